"""Errors that a user can act on. Each message names the value, the limit and the remedy.

Anything else that is raised is our own mistake and keeps its traceback; these are printed as one sentence and end the
process with `EXIT_USER_ERROR`.
"""


class UserError(Exception):
    """Base of the errors below; never raised itself."""


class ConfigError(UserError):
    """A key, type or value in the configuration cannot be used."""


class DataError(UserError):
    """A data set, tokenizer or shard is missing, damaged or does not fit the configuration."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another model."""


class ClusterError(UserError):
    """The processes, devices or launcher are not what the run needs."""
