"""The curves of a record as PNG files, for a paper or a message."""

from __future__ import annotations

from pathlib import Path

from shardline.errors import UsageError
from shardline.observe.report.record import Record

__all__ = ["draw"]


def draw(record: Record, stem: Path) -> list[Path]:
    """Write ``STEM-loss.png`` and the like; returns the files.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("pictures need matplotlib. Install it (pip install matplotlib) or leave out --png.") from None
    steps = sorted(record.steps)
    curves = {
        "loss": ("loss, mean over ranks", [record.steps[step].get("loss") for step in steps]),
        "grad-norm": ("gradient norm", [record.steps[step].get("grad_norm") for step in steps]),
        "seconds": ("seconds a step", [record.steps[step]["seconds"] for step in steps]),
    }
    written = []
    for name, (label, values) in curves.items():
        points = [(step, float(value)) for step, value in zip(steps, values, strict=True) if value is not None]
        if not points:
            continue
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=label)
        axes.plot(*zip(*points, strict=True))
        axes.grid(alpha=0.3)
        path = stem.with_name(f"{stem.name}-{name}.png")
        figure.savefig(path, dpi=150)
        written.append(path)
    return written
