"""What is read: the Markdown tables and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from targets import Figure, activations_mb, limit_mb, paired, unit_cost

ALONE = ("compute", "pure")
"""Loops without communication: each rank sees its own data only, so their loss is their own."""

TOLERANCE = {"fp32": 0.005, "bf16": 0.03}
"""How far apart the losses of two right engines may be after the same steps, as a share."""


def cases(result: dict[str, Any]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The rows by case, in the order they were measured."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in result["runs"]:
        found.setdefault((row["model"], row["dtype"], row["accumulation"], row["world"]), []).append(row)
    return found


def title(case: tuple[Any, ...]) -> str:
    model, dtype, accumulation, world = case
    ranks = "1 rank" if world == 1 else f"{world} ranks"
    return f"{model}, {dtype}, {ranks}" + (f", accumulation {accumulation}" if accumulation > 1 else "")


def markdown(result: dict[str, Any], figures: Sequence[Figure]) -> str:
    """The whole report."""
    lines = [", ".join(f"{key} {value}" for key, value in result["machine"].items()),
             f"`{result['command']}`, {result['rounds']} rounds", ""]  # fmt: skip
    for case, rows in cases(result).items():
        lines += [f"### {title(case)} ({rows[0]['parameters'] / 1e6:.1f}M parameters)", "", *_table(result, case, rows)]
    lines += _units(result)
    if figures:
        lines += ["### Targets", "", "| figure | where | engine | measured | target | |", "|---|---|---|---|---|---|"]
        lines += [f"| {f.what} | {f.where} | {f.engine} | {f.value:.2f} | {f.limit:.2f} | "
                  f"{'holds' if f.holds else '**misses**'} |" for f in figures]  # fmt: skip
        lines += ["", f"{sum(f.holds for f in figures)} of {len(figures)} hold."]
    if peers := wrong_losses(result, ours=False):
        lines += ["", "### Peers that compute something else", "", *(f"* {sentence}" for sentence in peers)]
    if result["errors"]:
        lines += ["", "### Errors", "", *(f"```\n{error}\n```" for error in result["errors"])]
    return "\n".join(lines) + "\n"


def _table(result: dict[str, Any], case: tuple[Any, ...], rows: list[dict[str, Any]]) -> Iterator[str]:
    yield ("| engine | step ms | per second | step / compute | peak MB | formula + activations | peak with start | "
           "steady MB | set-up s | first step s | loss |")  # fmt: skip
    yield "|---" * 11 + "|"
    seen = set()
    for row in rows:
        name, heat = row["engine"], {r["engine"]: r for r in rows if r["heat"] == row["heat"]}
        if name in seen:  # a reference engine: its figures in the first of its heats stand for it
            continue
        seen.add(name)
        step = statistics.median(row["rounds"])
        ratio = f"{paired(row['rounds'], heat['compute']['rounds']):.2f}" if "compute" in heat else ""
        differs = " **differs**" if name in _outliers(rows) else ""
        yield (f"| {name} | {1e3 * step:.1f} | {row['samples'] / step:.0f} | {ratio} | {row['peak']:.0f} | "
               f"{_limit(result, case, name, heat)} | {row['peak from start']:.0f} | {row['steady']:.0f} | "
               f"{row['setup']:.2f} | {row['first']:.2f} | {row['losses'][-1]:.4f}{differs} |")  # fmt: skip
    yield ""


def _outliers(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Engines whose last loss is not the others', with how far it is off, as a share."""
    agreed = [row["losses"][-1] for row in rows if row["engine"] not in ALONE]
    if len(agreed) < 3:
        return {}
    middle = statistics.median(agreed)
    off = {row["engine"]: abs(row["losses"][-1] / middle - 1) for row in rows if row["engine"] not in ALONE}
    return {name: share for name, share in off.items() if not share <= TOLERANCE[rows[0]["dtype"]]}


def wrong_losses(result: dict[str, Any], *, ours: bool) -> list[str]:
    """A sentence for each engine (of ``ours``, or of the peers) that did not compute what the others did."""
    return [f"{name} on {title(case)}: the loss is {share:.1%} away from the other engines'"
            for case, rows in cases(result).items() for name, share in _outliers(rows).items()
            if name.startswith("shardline") is ours]  # fmt: skip


def _limit(result: dict[str, Any], case: tuple[Any, ...], name: str, heat: dict[str, Any]) -> str:
    model, dtype, _, world = case
    if not name.startswith("shardline") or "compute" not in heat:
        return ""
    sizes = result["parts"][model]
    activations = activations_mb(sizes, dtype, heat["compute"]["peak"])
    return f"{limit_mb(sizes, dtype, int(name.split('-')[1]), world, activations):.0f}"


def _units(result: dict[str, Any]) -> list[str]:
    rows = []
    for world in (1, 2):
        for name in sorted({row["engine"] for row in result["runs"]}):
            costs = [unit_cost(result, name, count, world) for count in (8, 64, 512)]
            if name != "compute" and any(costs):
                cells = " | ".join("" if cost is None else f"{1e6 * cost:.0f}" for cost in costs)
                rows.append(f"| {name} | {world} | {cells} |")
    head = ["### Microseconds per unit and step above the hand-written loop", "",
            "| engine | ranks | 8 units | 64 | 512 |", "|---|---|---|---|---|"]  # fmt: skip
    return [*head, *rows, ""] if rows else []


def picture(result: dict[str, Any], file: Path) -> None:
    """Bars of step time over compute only and of peak memory, a row for each case on two ranks."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {case: rows for case, rows in cases(result).items()
             if case[2:] == (1, 2) and not case[0].startswith("units") and len(rows) > 1}  # fmt: skip
    if not shown:
        return
    heights = [0.26 * len({row["engine"] for row in rows}) + 0.9 for rows in shown.values()]
    figure, axes = plt.subplots(len(shown), 2, figsize=(11, sum(heights)), squeeze=False,
                                gridspec_kw={"height_ratios": heights}, layout="constrained")  # fmt: skip
    for (case, rows), (left, right) in zip(shown.items(), axes, strict=True):
        names, ratios, peaks, limits = [], [], [], []
        for row in rows:
            heat = {r["engine"]: r for r in rows if r["heat"] == row["heat"]}
            if row["engine"] in names or "compute" not in heat:
                continue
            names.append(row["engine"])
            ratios.append(paired(row["rounds"], heat["compute"]["rounds"]))
            peaks.append(row["peak"])
            limits.append(_limit(result, case, row["engine"], heat))
        colours = ["#1f77b4" if name.startswith("shardline") else "#555" if name in ALONE else "#c9c9c9"
                   for name in names]  # fmt: skip
        places = range(len(names))
        left.barh(places, ratios, color=colours)
        left.axvline(1.0, color="#555", linewidth=0.8)
        left.set(yticks=places, yticklabels=names, title=f"{title(case)}: step time / compute only")
        right.barh(places, peaks, color=colours)
        right.plot(*zip(*[(float(limit), place) for place, limit in zip(places, limits, strict=True) if limit]
                        or [(0.0, 0.0)], strict=True), "|", color="black", markersize=12)  # fmt: skip
        right.set(yticks=[], title="peak MB per rank; | is formula + activations")
        for axis, values, form in ((left, ratios, "%.2f"), (right, peaks, "%.0f")):
            axis.invert_yaxis()
            axis.bar_label(axis.containers[0], labels=[form % value for value in values], padding=3, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.12)
    figure.savefig(file, dpi=120)
    plt.close(figure)
