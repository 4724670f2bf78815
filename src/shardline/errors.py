"""The error tree: every error a user can cause, each a sentence that says what was found, where, and what to do.

    ShardlineError
    |-- ConfigError         SL101  the configuration cannot be used: a key, a value or a combination
    |-- UsageError          SL201  a call out of order or with arguments that cannot work
    |   `-- SealedError     SL202  a sharded parameter was touched where it is not gathered
    |-- ModelError          SL301  the model holds something the engine cannot manage, named by parameter
    |-- NonFiniteError      SL302  too many steps in a row had gradients that are not finite
    |-- OptimizerError      SL401  an optimizer whose update is incorrect on sharded parameters
    |-- DataError           SL501  the dataset, sampler or collate function
    |-- DisagreementError   SL601  ranks that must agree do not; names both sides
    |-- LostRankError       SL701  a rank ended, or did not come, while others waited for it
    |-- CheckpointError     SL801  a checkpoint that cannot be written or read; names the file
    `-- LaunchError         SL901  starting processes: environment variables, ports, scripts

Classes also derive from the built-in that a caller would expect to catch (``ValueError``, ``RuntimeError``). The text
of an error ends with its code, which never changes its meaning; ``docs/errors/`` has a page for each, with causes and
remedies.
Internal mistakes of Shardline itself are ``AssertionError`` and never appear in this tree.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DisagreementError",
    "LaunchError",
    "LostRankError",
    "ModelError",
    "NonFiniteError",
    "OptimizerError",
    "SealedError",
    "ShardlineError",
    "UsageError",
    "shown",
    "text_of",
]


class ShardlineError(Exception):
    """Base of every error that Shardline raises on purpose."""

    code: ClassVar[str] = ""
    """Short and stable, such as ``SL101``; empty where an error has no page."""

    def __init__(self, message: str = "") -> None:  # by name where torch raises again what a loader's worker raised
        super().__init__(message)

    @property
    def message(self) -> str:
        """The text without the code, for use inside another text. A terminal may show it: see :func:`escaped`."""
        return escaped(super().__str__())

    @property
    def page(self) -> str:
        """Where ``docs/`` explains the error: a file and an anchor, such as ``errors/ConfigError.md#sl101``."""
        owner = next(cls for cls in type(self).__mro__ if "code" in vars(cls))
        return f"errors/{owner.__name__}.md#{self.code.lower()}" if self.code else ""

    def __str__(self) -> str:
        if not self.code:
            return self.message
        gap = "\n" if "\n" in self.message else " "  # behind a list the code is not part of its last line
        return f"{self.message}{gap}[{self.code}]"


def escaped(text: str) -> str:
    """``text`` with every character escaped that a terminal might obey instead of showing it. Lines and tabs stay.

    Keys, tags and paths in an error come from outside, so each error passes through here when it is shown.
    """
    return "".join(char if char in "\n\t" or char.isprintable() else _escape(char) for char in text)


def shown(text: object, limit: int = 1000) -> str:
    """``text`` from outside as part of one line: what is not printable is escaped; no longer than ``limit``."""
    line = "".join(char if char.isprintable() else _escape(char) for char in str(text)[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def text_of(error: BaseException) -> str:
    """The text of ``error`` for use inside another text: of Shardline's own errors without the code."""
    if isinstance(error, ShardlineError):
        return error.message
    try:
        return str(error)
    except Exception as second:  # of the script's own class: it must not hide the error
        return f"(its text cannot be had: {type(second).__name__})"


class ConfigError(ShardlineError, ValueError):
    """The configuration names something unknown, mistyped or impossible."""

    code = "SL101"


class UsageError(ShardlineError, RuntimeError):
    """A call out of order, or with arguments that cannot work."""

    code = "SL201"


class SealedError(UsageError):
    """A sharded parameter was read or written while it is not gathered."""

    code = "SL202"


class ModelError(ShardlineError, ValueError):
    """The model holds a parameter or buffer that the engine cannot manage."""

    code = "SL301"


class NonFiniteError(ShardlineError, ArithmeticError):
    """Too many steps in a row were skipped, as their gradients were not finite."""

    code = "SL302"


class OptimizerError(ShardlineError, ValueError):
    """The optimizer's update is incorrect on parameters as they are sharded at this stage."""

    code = "SL401"


class DataError(ShardlineError, ValueError):
    """The dataset or its batches cannot be split over ranks as asked."""

    code = "SL501"


class DisagreementError(ShardlineError, RuntimeError):
    """Ranks hold or do different things where they must be the same."""

    code = "SL601"


class LostRankError(ShardlineError, RuntimeError):
    """A rank ended, or did not come, while this one waited for it."""

    code = "SL701"


class CheckpointError(ShardlineError, RuntimeError):
    """A checkpoint could not be written, found, verified or read."""

    code = "SL801"


class LaunchError(ShardlineError, RuntimeError):
    """Processes could not be started or did not find each other."""

    code = "SL901"
