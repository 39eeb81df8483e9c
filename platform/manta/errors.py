"""What can go wrong in a way that a person can mend; `run_job` prints each as one line, exit 2."""


class MantaError(Exception):
    """A problem that the person who started the job can act on.

    The message names the file or key, the value, what would be valid, and the remedy.
    """


class ConfigError(MantaError):
    """A key, value or combination of values that cannot be run."""


class DataError(MantaError):
    """A corpus, dataset or shard that is missing, empty, damaged or of another kind."""


class CheckpointError(MantaError):
    """A checkpoint that is missing, damaged, or of another model, tokenizer or optimizer."""


class TrainingError(MantaError):
    """A run that cannot go on as it is: its loss diverges, or its memory does not suffice."""


class ClusterError(MantaError):
    """Ray cannot be reached, refuses us, or has not the resources that were asked for."""
