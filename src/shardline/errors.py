"""The error tree: every error a user can cause, each a sentence that says what was found, where, and what to do.

    ShardlineError
    |-- ConfigError         the configuration cannot be used: a key, a value or a combination
    |-- UsageError          a call out of order or with arguments that cannot work
    |   `-- SealedError     a sharded parameter was touched where it is not gathered
    |-- ModelError          the model holds something the engine cannot manage, named by parameter
    |-- OptimizerError      an optimizer that cannot be computed right on shards
    |-- DataError           the dataset, sampler or collate function
    |-- DisagreementError   ranks that must agree do not; names both sides
    |-- LostRankError       a rank ended, or did not come, while others waited for it
    |-- CheckpointError     a checkpoint that cannot be written or read; names the file
    `-- LaunchError         starting processes: environment variables, ports, scripts

Classes also derive from the built-in that a caller would expect to catch (``ValueError``, ``RuntimeError``).
Internal mistakes of Shardline itself are ``AssertionError`` and never appear in this tree.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DisagreementError",
    "LaunchError",
    "LostRankError",
    "ModelError",
    "OptimizerError",
    "SealedError",
    "ShardlineError",
    "UsageError",
]


class ShardlineError(Exception):
    """Base of every error that Shardline raises on purpose."""


class ConfigError(ShardlineError, ValueError):
    """The configuration names something unknown, mistyped or impossible."""


class UsageError(ShardlineError, RuntimeError):
    """A call came at a moment, or with arguments, where it has no right meaning."""


class SealedError(UsageError):
    """A sharded parameter was read or written while it is not gathered."""


class ModelError(ShardlineError, ValueError):
    """The model holds a parameter or buffer that the engine cannot manage."""


class OptimizerError(ShardlineError, ValueError):
    """The optimizer cannot be computed right at this stage."""


class DataError(ShardlineError, ValueError):
    """The dataset or its batches cannot be split over ranks as asked."""


class DisagreementError(ShardlineError, RuntimeError):
    """Ranks that must hold or do the same do not."""


class LostRankError(ShardlineError, RuntimeError):
    """A rank ended, or did not come, while this one waited for it."""


class CheckpointError(ShardlineError, RuntimeError):
    """A checkpoint could not be written, found, verified or read."""


class LaunchError(ShardlineError, RuntimeError):
    """Processes could not be started or did not find each other."""
