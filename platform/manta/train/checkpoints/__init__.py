"""Checkpoints: what they contain, how they are written, and how a person looks at them.

Its files, in reading order:

    contents        what a checkpoint says about itself: its state and its manifest
    tensors         files of tensors, and whether they are the weights of a model
    adapters        the adapters of a checkpoint (LoRA): their weights, and what they are for
    fragments       the optimizer's state as pieces of weights, for any number of workers
    places          where runs and their checkpoints are: by name, by path, and all of them
    checkpoint      a checkpoint on disk: whole or absent
    host_memory     memory of the CPU for copies of tensors, locked where a GPU copies
    saver           saving while training continues: a copy in memory, and threads that write it
    listing         a person's view of a run's checkpoints: list, verify, compare, prune
"""
