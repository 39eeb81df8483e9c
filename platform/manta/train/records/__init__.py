"""Records of a run: its metrics, and how its time was spent.

Its files, in reading order:

    ledger          how a run's time was spent, across restarts: its goodput
    lines           files of records, one JSON object a line: only whole records are read
    logbook         metrics.jsonl, samples.jsonl, TensorBoard, the loss curve, and log lines
    history         what happened to a run and when: starts, failures, ends
    planned         the plan of a run next to what came of it
"""
