"""Training: from the config of a run to its last checkpoint, on Ray Train's workers.

Its sub-rooms and files, in reading order:

    step            the optimizer step: device, schedule, optimizer, DeepSpeed's engine
    checkpoints     what a checkpoint holds, how it is written, and which ones a run has
    faults          what goes wrong while training runs: signals, loss spikes, workers that hang
    records         the records of a run: metrics, and where its time went
    objectives      what a run learns from a batch: each next token, or answers of conversations
    eval_settings   the configs of val loss, suites and samples along the way
    settings        the configs of the training loop and of a run on Ray
    kinds           the objective for a run's datasets, and what the config must have for it
    run             the state that the loop works on, and the exceptions that end it early
    meter           times steps, logs them, and looks for loss spikes
    validation      val loss and bits per byte while a run trains
    loop            the training loop, without Ray
    fitting         whether a run fits into a worker's memory, and what would
    plan            what a run starts from: its weights, its model, the order of its data
    build           builds the engine for this machine from a config
    peak_memory     the most memory that a worker takes
    alone           training steps on this machine, without Ray and without a stream of data
    resume          what must stay the same when a run resumes, and whether it can resume
    rollbacks       goes back to before a loss spike and skips the tokens that caused it
    ranks           a worker's place among the workers, and what they agree on
    inputs          the micro batches and val tokens that a rank reads
    kept            what a worker keeps of one run for the next: embeddings fitted to the data
    worker          one rank: sets up the loop and runs it in Ray Train's process
    lane            one rank of a lane, which trains several runs, one after the other
    patience        decides whether failed workers are started again, and counts failures
    elastic         the number of workers of a run that takes what the cluster has room for
    earlier         what earlier runs tell of runs to come: their speed, their start
    supervise       runs Ray Train's workers, and starts them again when they fail
    pretrain        a whole run, as the process that a person starts sees it
"""
