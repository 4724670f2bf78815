"""What an engine shows of itself: its summary, traces, and what it costs to be looked at."""

from __future__ import annotations

import json
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from shardline.config import load_config
from shardline.errors import ConfigError, UsageError
from shardline.events import Event, MemoryOverStep, StepDone
from shardline.observe import Run, Sink, register
from shardline.observe.registry import check_packages, sinks_of
from tests.harness import Setup, start
from tests.models import Mlp, mse, regression


def train(engine, steps=1):
    for seed in range(steps):
        engine.backward(mse(engine, engine.module, regression(4, seed=seed + 10 * engine.global_rank)))
        engine.step()


def look_at(tmp: str):
    """On a rank: a profile, a summary, a trace of memory, and what was written, by one engine at stage 3."""
    config = Setup("bf16", "AdamW").config(3) | {
        "run_log": {"dir": f"{tmp}/run"},
        "flops_profiler": {"enabled": True, "detailed": False, "peak_tflops": 1.0},
        "activation_checkpointing": {"enabled": False},
    }
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "unit_min_numel": 0}
    engine = start(Mlp, config)
    events: list[Event] = []
    engine.events.subscribe(events.append)
    losses = []
    for seed in range(5):
        if seed == 3:
            path = engine.profile(steps=1, dir=f"{tmp}/profile")
            with pytest.raises(UsageError, match="while a profile runs"):
                engine.profile()
        loss = mse(engine, engine.module, regression(4, seed=seed + 10 * engine.global_rank))
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
    table = engine.summary()
    page = table._repr_html_()
    left = [name for unit in engine.trainables.layout.units for name in vars(unit) if name in ("unshard", "refresh")]
    engine.destroy()
    trace = json.loads(path.read_text())["traceEvents"]
    names = {event["name"] for event in trace if str(event.get("name", "")).startswith("shardline: ")}
    done = [event for event in events if isinstance(event, StepDone)]
    memory = [event for event in events if isinstance(event, MemoryOverStep)]
    return {
        "losses": losses,
        "told": [event.loss for event in done],
        "waited": [len(event.waited) for event in done],
        "sent": [dict(event.sent) for event in done],
        "flops": [event.flops for event in done],
        "mfu": [event.mfu for event in done],
        "names": names,
        "left": left,
        "rows": table.rows,
        "text": str(table),
        "page": page,
        "memory": [(event.step, len(event.bytes), {name for name, *_ in event.phases}) for event in memory],
    }


def test_what_an_engine_shows(ranks, tmp_path) -> None:
    first, second = ranks(look_at, 2, str(tmp_path))
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert first["told"] == second["told"] == pytest.approx(means, rel=1e-6), "the mean over ranks"
    assert first["waited"] == [2] * 5
    # Stage 3: each unit is gathered at most twice and reduced once; half of each buffer is the other's.
    size = sum(row.full for row in first["rows"])
    assert all(size // 2 <= sent["gather"] <= size and sent["reduce"] for sent in first["sent"][2:])
    weights = sum(p.numel() for p in Mlp().parameters() if p.dim() > 1)
    rows = 4
    inner = first["flops"][-1]
    assert inner is not None and 4 * rows * weights <= inner / 2 <= 6 * rows * weights, "2 forward, 2 to 4 backward"
    assert all(first["mfu"]) and first["flops"][0] == inner
    for words in ("forward", "backward", "step", "start gather", "wait for gather", "start reduce", "refresh"):
        assert any(name.startswith(f"shardline: {words}") for name in first["names"]), words
    assert any("weight" in name for name in first["names"]) and not first["left"]
    rows_ = first["rows"]
    assert sum(row.parameters for row in rows_) == sum(p.numel() for p in Mlp().parameters())
    assert all(row.masters == 2 * row.weights and row.states >= 2 * row.masters for row in rows_)
    assert all("sharded" in row.notes for row in rows_)
    assert "stage 3, bf16, 2 ranks on cpu" in first["text"] and first["page"].count("<tr>") == len(rows_) + 2
    assert [(step, phases) for step, _, phases in first["memory"]] == [(3, {"forward", "backward", "reduce", "step"})]
    assert not second["memory"] and not (tmp_path / "run" / "report.html").exists()


def recomputed():
    """On a rank: the notes of units in blocks of which every other one is recomputed."""
    block = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))  # noqa: E731
    config = Setup("fp32", "AdamW").config(0) | {"activation_checkpointing": {"enabled": True, "every": 2}}
    config["zero_optimization"]["unit_min_numel"] = 0
    engine = start(lambda: torch.nn.Sequential(*(block() for _ in range(4))), config)
    rows = engine.summary().rows
    engine.destroy()
    return [(row.name, row.notes) for row in rows]


def test_a_part_of_a_recomputed_block_is_recomputed(ranks) -> None:
    (rows,) = ranks(recomputed, 1)
    assert {name.partition(".")[0] for name, notes in rows if "recomputed" in notes} == {"0", "2"}
    assert {name.partition(".")[0] for name, _ in rows} == {"0", "1", "2", "3"}


def count_calls(tmp: str):
    """On a rank: events and writes of ten steps with sinks that write files."""
    config = Setup("fp32", "AdamW").config(2) | {
        "run_log": {"dir": f"{tmp}/run"},
        "csv_monitor": {"enabled": True, "output_path": tmp},
    }
    if find_spec("tensorboard"):
        config["tensorboard"] = {"enabled": True, "output_path": tmp, "job_name": "events"}
    engine = start(Mlp, config)
    train(engine, 4)
    threads = sorted(thread.name for thread in threading.enumerate())
    events: list[Event] = []
    engine.events.subscribe(events.append)
    collectives = []
    gather = engine.comm.all_gather_vector
    engine.comm.all_gather_vector = lambda vector: collectives.append(vector.numel()) or gather(vector)
    before, rows = writes(), rows_of_csv(tmp)
    train(engine, 10)
    written, rows = writes() - before, rows_of_csv(tmp) - rows
    assert sorted(thread.name for thread in threading.enumerate()) == threads
    del engine.comm.all_gather_vector
    lines = len((Path(tmp) / "run" / "events.jsonl").read_text().splitlines()) if engine.global_rank == 0 else 0
    engine.destroy()
    return len(events), collectives, lines, written, rows


def test_what_it_costs_to_be_looked_at(ranks, tmp_path) -> None:
    """Two events a step. A write of each to the run log and to TensorBoard, and of each value to its CSV file.

    No thread and no collective more.
    """
    (events, collectives, lines, written, rows), (_, other, nothing, none, _) = ranks(count_calls, 2, str(tmp_path))
    assert events == 20 and len(collectives) == 10 and len(set(collectives)) == 1 and other == collectives
    assert nothing == 0 and lines <= 2 * 14 + 4
    if sys.platform == "linux":
        files = 2 if find_spec("tensorboard") else 1
        assert written == files * events + rows and none == 0


def rows_of_csv(folder: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in Path(folder).rglob("*.csv"))


def writes() -> int:
    """Calls of the system by which this process has written."""
    io = Path("/proc/self/io")
    return int(io.read_text().partition("syscw:")[2].split()[0]) if io.exists() else 0


class Kept(Sink):
    """A sink of a program's own."""

    made: list[Kept] = []

    def __init__(self, word: str) -> None:
        self.word, self.events, self.runs = word, [], []
        self.made.append(self)

    def open(self, run: Run) -> None:
        self.runs.append((run.step, dict(run.state)))

    def receive(self, event: Event) -> None:
        self.events.append(event)

    def save(self):
        return {"word": self.word}

    def close(self) -> None:
        self.events.append("closed")


def registered(tmp: str):
    """On a rank: a registered sink over a resume by the user's own call. Ranks may name it differently."""
    register("kept", Kept)
    Kept.made.clear()
    word = ["ours", "another"][torch.distributed.get_rank()]
    config = Setup("fp32", "SGD").config(1) | {"sinks": {"kept": {"word": word}}}
    for resumes in (False, True):
        engine = start(Mlp, config)
        if resumes:
            engine.load_checkpoint(tmp)
        train(engine, 2)
        if not resumes:
            engine.save_checkpoint(tmp)
        engine.destroy()
    return [(sink.runs, [type(event).__name__ for event in sink.events]) for sink in Kept.made]


def test_a_registered_sink_sees_what_comes_before_the_first_step(ranks, tmp_path) -> None:
    (before, after), nothing = ranks(registered, 2, str(tmp_path))
    assert nothing == [], "on rank 0 alone"
    assert before[0] == [(0, {})] and after[0] == [(2, {"word": "ours"})]
    assert before[1][:2] == ["RunStarted", "StepDone"] and before[1][-1] == "str"
    assert after[1][:3] == ["RunStarted", "CheckpointLoaded", "StepDone"]


def test_what_is_missing_is_one_sentence(monkeypatch) -> None:
    import shardline.observe.registry as registry

    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb.enabled is true, and the package wandb is not installed. Install it"):
        check_packages(load_config({"train_batch_size": 1, "wandb": {"enabled": True}}, 1))
    with pytest.raises(ConfigError, match='sinks holds "nobody"'):
        check_packages(load_config({"train_batch_size": 1, "sinks": {"nobody": {}}}, 1))


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"run_log": {"dir": "{}"}}, "run_log.dir"),
        ({"csv_monitor": {"enabled": True, "output_path": "{}"}}, "csv_monitor.output_path"),
        ({"tensorboard": {"enabled": True, "output_path": "{}"}}, "tensorboard.output_path"),
    ],
)
def test_a_folder_that_cannot_be_made_is_told_before_training(tmp_path, section, key) -> None:
    (tmp_path / "file").touch()
    ((name, values),) = section.items()
    folder = str(tmp_path / "file" / "runs")
    values = {k: folder if v == "{}" else v for k, v in values.items()}
    config = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, name: values}
    with pytest.raises(ConfigError, match=rf"{key}: rank 0 cannot write to the folder {folder}.*: not a directory"):
        sinks_of(load_config(config, 1))
