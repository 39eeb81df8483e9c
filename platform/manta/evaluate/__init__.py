"""Evaluation: lm-eval's tasks on a saved checkpoint.

Its files, in reading order:

    catalog             the suites of evals/, and the names that a person may have meant
    settings            what a person asks of an evaluation
    inference_settings  what a person asks of a model in a job's own process
    rows                what is asked of a model, as rows of tokens in batches
    worker              what computes: a model that scores rows and completes prompts
    farm                Ray workers that evaluate checkpoints
    adapter             lm-eval's LM over those workers
    files               texts and rows that evaluations read from a person's files
    core                CORE: which 22 tasks, and their centred mean
    choices             tasks that are scored by tokens
    suites              tasks, run by lm-eval
    documents           suites' documents from this machine or the run's dataset
    report              where scores are kept: JSON, a table, a curve, TensorBoard
    evaluate            an evaluation of one checkpoint, or of each of a run's
    watch               an evaluation of each checkpoint of a run as it lands
    beside              the watcher in a process of its own, while a run trains
    compare             several runs: budgets, losses, scores, and what is more than noise
    surprise            a text as a page on which each token has the colour of its loss
"""
