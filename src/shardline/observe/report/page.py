"""The page: figures, charts and tables of a record, in one file of HTML with its styles, script and data inside."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from itertools import groupby
from pathlib import PurePath
from statistics import fmean, median
from typing import Any, NamedTuple

from shardline.observe.report.charts import Chart, charts_of, speed, times, waiting
from shardline.observe.report.record import Record

__all__ = ["page"]


def page(record: Record) -> str:
    """The whole page as text."""
    charts = charts_of(record)
    sections = [
        _section("curves", "Curves", _grid(charts, [name for name in charts if name not in _ELSEWHERE])),
        _section("time", "Where the time of a step goes", _grid(charts, ["share", "phases"])),
        _section("waiting", "Who waits for whom", _waiting(record), _grid(charts, ["waiting"])),
        _section("wire", "Bytes on the wire", _wire(record), _grid(charts, ["wire"])),
        _section("memory", "Memory", _grid(charts, ["trace", "peak"])),
        _section("skipped", "Skipped steps", _skipped(record)),
        _section("checkpoints", "Checkpoints", _checkpoints(record)),
        _section("notices", "Notices", _notices(record)),
        _section("units", "Units of the model", _units(record)),
        _section("config", "Configuration", _config(record)),
        _section("environment", "Environment", _environment(record)),
        _section("words", "Words", _words()),
    ]
    links = "".join(f'<a href="#{each.name}">{_text(each.title)}</a>' for each in sections if each.body)
    body = [
        _head(record),
        _tiles(record),
        _findings(record),
        f"<nav>{links}</nav>",
        *(each.html() for each in sections),
    ]
    values = {
        name: {k: v for k, v in asdict(chart).items() if k not in ("title", "note")} for name, chart in charts.items()
    }
    data = json.dumps(_finite(values), separators=(",", ":")).replace("</", "<\\/")
    room = files("shardline.observe.report")
    style, script = (room.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return _PAGE.format(title=html.escape(_title(record)), style=style, body="\n".join(body), data=data, script=script)


_ELSEWHERE = ("share", "phases", "waiting", "wire", "trace", "peak")
"""Charts of sections of their own; all others are curves."""


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
    return f"{count:.2f} GiB" if count < 1024 else f"{count / 1024:,.2f} TiB"


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


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


class _Section(NamedTuple):
    name: str
    title: str
    body: str

    def html(self) -> str:
        """An empty string if there is nothing to show."""
        return f'<section id="{self.name}">\n<h2>{_text(self.title)}</h2>\n{self.body}\n</section>' if self.body else ""


def _section(name: str, title: str, *parts: str) -> _Section:
    return _Section(name, title, "\n".join(filter(None, parts)))


def _grid(charts: Mapping[str, Chart], names: Iterable[str]) -> str:
    """The figures of the charts that there are: wide ones alone, the others two by two."""
    shown = [name for name in names if name in charts]
    narrow = [name for name in shown if not charts[name].is_wide]
    alone = narrow[-1:] if len(narrow) % 2 else []
    figures = "".join(_figure(name, charts[name], is_wide=charts[name].is_wide or name in alone) for name in shown)
    return f'<div class="figures">{figures}</div>' if figures else ""


def _figure(name: str, chart: Chart, *, is_wide: bool) -> str:
    caption = f"<figcaption><b>{_text(chart.title)}</b> {_text(chart.note)}</figcaption>"
    wide = ' class="wide"' if is_wide else ""
    return f'<figure{wide}>{caption}<div class="chart" data-chart="{name}"></div></figure>'


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()) -> str:
    def row(cells: Sequence[object], tag: str) -> str:
        classes = [' class="n"' if column in numeric else "" for column in range(len(cells))]
        return "".join(f"<{tag}{c}>{_text(cell)}</{tag}>" for c, cell in zip(classes, cells, strict=True))

    body = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{row(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


# -- sections ---------------------------------------------------------------------------------------------------------


def _title(record: Record) -> str:
    return f"{record.start['environment'].get('model', 'Training run')} · run report"


def _head(record: Record) -> str:
    start = record.start
    here, config = start["environment"], start["config"]
    stage = config.get("zero_optimization", {}).get("stage")
    facts = [
        f"ZeRO stage {stage}" if stage is not None else "",
        str(here.get("precision", "")),
        f"{here['ranks']} ranks" if here.get("ranks", 1) != 1 else "one process",
        str(here.get("device", "")),
    ]
    steps = sorted(record.steps)
    first, last = record.steps[steps[0]]["time"], record.steps[steps[-1]]["time"]
    when = f"{_moment(first)} to {_moment(last)}"
    if len(record.starts) > 1:
        ranks = [str(line["environment"].get("ranks", 1)) for line in record.starts]
        last = "" if len(set(ranks)) == 1 else f", on {', then '.join(key for key, _ in groupby(ranks))} ranks"
        when += f" · started {len(record.starts)} times{last}"
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
    unit, rates = speed(record)
    if rates:
        tiles.append((f"{unit} a second", _number(median(value for _, value in rates)), "in a median step"))
    tiles.append(("time of a step", _duration(median(line["seconds"] for line in steps)), "median"))
    ranks = max(1, len(steps[-1].get("waited") or ()))
    done = [line["flops"] / line["seconds"] / ranks / 1e12 for line in tail if line.get("flops")]
    if done:
        used = [line["mfu"] for line in tail if line.get("mfu") is not None]
        tiles.append(("TFLOP/s a device", _number(median(done)), f"{median(used):.1%} MFU" if used else "counted"))
    tiles.append(("memory", _bytes(max(line["memory_bytes"] for line in steps)), "peak of rank 0"))
    cells = "".join(f"<div><dt>{_text(a)}</dt><dd>{_text(b)}<small>{_text(c)}</small></dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _findings(record: Record) -> str:
    """What a reader would look for first, in sentences."""
    steps = list(record.steps.values())
    took = _duration(sum(line["seconds"] for line in steps))
    said = [f"{_count(len(steps), 'step')} {'was' if len(steps) == 1 else 'were'} applied, in {took} of training."]
    bad = [line["step"] for line in steps if line.get("loss") is not None and not math.isfinite(float(line["loss"]))]
    if bad:
        said.append(f"The loss was not finite in {len(bad):,} of them, first in step {bad[0]:,}.")
    if record.skipped:
        some = "One more was" if len(record.skipped) == 1 else f"{len(record.skipped):,} more were"
        reasons = list(dict.fromkeys(str(line["reason"]) for line in record.skipped.values()))
        said.append(f"{some} skipped: {', or '.join(reasons)}.")
    phases = times(record)
    if phases:
        middle = {phase: median(y for _, y in points) for phase, points in phases.items()}
        share = (middle["forward"] + middle["backward"]) / (sum(middle.values()) or 1.0)
        said.append(f"Forward and backward are {share:.0%} of a median step.")
    said.append(_waiting_sentence(record))
    if record.saved:
        last = record.saved[-1]
        said.append(f"The last checkpoint is that of step {last['step']:,}.")
    return f'<p class="findings">{_text(" ".join(filter(None, said)))}</p>'


def _waiting_sentence(record: Record) -> str:
    means = waiting(record)
    if not means:
        return ""
    seconds = fmean(line["seconds"] for line in record.steps.values())
    awaited = min(range(len(means)), key=means.__getitem__)
    more = (max(means) - means[awaited]) / seconds if seconds else 0.0
    if more < 0.02:
        return f"No rank holds the others up: each waits {_duration(fmean(means))} of a step, transfers included."
    return (
        f"The others wait for rank {awaited}: it waits {_duration(means[awaited])} a step, where another one waits "
        f"{_duration(max(means))}. With ranks of one speed a step would be up to {more:.0%} shorter."
    )


def _waiting(record: Record) -> str:
    said = _waiting_sentence(record)
    return f"<p>{_text(said)}</p>" if said else ""


def _wire(record: Record) -> str:
    sums = [sum((line.get("sent") or {}).values()) for line in record.steps.values()]
    if not any(sums):
        return ""
    said = f"Rank 0 sent {_bytes(sum(sums))} in these steps, {_bytes(fmean(sums))} in each on average."
    return f"<p>{_text(said)}</p>"


def _skipped(record: Record) -> str:
    if not record.skipped:
        return ""
    rows = [
        (f"{step:,}", line["reason"], *(_number(line[at]) if line.get(at) else "" for at in _SCALES))
        for step, line in sorted(record.skipped.items())
    ]
    table = _table(("step", "reason", "loss scale before", "after"), rows, (0, 2, 3))
    return "<p>Their gradients were thrown away, and the weights stayed as they were.</p>" + table


_SCALES = ("loss_scale_before", "loss_scale_after")


def _checkpoints(record: Record) -> str:
    if not (record.saved or record.loaded):
        return ""
    lines = sorted([*record.saved, *record.loaded], key=lambda line: line["time"])
    folders = {str(PurePath(line["path"]).parent) for line in lines}
    where = f"<p>In the folder <code>{_text(folders.pop())}</code>.</p>" if len(folders) == 1 else ""
    rows = [
        (
            f"{line['step']:,}",
            "saved" if line["event"] == "CheckpointSaved" else "went on from it",
            PurePath(line["path"]).name if where else line["path"],
            _duration(line["seconds"]) if "seconds" in line else "",
            _moment(line["time"]),
        )
        for line in lines
    ]
    head = ("step", "", "name", "took", "when")
    older, rows = rows[:-_SHOWN], rows[-_SHOWN:]
    more = (
        f"<details><summary>{len(older)} earlier ones</summary>{_table(head, older, (0, 3))}</details>" if older else ""
    )
    return where + _table(head, rows, (0, 3)) + more


_SHOWN = 5  # checkpoints, without unfolding


def _notices(record: Record) -> str:
    if not record.notices:
        return ""
    items = "".join(f"<li>{_text(line['message'])}</li>" for line in record.notices)
    return f"<ul>{items}</ul>"


def _units(record: Record) -> str:
    units = record.start["units"]
    if not units:
        return ""
    kinds = [kind for kind in ("weights", "gradients", "masters", "states") if any(unit[kind] for unit in units)]
    rows = [
        (u["name"], f"{u['parameters']:,}", u["dtype"], *(_bytes(u[kind]) for kind in kinds), ", ".join(u["notes"]))
        for u in units
    ]
    sums = [_bytes(sum(unit[kind] for unit in units)) for kind in kinds]
    total = (_count(len(units), "unit"), f"{sum(u['parameters'] for u in units):,}", "", *sums, "")
    note = (
        "The parts of the model whose weights are gathered and whose gradients are reduced together, and the bytes of "
    )
    note += "each that rank 0 held when the process began."
    if "states" not in kinds:
        note += " The optimizer makes its states in the first step."
    head = ("unit", "parameters", "dtype", *kinds, "")
    return f"<p>{_text(note)}</p>" + _table(head, [*rows, total], range(1, 3 + len(kinds)))


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        at = f"{path}.{name}" if path else name
        if isinstance(value, Mapping) and value:
            yield from _flat(value, at)
        else:
            yield at, value


def _config(record: Record) -> str:
    start = record.start
    origins = start["origins"]
    rows = [(path, json.dumps(value), origins.get(path, "default")) for path, value in _flat(start["config"])]
    if not rows:
        return ""
    chosen, rest = [r for r in rows if r[2] != "default"], [r for r in rows if r[2] == "default"]
    head = ("key", "value", "origin")
    more = f"<details><summary>{len(rest)} keys at their defaults</summary>{_table(head, rest)}</details>"
    return _table(head, chosen) + more


def _environment(record: Record) -> str:
    rows = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
        for name, value in record.start["environment"].items()
    )
    return f'<dl class="plain">{rows}</dl>' if rows else ""


_WORDS = {
    "rank": "One process of the job, with one device. They are numbered from 0, and rank 0 writes this log.",
    "step": "One update of the weights. It may be made of several micro-steps, each a forward and a backward.",
    "stage": "What is sharded over ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights (ZeRO).",
    "unit": "Parameters that are gathered and reduced together: as a rule one block of the model.",
    "gather": "Ranks send each other the weights that they hold a part of.",
    "reduce": "Ranks add up their gradients, and each keeps the sum of its own part.",
    "masters": "The fp32 copy of weights that are themselves in bf16 or fp16.",
    "MFU": "Model FLOP utilization: the share of what the device can do that went into the model's own operations.",
}


def _words() -> str:
    rows = "".join(f"<div><dt>{_text(word)}</dt><dd>{_text(what)}</dd></div>" for word, what in _WORDS.items())
    return f'<dl class="words">{rows}</dl>'
