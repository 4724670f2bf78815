"""The runner of the first minutes on a GPU: a section that hangs, dies or prints nothing is reported. Needs no GPU."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

STANDIN = """
import subprocess, sys, time
name = sys.argv[2]
print("from", name, flush=True)
if name == "hangs":
    print("ok: begun", flush=True)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # holds the pipe open
    time.sleep(60)
if name == "dies":
    raise RuntimeError("no such card")
if name == "judges":
    print("ok: one", flush=True)
    print("FAILED: two: 3 != 4", flush=True)
"""


@pytest.fixture
def gpu_first(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("gpu_first", ROOT / "benchmarks/gpu_first.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_first"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_first"]


class Report(io.StringIO):
    name = "report.txt"


def test_every_section_runs_and_has_a_verdict(gpu_first, monkeypatch, tmp_path, capsys):
    script = tmp_path / "standin.py"
    script.write_text(STANDIN)
    monkeypatch.setattr(gpu_first, "__file__", str(script))
    limits = {"hangs": 2.0, "dies": 60.0, "judges": 60.0, "quiet": 60.0}
    monkeypatch.setattr(
        gpu_first, "SECTIONS", {name: gpu_first.Section(lambda: None, limit) for name, limit in limits.items()}
    )
    report = Report()
    assert gpu_first.run_all(list(limits), dict(os.environ), report) == 1
    lines = report.getvalue().splitlines()
    assert lines == capsys.readouterr().out.splitlines()
    assert [f"from {name}" in lines for name in limits] == [True] * 4
    assert any("no such card" in line for line in lines)
    summary = lines[lines.index("") + 1 :]
    assert summary[:-1] == [
        "ok: [hangs] begun",
        "FAILED: [hangs] took more than 2 s",
        "FAILED: [dies] exit status 1",
        "ok: [judges] one",
        "FAILED: [judges] two: 3 != 4",
        "ok: [quiet] exit status 0",
    ]
    assert summary[-1].startswith("3 ok, 3 failed in ")


def test_an_error_in_a_section_is_a_verdict(gpu_first, capsys):
    with gpu_first.attempt("the sum"):
        raise ValueError("1 is not 2")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "FAILED: the sum: ValueError: 1 is not 2"
    assert "test_gpu_first.py" in said[1]


def test_a_wait_is_told_from_the_warning_of_the_mode(gpu_first):
    from gpu_says import is_wait

    assert is_wait(UserWarning("called a synchronizing CUDA operation (Triggered internally at ...)"))
    assert not is_wait(
        UserWarning(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
        )
    )


def test_a_missing_package_without_wheels_is_a_sentence(gpu_first, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_first, "NEEDED", ("a_package_that_is_not_there",))
    monkeypatch.setattr(gpu_first, "WHEELS", tmp_path / "wheels")
    with pytest.raises(SystemExit, match=r"Not installed here: a_package_that_is_not_there\. Run `make gpu-wheels`"):
        gpu_first.environment(tmp_path)


def test_where_there_is_no_accelerator_it_ends_at_once(tmp_path):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    env.pop("SIMCUDA", None)
    command = [sys.executable, str(ROOT / "benchmarks/gpu_first.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "FAILED: [machine] there is an accelerator" in (tmp_path / "report.txt").read_text()
    assert "stages" not in done.stdout
