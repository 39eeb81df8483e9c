"""Problems that a person can fix; `run_job` prints each as one line and exits with code 2."""


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
    """A run that cannot continue as configured: its loss diverges, or it runs out of memory."""


class ClusterError(MantaError):
    """Ray cannot be reached, refuses the connection, or lacks the requested resources."""


class SweepError(MantaError):
    """A sweep whose journal is damaged, or was written with settings that do not go with these."""
