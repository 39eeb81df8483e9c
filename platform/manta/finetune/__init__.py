"""Fine-tuning: a run like any other that starts from a checkpoint, on conversations,
preferences or texts.

Its files, in reading order:

    settings   the config: a run's own, and the checkpoint, the kind of data and the epochs
    finetune   prepares the data with the checkpoint's tokenizer, and trains
"""
