"""What the charts of a report show: values of a record, with a title, a sentence and axes. No HTML and no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from shardline.observe.report.record import Record

__all__ = ["PHASES", "Chart", "Series", "charts_of", "speed", "times", "waiting"]

_POINTS = 1200
"""Points of a curve: more than a screen has columns. Longer ones are means of neighbours."""

_FEW = 40
"""Steps up to which a curve is shown as it is, without a smoothed one."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve, area or bar.

    Attributes:
        points: x and y, of which y may be not finite; one point for a bar.
        faint: it stands behind the next one, of which it is the raw form.
        dots: each point is marked.
    """

    name: str
    points: Sequence[Point]
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        note: a sentence that says what is shown.
        kind: curves; areas that add up; the parts of one bar; a bar for each name.
        x, y: what the axes are.
        unit: ``"s"`` and ``"B"``: values are seconds and bytes.
        zero, log: whether the y-axis begins at 0, and whether it is logarithmic.
        marks: places on x at which a process went on from a checkpoint.
        skipped: places on x of skipped steps.
        bands: name, begin and end of what happened meanwhile.
        is_wide: it takes the whole width.
    """

    title: str
    note: str
    series: list[Series]
    kind: Literal["lines", "areas", "share", "bars"] = "lines"
    x: str = "step"
    y: str = ""
    unit: str = ""
    zero: bool = False
    log: bool = False
    marks: tuple[float, ...] = ()
    skipped: tuple[float, ...] = ()
    bands: tuple[tuple[str, float, float], ...] = ()
    is_wide: bool = True


def charts_of(record: Record) -> dict[str, Chart]:
    """All charts that there are values for, by name, in the order in which they are shown."""
    found: dict[str, Chart] = {}
    for make in (_losses, _rates, _norms, _scales, _speeds, _phases, _waits, _sent, _memory):
        found |= make(record)
    return found


# -- points -----------------------------------------------------------------------------------------------------------


def _group(count: int) -> int:
    """Neighbours of which a point is the mean, so that there are no more points than a screen shows."""
    return max(1, -(-count // _POINTS))


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are finite; where none is, the last one."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else values[-1]


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most so many points that a screen shows: means of neighbours where there are more."""
    size = _group(len(points))
    if size == 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), _mean([y for _, y in group])) for group in groups]


def _of_steps(record: Record, name: str) -> list[Point]:
    return [(step, float(line[name])) for step, line in record.steps.items() if line.get(name) is not None]


def _reach(count: int) -> int:
    """Neighbours on either side that a smoothed value is the mean of."""
    return max(1, count // 60)


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Means over as many neighbours on either side: they lag behind nothing. At the start, where curves are steep, and
    at the end there are fewer."""
    found, most = [], _reach(len(points))
    for at, (x, _) in enumerate(points):
        reach = min(most, at)
        found.append((x, _mean([v for _, v in points[at - reach : at + reach + 1]])))
    return found


def _curve(name: str, points: Sequence[Point]) -> list[Series]:
    """The values of each step, and the smoothed ones in front where there are many."""
    if len(points) < _FEW:
        return [Series(name, points)]
    shown, size = _thin(points), _group(len(points))  # thinned first: the time that it takes grows with the steps alone
    around = (2 * _reach(len(shown)) + 1) * size
    raw = "each step" if size == 1 else f"mean of {size} steps"
    return [Series(raw, shown, faint=True), Series(f"mean of {around:,} steps", _smooth(shown))]


def _per_index(record: Record, name: str, label: str) -> list[Series]:
    """A curve for each place of a list, or one where they are all the same."""
    columns: dict[int, list[Point]] = {}
    for step, line in record.steps.items():
        for index, value in enumerate(line.get(name) or ()):
            columns.setdefault(index, []).append((step, float(value)))
    if len(columns) > 1 and all(column == columns[0] for column in columns.values()):
        columns = {0: columns[0]}
    one = len(columns) == 1
    return [Series(label if one else f"{label} {index}", _thin(column)) for index, column in columns.items()]


# -- curves -----------------------------------------------------------------------------------------------------------


def _losses(record: Record) -> dict[str, Chart]:
    losses = _of_steps(record, "loss")
    names = sorted({name for values in record.scalars.values() for name in values})
    own = {name: [(s, v[name]) for s, v in sorted(record.scalars.items()) if name in v] for name in names}
    finite = [y for _, y in losses if math.isfinite(y)]
    beside = {}
    if finite:
        low, high = min(finite) / 3, max(finite) * 3
        beside = {name: points for name, points in own.items() if all(low <= y < high for _, y in points)}
    found = {}
    if losses:
        notes = ["Mean over all ranks."]
        if beside:
            notes.append("Points are values that the script has given.")
        if record.loaded:
            notes.append("At a dashed line training went on from a checkpoint.")
        if record.skipped:
            notes.append("Ticks on the axis are skipped steps.")
        series = _curve("training", losses) + [Series(name, points, dots=True) for name, points in beside.items()]
        marks, skipped = tuple(line["step"] for line in record.loaded), tuple(sorted(record.skipped))
        found["loss"] = Chart("Loss", " ".join(notes), series, y="loss", marks=marks, skipped=skipped)
    for number, (name, points) in enumerate((n, p) for n, p in own.items() if n not in beside):
        note = "A value that the script has given."
        found[f"own{number}"] = Chart(name, note, [Series(name, points, dots=True)], y=name, is_wide=False)
    return found


def _rates(record: Record) -> dict[str, Chart]:
    series = _per_index(record, "lr", "param group")
    note = "Of each param group, as each step has used it." if len(series) > 1 else "As each step has used it."
    return {"lr": Chart("Learning rate", note, series, y="rate", zero=True, is_wide=False)} if series else {}


def _norms(record: Record) -> dict[str, Chart]:
    norms = _of_steps(record, "grad_norm")
    if not norms:
        return {}
    groups = _per_index(record, "grad_norms", "param group")
    series = [Series("all parameters", _thin(norms)), *groups] if groups else _curve("norm", norms)
    clipping = record.config.get("gradient_clipping")
    note = "L2 norm over all parameters, before clipping" + (f" at {clipping:g}." if clipping else ", which is off.")
    return {"norm": Chart("Gradient norm", note, series, y="norm", zero=True, is_wide=False)}


def _scales(record: Record) -> dict[str, Chart]:
    scales = _of_steps(record, "loss_scale")
    note = "The loss is multiplied by it, so that gradients fit into fp16. It is halved when they do not."
    return (
        {"scale": Chart("Loss scale", note, [Series("scale", _thin(scales))], log=True, y="factor", is_wide=False)}
        if scales
        else {}
    )


def speed(record: Record) -> tuple[str, list[Point]]:
    """``"tokens"`` or ``"samples"``, and how many of them all ranks together have done in a second of each step."""
    unit = "tokens" if any(line.get("tokens") for line in record.steps.values()) else "samples"
    lines = [(step, line) for step, line in record.steps.items() if line["seconds"] > 0]
    return unit, [(step, line[unit] / line["seconds"]) for step, line in lines]


def _speeds(record: Record) -> dict[str, Chart]:
    unit, points = speed(record)
    if not points:
        return {}
    note = "All ranks together. What the script does between two steps, such as evaluation, counts as time."
    title = f"{unit.capitalize()} a second"
    return {"speed": Chart(title, note, _curve(f"{unit}/s", points), y=f"{unit}/s", zero=True, is_wide=False)}


# -- time -------------------------------------------------------------------------------------------------------------

PHASES = {
    "forward": "the model's forward",
    "backward": "its gradients, with transfers under way",
    "reduce": "waiting until the last gradients are summed over the ranks",
    "step": "norm, optimizer, new weights",
    "outside": "what the script does itself: data, evaluation, logging",
}
"""By name, as in :class:`shardline.events.PhaseTimes`; the last one is the rest."""


def times(record: Record) -> dict[str, list[Point]]:
    """Seconds of each phase on rank 0, by step."""
    found: dict[str, list[Point]] = {phase: [] for phase in PHASES}
    for step, line in sorted(record.phases.items()):
        if step in record.steps:
            seconds = [float(line["seconds"].get(phase, 0.0)) for phase in list(PHASES)[:-1]]
            seconds.append(max(0.0, float(record.steps[step]["seconds"]) - sum(seconds)))
            for phase, value in zip(PHASES, seconds, strict=True):
                found[phase].append((step, value))
    return found if found["forward"] else {}


def _phases(record: Record) -> dict[str, Chart]:
    found = times(record)
    if not found:
        return {}
    middle = [Series(phase, [(0, median(y for _, y in points))]) for phase, points in found.items()]
    words = "; ".join(f"{phase}: {what}" for phase, what in PHASES.items())
    areas = [Series(phase, _thin(points)) for phase, points in found.items()]
    return {
        "share": Chart("A median step", f"On rank 0. {words[0].upper()}{words[1:]}.", middle, kind="share", unit="s"),
        "phases": Chart(
            "Each step", "Seconds on rank 0, one phase upon the other.", areas, kind="areas", unit="s", y="time"
        ),
    }


def waiting(record: Record) -> list[float]:
    """Seconds that each rank has waited for the others in a step, the mean by rank; empty with one rank."""
    rows = [line["waited"] for line in record.steps.values() if line.get("waited")]
    rows = [row for row in rows if len(row) == len(rows[-1])]
    return [fmean(row[rank] for row in rows) for rank in range(len(rows[0]))] if rows and len(rows[0]) > 1 else []


def _waits(record: Record) -> dict[str, Chart]:
    means = waiting(record)
    series = [Series(f"rank {rank}", [(0, value)]) for rank, value in enumerate(means)]
    note = "Mean of a step, by rank. The rank with the shortest bar is the one that the others wait for."
    return (
        {"waiting": Chart("Time spent waiting for other ranks", note, series, kind="bars", unit="s")} if means else {}
    )


# -- bytes ------------------------------------------------------------------------------------------------------------


def _sent(record: Record) -> dict[str, Chart]:
    lines = [(step, line.get("sent") or {}) for step, line in record.steps.items()]
    names = sorted({name for _, sent in lines for name in sent})
    if not any(any(sent.values()) for _, sent in lines):
        return {}
    words = {"gather": "weights (gather)", "reduce": "gradients (reduce)"}
    series = [Series(words.get(n, n), _thin([(step, float(sent.get(n, 0))) for step, sent in lines])) for n in names]
    note = "What rank 0 has sent in each step. The others send about as much."
    return {"wire": Chart("Bytes sent", note, series, kind="areas", unit="B", y="bytes")}


def _memory(record: Record) -> dict[str, Chart]:
    found = {}
    line = record.memory
    if line is not None and len(line["bytes"]) > 2:
        points = [(float(t), float(b)) for t, b in zip(line["seconds"], line["bytes"], strict=True)]
        bands = tuple((str(name), float(begin), float(end)) for name, begin, end in line["phases"])
        micro = sum(name == "forward" for name, *_ in bands)
        note = "What rank 0 has allocated and not freed. Bands are the phases of the step"
        note += f", which has {micro} micro-steps." if micro > 1 else "."
        found["trace"] = Chart(
            f"Within step {line['step']}", note, [Series("in use", points)], x="time since the step began", y="bytes",
            unit="B", bands=bands,
        )  # fmt: skip
    peaks = [Series("peak", _thin([(float(step), float(line["memory_bytes"])) for step, line in record.steps.items()]))]
    note = "The most that rank 0 has had so far: allocated on an accelerator, resident on a CPU."
    found["peak"] = Chart("Peak so far", note, peaks, unit="B", y="bytes", zero=True)
    return found
