"""The engine as an ``nn.Module`` around the user's: attributes are the model's, and copies are refused."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from shardline.engine.calls import Calls
from shardline.errors import UsageError

__all__ = ["Wrapper"]


class Wrapper(nn.Module):
    """A module whose child ``module`` is the user's model. What it does not have itself is looked up there."""

    module: nn.Module
    _calls: Calls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module" or name.startswith("_"):
                raise
            found = getattr(self.module, name)
        return self._calls.method(found) if isinstance(found, MethodType) and found.__self__ is self.module else found

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise self._no_copy("copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._no_copy("pickled")

    def _no_copy(self, done: str) -> UsageError:
        return UsageError(
            f"an engine cannot be {done}: it holds the process groups of its ranks and their parts of the model. Copy "
            f"or save engine.module inside engine.gathered_parameters(), take engine.full_state_dict(), or call "
            f"save_checkpoint() to go on later."
        )

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Any:
        """Read by DistributedDataParallel alone, of a module that it is about to wrap."""
        raise UsageError(
            "an engine was given to DistributedDataParallel (accelerator.prepare(engine) does that). The engine "
            "averages gradients itself: use it as it is, and give prepare() the data loaders alone."
        )
