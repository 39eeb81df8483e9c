"""What a run writes down: metrics, and where its time went.

Its files, in reading order:

    ledger          where a run's time has gone across restarts: its goodput
    logbook         metrics.jsonl, samples.jsonl, TensorBoard, the curve, and one line to read
    gauges          a run's newest numbers as metrics of Ray's
"""
