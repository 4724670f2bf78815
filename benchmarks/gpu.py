"""One large GPU, one command, under 8 minutes: speed, memory, the update against the copy bandwidth, syncs, streams.

    python benchmarks/gpu.py                # a GPT of 1.0B parameters in bf16; results in runs/gpu
    python benchmarks/gpu.py --device cpu   # the same paths on a tiny GPT, to test them where there is no GPU
    python benchmarks/gpu.py --size tiny    # the tiny GPT on the GPU

Every part runs in a process of its own, and the engines take turns: A B C A B C. Ratios are taken within a round.

* train: tokens/s, TFLOP/s and peak memory of the hand-written loop, FSDP2, DeepSpeed (where it is installed) and
  Shardline, on one rank. A step's work is 6 operations per token and weight, and 12 x depth x width x time per token
  for attention, not counting what is computed twice.
* kernels: those of an update, one at a time, as bytes per second.
* update: what ``engine.step()`` takes, as bytes per second beside a measured copy of a large buffer, and beside the
  same by hand. It moves 42 bytes per parameter: 4 for the norm; 32 for AdamW (master, both moments and the fp32
  gradient in and out, since fused kernels write the gradient back that they have scaled); 6 to round the weight. By
  hand it is 46, as clipping is a pass of its own (8) and AdamW writes no gradient (28).
* checks: how often two steps wait for the GPU, by CUDA's sync debug mode; kernels and copies by stream, from a profile.
* ranks: two ranks that share the GPU over gloo train as one process with both ranks' data does, at every stage.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACES = [str(ROOT / "src"), str(ROOT / "benchmarks")]
sys.path[:0] = PLACES

from gpu_says import is_wait  # noqa: E402

ENGINES = ("compute", "fsdp2", "deepspeed-2", "deepspeed-3", "shardline-0", "shardline-2", "shardline-3")
BYTES_PER_PARAMETER = 42
"""What ``engine.step()`` moves."""
LIMIT = 150.0
"""Seconds that one part may take."""


@dataclass(frozen=True)
class Size:
    """A GPT of ``depth`` blocks, ``micro`` sequences of ``time`` tokens, and how much is measured.

    Attributes:
        copy: bytes of the buffer whose copy is timed.
        steps: of one turn of an engine.
        shared: the model of two ranks that share the device, by its name in ``models.py``.
    """

    depth: int
    width: int
    vocabulary: int
    time: int
    micro: int
    copy: int
    steps: int
    shared: str

    def model(self) -> Any:
        from models import gpt

        return gpt(self.depth, self.width, self.vocabulary, self.time, self.micro, turn=1)


SIZES = {
    "large": Size(24, 1792, 32768, 1024, micro=8, copy=1 << 30, steps=8, shared="gpt"),
    "tiny": Size(2, 64, 256, 16, micro=2, copy=1 << 22, steps=2, shared="tiny"),
}


def part_train(device: str, size: Size, engine: str) -> dict[str, Any]:
    """One turn of an engine on one rank."""
    import torch
    from loops import ENGINES as MAKERS
    from loops import Work

    _world(device)
    spec = size.model()
    with torch.device(device):
        model = spec.fresh()
    batches = spec.data(0, torch.bfloat16, device)
    parameters = sum(param.numel() for param in model.parameters())
    per_token = operations_per_token(model, size)
    step = MAKERS[engine].make(model, Work(torch.bfloat16, micro=size.micro))
    for batch in batches[:3]:
        step([batch])
    memory = _Memory(device)
    seconds = []
    for number in range(size.steps):
        _wait(device)
        began = time.perf_counter()
        loss = step([batches[number % len(batches)]])
        _wait(device)
        seconds.append(time.perf_counter() - began)
    taken = statistics.median(seconds)
    return {
        "seconds": taken,
        "tokens/s": spec.samples / taken,
        "TFLOP/s": spec.samples * per_token / taken / 1e12,
        "peak GB": memory.peak() / 1e9,
        "loss": loss.item(),
        "parameters": parameters,
    }


def operations_per_token(model: Any, size: Size) -> int:
    """Floating-point operations of forward and backward, without the tables that are looked up."""
    looked_up = model.tokens.weight.numel() + model.positions.weight.numel()
    weights = sum(param.numel() for param in model.parameters()) - looked_up
    return 6 * weights + 12 * size.depth * size.width * size.time


def part_copy(device: str, size: Size) -> dict[str, Any]:
    """The copy bandwidth: bytes read and written per second."""
    import torch

    source, target = (torch.ones(size.copy, dtype=torch.uint8, device=device) for _ in range(2))
    return {"bytes/s": 2 * size.copy / _timed(device, lambda: target.copy_(source), 10)}


def part_kernels(device: str, size: Size) -> dict[str, Any]:
    """What an update is made of, a kernel at a time: bytes per second on matrices of one block, as they lie in buckets.

    ``each``: a call for each tensor; ``foreach``: one for all of them, which torch cuts into launches of few blocks.
    """
    import torch
    from loops import ADAMW

    count, numel = size.depth, 4 * size.width**2
    wide = [torch.ones(numel, device=device) for _ in range(count)]
    narrow = [torch.ones(numel, device=device, dtype=torch.bfloat16) for _ in range(count)]
    params = [torch.nn.Parameter(torch.ones(numel, device=device)) for _ in range(count)]
    for param, grad in zip(params, wide, strict=True):
        param.grad = grad
    optimizer = torch.optim.AdamW(params, fused=True, **ADAMW)
    scale, found_inf = torch.ones((), device=device), torch.zeros((), device=device)

    def scaled() -> None:
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]

    def copy_each(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    row = min(numel, 16_384)
    actions: dict[str, tuple[int, int, Callable[[], Any]]] = {  # tensors, bytes of an element, what is done
        "widen one": (1, 6, lambda: wide[0].copy_(narrow[0])),
        "widen one, foreach": (1, 6, lambda: torch._foreach_copy_(wide[:1], narrow[:1])),
        "widen each": (count, 6, lambda: copy_each(wide, narrow)),
        "widen, foreach": (count, 6, lambda: torch._foreach_copy_(wide, narrow)),
        "round each": (count, 6, lambda: copy_each(narrow, wide)),
        "round, foreach": (count, 6, lambda: torch._foreach_copy_(narrow, wide)),
        "norms of rows": (count, 4, lambda: [torch.linalg.vector_norm(g.view(-1, row), dim=1) for g in wide]),
        "norms, foreach": (count, 4, lambda: torch._foreach_norm(wide)),
        "AdamW": (count, 28, optimizer.step),
        "AdamW with a scale": (count, 32, scaled),
    }
    return {
        f"{name}, bytes/s": tensors * numel * each / _timed(device, action, 5)
        for name, (tensors, each, action) in actions.items()
    }


def part_update(device: str, size: Size, stage: str) -> dict[str, Any]:
    """``engine.step()`` alone, after a backward each time, and in turns with it the same by hand.

    By hand gradients become fp32 (``collect``) before they are clipped and used, which the engine does in its backward.
    """
    import torch
    from loops import ADAMW, Masters, Work, config

    import shardline

    _world(device)
    spec = size.model()
    with torch.device(device):
        model, twin = spec.fresh(), spec.fresh()
    parameters = sum(param.numel() for param in model.parameters())
    engine = shardline.initialize(model=model, config=config(Work(torch.bfloat16, micro=size.micro), int(stage)))[0]
    masters = Masters(twin.parameters(), torch.bfloat16)
    optimizer = torch.optim.AdamW(masters.masters, fused=True, **ADAMW)
    turns: dict[str, list[tuple[float, float]]] = {"step": [], "collect": [], "hand": []}
    batches = spec.data(0, torch.bfloat16, device)
    for batch in batches[:7]:
        engine.backward(engine(*batch))
        turns["step"].append(_apart(device, engine.step))
        twin(*batch).backward()
        turns["collect"].append(_apart(device, masters.collect))
        turns["hand"].append(_apart(device, lambda: masters.update(optimizer)))
    middle = {name: [statistics.median(each) for each in zip(*found[2:], strict=True)] for name, found in turns.items()}
    ratios = [step[1] / hand[1] for step, hand in zip(turns["step"][2:], turns["hand"][2:], strict=True)]
    engine.backward(engine(*batches[7]))
    kernels = _kernels(device, engine.step)
    twin(*batches[7]).backward()
    masters.collect()
    by_hand = _kernels(device, lambda: masters.update(optimizer))
    return {
        "seconds": middle["step"][1],
        "seconds until it returns": middle["step"][0],
        "bytes/s": BYTES_PER_PARAMETER * parameters / middle["step"][1],
        "by hand": middle["hand"][1],
        "by hand until it returns": middle["hand"][0],
        "collect by hand": middle["collect"][1],
        "step / by hand": statistics.median(ratios),
        "kernels": kernels,
        "kernels by hand": by_hand,
    }


def _apart(device: str, action: Callable[[], Any]) -> tuple[float, float]:
    """Seconds until ``action`` returns, and until the device has done what it asked for."""
    _wait(device)
    began = time.perf_counter()
    action()
    returned = time.perf_counter() - began
    _wait(device)
    return returned, time.perf_counter() - began


def _kernels(device: str, action: Callable[[], Any]) -> dict[str, Any]:
    """What the device does for ``action``: how many kernels and copies, the ms of them, the ms from first to last.

    ``table``: those that take longest by name, as (ms, calls, name).
    """
    from torch.profiler import ProfilerActivity, profile, supported_activities

    _wait(device)
    # torch's CPU build, which a simulated device runs on, records no CUDA
    with profile(activities={ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()) as profiler:
        action()
        _wait(device)
    events = profiler.events() or []
    # ranges such as "Optimizer.step" are shown on the device, too
    found = [event for event in events if event.device_type.name != "CPU" and not event.is_user_annotation]
    names: dict[str, tuple[float, int]] = {}
    for event in found:
        ms, calls = names.get(event.name, (0.0, 0))
        names[event.name] = (ms + event.time_range.elapsed_us() / 1e3, calls + 1)
    span = max((e.time_range.end for e in found), default=0) - min((e.time_range.start for e in found), default=0)
    table = sorted(((ms, calls, name[:200]) for name, (ms, calls) in names.items()), reverse=True)
    return {"count": len(found), "ms": sum(ms for ms, _, _ in table), "span ms": span / 1e3, "table": table[:12]}


def part_checks(device: str, size: Size, stage: str) -> dict[str, Any]:
    """How often two steps wait for the device, and a step under the profiler."""
    import torch
    from loops import ENGINES as MAKERS
    from loops import Work
    from torch.profiler import ProfilerActivity, profile, supported_activities

    _world(device)
    spec = size.model()
    with torch.device(device):
        model = spec.fresh()
    batches = spec.data(0, torch.bfloat16, device)
    step = MAKERS[f"shardline-{stage}"].make(model, Work(torch.bfloat16, micro=size.micro))
    for batch in batches[:3]:
        step([batch])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        step([batches[3]])
        step([batches[4]])
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    waits = sum(is_wait(warning.message) for warning in said)
    # torch's CPU build, which a simulated device runs on, records no CUDA
    with profile(activities={ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()) as profiler:
        step([batches[5]])
        _wait(device)
    streams: dict[str, float] = {}
    for event in profiler.events() or []:
        if event.device_type != torch.autograd.DeviceType.CPU:
            name = f"stream {event.device_resource_id}"
            streams[name] = streams.get(name, 0.0) + event.time_range.elapsed_us() / 1e3
    return {"waits": waits, "busy ms by stream": streams, "events": len(profiler.events() or [])}


def part_rank(device: str, size: Size, stage: str) -> dict[str, Any]:
    """One of two ranks on the same device over gloo; rank 0 also trains alone on both ranks' data."""
    import torch
    import torch.distributed as dist
    from loops import ENGINES as MAKERS
    from loops import Work, hand
    from models import MODELS

    _world(device, backend="gloo")
    rank, spec = dist.get_rank(), MODELS[size.shared]
    data = [spec.data(number, torch.float32, device) for number in range(2)]
    with torch.device(device):
        model, twin = spec.fresh(), spec.fresh()
    step = MAKERS[f"shardline-{stage}"].make(model, Work(micro=spec.samples))
    alone = hand(twin, Work(accumulation=2))
    worst = 0.0
    for number in range(5):
        loss = step([data[rank][number]])
        both = torch.stack([loss.detach().float().cpu(), torch.zeros(())])
        dist.all_reduce(both)
        expected = alone([data[0][number], data[1][number]]).item()
        worst = max(worst, abs(both[0].item() / 2 - expected) / abs(expected))
    return {"largest difference of the loss": worst}


def _world(device: str, backend: str | None = None) -> None:
    import torch
    import torch.distributed as dist

    from shardline.runtime.topology import default_backend

    if device == "cuda":
        torch.cuda.set_device(0)
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    dist.init_process_group(backend or default_backend())


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _timed(device: str, action: Callable[[], Any], times: int, warm: int = 2) -> float:
    """Seconds of one call, from the median of ``times``."""
    seconds = []
    for number in range(warm + times):
        _wait(device)
        began = time.perf_counter()
        action()
        _wait(device)
        if number >= warm:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


class _Memory:
    """The most that is allocated from now on: by torch on a GPU, by the process on CPU."""

    def __init__(self, device: str) -> None:
        import measure
        import torch

        self.peak = torch.cuda.max_memory_allocated if device == "cuda" else measure.peak
        (torch.cuda.reset_peak_memory_stats if device == "cuda" else measure.restart_peak)()


PARTS = {
    "train": part_train,
    "copy": part_copy,
    "kernels": part_kernels,
    "update": part_update,
    "checks": part_checks,
    "rank": part_rank,
}
CHOICES = ("copy", "kernels", "train", "update", "checks", "ranks")


def run(device: str, size: str, part: str, *arguments: str, world: int = 1) -> dict[str, Any]:
    """A part in a process of its own, or in ``world`` of them; rank 0's answer, or what went wrong."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--device", device, "--size", size, "--part", part, *arguments]
    places = [*filter(None, [os.environ.get("PYTHONPATH")]), *PLACES]
    processes = []
    for rank in range(world):
        launcher = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in launcher.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    deadline = time.monotonic() + LIMIT
    answers = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
            answers.append(
                json.loads(lines[-1][7:]) if lines else {"error": err.strip().splitlines()[-1:] or "nothing"}
            )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT:.0f} s"}
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return answers[0]


def installed(engine: str) -> bool:
    import importlib.util

    return not engine.startswith("deepspeed") or importlib.util.find_spec("deepspeed") is not None


def main(arguments: Sequence[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, help="large on a GPU, tiny on CPU")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parts", default=",".join(CHOICES), help="some of these, by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    size = args.size or ("large" if args.device == "cuda" else "tiny")
    if args.part:
        print("RESULT " + json.dumps(PARTS[args.part[0]](args.device, SIZES[size], *args.part[1:])), flush=True)
        return 0

    began = time.monotonic()
    card = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    result: dict[str, Any] = {"device": card, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    print(", ".join(f"{key} {value}" for key, value in result.items()), flush=True)

    def note(name: str, answer: dict[str, Any]) -> dict[str, Any]:
        result[name] = answer
        print(f"[{time.monotonic() - began:4.0f} s] {name}: {_line(answer)}", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.json").write_text(json.dumps(result, indent=1))
        return answer

    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in CHOICES]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(CHOICES)}")
    copy = note("copy", run(args.device, size, "copy")) if "copy" in parts else {"error": "not asked for"}
    if "kernels" in parts:
        note("kernels", run(args.device, size, "kernels"))
    turns: dict[str, list[dict[str, Any]]] = {}
    for number in range(args.rounds if "train" in parts else 0):
        for engine in filter(installed, args.engines.split(",")):
            answer = note(f"train {engine} {number}", run(args.device, size, "train", engine))
            turns.setdefault(engine, []).append(answer)
    for stage in ("0", "3"):
        if "update" in parts:
            update = note(f"update stage {stage}", run(args.device, size, "update", stage))
            if "error" not in update and "error" not in copy:
                update["of copy"] = update["bytes/s"] / copy["bytes/s"]
        if "checks" in parts:
            note(f"checks stage {stage}", run(args.device, size, "checks", stage))
    for stage in ("0", "1", "2", "3") if "ranks" in parts else ():
        note(f"two ranks stage {stage}", run(args.device, size, "rank", stage, world=2))
    text = table(result, turns, copy)
    print(text)
    (args.out / "results.md").write_text(text)
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    failed = [name for name, answer in result.items() if isinstance(answer, dict) and "error" in answer]
    print(f"{time.monotonic() - began:.0f} s; results are in {args.out}" + f"; failed: {failed}" * bool(failed))
    return bool(failed)


def _line(answer: dict[str, Any]) -> str:
    """``key value, ...``, and below it the tables of kernels."""
    parts, below = [], ""
    for key, value in answer.items():
        if isinstance(value, dict) and "table" in value:
            below += f"\n    {key}: {value['count']}, {value['ms']:.2f} ms in {value['span ms']:.2f} ms"
            below += "".join(f"\n    {ms:9.3f} ms {calls:5d} x {name}" for ms, calls, name in value["table"])
        else:
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(parts) + below


def table(result: dict[str, Any], turns: dict[str, list[dict[str, Any]]], copy: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"{result['device']}, torch {result['torch']}, {result['date']}"]
    if turns:
        lines += ["", "| engine | tokens/s | TFLOP/s | step / hand loop | peak GB | loss |", "|---" * 6 + "|"]
    for engine, answers in turns.items():
        if any("error" in answer for answer in answers):
            lines.append(f"| {engine} | failed | | | | |")
            continue
        middle = {key: statistics.median(answer[key] for answer in answers)
                  for key in ("tokens/s", "TFLOP/s", "peak GB", "loss")}  # fmt: skip
        pairs = [a["seconds"] / b["seconds"] for a, b in zip(answers, turns.get("compute", []), strict=False)
                 if "error" not in b]  # fmt: skip
        ratio = f"{statistics.median(pairs):.3f}" if pairs else ""
        lines.append(f"| {engine} | {middle['tokens/s']:.0f} | {middle['TFLOP/s']:.4g} | {ratio} | "
                     f"{middle['peak GB']:.2f} | {middle['loss']:.4f} |")  # fmt: skip
    if "error" not in copy:
        lines += ["", f"Copy: {copy['bytes/s'] / 1e9:.0f} GB/s."]
    for name, answer in result.items():
        if name.startswith(("kernels", "update", "checks", "two")):
            lines.append(f"{name}: {_line(answer)}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
