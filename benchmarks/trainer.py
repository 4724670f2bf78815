"""A step of Transformers' Trainer on two CPU ranks: without an engine, under DDP, Shardline and DeepSpeed.

    make bench-trainer                                                  # all of it, into docs/performance.md
    python benchmarks/trainer.py [--rounds 5] [--in-place 0 1 2 3] [--stages 2 3] [--write]
    python benchmarks/trainer.py --read ROUNDS.json ... --write            # figures of another machine

`in-place-N` is shardline.integrations.transformers.Trainer at stage N, `shardline-N` the stand-in for DeepSpeed,
`deepspeed-N` DeepSpeed itself; without it these are left out.

The interpreter that runs this needs torch, Transformers, Accelerate and Shardline's own dependencies; Shardline itself
is taken from this folder. DeepSpeed is in the same interpreter, or in that of DEEPSPEED_PYTHON, with Transformers. No
GPU is used, even where there is one.

The same script, model (a GPT-2 in fp32), data and ds_config everywhere, one thread for each rank. Each round runs every
way once, one after the other. A ratio is taken within a round; the median over the rounds is written. Without an engine
each rank trains alone. The processor time counts all threads of rank 0. Memory is the most that rank 0 holds in
training above what it held before the model was made.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- trainer: begin -->\n", "<!-- trainer: end -->\n"
LENGTH, MICRO, WARM = 128, 4, 3
SIZES = {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 2048, "n_positions": LENGTH}
QUICK = SIZES | {"n_layer": 2, "n_embd": 32, "n_head": 2}
LABELS = {
    "alone": "no engine, no communication",
    "ddp": "DDP",
    "in-place": "Shardline in place, stage",
    "deepspeed": "DeepSpeed, stage",
    "shardline": "Shardline as DeepSpeed, stage",
}


# -- one rank ----------------------------------------------------------------------------------------------------------


def train(way: str, steps: int, quick: bool, out: str) -> None:
    """One rank of one way; rank 0 writes its figures."""
    import measure
    import torch
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    torch.set_num_threads(1)
    given: dict[str, Any] = {"use_cpu": True}
    kind, _, stage = way.rpartition("-")
    if kind == "in-place":
        from shardline.integrations.transformers import Trainer as Sharded

        Trainer = partial(Sharded, shardline={"zero_optimization": {"stage": int(stage)}})
    elif kind:
        given = {"accelerator_config": {"use_configured_state": True}, "deepspeed": ds_config(int(stage))}
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        import deepspeed
        from accelerate import PartialState
        from deepspeed import DeepSpeedEngine, initialize  # noqa: F401  (what comes with them is no one's memory)

        PartialState(backend="gloo")  # Accelerate takes gloo only where it is named
        if kind == "deepspeed":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference; it would be compiled
    arguments = TrainingArguments(
        output_dir=f"{out}.run",
        per_device_train_batch_size=MICRO,
        max_steps=steps,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **given,
    )
    ids = torch.randint(0, SIZES["vocab_size"], (4 * MICRO * steps, LENGTH), generator=torch.Generator().manual_seed(2))
    before = measure.resident()
    measure.restart_peak()
    set_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**(QUICK if quick else SIZES), bos_token_id=0, eos_token_id=0))
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.add_callback(Clock())
    loss = trainer.train().training_loss
    walls, works = ([b - a for a, b in itertools.pairwise(one)][WARM:] for one in zip(*marks, strict=True))
    if os.environ.get("RANK", "0") != "0" or os.environ.get("ALONE"):
        return
    found = {
        "wall": statistics.median(walls),
        "work": statistics.median(works),
        "peak": measure.peak() - before,
        "loss": loss,
        "machine": measure.machine() | {"transformers": transformers.__version__},
    }
    Path(out).write_text(json.dumps(found))


def ds_config(stage: int) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "overlap_comm": True, "contiguous_gradients": True},
    }


# -- both ranks of each way, round by round ----------------------------------------------------------------------------


def patient(way: str, python: str, options: list[str], out: Path) -> dict[str, Any]:
    """:func:`run`, up to three times: ranks of DeepSpeed abort now and then as they exit, and a port can be taken."""
    for _ in range(2):
        try:
            return run(way, python, options, out)
        except Failed as error:
            print(f"{error}\n{way} is run again.", file=sys.stderr)
    return run(way, python, options, out)


class Failed(SystemExit):
    """A rank that failed, with the end of its log."""


def run(way: str, python: str, options: list[str], out: Path) -> dict[str, Any]:
    """Start both ranks of ``way`` and read the figures of rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = [str(ROOT / "src")] if way.startswith(("shardline", "in-place")) else []
    if way.startswith("shardline"):
        path.insert(0, str(ROOT / "src/shardline/compat/deepspeed/path"))
    ranks = []
    for rank in range(2):
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if way == "alone":
            environment |= {"ALONE": "1"} if rank else {}
        else:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = out.with_suffix(f".{rank}.log")
        with log.open("w") as file:
            command = [python, __file__, "--job", way, "--out", str(out), *options]
            ranks.append((subprocess.Popen(command, env=environment, stdout=file, stderr=file), log))
    try:
        _wait(way, ranks)
    finally:
        for process, _ in ranks:
            process.kill()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _wait(way: str, ranks: list[tuple[subprocess.Popen[bytes], Path]]) -> None:
    end = time.monotonic() + 600
    while any(process.poll() is None for process, _ in ranks):
        failed = [log for process, log in ranks if process.returncode]
        if failed or time.monotonic() > end:
            break
        time.sleep(0.1)
    for process, log in ranks:
        if process.poll() != 0:
            what = "did not end in 600 s" if process.returncode is None else f"ended with {process.returncode}"
            if process.returncode is not None or all(other.returncode is None for other, _ in ranks):
                raise Failed(f"{way}: a rank {what}; {log} ends with\n{log.read_text()[-3000:]}")


# -- what is written ---------------------------------------------------------------------------------------------------


def label(way: str) -> str:
    kind, _, stage = way.rpartition("-")
    return f"{LABELS[kind]} {stage}" if kind else LABELS[way]


def table(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """The Markdown table: medians over the rounds, and medians of ratios that were taken within a round."""
    ways = list(rounds[0])

    def middle(way: str, key: str) -> float:
        return statistics.median(each[way][key] for each in rounds)

    def ratio(way: str, other: str, key: str = "wall") -> str:
        if other not in ways or other == way:
            return ""
        return f"{statistics.median(each[way][key] / each[other][key] for each in rounds):.2f}"

    heads = ["", "step, ms", "of no engine", "of DDP", "of DeepSpeed", "processor time, ms", "memory, MB", "of DDP's",
             "of DeepSpeed's", "loss"]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for way in ways:
        peer = way.replace("shardline", "deepspeed").replace("in-place", "deepspeed")
        lines.append([
            label(way), f"{middle(way, 'wall') * 1e3:.0f}", ratio(way, "alone"), ratio(way, "ddp"), ratio(way, peer),
            f"{middle(way, 'work') * 1e3:.0f}", f"{middle(way, 'peak') / 1e6:.0f}", ratio(way, "ddp", "peak"),
            ratio(way, peer, "peak"), f"{middle(way, 'loss'):.4f}",
        ])  # fmt: skip
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def section(results: Sequence[dict[str, Any]]) -> str:
    """What stands between the markers of docs/performance.md: a table for each set of ways."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result["rounds"][0]), []).append(result)
    return "\n".join(map(_with_table, groups.values()))


def _with_table(results: Sequence[dict[str, Any]]) -> str:
    """The table of runs of the same ways, and where they were."""
    rounds, machine = [each for result in results for each in result["rounds"]], results[0]["machine"]
    where = ", ".join([machine["cpu"], *(f"{name} {machine[name]}" for name in ("torch", "transformers"))])
    said = f"{results[0]['date']}, {where}, Python {machine['python']}, load before {machine['load before']}; "
    return f"{said}{len(rounds)} rounds.\n\n{table(rounds)}"


def written(page: str, results: Sequence[dict[str, Any]]) -> str:
    """``page`` with the section of ``results``."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return before + BEGIN + section(results) + END + after


def peer_python() -> str | None:
    """An interpreter that has DeepSpeed, if there is one."""
    own = sys.executable if importlib.util.find_spec("deepspeed") else None
    return os.environ.get("DEEPSPEED_PYTHON") or own


def measured(args: argparse.Namespace) -> dict[str, Any]:
    if missing := [name for name in ("torch", "transformers", "accelerate") if not importlib.util.find_spec(name)]:
        raise SystemExit(f"{sys.executable} does not have {', '.join(missing)}. make bench-trainer makes one that has.")
    peer = peer_python()
    ways = ["alone", "ddp", *(f"in-place-{stage}" for stage in args.in_place)]
    for stage in args.stages:
        ways += [f"deepspeed-{stage}"] * (peer is not None) + [f"shardline-{stage}"]
    args.out.mkdir(parents=True, exist_ok=True)
    options = ["--steps", str(args.steps)] + ["--quick"] * args.quick
    pythons = {way: (peer if way.startswith("deepspeed") else None) or sys.executable for way in ways}
    rounds: list[dict[str, dict[str, Any]]] = []
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "rounds": rounds}
    for number in range(args.rounds):
        rounds.append({way: patient(way, pythons[way], options, args.out / f"{way}.json") for way in ways})
        result["machine"] = rounds[0]["alone"]["machine"]
        (args.out / "rounds.json").write_text(json.dumps(result))
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--stages", type=int, nargs="*", default=[2, 3], help="of DeepSpeed and its stand-in")
    parser.add_argument("--in-place", type=int, nargs="*", default=[0, 1, 2, 3], help="stages of Shardline in place")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/trainer", help="where rounds.json is kept")
    parser.add_argument("--read", type=Path, nargs="+", help="take the figures of these files, and measure nothing")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does the benchmark itself work?")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= WARM + 1:
        raise SystemExit(f"--steps is {args.steps}; the first {WARM + 1} are not counted, so it takes more.")
    if args.job:
        train(args.job, args.steps, args.quick, str(args.out))
        return
    results = [json.loads(path.read_text()) for path in args.read] if args.read else [measured(args)]
    print(section(results), end="")
    if args.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
