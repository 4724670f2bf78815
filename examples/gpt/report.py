"""What a run measured: losses and speed as it goes, a picture and a table of figures at its end."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor

Curve = list[tuple[int, float]]
"""Pairs of step and loss in nats per character."""


class Journal:
    """The loss curves of a run and the time its training took, over all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.train: Curve = []
        self.held_out: Curve = []
        self.tokens = 0
        """Tokens that all ranks together trained on so far."""
        self.seconds = 0.0
        """Time spent on them: evaluation is left out."""
        self.rate = 0.0
        """Tokens per second between the last two calls of :meth:`close`."""
        self._sums = torch.zeros(2, device=device)  # of losses times tokens, and of tokens, on this rank
        self._since = time.perf_counter()

    def open(self) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def add(self, loss: Tensor, tokens: int) -> None:
        """Count one micro-batch of this rank; waits for nothing."""
        self._sums += torch.stack([loss.detach().float() * tokens, torch.full_like(self._sums[1], tokens)])

    def close(self, step: int) -> None:
        """Write down the mean loss of all ranks since the last time, and the speed. A collective."""
        dist.all_reduce(self._sums)
        loss, tokens = self._sums.tolist()
        now = time.perf_counter()
        self.train.append((step, loss / tokens))
        self.rate = tokens / (now - self._since)
        self.tokens += round(tokens)
        self.seconds += now - self._since
        self._sums.zero_()
        self._since = now

    def figures(self) -> dict[str, str]:
        """Return the figures of the run by name."""
        (_, first), (_, last) = self.held_out[0], self.held_out[-1]
        steps = [step for step, _ in self.train]
        window = steps[-1] - (steps[-2] if len(steps) > 1 else 0)
        return {
            "steps": f"{steps[-1]:,}",
            "tokens": f"{self.tokens:,}",
            "tokens/s": f"{self.tokens / self.seconds:,.0f}",
            "train loss": f"{self.train[-1][1]:.3f} (mean of the last {window} steps)",
            "held-out loss": f"{first:.3f} -> {last:.3f}",
            "bits per character": f"{first / math.log(2):.2f} -> {last / math.log(2):.2f} (held out)",
        }

    def draw(self, path: Path) -> Path:
        """Save both curves as a PNG and return its path."""
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per character")
        axes.plot(*zip(*self.train, strict=True), label="train")
        axes.plot(*zip(*self.held_out, strict=True), "o-", label="held out")
        axes.grid(alpha=0.3)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        return path


def table(rows: dict[str, str]) -> str:
    """Lay out names and values in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
