"""Measurements of Manta itself: ratios within one run, medians, A and B in turn.

Its files, in reading order:

    settings        what to measure, and how long
    workers         processes on this machine that train together, without Ray
    memory          how much memory Manta holds, all its processes together
    model           the training step alone, without Ray and without a stream of data
    head            the head's loss and its gradients: plain or compiled, by the size of the chunks
    stages          what each ZeRO stage holds in memory, against the cost model
    checkpoints     what saving costs training, and what resuming costs
    data            the stream: its speed against a bare read of the shards, its start, its memory
    tokenization    preparation against tiktoken's own speed
    generation      with the KV cache against without, and many prompts at once against one
    evaluation      lm-eval's requests in batches against one at a time
    overhead        the whole platform against a bare PyTorch loop
    gpu_parts       the parts of `what=gpu`, each a function
    gpu             one command that proves a GPU, part by part
    command         `bench`: measures one thing, prints a table, writes JSON
"""
