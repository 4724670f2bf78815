"""Floating-point operations of a step, counted once: what TFLOP/s and MFU follow from."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from shardline.config import Config

__all__ = ["FlopsProfiler", "peak_tflops"]

logger = logging.getLogger("shardline.progress")

_PEAKS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "GH200": 989.0, "A100": 312.0, "L40S": 362.0,
    "L4": 121.0, "A10": 125.0, "V100": 125.0, "MI300X": 1307.0, "MI250X": 383.0,
}  # fmt: skip
"""TFLOP/s in 16-bit floating point, dense, of the data sheets, by part of the device's name."""


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """What ``device`` can do in the dtype of ``config``, or None where that is not known."""
    if config.flops_profiler.peak_tflops is not None:
        return config.flops_profiler.peak_tflops
    if device.type != "cuda" or not (config.bf16.enabled or config.fp16.enabled or config.torch_autocast.enabled):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


class FlopsProfiler:
    """Counts the operations of forwards and backwards in one step, and takes later steps to do the same by sample.

    What is recomputed in a backward is counted, and is not part of MFU: a backward does at most twice what its forward
    does.
    """

    def __init__(self, config: Config, device: torch.device, ranks: int, *, speaks: bool) -> None:
        self._section, self._speaks = config.flops_profiler, speaks
        self._ranks = ranks
        self._peak = peak_tflops(config, device)
        self._remaining = self._section.profile_step  # steps until that one is over
        self._counts: Counter[str] = Counter()
        self._modules: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._samples = 0  # that were counted, on all ranks

    @contextmanager
    def counting(self, phase: str) -> Iterator[None]:
        """Count what runs within as a part of ``phase``, if it is the step's turn."""
        if self._remaining != 1 or phase not in ("forward", "backward"):
            yield
            return
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        with counter:
            yield
        self._counts[phase] += counter.get_total_flops()
        for module, operations in counter.get_flop_counts().items() if phase == "forward" else ():
            self._modules[module].update({str(name).removeprefix("aten."): n for name, n in operations.items()})

    def end_step(self) -> bool:
        """A step is over; whether it was counted."""
        self._remaining -= 1
        return self._remaining == 0

    def tell(self, samples: int) -> None:
        """The step that was counted had ``samples`` on all ranks."""
        self._samples = samples
        if self._speaks and self._section.detailed:
            text = self.table()
            if self._section.output_file is None:
                logger.info("%s", text)
            else:
                Path(self._section.output_file).write_text(text + "\n", encoding="utf-8")

    def of(self, samples: int, seconds: float) -> tuple[float | None, float | None]:
        """Operations on all ranks of a step with ``samples``, and its MFU."""
        if not self._samples:
            return None, None
        forward, backward = self._counts["forward"], self._counts["backward"]
        share = self._ranks * samples / self._samples
        own = forward + min(backward, 2 * forward)
        mfu = (
            None if self._peak is None or seconds <= 0 else own * samples / self._samples / seconds / self._peak / 1e12
        )
        return (forward + backward) * share, mfu

    def table(self) -> str:
        """Operations of one step on this rank: those of the forward by module."""
        depth, forward = self._section.module_depth, self._counts["forward"]
        lines = [
            f"floating-point operations of one step on each rank: forward {forward:.3e}, backward "
            f"{self._counts['backward']:.3e}; of the forward:"
        ]
        for module, operations in sorted(self._modules.items()):
            if module != "Global" and (depth < 0 or module.count(".") <= depth):
                count = sum(operations.values())
                names = ", ".join(f"{name} {n:.2e}" for name, n in operations.most_common())
                lines.append(f"  {module:<48} {count:.2e} {count / max(1, forward):6.1%}  {names}")
        return "\n".join(lines)
