"""The first minutes on a machine with one GPU, one command, under 9 minutes: is the path that a GPU takes right?

    make gpu-wheels           # where there is a package index: what is needed beside torch, as wheels in wheels/
    make gpu-first            # on the machine; everything is in runs/gpu-first/report.txt as it comes
    SIMCUDA=1 make gpu-first  # where there is no GPU: from start to end on a simulated device, with small models

Every section runs in a process of its own and has a time limit, so what fails or hangs costs nothing but its section. A
verdict is a line that begins with ``ok`` or ``FAILED``; all of them stand once more at the end. The exit status is 0 if
none failed.

It runs in the Python that starts it, which has torch. What else is needed and is not there comes from ``wheels/``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import gpu_use
from gpu_says import attempt, note, verdict, watched

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "wheels"
NEEDED = ("pydantic", "safetensors", "tqdm", "pytest", "pytest_timeout", "hypothesis")
BUDGET = 530.0
"""Seconds for everything."""
STAGES = range(4)
DTYPES = ("fp32", "bf16", "fp16")
SIMULATED = bool(os.environ.get("SIMCUDA"))

Line = Callable[[str], None]


# -- sections ----------------------------------------------------------------------------------------------------------


def machine() -> None:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    verdict("there is an accelerator", found is not None, found or "torch.accelerator.is_available() is False")
    note(f"python {sys.version.split()[0]}, torch {torch.__version__}, {torch.accelerator.device_count()} visible")
    if found is not None and found.type == "cuda":
        about = torch.cuda.get_device_properties(0)
        note(f"{torch.cuda.get_device_name()}, {about.total_memory / 2**30:.0f} GiB, {about.major}.{about.minor}")
        if not SIMULATED:
            note(f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    import shardline

    note(f"shardline {shardline.__version__}")


def stages() -> None:
    """What a stage or offload changes is where things lie."""
    from tests.device.training import config, train

    for dtype in DTYPES:
        with attempt(f"{dtype}: stages"):
            runs = [train(config(stage, dtype), 6) for stage in STAGES]
            note(f"{dtype}: losses {[round(loss, 6) for loss in runs[0][0]]}")
            verdict(f"{dtype}: the stages agree bit by bit", all(run == runs[0] for run in runs), _apart(runs))
        for stage in STAGES:
            with attempt(f"{dtype}: offload at stage {stage}"):
                away = train(config(stage, dtype, offload=True), 6)
                off = max(abs(a - b) / abs(b) for a, b in zip(away[0], runs[0][0], strict=True))
                within = 1e-5 if dtype == "fp32" else 2e-2
                verdict(f"{dtype}: offload at stage {stage} agrees within {within:g}", off <= within, f"{off:.2g}")


def _apart(runs: Sequence[tuple[list[float], float]]) -> str:
    return ", ".join(
        f"stage {stage}: loss {max(abs(a - b) for a, b in zip(run[0], runs[0][0], strict=True)):.2g}"
        f", weights {abs(run[1] - runs[0][1]):.2g} off"
        for stage, run in enumerate(runs)
        if run != runs[0]
    )


def hand() -> None:
    """A plain loop, with torch's optimizer and clipping."""
    import torch
    from torch.nn.utils import clip_grad_norm_

    from tests.device.training import Net, batch, config, train

    device = torch.accelerator.current_accelerator()
    torch.manual_seed(0)
    model = Net().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    expected = []
    for number in range(6):
        loss = model(*batch(number, 0, device))
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for stage in STAGES:
        with attempt(f"fp32 at stage {stage} against a hand-written loop"):
            losses, _ = train(config(stage, "fp32"), 6)
            off = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
            verdict(f"fp32 at stage {stage} is the hand-written loop within 1e-5", off <= 1e-5, f"{off:.2g}")


def waits() -> None:
    """Where the host waits for the device, once the engine has settled."""
    import torch

    from tests.device.training import batch, config, make

    seen: Counter[str] = Counter()
    with watched(seen):
        torch.ones(1, device=torch.accelerator.current_accelerator()).item()
    verdict("a wait is seen where there is one", seen.total() == 1, dict(seen))
    cases = {f"{dtype} at stage {stage}": config(stage, dtype) for dtype in DTYPES for stage in STAGES}
    cases |= {f"bf16 with {name}": config(2, "bf16", optimizer=name) for name in ("Lamb", "Lion", "SGD")}
    cases["bf16 at stage 3, accumulation"] = config(3, "bf16", accumulation=2)
    cases["bf16 at stage 3, recomputation"] = config(3, "bf16", activation_checkpointing=RECOMPUTED)
    for name, settings in cases.items():
        with attempt(f"{name}: where the host waits"):
            engine = make(settings)
            micro = settings["gradient_accumulation_steps"]
            batches = [batch(number, 0, engine.device) for number in range(6 * micro)]
            found: Counter[str] = Counter()
            for number, given in enumerate(batches):
                with watched(found) if number >= 4 * micro else contextlib.nullcontext():
                    engine.backward(engine(*given))
                    engine.step()
            engine.destroy()
            allowed = 1 if name.startswith("fp16") else 0
            verdict(f"{name}: the host waits at most {2 * allowed} times in two steps",
                    found.total() <= 2 * allowed, found.total())  # fmt: skip
            for line, times in found.items():
                note(f"{times} at {line}")


def memory() -> None:
    """Bytes of one parameter between two steps, at the peak of a step, and what the engine leaves behind."""
    import torch
    from torch import Tensor, nn

    from tests.device.training import config, make

    layers, width = 8, 256 if SIMULATED else 2048
    numel = layers * width * width
    kept = torch.accelerator.memory

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x.float().square().mean()

    def measure(settings: dict[str, Any]) -> tuple[float, float, int]:
        gc.collect()
        before = kept.memory_allocated()
        engine = make(settings, Deep)
        x = torch.randn(4, width, device=engine.device)
        for _ in range(3):
            torch.accelerator.synchronize()
            kept.reset_peak_memory_stats()
            engine.backward(engine(x))
            engine.step()
        torch.accelerator.synchronize()
        peak = (kept.max_memory_allocated() - before) / numel
        rest = (kept.memory_allocated() - before) / numel
        engine.destroy()
        del engine, x
        return rest, peak, kept.memory_allocated() - before

    bytes_at_rest = {
        "bf16": (config(2, "bf16"), 14, 4),  # weight 2, master 4, two moments 8; a gradient added up in fp32
        "fp32": (config(2, "fp32"), 12, 4),
        "bf16 offload": (config(2, "bf16", offload=True), 2, 2),
    }
    for name, (settings, expected, gradient) in bytes_at_rest.items():
        with attempt(f"{name}: bytes of one parameter"):
            measure(settings)  # what libraries keep for themselves, such as cuBLAS's workspaces
            rest, peak, left = measure(settings)
            most = expected + gradient + 8 / layers
            verdict(f"{name}: {expected} bytes of one parameter at rest", abs(rest - expected) <= 0.2, f"{rest:.2f}")
            verdict(f"{name}: at most {most:g} bytes of one parameter at the peak", peak <= most, f"{peak:.2f}")
            verdict(f"{name}: nothing is left after destroy", left == 0, f"{left} bytes")


def nccl() -> None:
    """What the engine asks of NCCL, in a group of one rank: every dtype, in place, and added to what is there."""
    import torch
    import torch.distributed as dist

    import shardline
    from shardline.comm import TransitionLog
    from shardline.comm.transport import AllToAllTransport, NcclTransport

    shardline.init_distributed()
    group = dist.new_group([0])
    device = torch.device(torch.accelerator.current_accelerator().type, 0)
    verdict(
        "the group's backend is nccl", group._get_backend(device).name() == "nccl", group._get_backend(device).name()
    )

    class Scratch:
        def borrow(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(numel, dtype=dtype, device=device)

        def give_back(self, buffer: torch.Tensor) -> None:
            pass

    for kind in (NcclTransport, AllToAllTransport):
        transport = kind(group, TransitionLog())
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = f"{kind.__name__}, {str(dtype).removeprefix('torch.')}"
            whole = torch.arange(128, device=device).to(dtype)
            with attempt(f"{name}: gather"):
                buffer = torch.empty_like(whole)
                transport.gather(0, buffer, (0, 128), whole.clone()).wait()
                transport.gather(0, buffer, (0, 128)).wait()  # in place
                verdict(f"{name}: gather", torch.equal(buffer, whole))
            with attempt(f"{name}: reduce"):
                good = True
                for target in {dtype, torch.float32}:
                    out = torch.ones(128, dtype=target, device=device)
                    transport.reduce(0, whole, (0, 128), out, add=True, scratch=Scratch()).wait()
                    good &= torch.equal(out, whole.to(target) + 1)
                buffer = whole.clone()
                transport.reduce(0, buffer, (0, 128), buffer[:128], add=False, scratch=Scratch()).wait()  # in place
                verdict(f"{name}: reduce", good and torch.equal(buffer, whole))
    with attempt("rows in fp64"):
        row = torch.arange(8, dtype=torch.float64, device=device)
        rows = torch.empty(1, 8, dtype=torch.float64, device=device)
        dist.all_gather(list(rows.unbind()), row, group=group)
        verdict("rows in fp64", torch.equal(rows[0], row))
    with attempt("bytes"):
        wire = torch.arange(64, dtype=torch.uint8, device=device)
        dist.broadcast(wire, group_src=0, group=group, async_op=True).wait()
        verdict("bytes", wire.tolist() == list(range(64)))
    dist.destroy_process_group()


def resume() -> None:
    from tests.device.training import config, make, steps

    cases = {"stage 3": (config(3), False), "stage 1 in the background": (config(1), True),
             "stage 2 with offload in the background": (config(2, offload=True), True),
             "fp16 at stage 2": (config(2, "fp16"), False)}  # fmt: skip
    for name, (settings, background) in cases.items():
        with attempt(f"{name}: a resume"), tempfile.TemporaryDirectory() as folder:
            engine = make(settings)
            steps(engine, 3)
            engine.save_checkpoint(folder, async_save=background)
            expected = [float(loss) for loss in steps(engine, 3, 3)]
            engine.destroy()
            engine = make(settings)
            engine.load_checkpoint(folder)
            counters = engine.global_steps, engine.global_samples, engine.skipped_steps
            found = [float(loss) for loss in steps(engine, 3, 3)]
            engine.destroy()
            verdict(f"{name}: a resume is the run without one, bit by bit", found == expected)
            verdict(f"{name}: counters after a resume", counters == (3, 3 * 4, 0), counters)


def freezing() -> None:
    """A weight inside of a block is frozen and unfrozen again: the runs are cut elsewhere, and no value changes."""
    from tests.device.training import config, make, steps

    for dtype in ("fp32", "bf16"):
        runs = []
        for stage in STAGES:
            with attempt(f"{dtype}: freezing at stage {stage}"):
                engine = make(config(stage, dtype))
                weight = engine.module.blocks[1].up.weight
                losses = steps(engine, 2)
                for number, trained in ((2, False), (4, True)):
                    weight.requires_grad_(trained)
                    losses += steps(engine, 2, number)
                runs.append([float(loss) for loss in losses])
                engine.destroy()
        same = len(runs) == 4 and all(run == runs[0] for run in runs)
        verdict(f"{dtype}: the stages agree bit by bit over freezing", same)


RECOMPUTED = {"enabled": True, "every": 1}


def recomputation() -> None:
    from tests.device.training import config, train

    for stage in (0, 2, 3):
        expected = train(config(stage))
        for offload in (False, True):
            name = f"stage {stage}{', inputs on the host' * offload}"
            with attempt(f"{name}: recomputation"):
                found = train(config(stage, activation_checkpointing=RECOMPUTED | {"offload": offload}))
                verdict(f"{name}: recomputation gives the same bits", found == expected)


def streams() -> None:
    """Accesses of two streams without an order: by torch's sanitizer on a GPU, by the simulated device's clocks."""
    from tests.device.training import config, train

    if SIMULATED:
        from tests.device import simulated

        sanitizer = contextlib.nullcontext()
        unordered: Callable[[], Sequence[object]] = simulated.races
    else:
        from torch.cuda import _sanitizer

        from shardline.runtime.modes import keep

        # the sanitizer is a dispatch mode, which the engine's own work would not meet
        sanitizer = keep(_sanitizer.cuda_sanitizer.dispatch)
        unordered = tuple
    cases = {f"{dtype} at stage {stage}": config(stage, dtype) for dtype in ("fp32", "bf16") for stage in STAGES}
    cases["bf16 at stage 2 with offload"] = config(2, offload=True)
    cases["bf16 at stage 3, recomputation"] = config(3, activation_checkpointing=RECOMPUTED | {"offload": True})
    with sanitizer:
        with attempt("two streams without an order"):
            seen = False
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # torch prints the stacks of what it finds
                    planted()
                seen = bool(unordered())
            except Exception as error:
                seen = type(error).__name__ == "CUDASanitizerErrors"
            verdict("two streams without an order are seen where there are two", seen)
        for name, settings in cases.items():
            with attempt(f"{name}: order of streams"):
                train(settings, 3)
                found = list(unordered())
                verdict(f"{name}: no access of two streams without an order", not found, "; ".join(map(str, found)))


def planted() -> None:
    """A stream changes what another made, and waits for nothing."""
    import torch

    made = torch.zeros(1 << 16, device=torch.accelerator.current_accelerator())
    with torch.Stream(made.device):
        made.add_(1)
    torch.accelerator.synchronize()


def tests() -> int:
    """The files that hold tests marked gpu, and of them these tests."""
    # assembled, so that this file is not found by its own search
    mark = "mark." + "gpu"
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if mark in path.read_text()]
    options = ["-m", "gpu", "-q", "-ra", "-p", "no:cacheprovider", "--timeout", "60", "--continue-on-collection-errors"]
    # a warning that a new version brings is reported, and does not hide whether the code works
    return subprocess.call([sys.executable, "-m", "pytest", *options, "-W", "default", *map(str, files)], cwd=ROOT)


def doctor() -> int:
    return subprocess.call([sys.executable, "-m", "shardline", "doctor"], cwd=ROOT)


def update() -> int:
    """``engine.step()`` alone, beside the same by hand, and its kernels."""
    return figures("update", "copy,kernels,update")


def benchmark() -> int:
    return figures("benchmark", "train,checks,ranks")


def figures(name: str, parts: str) -> int:
    """Parts of ``gpu.py``, one round of them."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cuda", "--parts", parts, "--rounds", "1"]
    engines = "compute,shardline-0,shardline-3" if SIMULATED else "compute,fsdp2,shardline-0,shardline-3"
    command += ["--engines", engines, *(["--size", "tiny"] if SIMULATED else [])]
    return subprocess.call([*command, "--out", f"{os.environ['GPU_FIRST_OUT']}/{name}"], cwd=ROOT)


# -- all of them -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """``run`` gives its verdicts itself, or returns an exit status; ``limit`` is in seconds."""

    run: Callable[[], int | None]
    limit: float


SECTIONS = {
    "machine": Section(machine, 60),
    "stages": Section(stages, 60),
    "hand": Section(hand, 40),
    "waits": Section(waits, 60),
    "memory": Section(memory, 40),
    "nccl": Section(nccl, 40),
    "resume": Section(resume, 40),
    "freezing": Section(freezing, 40),
    "recomputation": Section(recomputation, 40),
    "streams": Section(streams, 80),
    "loops": Section(gpu_use.loops, 50),
    "features": Section(gpu_use.features, 50),
    "compiled": Section(gpu_use.compiled, 120),
    "clients": Section(gpu_use.clients, 90),
    "deepspeed": Section(gpu_use.deepspeed, 60),
    "observing": Section(gpu_use.observing, 40),
    "doctor": Section(doctor, 60),
    "tests": Section(tests, 100),
    "update": Section(update, 120),
    "benchmark": Section(benchmark, 240),
}


def run(name: str, command: Sequence[str], env: dict[str, str], limit: float, say: Line) -> list[str]:
    """Run a section; what it prints is said as it comes. Returns its verdicts, at least one."""
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    verdicts = []
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip("\n"))
            if line.startswith(("ok: ", "FAILED: ")):
                verdicts.append(line.strip())
    status = process.returncode
    timer.cancel()
    timer.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what the section left behind
    if late.is_set():
        verdicts.append(f"FAILED: took more than {limit:.0f} s")
    elif status:
        verdicts.append(f"FAILED: exit status {status}")
    elif not verdicts:
        verdicts.append("ok: exit status 0")
    return [verdict.replace(": ", f": [{name}] ", 1) for verdict in verdicts]


def environment(out: Path) -> dict[str, str]:
    """For the sections: sources, wheels where something is missing, and the simulated device if asked for."""
    places = [str(ROOT / "src"), str(ROOT)]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        wheels = sorted(map(str, WHEELS.glob("*.whl")))
        if not wheels:
            sys.exit(f"Not installed here: {', '.join(missing)}. Run `make gpu-wheels` where there is a package index, "
                     f"and bring {WHEELS.name}/ along with the sources.")  # fmt: skip
        site = out / "site"
        options = [
            "-q",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--no-cache-dir",
            "--upgrade",
            "--target",
            str(site),
        ]
        if subprocess.call([sys.executable, "-m", "pip", "install", *options, *wheels]):
            sys.exit(f"The wheels in {WHEELS} do not install in {sys.executable} (Python {sys.version.split()[0]}).")
        places.insert(0, str(site))
    if SIMULATED:
        places.insert(0, str(ROOT / "tests/device/everywhere"))
        subprocess.check_call([sys.executable, "-c", "import tests.device.simulated"], cwd=ROOT)  # compiles it once
    env = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    env |= {"PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1", "GPU_FIRST_OUT": str(out)}
    env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits for the same products
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        env.setdefault(name, "lo")
    return env


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-first")
    parser.add_argument("--only", help="sections, by commas: " + ", ".join(SECTIONS))
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.section:
        return SECTIONS[args.section].run() or 0
    names = args.only.split(",") if args.only else list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "report.txt").open("w") as report:
        return run_all(names, environment(out), report)


def run_all(names: Sequence[str], env: dict[str, str], report: IO[str]) -> int:
    began = time.monotonic()

    def say(line: str) -> None:
        print(line, flush=True)
        report.write(line + "\n")
        report.flush()

    verdicts = []
    for name in names:
        left = BUDGET - (time.monotonic() - began)
        if left < 5:
            found = [f"FAILED: [{name}] not run, {BUDGET:.0f} s are over"]
        else:
            say(f"[{time.monotonic() - began:4.0f} s] {name}")
            command = [sys.executable, __file__, "--section", name]
            found = run(name, command, env, min(SECTIONS[name].limit, left), say)
        verdicts += found
        if name == "machine" and any(line.startswith("FAILED") for line in found):
            break  # nothing else can run
    say("")
    for line in verdicts:
        say(line)
    failed = sum(line.startswith("FAILED") for line in verdicts)
    say(f"{len(verdicts) - failed} ok, {failed} failed in {time.monotonic() - began:.0f} s; report: {report.name}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
