"""Shardline compared with its peers and with the limit: engines take turns on the same work, in one run.

    make bench                                                # everything, about 25 minutes on 2 cores
    python benchmarks/bench.py --models gpt --dtypes fp32 --engines compute,shardline-2,shardline-3 --rounds 5

Engines of one stage form a heat: their processes live side by side, and every round each of them does a few steps while
the others sleep, A B C A B C. What is quoted are ratios within a round, and the median of them over the rounds; a time
alone depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACES = [str(ROOT / "src"), str(ROOT / "benchmarks")]
# what DeepSpeed compiles at first use; a place of its own, as environments that share one compile it again in turns
EXTENSIONS = Path(sys.prefix) / "torch_extensions"
# before torch is imported, and for the processes to come: one thread a rank, no accelerator
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
os.environ["TORCH_EXTENSIONS_DIR"] = str(EXTENSIONS)
os.environ["PYTHONPATH"] = os.pathsep.join([*PLACES, os.environ.get("PYTHONPATH", "")])
sys.path[:0] = PLACES

import measure  # noqa: E402
import report  # noqa: E402
import targets  # noqa: E402
from loops import ENGINES  # noqa: E402
from models import MODELS, parts  # noqa: E402
from suite import Case, full, heats, quick  # noqa: E402
from worker import Failed, Pair  # noqa: E402


def run_heat(case: Case, engines: Sequence[str], rounds: int, turn: int) -> tuple[list[dict[str, Any]], list[str]]:
    """All ``engines`` on ``case``, in turns; what was measured, and what went wrong."""
    pairs: dict[str, Pair] = {}
    rows: dict[str, dict[str, Any]] = {}
    errors = []

    def drop(name: str, error: Failed) -> None:
        errors.append(f"{name} on {case}: {error}")
        print(f"    {name} failed:\n{error}", file=sys.stderr)
        rows.pop(name, None)
        pairs.pop(name, None)

    try:
        for name in engines:
            try:
                pairs[name] = Pair(name, case.model, case.dtype, case.accumulation, case.world)
            except Failed as error:
                drop(name, error)
                continue
            start = pairs[name].start
            rows[name] = {
                "engine": name,
                "parameters": start[0]["parameters"],
                "setup": max(rank["setup"] for rank in start),
                "first": max(rank["first"] for rank in start),
                "peak from start": max(rank["peak"] for rank in start) / measure.MB,
                "losses": [statistics.fmean(rank["losses"][0] for rank in start)],
                "rounds": [],
                "peaks": [],
                "steadies": [],
            }
        for number in range(rounds + 1):
            for name in list(pairs):
                try:
                    answers = pairs[name].run(turn if number else 1)
                except Failed as error:
                    drop(name, error)
                    continue
                row = rows[name]
                row["losses"] += [statistics.fmean(pair) for pair in zip(*(a["losses"] for a in answers), strict=True)]
                row["peak from start"] = max(row["peak from start"], max(a["peak"] for a in answers) / measure.MB)
                if number:  # the first turn warms up
                    times = [max(pair) for pair in zip(*(a["seconds"] for a in answers), strict=True)]
                    row["rounds"].append(statistics.median(times))
                    row["peaks"].append(max(a["peak"] for a in answers) / measure.MB)
                    row["steadies"].append(max(a["steady"] for a in answers) / measure.MB)
    finally:
        for pair in pairs.values():
            pair.close()
    for row in rows.values():
        row["peak"] = max(row.pop("peaks"), default=0.0)
        row["steady"] = statistics.median(row.pop("steadies") or [0.0])
    return list(rows.values()), errors


def run_starts(case: Case, engines: Sequence[str], rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Set up each of ``engines`` again in every round: seconds of the call that makes a model an engine."""
    rows = {name: asdict(case) | {"engine": name, "rounds": []} for name in engines}
    errors = []
    for _ in range(rounds):
        for name in list(rows):
            try:
                pair = Pair(name, case.model, case.dtype, case.accumulation, case.world)
            except Failed as error:
                errors.append(f"{name} on {case}: {error}")
                rows.pop(name)
                continue
            rows[name]["rounds"].append(max(rank["setup"] for rank in pair.start))
            pair.close()
    return list(rows.values()), errors


def compile_deepspeed() -> None:
    """Let DeepSpeed build its shared-memory operator (for inference) now, so that no figure holds a compiler's time."""
    for lock in EXTENSIONS.glob("*/lock"):  # of a run that was killed; a process that finds one waits without end
        lock.unlink()
    try:
        Pair("deepspeed-0", "tiny", "fp32", 1, 1).close()
    except Failed as error:
        print(f"DeepSpeed on one rank failed:\n{error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}; without it a whole suite is run")
    parser.add_argument("--quick", action="store_true", help="the quick suite: does the benchmark itself work?")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--accumulation", default="1", help="micro-batches of a step, such as 1,4")
    parser.add_argument("--worlds", default="2", help="numbers of ranks")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine that count")
    parser.add_argument("--steps", type=int, help="steps of a turn; the default depends on the model")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench", help="folder for JSON, table and picture")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a figure misses its target")
    args = parser.parse_args(arguments)

    chosen = args.engines.split(",")
    if unknown := [name for name in chosen if name not in ENGINES]:
        parser.error(f"unknown engines {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    if args.models:
        if unknown := [name for name in args.models.split(",") if name not in MODELS]:
            parser.error(f"unknown models {', '.join(unknown)}; there are {', '.join(MODELS)}")
        cases = [(Case(model, dtype, int(accumulation), int(world)), chosen)
                 for model in args.models.split(",") for dtype in args.dtypes.split(",")
                 for accumulation in args.accumulation.split(",") for world in args.worlds.split(",")]  # fmt: skip
    else:
        suite = quick() if args.quick else full()
        cases = [(case, [name for name in engines if name in chosen])
                 for case, engines in suite if case.dtype in args.dtypes.split(",")]  # fmt: skip
    absent = sorted({name for _, engines in cases for name in engines if not ENGINES[name].installed})
    if absent:
        print(f"not installed, left out: {', '.join(absent)}", file=sys.stderr)

    result: dict[str, Any] = {"machine": measure.machine() | {"date": time.strftime("%Y-%m-%d")},
                              "command": " ".join(["python", *sys.argv]), "rounds": args.rounds,
                              "parts": {}, "runs": [], "starts": [], "errors": []}  # fmt: skip
    began = time.monotonic()
    if any(name.startswith("deepspeed") and name not in absent for _, engines in cases for name in engines):
        compile_deepspeed()
    for case, engines in cases:
        spec = MODELS[case.model]
        result["parts"].setdefault(case.model, parts(spec.fresh()))
        for number, heat in enumerate(heats([name for name in engines if name not in absent], case.dtype)):
            print(f"[{time.monotonic() - began:5.0f} s] {case}: {' '.join(heat)}", file=sys.stderr, flush=True)
            turn = args.steps or max(1, spec.turn // case.accumulation)
            rows, errors = run_heat(case, heat, args.rounds, turn)
            samples = spec.samples * case.accumulation * case.world
            result["runs"] += [asdict(case) | {"heat": number, "samples": samples} | row for row in rows]
            result["errors"] += errors
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "results.json").write_text(json.dumps(result, indent=1))
    for dtype in () if args.models or args.quick else args.dtypes.split(","):
        names = ["fsdp2", *(f"shardline-{stage}" for stage in range(4))]
        names = [name for name in names if name in chosen]
        print(f"[{time.monotonic() - began:5.0f} s] set-up, {dtype}: {' '.join(names)}", file=sys.stderr, flush=True)
        rows, errors = run_starts(Case("gpt", dtype), names, 3)
        result["starts"] += rows
        result["errors"] += errors
    result["errors"] += report.wrong_losses(result, ours=True)
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    figures = targets.judge(result)
    text = report.markdown(result, figures)
    (args.out / "results.md").write_text(text)
    report.picture(result, args.out / "bench.png")
    print(text)
    print(f"{time.monotonic() - began:.0f} s; results.json, results.md and bench.png are in {args.out}")
    return 1 if result["errors"] or (args.strict and not all(figure.holds for figure in figures)) else 0


if __name__ == "__main__":
    sys.exit(main())
