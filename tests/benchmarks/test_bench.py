"""The benchmark itself: it runs, engines compute the same, memory and ratios are what they say. No times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def parts(monkeypatch):
    """The benchmark's modules, which are scripts beside each other and no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measure
    import models
    import report
    import suite
    import targets

    return {"targets": targets, "measure": measure, "models": models, "report": report, "suite": suite}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in launcher}
    return subprocess.run(
        [sys.executable, BENCHMARKS / "bench.py", *arguments], env=clean, capture_output=True, text=True, timeout=200
    )


def test_engines_take_turns_and_agree(tmp_path):
    engines = "compute,ddp,shardline-3"
    work = ("--models=tiny", "--dtypes=fp32", "--accumulation=2", "--steps=2", "--rounds=2")
    done = bench(*work, f"--engines={engines}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "results.json").read_text())
    rows = {row["engine"]: row for row in result["runs"]}
    assert set(rows) == set(engines.split(","))
    communicating = [row["losses"] for name, row in rows.items() if name != "compute"]
    for losses in communicating:
        assert len(losses) == 2 + 2 * 2  # two that warm up, two rounds of two
        torch.testing.assert_close(losses, communicating[0], rtol=2e-4, atol=0)
    assert all(len(row["rounds"]) == 2 and min(row["rounds"]) > 0 for row in rows.values())
    assert all(row["peak"] <= row["peak from start"] for row in rows.values())
    assert "| shardline-3 |" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_an_engine_that_fails_is_named_and_the_others_go_on(tmp_path):
    script = f"""
import sys; sys.argv[1:] = ["--models=tiny", "--dtypes=fp32", "--engines=compute,ddp", "--rounds=1", "--out={tmp_path}"]
sys.path.insert(0, {str(BENCHMARKS)!r})
import bench, loops, dataclasses
def broken(model, work):
    raise ValueError("broken on purpose")
loops.ENGINES["ddp"] = dataclasses.replace(loops.ENGINES["ddp"], make=broken)
if __name__ in ("__main__", "__mp_main__"):
    if __name__ == "__main__":
        sys.exit(bench.main())
"""
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=200)
    result = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 1
    assert [row["engine"] for row in result["runs"]] == ["compute"]
    assert "broken on purpose" in result["errors"][0]


def test_an_unknown_engine_is_refused():
    done = bench("--engines=nobody")
    assert done.returncode == 2
    assert "nobody" in done.stderr


def test_no_heat_is_part_of_another(parts):
    heats = parts["suite"].heats
    assert heats(["compute", "shardline-2", "shardline-3"], "fp32") == [
        ["compute", "shardline-2"],
        ["compute", "shardline-3"],
    ]
    assert heats(["compute", "pure"], "fp32") == [["compute"]]
    assert heats(["compute", "pure"], "bf16") == [["compute", "pure"]]


def test_the_gpt_has_34_million_parameters_in_parts(parts):
    with torch.device("meta"):
        model = parts["models"].MODELS["gpt"].build()
    sizes = parts["models"].parts(model)
    total = sum(param.numel() for param in model.parameters())
    assert round(total / 1e6) == 34
    assert sum(sizes) == total
    assert len(sizes) == 8 + 4  # blocks; embedding, positions, norm, head


def test_the_formula_of_state_is_what_a_loop_holds(parts):
    """Weights, gradients and moments of a plain AdamW, counted."""
    model = nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 100)).sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    held = sum(t.nbytes for p in model.parameters() for t in (p, p.grad)) + sum(t.nbytes for t in moments)
    numel = sum(p.numel() for p in model.parameters())
    assert parts["targets"].state_bytes("fp32", 0, 1) * numel == held
    for dtype in ("fp32", "bf16"):
        alone = {parts["targets"].state_bytes(dtype, stage, 1) for stage in range(4)}
        assert len(alone) == 1, "a single process has nothing to divide"
    assert parts["targets"].state_bytes("bf16", 3, 9) == 2


def test_ratios_are_paired_before_the_median(parts):
    """A machine that gets three times slower half-way leaves the ratio alone; bare medians would not."""
    ours, theirs = [1.0, 1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 6.0, 6.0]
    assert parts["targets"].paired(ours, theirs) == 0.5


def row(engine, step, peak, **other):
    case = {"model": "gpt", "dtype": "fp32", "accumulation": 1, "world": 2, "heat": 0}
    return case | {"engine": engine, "rounds": [step] * 3, "peak": peak} | other


def test_a_wrong_loss_is_ours_or_a_peers(parts):
    """Only Shardline's makes the run fail; a peer's is named."""
    losses = {"compute": 9.0, "ddp": 5.0, "fsdp2": 5.01, "deepspeed-2": 4.0, "shardline-2": 5.0, "shardline-3": 6.0}
    result = {"runs": [row(name, 1.0, 1.0, losses=[loss]) for name, loss in losses.items()]}
    ours, peers = (parts["report"].wrong_losses(result, ours=which) for which in (True, False))
    assert [sentence.split()[0] for sentence in ours] == ["shardline-3"]
    assert [sentence.split()[0] for sentence in peers] == ["deepspeed-2"]
    assert "20.0%" in ours[0] and "20.0%" in peers[0]


def test_figures_stand_beside_their_limits(parts):
    result = {
        "parts": {"gpt": [10_000_000, 10_000_000, 5_000_000]},
        "runs": [
            row("compute", 1.0, 500.0),
            row("deepspeed-3", 2.0, 1000.0),
            row("fsdp2", 1.5, 800.0),
            row("shardline-3", 1.1, 500.0),
            row("shardline-3-gloo", 1.5, 500.0),
        ],
    }
    found = {(f.what, f.engine): f for f in parts["targets"].judge(result)}
    assert found["step / DeepSpeed, same stage", "shardline-3"].value == pytest.approx(0.55)
    assert found["step / DeepSpeed, same stage", "shardline-3"].holds
    assert not found["step / DeepSpeed, same stage", "shardline-3-gloo"].holds
    assert not found["step / FSDP2", "shardline-3"].holds
    assert found["step / compute only", "shardline-3"].limit == 1.12
    peak = found["peak memory / best of DeepSpeed, FSDP2", "shardline-3"]
    assert peak.value == pytest.approx(500 / 800)  # the best of the two
    # 25M parameters: 400 MB of state on one rank, so 100 MB of activations; 200 MB at stage 3, 160 MB in flight
    assert found["peak memory / formula + activations", "shardline-3"].value == pytest.approx(500 / 460)


def test_shared_memory_counts_once_for_all_who_map_it(parts):
    """Two processes that map the same 64 MB hold 32 MB each; private memory is each one's own."""
    code = f"""
import mmap, os, signal, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import measure
base, size = measure.resident(), 64 << 20
measure.restart_peak()
shared = mmap.mmap(-1, size)
for page in range(0, size, 4096): shared[page] = 1
private = b"1" * size
del private
ready, go = os.pipe()
child = os.fork()
if child == 0:
    for page in range(0, size, 4096): shared[page]
    os.write(go, b"1"); signal.pause()
os.read(ready, 1)
print(measure.resident() - base, measure.peak() - base)
os.kill(child, 9); os.waitpid(child, 0)
"""
    if not parts["measure"].available():
        pytest.skip("Linux only")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    resident, peak = map(float, done.stdout.split())
    assert resident == pytest.approx(32 << 20, abs=6 << 20)
    assert peak == pytest.approx((32 << 20) + (64 << 20), abs=6 << 20)


@pytest.mark.slow
def test_the_gpu_benchmark_has_a_path_without_a_gpu(parts, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "LIMIT", 60.0)
    trained = gpu.run("cpu", "tiny", "train", "shardline-3")
    assert trained["tokens/s"] > 0, trained
    assert gpu.run("cpu", "tiny", "rank", "3", world=2)["largest difference of the loss"] < 1e-5
    assert "nobody" in gpu.run("cpu", "tiny", "train", "nobody")["error"][0]


def test_a_card_is_credited_with_the_operations_of_its_model(parts):
    """6 per token and weight that multiplies, counted by torch on the forward and the backward of a tiny GPT."""
    import gpu
    from torch.utils.flop_counter import FlopCounterMode

    size = gpu.SIZES["tiny"]
    spec = size.model()
    model = spec.fresh()
    with FlopCounterMode(display=False) as counter:
        model(*spec.data(0, torch.float32)[0]).backward()
    claimed = gpu.operations_per_token(model, size) * spec.samples
    assert claimed == pytest.approx(counter.get_total_flops(), rel=0.1)
