"""Checkpoints: what is written, how, and what is there.

Its files, in reading order:

    fragments       the optimizer's state as pieces of weights, for any number of workers
    checkpoint      a checkpoint on disk: whole or absent
    host_memory     memory of the CPU for copies of tensors, locked where a GPU copies
    saver           saving while training goes on: a copy in memory, and threads that write it
    listing         a run's checkpoints, as a person looks at them: list, verify, compare, prune
"""
