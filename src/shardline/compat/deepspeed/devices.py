"""Building a model on a device and in a dtype."""

from __future__ import annotations

from types import TracebackType

import torch

__all__ = ["OnDevice"]


class OnDevice:
    """Within it new tensors lie on ``device`` ("meta" as well) and floating ones are of ``dtype``."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True) -> None:
        self._enabled, self._dtype = enabled, dtype
        self._device = torch.device(device)
        self._before = torch.get_default_dtype()

    def __enter__(self) -> None:
        if self._enabled:
            self._before = torch.get_default_dtype()
            torch.set_default_dtype(self._dtype)
            self._device.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._device.__exit__(kind, error, trace)
            torch.set_default_dtype(self._before)
