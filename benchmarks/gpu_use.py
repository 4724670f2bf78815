"""Sections of ``gpu_first.py``: an engine as loops and clients use it, and what shows it at work."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_says import attempt, note, verdict, watched

STAGES = range(4)
SIMULATED = bool(os.environ.get("SIMCUDA"))


def apart(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest difference, relative to what is expected; infinite if there are more or fewer."""
    if len(found) != len(expected):
        return float("inf")
    return max(abs(a - b) / max(abs(b), 1e-8) for a, b in zip(found, expected, strict=True))


# -- a loop of the user's own ------------------------------------------------------------------------------------------


def loops() -> None:
    """``shardline.shard`` behind a loop that stays as it is: windows, clipping, a scaler, a group, an average."""
    for precision, within in (("fp32", 1e-5), ("bf16", 2e-3), ("fp16", 2e-3)):
        expected = looped(None, precision)
        note(f"{precision}: losses {[round(loss, 6) for loss in expected[0]]}")
        for stage in STAGES:
            name = f"{precision} at stage {stage} in place"
            with attempt(name):
                found = looped(stage, precision)
                for what, got, wanted in zip(("losses", "norms", "weights", "average"), found, expected, strict=True):
                    off = apart(got, wanted)
                    verdict(f"{name}: {what} of the plain loop within {within:g}", off <= within, f"{off:.2g}")


def looped(stage: int | None, precision: str) -> tuple[list[float], ...]:
    """Losses, norms before clipping, magnitudes of weights and of their moving average.

    Two backwards a step; a frozen norm; the head joins as a group of its own after two steps. Below fp32 by autocast,
    in fp16 with a ``GradScaler``.
    """
    import torch
    from torch.nn.utils import clip_grad_norm_

    import shardline
    from tests.device.training import Net, batch

    device = torch.accelerator.current_accelerator()
    torch.manual_seed(0)
    model = Net().to(device)
    for frozen in (model.blocks[0].norm, model.head):
        frozen.requires_grad_(False)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, enabled=precision == "fp16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    engine = ema = None
    if stage is not None:
        zero = {"stage": stage, "unit_min_numel": 1, "stage3_param_persistence_threshold": 0}
        engine = shardline.shard(model, optimizer, {"zero_optimization": zero})
        ema = shardline.EMA(engine, decay=0.8)
    averages = {name: param.detach().clone() for name, param in model.named_parameters()} if engine is None else {}
    losses, norms = [], []
    for number in range(6):
        if number == 2:
            model.head.requires_grad_(True)
            optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 5e-3})
        for micro in range(2):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = model(*batch(2 * number + micro, 0, device))
            scaler.scale(loss / 2).backward()
            losses.append(loss.item())
        scaler.unscale_(optimizer)
        norms.append(float(clip_grad_norm_(model.parameters(), 0.5)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if engine is None:
            for name, param in model.named_parameters():
                if param.requires_grad:
                    averages[name].lerp_(param.detach(), 0.2)
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    if engine is None or ema is None:
        weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    else:
        weights = engine.full_state_dict()
        with ema.applied():
            averages = engine.full_state_dict()
        engine.destroy()
    sizes = ([float(values[name].double().norm()) for name in names] for values in (weights, averages))
    return losses, norms, *sizes


# -- what an engine offers beside a step -------------------------------------------------------------------------------


def features() -> None:
    experts()
    for stage, dtype in ((0, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32")):
        with attempt(f"{dtype} at stage {stage}: serving"):
            serving(stage, dtype)
    values()
    for stage in (0, 3):
        with attempt(f"stage {stage}: inference"):
            inference(stage)


def experts() -> None:
    """``shardline.moe.MoE`` at stages 0 and 3, beside the same module in a plain loop."""
    import torch
    from torch import Tensor, nn

    from shardline.moe import MoE
    from tests.device.training import config, make

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inlet = nn.Linear(16, 32)
            expert = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
            self.experts = MoE(32, expert, num_experts=4, k=2, capacity_factor=1.25, top2_2nd_expert_sampling=False)

        def forward(self, x: Tensor) -> Tensor:
            output, balance, _ = self.experts(self.inlet(x))
            return output.square().mean() + 0.01 * balance

    device = torch.accelerator.current_accelerator()
    data = torch.randn(6, 32, 16, generator=torch.Generator().manual_seed(1)).to(device)
    torch.manual_seed(0)
    plain = Mixture().to(device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    expected = []
    for x in data:
        loss = plain(x)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for stage in (0, 3):
        with attempt(f"experts at stage {stage}"):
            engine = make(config(stage, "fp32"), Mixture)
            found = []
            for x in data:
                loss = engine(x)
                engine.backward(loss)
                engine.step()
                found.append(loss.item())
            engine.destroy()
            off = apart(found, expected)
            verdict(f"experts at stage {stage} train as in a plain loop within 1e-5", off <= 1e-5, f"{off:.2g}")


def serving(stage: int, dtype: str) -> None:
    """States leave the device and come back, weights are streamed meanwhile; nothing of it changes a run."""
    import torch

    from tests.device.training import config, make, steps

    name, memory = f"{dtype} at stage {stage}", torch.accelerator.memory
    expected = make(config(stage, dtype))
    losses = [float(loss) for loss in steps(expected, 4)]
    expected.destroy()
    engine = make(config(stage, dtype))
    found = [float(loss) for loss in steps(engine, 2)]
    gc.collect()
    held = memory.memory_allocated()
    moved = engine.offload_states()
    freed = held - memory.memory_allocated()
    verdict(f"{name}: offload_states frees what it says", moved > 0 and freed >= moved, f"{freed} of {moved} bytes")
    whole = engine.full_state_dict()
    streamed = dict(engine.stream_weights(bucket_bytes=1 << 12, dtype=torch.float32))
    alike = all(torch.equal(value.cpu(), whole[key].float().cpu()) for key, value in streamed.items())
    verdict(f"{name}: stream_weights gives the masters", alike and len(streamed) > 10, f"{len(streamed)} weights")
    back = engine.reload_states()
    verdict(f"{name}: reload_states brings back as much", back == moved, back)
    found += [float(loss) for loss in steps(engine, 2, first=2)]
    verdict(f"{name}: the run goes on to the same bits", found == losses)
    engine.destroy()


def values() -> None:
    """Weights of a model without any, from a mapping, from a checkpoint."""
    import torch
    from torch import nn

    import shardline
    from tests.device.training import Net, config, make, steps

    def without() -> nn.Module:
        with shardline.empty_weights(min_numel=1):
            return Net()

    torch.manual_seed(0)
    given = Net().state_dict()
    for stage in (0, 3):
        with attempt(f"stage {stage}: values from elsewhere"), tempfile.TemporaryDirectory() as folder:
            engine = make(config(stage))
            losses = [float(loss) for loss in steps(engine, 3)]
            engine.save_checkpoint(folder)
            after = {name: value.cpu() for name, value in engine.full_state_dict().items()}
            engine.destroy()
            engine = make(config(stage), without, init_fn=given)  # type: ignore[arg-type]
            same = [float(loss) for loss in steps(engine, 3)] == losses
            engine.destroy()
            verdict(f"stage {stage}: empty_weights filled by a mapping trains to the same bits", same)
            with shardline.checkpoint.read(folder) as snapshot:
                read = {name: snapshot[name] for name in snapshot}
                engine = make(config(stage), without, init_fn=snapshot)  # type: ignore[arg-type]
            found = {name: value.cpu() for name, value in engine.full_state_dict().items()}
            engine.destroy()
            good = all(torch.equal(value, after[name]) for name, value in found.items())
            good &= all(torch.equal(value, after[name]) for name, value in read.items())
            verdict(f"stage {stage}: checkpoint.read gives the weights that were saved", good and len(read) > 10)


def inference(stage: int) -> None:
    """Greedy generation by a model that is trained, and by one that is only evaluated."""
    import torch
    from torch import Tensor, nn

    import shardline
    from tests.device.training import VOCABULARY, WIDTH, Block, config

    class Speaker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids).cumsum(1)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    def speak(model: Any, device: torch.device) -> list[int]:
        ids = torch.arange(4, device=device)[None]
        with torch.no_grad():
            for _ in range(8):
                ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
        return ids.flatten().tolist()

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return Speaker()

    device = torch.accelerator.current_accelerator()
    expected = speak(fresh().to(device).eval(), device)
    trained = shardline.initialize(model=fresh(), config=config(stage, "fp32"))[0]
    only = {key: value for key, value in config(stage, "fp32").items() if key != "optimizer"}
    evaluated = shardline.initialize(model=fresh(), config=only)[0]
    for name, engine in (("that is trained", trained), ("that is only evaluated", evaluated)):
        engine.eval()
        verdict(f"stage {stage}: a model {name} generates as a plain one", speak(engine, engine.device) == expected)
        engine.destroy()


def compiled() -> None:
    """``engine.compile()`` with inductor, block by block."""
    import torch

    from tests.device.training import config, make, steps

    if SIMULATED:
        verdict("left out: inductor has no simulated device", True)
        return
    for stage, dtype, within in ((0, "fp32", 1e-4), (3, "fp32", 1e-4), (3, "bf16", 2e-2)):
        name = f"{dtype} at stage {stage}, compiled"
        with attempt(name):
            engine = make(config(stage, dtype))
            expected = [float(loss) for loss in steps(engine, 4)]
            engine.destroy()
            engine = make(config(stage, dtype))
            engine.compile()
            found = [float(loss) for loss in steps(engine, 4)]
            waited: Counter[str] = Counter()
            with watched(waited):
                engine_step(engine)
            engine.destroy()
            torch.compiler.reset()
            off = apart(found, expected)
            verdict(f"{name}: losses within {within:g}", off <= within, f"{off:.2g}")
            note(f"{name}: waits {dict(waited)}")


def engine_step(engine: Any, number: int = 9) -> None:
    from tests.device.training import batch

    engine.backward(engine(*batch(number, 0, engine.device)))
    engine.step()


# -- clients -----------------------------------------------------------------------------------------------------------


def missing(*packages: str) -> bool:
    """Whether one of them is not there, which is a note and no failure."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        verdict(f"left out: {', '.join(absent)} is not installed", True)
    return bool(absent)


def clients() -> None:
    """Transformers' Trainer, Accelerate and Lightning's Fabric over an engine, beside themselves without one."""
    if not missing("transformers", "accelerate"):
        beside(trainer, "Transformers' Trainer", (0, 2, 3))
        beside(accelerated, "Accelerate", (0, 3))
    if not missing("lightning"):
        beside(fabric, "Lightning's Fabric", (0, 3))


def deepspeed() -> int:
    """The stand-in for DeepSpeed under Transformers' own Trainer, in a script that is started as its users do."""
    if missing("transformers", "accelerate"):
        return 0
    if SIMULATED:
        verdict("left out: it asks for NCCL by name, which the simulated device does not have", True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            (Path(folder) / dtype).write_text(json.dumps(scripted(None, dtype == "bf16", folder)))
        return subprocess.call([sys.executable, "-m", "shardline.compat.deepspeed", __file__, folder])


def stood_in(folder: str) -> None:
    """What :func:`deepspeed` starts; the figures of the Trainer alone are in ``folder``."""
    for dtype in DTYPES:
        expected = json.loads((Path(folder) / dtype).read_text())
        compare(scripted, "the stand-in for DeepSpeed", dtype, (2, 3), expected, folder)


DTYPES = {"fp32": 1e-5, "bf16": 2e-3}
"""How far apart figures may be."""


def beside(train: Any, client: str, stages: Sequence[int]) -> None:
    """``train(stage, bf16, folder)`` gives losses and norms; without an engine for the stage ``None``."""
    for dtype in DTYPES:
        with attempt(f"{client} alone in {dtype}"), tempfile.TemporaryDirectory() as folder:
            compare(train, client, dtype, stages, train(None, dtype == "bf16", folder), folder)


def compare(train: Any, client: str, dtype: str, stages: Sequence[int], expected: dict[str, list[float]],
            folder: str) -> None:  # fmt: skip
    within = DTYPES[dtype]
    note(f"{client}, {dtype}: losses {[round(loss, 5) for loss in expected['losses']]}")
    for stage in stages:
        name = f"{client} in {dtype} at stage {stage}"
        with attempt(name):
            found = train(stage, dtype == "bf16", folder)
            for what, wanted in expected.items():
                off = apart(found[what], wanted)
                verdict(f"{name}: {what} within {within:g}", off <= within, f"{off:.2g}")


def trainer(stage: int | None, bf16: bool, folder: str) -> dict[str, list[float]]:
    from transformers import Trainer as Plain
    from transformers import TrainingArguments

    from shardline.integrations.transformers import Trainer
    from tests.integrations.clients import SAMPLES, common, config, fresh, gpt, texts

    fresh()
    arguments = TrainingArguments(**common(folder, use_cpu=False, bf16=bf16, num_train_epochs=1))
    given = {"model": gpt(), "args": arguments, "train_dataset": texts(1, SAMPLES)}
    made = Plain(**given) if stage is None else Trainer(**given, shardline=config(stage))
    return trained(made)


def scripted(stage: int | None, bf16: bool, folder: str) -> dict[str, list[float]]:
    from transformers import Trainer, TrainingArguments

    from tests.compat.clients.trainer import AUTO
    from tests.integrations.clients import SAMPLES, common, fresh, gpt, texts

    fresh()
    zero = {"zero_optimization": AUTO["zero_optimization"] | {"stage": stage}}
    given = {} if stage is None else {"deepspeed": AUTO | zero}
    arguments = TrainingArguments(**common(folder, use_cpu=False, bf16=bf16, num_train_epochs=1), **given)
    return trained(Trainer(gpt(), arguments, train_dataset=texts(1, SAMPLES)))


def trained(made: Any) -> dict[str, list[float]]:
    made.train()
    logs = made.state.log_history
    found = {
        "losses": [each["loss"] for each in logs if "loss" in each],
        "norms": [float(each["grad_norm"]) for each in logs if "grad_norm" in each],
    }
    engine = getattr(made, "engine", None) or getattr(made, "deepspeed", None)
    if engine is not None:
        engine.destroy()
    return found


def accelerated(stage: int | None, bf16: bool, folder: str) -> dict[str, list[float]]:
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator as Plain

    from shardline.integrations.accelerate import Accelerator
    from tests.integrations.clients import config, dataset, fresh, net

    fresh()
    options = {"mixed_precision": "bf16" if bf16 else "no", "gradient_accumulation_steps": 2}
    accelerator = Plain(**options) if stage is None else Accelerator(**options, shardline=config(stage))
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(dataset(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found: dict[str, list[float]] = {"losses": [], "norms": []}
    for x, y in [batch for _ in range(2) for batch in loader]:
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(x), y)
            accelerator.backward(loss)
            found["losses"].append(loss.item())
            if accelerator.sync_gradients:
                found["norms"].append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
    accelerator.free_memory(model)
    return found


def fabric(stage: int | None, bf16: bool, folder: str) -> dict[str, list[float]]:
    import torch
    import torch.nn.functional as F
    from lightning.fabric import Fabric

    from shardline.integrations.lightning import ShardlineFabricStrategy
    from tests.integrations.clients import config, dataset, net

    strategy = "auto" if stage is None else ShardlineFabricStrategy(config(stage))
    made = Fabric(accelerator="cuda", devices=1, strategy=strategy, precision="bf16-mixed" if bf16 else "32-true")
    made.launch()
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = made.setup(model, optimizer)
    found: dict[str, list[float]] = {"losses": [], "norms": []}
    x, y = (made.to_device(each) for each in dataset().tensors)
    for _ in range(6):
        loss = F.mse_loss(model(x), y)
        made.backward(loss)
        found["losses"].append(loss.item())
        found["norms"].append(float(made.clip_gradients(model, optimizer, max_norm=0.5)))
        optimizer.step()
        optimizer.zero_grad()
    for engine in getattr(made.strategy, "engines", []):
        engine.destroy()
    return found


# -- what shows an engine at work --------------------------------------------------------------------------------------


def observing() -> None:
    """All sinks and the watch at work: no wait, a report, memory counts, a summary, a trace."""
    for stage in (0, 3):
        with attempt(f"stage {stage}: a run that is looked at"), tempfile.TemporaryDirectory() as folder:
            looked_at(stage, Path(folder))
    with attempt("a rank that is slow"):
        launch = [sys.executable, "-m", "shardline", "run", "--nproc", "2", __file__, "slow"]
        done = subprocess.run(launch, capture_output=True, text=True, timeout=40)
        said = [line for line in (done.stdout + done.stderr).splitlines() if "shardline: " in line]
        found = [line for line in said if "rank 0 waits in" in line and "for rank 1" in line]
        verdict("a rank that is slow is named by the one that waits", done.returncode == 0 and bool(found))
        for line in found or (done.stdout + done.stderr).splitlines()[-20:]:
            note(line)


def slow() -> None:
    """What :func:`observing` starts on two ranks, which share the device: the second sleeps before its fourth step."""
    import time

    from tests.device.training import config, make

    engine = make(config(3) | {"watchdog": {"quiet_seconds": 1}})
    for number in range(5):
        if number == 3 and engine.comm.data.rank:
            time.sleep(4)
        engine_step(engine, number)
    engine.destroy()


def looked_at(stage: int, folder: Path) -> None:
    import torch

    from tests.device.training import batch, config, make

    name, on = f"stage {stage}", {"enabled": True, "output_path": str(folder)}
    sinks: dict[str, Any] = {
        "run_log": {"dir": str(folder)},
        "csv_monitor": on,
        "wall_clock_breakdown": True,
        "steps_per_print": 1,
        "comms_logger": {},
        "flops_profiler": {"enabled": True},
    }
    if importlib.util.find_spec("tensorboard") is not None:
        sinks["tensorboard"] = on
    note(f"{name}: sinks {', '.join(sinks)}")
    logging.getLogger("shardline").addHandler(logging.NullHandler())
    logging.getLogger("shardline").propagate = False
    engine = make(config(stage, "bf16") | sinks)
    batches = [batch(number, 0, engine.device) for number in range(8)]
    waited: Counter[str] = Counter()
    for number, given in enumerate(batches):
        with watched(waited) if number >= 6 else contextlib.nullcontext():
            engine.backward(engine(*given))
            engine.step()
    verdict(f"{name}: with all sinks two steps do not wait", not waited, dict(waited) or "")
    table = engine.summary()
    if stage == 0:
        print(table)
    size = sum(param.numel() for param in engine.module.parameters())
    counted = sum(row.parameters for row in table.rows)
    held = sum(row.weights + row.masters + row.states for row in table.rows)
    used = torch.accelerator.memory.memory_allocated()
    verdict(f"{name}: the summary counts every parameter", counted == size, f"{counted} of {size}")
    verdict(f"{name}: the summary's bytes are allocated", 0 < held <= used, f"{held} of {used} bytes")
    path = engine.profile(steps=1, dir=folder)
    engine_step(engine)
    events = json.loads(path.read_text())["traceEvents"]
    ranges = {event.get("name") for event in events}
    verdict(f"{name}: a trace has the phases", {f"shardline: {p}" for p in ("forward", "backward", "step")} <= ranges)
    kernels = [event for event in events if event.get("cat") == "kernel"]
    verdict(f"{name}: a trace has the device's kernels", bool(kernels) or SIMULATED, f"{len(kernels)} kernels")
    engine.destroy()
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    kinds = Counter(line["event"] for line in lines)
    verdict(f"{name}: every step is told", kinds["StepDone"] == 9, dict(kinds))
    traces = [line for line in lines if line["event"] == "MemoryOverStep"]
    note(f"{name}: memory over a step {str(traces)[:300]}")
    verdict(f"{name}: memory over a step is told", len(traces) == 1)
    made = subprocess.run([sys.executable, "-m", "shardline", "report", str(folder)], capture_output=True, text=True)
    page = folder / "report.html"
    verdict(f"{name}: a report of it", made.returncode == 0 and page.stat().st_size > 10_000, made.stderr[-300:])


if __name__ == "__main__":
    slow() if sys.argv[1] == "slow" else stood_in(sys.argv[1])
