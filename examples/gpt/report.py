"""What a run measured: losses and speed as it goes, in a file too; a picture and a table of figures at its end."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor

Curve = dict[int, float]
"""Losses in nats per character, by step."""


class Journal:
    """The loss curves of a run and the time its training took, over all ranks.

    Each loss is a row of the file ``path`` when it is known, so a run that was killed has its curves, too. One that
    goes on at ``step`` takes up those rows that lie before; what it does again is written again, and the last row
    of a step counts. Without a path (on all ranks but one) nothing is read or written.
    """

    def __init__(self, device: torch.device, path: Path | None = None, step: int = 0) -> None:
        self.path = path
        self.train, self.held_out = read(path, step) if path is not None and path.exists() else ({}, {})
        self.begun = step
        """The step from which this process went on."""
        self.tokens = 0
        """Tokens that all ranks together trained on since."""
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
        self.train[step] = self._write(step, "train", loss / tokens)
        self.rate = tokens / (now - self._since)
        self.tokens += round(tokens)
        self.seconds += now - self._since
        self._sums.zero_()
        self._since = now

    def look(self, step: int, loss: float) -> None:
        """Write down the loss on the held-out text."""
        self.held_out[step] = self._write(step, "held out", loss)

    def _write(self, step: int, what: str, loss: float) -> float:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                print(json.dumps({"step": step, what: loss}), file=file)
        return loss

    def figures(self) -> dict[str, str]:
        """Return the figures of the run by name."""
        first, last = self.held_out[min(self.held_out)], self.held_out[max(self.held_out)]
        *before, step = [0, *sorted(self.train)]
        went_on = f" since step {self.begun:,}" if self.begun else ""
        return {
            "steps": f"{step:,}",
            "tokens": f"{self.tokens:,}{went_on}",
            "tokens/s": f"{self.tokens / self.seconds:,.0f}" if self.seconds else "nothing was left to train",
            "train loss": f"{self.train[step]:.3f} (mean of the last {step - before[-1]} steps)",
            "held-out loss": f"{first:.3f} -> {last:.3f}",
            "bits per character": f"{first / math.log(2):.2f} -> {last / math.log(2):.2f} (held out)",
        }

    def draw(self, path: Path) -> Path:
        """Save both curves as a PNG and return its path."""
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per character")
        axes.plot(*zip(*sorted(self.train.items()), strict=True), label="train")
        axes.plot(*zip(*sorted(self.held_out.items()), strict=True), "o-", label="held out")
        axes.grid(alpha=0.3)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        return path


def read(path: Path, step: int | None = None) -> tuple[Curve, Curve]:
    """Return the curves of a journal's file, training and held-out text, up to ``step``."""
    train: Curve = {}
    held_out: Curve = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if step is None or row["step"] <= step:
            curve, loss = (train, row["train"]) if "train" in row else (held_out, row["held out"])
            curve[row["step"]] = loss
    return train, held_out


def table(rows: dict[str, str]) -> str:
    """Lay out names and values in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
