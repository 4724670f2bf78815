"""The page: figures, charts and tables of a record, in one file of HTML with its styles, script and data inside."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from statistics import fmean, median
from typing import Any

from shardline.observe.report.record import Record

__all__ = ["page"]

_POINTS = 1200
"""Points of a curve: more than a screen has columns. Longer ones are means of neighbours."""

Series = dict[str, Any]


def page(record: Record) -> str:
    """The whole page as text."""
    charts: dict[str, Any] = {}
    body = "\n".join(
        part
        for part in (
            _head(record),
            _tiles(record),
            _curves(record, charts),
            _time(record, charts),
            _waiting(record, charts),
            _wire(record, charts),
            _memory(record, charts),
            _skipped(record),
            _checkpoints(record),
            _notices(record),
            _units(record),
            _config(record),
            _environment(record),
        )
        if part
    )
    data = json.dumps(_finite(charts), separators=(",", ":")).replace("</", "<\\/")
    room = files("shardline.observe.report")
    style, script = (room.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return _PAGE.format(title=html.escape(_title(record)), style=style, body=body, data=data, script=script)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


# -- text -----------------------------------------------------------------------------------------------------------


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _text(value: object) -> str:
    return html.escape(str(value))


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.1f} ms" if seconds < 0.1 else f"{1e3 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _section(name: str, title: str, *parts: str) -> str:
    return f'<section id="{name}">\n<h2>{_text(title)}</h2>\n' + "\n".join(filter(None, parts)) + "\n</section>"


def _chart(name: str, title: str, note: str = "") -> str:
    caption = f"<figcaption><b>{_text(title)}</b> {_text(note)}</figcaption>"
    return f'<figure>{caption}<div class="chart" data-chart="{name}"></div></figure>'


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()) -> str:
    def row(cells: Sequence[object], tag: str) -> str:
        classes = [' class="n"' if column in numeric else "" for column in range(len(cells))]
        return "".join(f"<{tag}{c}>{_text(cell)}</{tag}>" for c, cell in zip(classes, cells, strict=True))

    body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{row(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


# -- curves -----------------------------------------------------------------------------------------------------------


def _thin(points: Sequence[tuple[float, float]]) -> list[list[float]]:
    """At most so many points that a screen shows: means of neighbours where there are more."""
    size = -(-len(points) // _POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else []
    return [[fmean(x for x, _ in group), fmean(y for _, y in group)] for group in groups] or [list(p) for p in points]


def _of_steps(record: Record, name: str, scale: float = 1.0) -> list[tuple[float, float]]:
    return [(step, scale * float(line[name])) for step, line in record.steps.items() if line.get(name) is not None]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A moving average whose reach grows with the number of points, without the bias of its start."""
    keep = 1 - 1 / max(1.0, len(points) / 30)
    found, total, weight = [], 0.0, 0.0
    for x, y in points:
        if math.isfinite(y):
            total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        found.append((x, total / weight if weight else y))
    return found


def _line(name: str, points: Sequence[tuple[float, float]], **style: Any) -> Series:
    return {"name": name, "points": _thin(points), **style}


def _per_index(record: Record, name: str, label: str) -> list[Series]:
    """A curve for each place of a list, or one where they are all the same."""
    columns: dict[int, list[tuple[float, float]]] = {}
    for step, line in record.steps.items():
        for index, value in enumerate(line.get(name) or ()):
            columns.setdefault(index, []).append((step, float(value)))
    if len(columns) > 1 and all(column == columns[0] for column in columns.values()):
        columns = {0: columns[0]}
    return [_line(f"{label} {index}" if len(columns) > 1 else label, column) for index, column in columns.items()]


def _speed(record: Record) -> tuple[str, list[tuple[float, float]]]:
    unit = "tokens" if any(line.get("tokens") for line in record.steps.values()) else "samples"
    lines = [(step, line) for step, line in record.steps.items() if line["seconds"] > 0]
    return unit, [(step, line[unit] / line["seconds"]) for step, line in lines]


# -- sections ---------------------------------------------------------------------------------------------------------


def _last_start(record: Record) -> dict[str, Any]:
    return record.starts[-1] if record.starts else {"environment": {}, "config": {}, "origins": {}, "units": []}


def _title(record: Record) -> str:
    return f"{_last_start(record)['environment'].get('model', 'Training run')} · run report"


def _head(record: Record) -> str:
    start = _last_start(record)
    here, config = start["environment"], start["config"]
    stage = config.get("zero_optimization", {}).get("stage")
    facts = [
        f"stage {stage}" if stage is not None else "",
        str(here.get("precision", "")),
        f"{here['ranks']} ranks" if here.get("ranks", 1) != 1 else "one process",
        str(here.get("device", "")),
    ]
    steps = sorted(record.steps)
    first, last = record.steps[steps[0]]["time"], record.steps[steps[-1]]["time"]
    when = f"{_moment(first)} to {_moment(last)}"
    if len(record.starts) > 1:
        when += f" · {len(record.starts)} processes, one after another"
    return (
        f'<header><p class="eyebrow">Shardline run report</p><h1>{_text(here.get("model", "Training run"))}</h1>'
        f'<p class="facts">{_text(" · ".join(filter(None, facts)))}</p><p class="when">{_text(when)}</p></header>'
    )


def _tiles(record: Record) -> str:
    steps = list(record.steps.values())
    tail = steps[-max(1, len(steps) // 10) :]
    tiles: list[tuple[str, str, str]] = [("steps", f"{steps[-1]['step']:,}", f"{len(record.skipped)} skipped")]
    losses = [float(line["loss"]) for line in steps if line.get("loss") is not None]
    if losses:
        tiles.append(("loss", _number(fmean(losses[-len(tail) :])), f"from {_number(losses[0])}"))
    unit, speed = _speed(record)
    if speed:
        tiles.append((f"{unit} a second", _number(median(value for _, value in speed)), "median step"))
    tiles.append(("a step", _duration(median(line["seconds"] for line in steps)), "median"))
    ranks = max(1, len(steps[-1].get("waited") or ()))
    rates = [line["flops"] / line["seconds"] / ranks / 1e12 for line in tail if line.get("flops")]
    if rates:
        used = [line["mfu"] for line in tail if line.get("mfu") is not None]
        tiles.append(("TFLOP/s a device", _number(median(rates)), f"{median(used):.1%} MFU" if used else "counted"))
    tiles.append(("memory", _bytes(max(line["memory_bytes"] for line in steps)), "peak of rank 0"))
    cells = "".join(f"<div><dt>{_text(a)}</dt><dd>{_text(b)}<small>{_text(c)}</small></dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _curves(record: Record, charts: dict[str, Any]) -> str:
    parts = []
    losses = _of_steps(record, "loss")
    if losses:
        series = [_line("each step", losses, faint=True), _line("smoothed", _smooth(losses))]
        if len(losses) < 40:
            series = [_line("training", losses)]
        names = sorted({name for values in record.scalars.values() for name in values})
        own = {n: [(s, values[n]) for s, values in sorted(record.scalars.items()) if n in values] for n in names}
        low, high = min(y for _, y in losses), max(y for _, y in losses)
        beside = {
            name: p for name, p in own.items() if low / 3 <= min(y for _, y in p) and max(y for _, y in p) < high * 3
        }
        series += [_line(name, points, dots=True) for name, points in beside.items()]
        charts["loss"] = {"series": series, "marks": [line["step"] for line in record.loaded]}
        parts.append(_chart("loss", "Loss", "mean over all ranks, by step"))
        for index, (name, points) in enumerate((n, p) for n, p in own.items() if n not in beside):
            charts[f"own{index}"] = {"series": [_line(name, points)]}
            parts.append(_chart(f"own{index}", name))
    pair = []
    if rates := _per_index(record, "lr", "group"):
        charts["lr"] = {"series": rates, "zero": True}
        pair.append(_chart("lr", "Learning rate", "of each param group" if len(rates) > 1 else ""))
    norms = _of_steps(record, "grad_norm")
    if norms:
        groups = _per_index(record, "grad_norms", "group")
        charts["norm"] = {"series": [_line("all", norms), *groups], "zero": True}
        pair.append(_chart("norm", "Gradient norm", "before clipping"))
    if scales := _of_steps(record, "loss_scale"):
        charts["scale"] = {"series": [_line("loss scale", scales)], "log": True}
        pair.append(_chart("scale", "Loss scale"))
    unit, speed = _speed(record)
    if speed:
        charts["speed"] = {"series": [_line(f"{unit}/s", speed)], "zero": True}
        pair.append(_chart("speed", f"{unit.capitalize()} a second", "over all ranks"))
    return _section("curves", "Curves", *parts, f'<div class="pair">{"".join(pair)}</div>')


_PHASES = ("forward", "backward", "reduce", "step")


def _time(record: Record, charts: dict[str, Any]) -> str:
    rows = [
        (step, [float(line["seconds"].get(phase, 0.0)) for phase in _PHASES], record.steps[step]["seconds"])
        for step, line in sorted(record.phases.items())
        if step in record.steps
    ]
    if not rows:
        return ""
    names = [*_PHASES, "the loop's own"]
    table = [[*phases, max(0.0, whole - sum(phases))] for _, phases, whole in rows]
    charts["phases"] = {
        "stack": True,
        "unit": "s",
        "series": [
            _line(name, [(row[0], values[i]) for row, values in zip(rows, table, strict=True)])
            for i, name in enumerate(names)
        ],
    }
    middle = [median(values[i] for values in table) for i in range(len(names))]
    charts["share"] = {"bar": [[name, value] for name, value in zip(names, middle, strict=True)]}
    return _section(
        "time",
        "Where the time of a step goes",
        _chart("share", "Median step", "on rank 0"),
        _chart("phases", "By step", "seconds; the loop's own: data, evaluation, logging"),
    )


def _waiting(record: Record, charts: dict[str, Any]) -> str:
    rows = [line["waited"] for line in record.steps.values() if line.get("waited")]
    if not rows or len(rows[0]) < 2:
        return ""
    rows = [row for row in rows if len(row) == len(rows[-1])]
    means = [fmean(row[rank] for row in rows) for rank in range(len(rows[0]))]
    seconds = fmean(line["seconds"] for line in record.steps.values())
    awaited = min(range(len(means)), key=means.__getitem__)
    longest = max(means)
    charts["waiting"] = {"bars": [[f"rank {rank}", value] for rank, value in enumerate(means)], "unit": "s"}
    if longest - means[awaited] < 0.02 * seconds:
        said = f"No rank is waited for: they wait for {_duration(fmean(means))} a step each, transfers included."
    else:
        share = (longest - means[awaited]) / seconds
        said = (
            f"The others wait for rank {awaited}: it waits {_duration(means[awaited])} a step, where another one waits "
            f"{_duration(longest)}. With ranks of one speed a step would be up to {share:.0%} shorter."
        )
    return _section(
        "waiting",
        "Who waits for whom",
        f"<p>{_text(said)}</p>",
        _chart("waiting", "Waiting", "mean of a step, by rank"),
    )


def _wire(record: Record, charts: dict[str, Any]) -> str:
    names = sorted({name for line in record.steps.values() for name in line.get("sent") or {}})
    lines = list(record.steps.items())
    if not names or not any(any((line.get("sent") or {}).values()) for _, line in lines):
        return ""
    words = {"gather": "weights gathered", "reduce": "gradients reduced"}
    charts["wire"] = {
        "stack": True,
        "unit": "B",
        "series": [
            _line(words.get(n, n), [(s, float((line.get("sent") or {}).get(n, 0))) for s, line in lines]) for n in names
        ],
    }
    total = sum(sum((line.get("sent") or {}).values()) for _, line in lines)
    mean = _bytes(total / len(lines))
    said = f"Rank 0 sent {_bytes(total)} in these steps, {mean} in each on average."
    return _section(
        "wire", "Bytes on the wire", f"<p>{_text(said)}</p>", _chart("wire", "Sent by rank 0", "in each step")
    )


def _memory(record: Record, charts: dict[str, Any]) -> str:
    parts = []
    if record.memory is not None and len(record.memory["bytes"]) > 2:
        found = record.memory
        points = list(zip([float(t) for t in found["seconds"]], [float(b) for b in found["bytes"]], strict=True))
        charts["trace"] = {
            "series": [_line("in use", points)],
            "bands": found["phases"],
            "unit": "B",
            "x": "seconds",
        }
        parts.append(_chart("trace", f"Over step {found['step']}", "what rank 0 has allocated and not freed"))
    peaks = [(float(step), float(line["memory_bytes"])) for step, line in record.steps.items()]
    charts["peak"] = {"series": [_line("peak so far", peaks)], "unit": "B", "zero": True}
    parts.append(_chart("peak", "Peak so far", "of rank 0, by step"))
    return _section("memory", "Memory", *parts)


def _skipped(record: Record) -> str:
    if not record.skipped:
        return ""
    rows = [
        (step, line["reason"], line.get("loss_scale_before") or "", line.get("loss_scale_after") or "")
        for step, line in sorted(record.skipped.items())
    ]
    return _section("skipped", "Skipped steps", _table(("step", "reason", "scale before", "after"), rows, (0, 2, 3)))


def _checkpoints(record: Record) -> str:
    if not (record.saved or record.loaded):
        return ""
    lines = sorted([*record.saved, *record.loaded], key=lambda line: line["time"])
    rows = [
        (
            line["step"],
            "saved" if line["event"] == "CheckpointSaved" else "went on from it",
            line["path"],
            _duration(line["seconds"]) if "seconds" in line else "",
            _moment(line["time"]),
        )
        for line in lines
    ]
    return _section("checkpoints", "Checkpoints", _table(("step", "", "path", "took", "when"), rows, (0, 3)))


def _notices(record: Record) -> str:
    if not record.notices:
        return ""
    items = "".join(f"<li>{_text(line['message'])}</li>" for line in record.notices)
    return _section("notices", "Notices", f"<ul>{items}</ul>")


def _units(record: Record) -> str:
    units = _last_start(record)["units"]
    if not units:
        return ""
    kinds = ("weights", "gradients", "masters", "states")
    rows = [
        (u["name"], f"{u['parameters']:,}", u["dtype"], *(_bytes(u[kind]) for kind in kinds), ", ".join(u["notes"]))
        for u in units
    ]
    total = (
        "all",
        f"{sum(u['parameters'] for u in units):,}",
        "",
        *(_bytes(sum(u[k] for u in units)) for k in kinds),
        "",
    )
    head = ("unit", "parameters", "dtype", *kinds, "")
    note = "<p>What is gathered and reduced together, and what rank 0 held of it when the process began.</p>"
    return _section("units", "Units of the model", note, _table(head, [*rows, total], range(1, 7)))


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        at = f"{path}.{name}" if path else name
        if isinstance(value, Mapping) and value:
            yield from _flat(value, at)
        else:
            yield at, value


def _config(record: Record) -> str:
    start = _last_start(record)
    origins = start["origins"]
    rows = [(path, json.dumps(value), origins.get(path, "default")) for path, value in _flat(start["config"])]
    if not rows:
        return ""
    chosen, rest = [r for r in rows if r[2] != "default"], [r for r in rows if r[2] == "default"]
    head = ("key", "value", "origin")
    more = f"<details><summary>{len(rest)} keys at their defaults</summary>{_table(head, rest)}</details>"
    return _section("config", "Configuration", _table(head, chosen), more)


def _environment(record: Record) -> str:
    rows = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
        for name, value in _last_start(record)["environment"].items()
    )
    return _section("environment", "Environment", f'<dl class="plain">{rows}</dl>') if rows else ""
