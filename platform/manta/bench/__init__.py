"""Measurements of Manta itself: ratios within one run, medians, A and B in turn.

Its files, in reading order:

    settings        what to measure, and how long
    workers         processes on this machine that train together, without Ray
    memory          how much memory all of Manta's processes use together
    model           the training step alone, without Ray and without a stream of data
    scaling         weak scaling: several workers against one, and against as many apart
    growth          what grows with the number of workers, counted for up to 4,096
    conversations   a step on conversations against one on documents of the same shape
    head            the head's loss and its gradients, plain and compiled, by chunk size
    stages          the memory that each ZeRO stage takes, against the cost model
    peaks           the peak memory of a step at each ZeRO stage, against the cost model
    calibrate       how fast this machine does each kind of work, kept for plans
    checkpoints     the cost of saving, for training, and of resuming
    data            the data stream: speed against a bare read of the shards, start, memory
    tokenization    the preparation of text against tiktoken's own speed
    generation      sampling with and without the KV cache, and many prompts against one
    serve           the serving engine: its cache, and many streams against one
    serve_http      the server over HTTP: streams, a crowd, log-likelihoods
    evaluation      lm-eval's requests in batches against one at a time
    overhead        the whole platform against a bare PyTorch loop
    curves          curves of val loss of a grid of small runs, recorded for replays
    sweeps          ASHA replayed over these curves: its tokens, and what it finds
    lanes           twelve trials of a sweep: how much of their time is steps
    metrics         what a run's metrics and alerts cost
    gpu_parts       the parts of `what=gpu`, each a function
    gpu             one command that checks Manta on a GPU, part by part
    command         `bench`: measures one thing, prints a table, writes JSON
"""
