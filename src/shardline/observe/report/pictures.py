"""The charts of a record as PNG files, for a paper or a message."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from shardline.errors import UsageError
from shardline.observe.report.charts import Chart, charts_of
from shardline.observe.report.record import Record

__all__ = ["draw"]

_COLORS = ("#1f6feb", "#d9622b", "#2a9d6f", "#8a5cd6", "#8d96a3", "#c23b6b")
_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "\N{MICRO SIGN}s")),
    "B": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")),
}


def draw(record: Record, stem: Path) -> list[Path]:
    """Write ``STEM-loss.png`` and the like, one for each chart of the page; returns the files.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("pictures need matplotlib. Install it (pip install matplotlib) or leave out --png.") from None
    written = []
    for name, chart in charts_of(record).items():
        low = 1.4 + 0.35 * len(chart.series)
        height = 4.2 if chart.kind in ("lines", "areas") else low if chart.kind == "bars" else 1.9
        figure = Figure(figsize=(8, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(chart.title, loc="left", fontweight="bold")
        {"lines": _lines, "areas": _areas, "bars": _bars, "share": _share}[chart.kind](axes, chart)
        axes.spines[["top", "right"]].set_visible(False)
        path = stem.with_name(f"{stem.name}-{name}.png")
        figure.savefig(path, dpi=150)
        written.append(path)
    return written


def _scale(chart: Chart) -> tuple[float, str]:
    """What values are divided by, and the unit that they have then."""
    sums = [sum(max(0.0, y) for y in column) for column in zip(*_columns(chart), strict=False)]
    most = max(
        [abs(y) for column in _columns(chart) for y in column] + (sums if chart.kind == "areas" else []), default=0.0
    )
    found = [(size, unit) for size, unit in _SCALES.get(chart.unit, ()) if most >= size]
    return found[0] if found else (1.0, chart.unit)


def _columns(chart: Chart) -> list[list[float]]:
    return [[y for _, y in one.points if math.isfinite(y)] for one in chart.series]


def _frame(axes: Any, chart: Chart) -> float:
    """Label the axes; returns what values are divided by."""
    size, unit = _scale(chart)
    axes.set_xlabel(f"{chart.x} (s)" if chart.x != "step" else chart.x)
    axes.set_ylabel(f"{chart.y} ({unit})" if unit and unit != chart.y else chart.y)
    axes.grid(axis="y", alpha=0.3)
    axes.margins(x=0.01)
    return size


def _lines(axes: Any, chart: Chart) -> None:
    size, at = _frame(axes, chart), 0
    for one in chart.series:
        color = _COLORS[at % len(_COLORS)]
        style = {"alpha": 0.35, "linewidth": 0.8} if one.faint else {"linewidth": 1.6}
        xs, ys = [x for x, _ in one.points], [y / size for _, y in one.points]
        axes.plot(xs, ys, color=color, label=one.name, marker="o" if one.dots else None, markersize=3, **style)
        at += not one.faint
    if chart.log:
        axes.set_yscale("log", base=2)
    elif chart.zero:
        axes.set_ylim(bottom=0)
    for x in chart.marks:
        axes.axvline(x, color="gray", linestyle=(0, (2, 3)))
    for x in chart.skipped:
        axes.axvline(x, ymax=0.04, color=_COLORS[5])
    names = list(dict.fromkeys(name for name, *_ in chart.bands))
    for name, begin, end in chart.bands:
        axes.axvspan(begin, end, color=_COLORS[names.index(name)], alpha=0.1, linewidth=0)
        if end - begin > 0.1 * (chart.series[0].points[-1][0] or 1.0):
            axes.text(begin, 0.97, f" {name}", transform=axes.get_xaxis_transform(), va="top", color="gray")
    if chart.bands:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.12 * (high - low))  # the names are above the curve
    if len(chart.series) > 1:
        axes.legend(frameon=False)


def _areas(axes: Any, chart: Chart) -> None:
    size = _frame(axes, chart)
    xs = [x for x, _ in chart.series[0].points]
    values = [[y / size for _, y in one.points] for one in chart.series]
    axes.stackplot(xs, values, labels=[one.name for one in chart.series], colors=_COLORS, alpha=0.85)
    _legend_above(axes, chart)


def _bars(axes: Any, chart: Chart) -> None:
    size, unit = _scale(chart)
    values = [one.points[0][1] / size for one in chart.series]
    bars = axes.barh([one.name for one in chart.series], values, color=_COLORS[0])
    axes.bar_label(bars, [f" {value:.3g} {unit}" for value in values])
    axes.invert_yaxis()
    axes.set_xlabel(f"mean of a step ({unit})")


def _share(axes: Any, chart: Chart) -> None:
    size, unit = _scale(chart)
    begin = 0.0
    for one, color in zip(chart.series, _COLORS, strict=False):
        value = one.points[0][1] / size
        axes.barh([""], [value], left=begin, color=color, label=f"{one.name} {value:.3g} {unit}")
        begin += value
    axes.set_xlabel(f"time ({unit})")
    _legend_above(axes, chart)


def _legend_above(axes: Any, chart: Chart) -> None:
    axes.legend(frameon=False, ncols=len(chart.series), loc="lower left", bbox_to_anchor=(0, 1.0), fontsize="small")
    axes.set_title(chart.title, loc="left", fontweight="bold", pad=24)
