"""Evaluation: lm-eval's tasks on a saved checkpoint.

Its files, in reading order:

    catalog             the suites of evals/, and suggestions for a misspelt name
    settings            settings of an evaluation
    inference_settings  settings of a job that runs a model in its own process
    chat                a conversation with a model, as text that is streamed
    lines               lines that a person types, or that a pipe gives
    questions           questions about words and numbers, and how well a model answers them
    rows                requests to a model, as rows of tokens in batches
    worker              a model that scores rows and completes prompts
    farm                Ray workers that evaluate checkpoints
    reference           log-probabilities of the answers of pairs, before a preference tuning
    conversation        conversations as texts that carry the ids of their special tokens
    completions         what a task asks of a completion: its length, ends and sampling
    adapter             lm-eval's LM interface over those workers
    files               texts and rows read from a person's files
    core                CORE: prompts of its 22 tasks, and their centred mean
    choices             tasks scored by tokens
    suites              suites and tasks, run with lm-eval
    documents           documents of the suites, from this machine or the run's dataset
    report              scores as JSON, a table, a curve and in TensorBoard
    evaluate            an evaluation of one checkpoint
    watch               an evaluation of each checkpoint of a run as it lands
    beside              the watcher in a process of its own, while a run trains
    differences         which differences between runs are more than noise
    entries             the columns of a comparison: runs, and published figures
    compare             several runs: budgets, losses, scores, and what is more than noise
    verdicts            figures of a classifier, with intervals and tests of differences
    labelling           the probabilities of a classifier's labels for texts
    baseline            the classifier that a GPT has to beat                   [sklearn]
    exam                the test of a classifier at its run's end
    classify            labels for a person's texts
    surprise            a page that colours each token of a text by its loss
"""
