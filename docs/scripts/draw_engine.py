"""Draw one step of the engine: what computes, what travels, and what lies whole in memory, for three units.

    .venv/bin/python docs/scripts/draw_engine.py    # writes docs/images/engine.svg

The order is the one that :mod:`shardline.sharding.schedule` drives at stage 3; widths are schematic, not measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

UNITS = {"A": "#4c78a8", "B": "#f58518", "C": "#54a24b"}
INK, FAINT = "#222222", "#8a8a8a"
LANES = {
    "compute": 4.0,
    "gathers\n(group 1)": 3.0,
    "reductions\n(group 2)": 2.0,
    "whole weights\nin memory": 0.9,
}
COMPUTE, GATHER, REDUCE, MEMORY = LANES.values()

# (lane, unit, start, stop, text)
BARS = [
    (GATHER, "A", 0.0, 1.0, "gather A"),
    (GATHER, "B", 1.0, 2.0, "gather B"),
    (GATHER, "C", 2.2, 3.2, "gather C"),
    (COMPUTE, "A", 1.0, 2.2, "forward A"),
    (COMPUTE, "B", 2.2, 3.4, "forward B"),
    (COMPUTE, "C", 3.4, 4.6, "forward C"),
    (GATHER, "C", 5.2, 6.2, "gather C"),
    (GATHER, "B", 6.2, 7.2, "gather B"),
    (GATHER, "A", 8.0, 9.0, "gather A"),
    (COMPUTE, "C", 6.2, 8.0, "backward C"),
    (COMPUTE, "B", 8.0, 9.8, "backward B"),
    (COMPUTE, "A", 9.8, 11.6, "backward A"),
    (REDUCE, "C", 8.0, 9.2, "reduce C"),
    (REDUCE, "B", 9.8, 11.0, "reduce B"),
    (REDUCE, "A", 11.6, 12.8, "reduce A"),
]
# (unit, start, stop, row)
WHOLE = [
    ("A", 0.0, 2.2, 2),
    ("B", 1.0, 3.4, 1),
    ("C", 2.2, 4.6, 0),
    ("C", 5.2, 8.0, 0),
    ("B", 6.2, 9.8, 1),
    ("A", 8.0, 11.6, 2),
]
PHASES = [
    (0.0, 4.9, "loss = engine(batch)"),
    (5.1, 11.7, "engine.backward(loss)"),
    (11.9, 17.4, "engine.step()"),
]
NOTES = [
    (2.45, "a module's pre-hook gathers its unit,\nits hook releases it", "hooks -> schedule -> unit"),
    (
        8.4,
        "a saved tensor that backward unpacks gathers;\ncomplete input gradients start the reduction",
        "hooks -> schedule -> unit",
    ),
    (
        14.8,
        "norm, weights, found-inf and digests in one row;\nmasters updated, rounded into the weights",
        "step, clip, optimizer -> unit",
    ),
]


def box(
    axes: Axes, left: float, right: float, middle: float, text: str, colour: str, height: float = 0.62, alpha: float = 1
) -> None:
    """One rounded bar with its label."""
    style = f"round,pad=0,rounding_size={height / 7}"
    corner, width = (left + 0.03, middle - height / 2), right - left - 0.06
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=colour, ec="none", alpha=alpha))
    axes.text((left + right) / 2, middle, text, ha="center", va="center", color="white", fontsize=8.5)


def draw() -> Figure:
    """The picture."""
    figure = Figure(figsize=(13, 5.6), facecolor="white")
    axes = figure.add_axes((0.1, 0.02, 0.895, 0.96))
    axes.set(xlim=(-0.1, 17.5), ylim=(-1.15, 6.1))
    axes.axis("off")
    for left, right, call in PHASES:
        axes.axvspan(left, right, ymin=0.085, ymax=0.925, color="#f4f4f6", zorder=0)
        axes.text((left + right) / 2, 5.72, call, ha="center", va="center", family="monospace", fontsize=12, color=INK)
    for name, middle in LANES.items():
        axes.text(-0.25, middle, name, ha="right", va="center", fontsize=9.5, color=INK)
        if middle != MEMORY:
            axes.plot((0, 17.4), (middle, middle), color="#dddde2", lw=0.8, zorder=0.5)
    for lane, unit, start, stop, text in BARS:
        box(axes, start, stop, lane, text, UNITS[unit])
    for unit, start, stop, row in WHOLE:
        middle = MEMORY + (row - 1) * 0.32
        box(axes, start, stop, middle, "", UNITS[unit], height=0.24, alpha=0.55)
        axes.text((start + stop) / 2, middle, unit, ha="center", va="center", fontsize=7.5, color=INK)
    box(axes, 12.8, 14.0, REDUCE, "one row", "#6b6b76")
    box(axes, 14.0, 15.0, COMPUTE, "update", "#6b6b76")
    box(axes, 15.0, 16.0, COMPUTE, "refresh", "#6b6b76")
    box(axes, 15.2, 17.2, GATHER, "gathers at stages 0-2", "#a3a3ae")
    axes.text(14.75, MEMORY, "shards only: sealed", ha="center", va="center", fontsize=9, color=FAINT, style="italic")
    for middle, what, files in NOTES:
        axes.text(middle, 5.0, what, ha="center", va="center", fontsize=9, color=INK, linespacing=1.35)
        axes.text(middle, -0.2, files, ha="center", va="center", fontsize=9, color=FAINT, family="monospace")
    axes.text(
        8.65, -0.82,
        "Stage 3, three units. At stages 0 to 2 the whole weights rest in memory: forward and backward gather nothing, "
        "and step() ends with one gather for each unit.",
        ha="center", va="center", fontsize=9.5, color=INK,
    )  # fmt: skip
    return figure


def main() -> None:
    """Write the SVG."""
    parser = argparse.ArgumentParser(description="Draw one step of the engine.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "images" / "engine.svg")
    path = parser.parse_args().out
    matplotlib.rcParams["svg.hashsalt"] = "shardline"  # the same file each time
    draw().savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


if __name__ == "__main__":
    main()
