"""The page of a run: what it takes from a log, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from shardline.cli import main
from shardline.errors import UsageError
from shardline.observe.report import page, read
from shardline.observe.report.charts import charts_of
from shardline.observe.report.record import Record

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def step(number, **changes):
    return {
        "event": "StepDone",
        "time": 1.7e9 + number,
        "step": number,
        "loss": 4.0 / number,
        "lr": [0.1, 0.2],
        "grad_norm": 1.0,
        "grad_norms": [0.8, 0.6],
        "loss_scale": None,
        "samples": 8,
        "tokens": 1024,
        "seconds": 0.5,
        "waited": [0.001, 0.1],
        "sent": {"gather": 1 << 20, "reduce": 2 << 20},
        "flops": 1e12,
        "mfu": 0.4,
        "memory_bytes": 3 << 30,
        **changes,
    }


def log(folder):
    """Of two processes: the first is killed at step 5, and the second goes on from step 3."""
    unit = {"name": "blocks.0", "parameters": 1000, "trained": 1000, "dtype": "bfloat16", "notes": ["sharded"]}
    start = {
        "event": "RunStarted",
        "time": 1.7e9,
        "step": 0,
        "config": {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "seed": 1234},
        "origins": {"train_batch_size": "file"},
        "environment": {"model": "Net</script><b>", "ranks": 2, "device": "AMD EPYC", "precision": "bf16"},
        "units": [unit | dict.fromkeys(("weights", "gradients", "masters", "states", "full"), 2048)],
    }
    first = [start, *(step(n) for n in range(1, 6)), {"event": "Scalars", "step": 5, "values": {"held out": 9.0}}]
    phases = [
        {"event": "PhaseTimes", "time": 0, "step": n, "seconds": {"forward": 0.1, "backward": 0.2, "step": 0.05}}
        for n in range(1, 8)
    ]
    second = [
        {"event": "CheckpointLoaded", "time": 1.7e9 + 9, "step": 3, "path": "checkpoints/global_step3", "sinks": {}},
        start | {"step": 3},
        {"event": "Notice", "time": 0, "message": "resumed <here>"},
        *(step(n, loss="nan" if n == 7 else 1.5) for n in (4, 5, 7)),
        {"event": "StepSkipped", "step": 6, "reason": "gradients that are not finite", "loss_scale_before": 8.0,
         "loss_scale_after": 4.0, "time": 0},
        {"event": "Scalars", "time": 0, "step": 4, "values": {"held out": 2.0, "accuracy": 95.0}},
        {"event": "CheckpointSaved", "time": 1.7e9 + 20, "step": 6, "path": "checkpoints/global_step6", "seconds": 1.5},
        {"event": "MemoryOverStep", "time": 0, "step": 6, "seconds": [0.0, 0.1, 0.2, 0.3],
         "bytes": [1 << 30, 2 << 30, 3 << 30, 1 << 30], "phases": [["forward", 0.0, 0.12], ["backward", 0.12, 0.3]]},
    ]  # fmt: skip
    lines = [json.dumps(line) for line in (*first, *phases, *second, *phases[3:])]
    (folder / "events.jsonl").write_text("\n".join(lines) + '\n{"event": "StepDo')
    return folder


def test_steps_that_a_kill_took_back_are_not_in_the_record(tmp_path) -> None:
    record = read(log(tmp_path))
    assert sorted(record.steps) == [1, 2, 3, 4, 5, 7] and [record.steps[n]["loss"] for n in (3, 4)] == [4 / 3, 1.5]
    assert record.scalars == {4: {"held out": 2.0, "accuracy": 95.0}} and sorted(record.skipped) == [6]
    assert sorted(record.phases) == list(range(1, 8)) and len(record.starts) == 2


def test_the_page_says_what_happened_and_loads_nothing(tmp_path) -> None:
    text = page(read(log(tmp_path)))
    for said in (
        "The others wait for rank 0: it waits 1.0 ms a step, where another one waits 100 ms",
        "up to 20% shorter",
        "Net&lt;/script&gt;&lt;b&gt;",
        "resumed &lt;here&gt;",
        "gradients that are not finite",
        "In the folder <code>checkpoints</code>",
        "<td>global_step6</td>",
        "went on from it",
        "2 keys at their defaults",
        "40.0% MFU",
        "3.00 GiB",
    ):
        assert said in text, said
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert data["loss"]["series"][0]["points"][-1] == [7, None]
    assert data["loss"]["marks"] == [3] and data["loss"]["skipped"] == [6]
    assert data["wire"]["series"][1]["points"][0] == [1, 2 << 20]
    assert data["trace"]["bands"] == [["forward", 0.0, 0.12], ["backward", 0.12, 0.3]]
    places = {name: [series["name"] for series in chart["series"]] for name, chart in data.items()}
    assert places["loss"] == ["training", "held out"] and places["own0"] == ["accuracy"], (
        "of another size than the loss"
    )
    assert all(f'data-chart="{name}"' in text for name in data) and text.count('data-chart="') == len(data)
    assert all(chart["x"] and (chart["y"] or chart["kind"] in ("share", "bars")) for chart in data.values())
    links = re.findall(r'<a href="#(\w+)">', text)
    assert links == re.findall(r'<section id="(\w+)">', text) and {"skipped", "notices", "words"} <= set(links)


def test_a_smoothed_curve_lags_behind_nothing(tmp_path) -> None:
    """The mean of neighbours on both sides of a line is the line; only its end has fewer of them."""
    lines = [step(n, loss=10.0 - n / 100) for n in range(1, 301)]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, lines)))
    raw, smooth = charts_of(read(tmp_path))["loss"].series
    assert raw.faint and smooth.name == "mean of 11 steps"
    assert [y for _, y in smooth.points[:-5]] == pytest.approx([y for _, y in raw.points[:-5]])


def test_a_long_run_is_shown_by_means_and_smoothed_from_these() -> None:
    record = Record(steps={n: step(n, loss="nan" if n == 9 else float(n)) for n in range(1, 12_001)})
    raw, smooth = charts_of(record)["loss"].series
    assert (raw.name, smooth.name) == ("mean of 10 steps", "mean of 410 steps")
    assert len(raw.points) == len(smooth.points) == 1200
    assert raw.points[0] == (5.5, pytest.approx(fmean([1, 2, 3, 4, 5, 6, 7, 8, 10]))), (
        "one NaN does not hide its neighbours"
    )
    assert smooth.points[600] == pytest.approx(raw.points[600])


def test_the_command(tmp_path, capsys) -> None:
    assert main(["report", str(log(tmp_path)), "--png"]) == 0
    written = capsys.readouterr().out.split()
    names = ["loss", "own0", "lr", "norm", "speed", "share", "phases", "waiting", "wire", "trace", "peak"]
    assert written == [str(tmp_path / "report.html"), *(str(tmp_path / f"report-{name}.png") for name in names)]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in written[1:])
    assert main(["report", str(tmp_path / "elsewhere")]) == 2
    assert '"run_log": {"dir":' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "holds no step yet"),
        ([{"event": "RunStarted", "environment": {}, "config": {}, "origins": {}, "units": []}], "holds no step yet"),
        (["some text", {"step": 3}], "is no run log: it holds no line that a run writes"),
        (
            [{"event": "StepSkipped", "step": n, "reason": "a gradient is NaN"} for n in (1, 2)],
            r"no step that was applied: all 2 were skipped \(a gradient is NaN\)",
        ),
    ],
)
def test_a_log_without_steps_is_an_error(tmp_path, lines, said) -> None:
    (tmp_path / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(UsageError, match=said):
        read(tmp_path)


def test_sentences_count_right(tmp_path) -> None:
    """One of a kind, and a run that was started again on another number of ranks."""
    start, *_ = (json.loads(line) for line in (log(tmp_path) / "events.jsonl").read_text().splitlines()[:1])
    once = page(Record(starts=[start], steps={1: step(1)}))
    assert (
        "1 step was applied" in once
        and "1 unit<" in once
        and "started" not in once.split("<header>")[1].split("</header>")[0]
    )
    other = start | {"environment": start["environment"] | {"ranks": 3}}
    assert "started 2 times<" in page(Record(starts=[start, start], steps={1: step(1)}))
    assert "started 3 times, on 2, then 3 ranks<" in page(Record(starts=[start, start, other], steps={1: step(1)}))
    huge = page(Record(starts=[start], steps={1: step(1, sent={"gather": 3 << 40})}))
    assert "Rank 0 sent 3.00 TiB" in huge


def test_the_command_needs_no_torch(tmp_path) -> None:
    command = ["report", str(log(tmp_path))]
    code = f"import sys; from shardline.cli import main; main({command}); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=200).returncode == 0


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to look at the page")
@pytest.mark.parametrize(("width", "height", "steps"), [(1280, 900, 0), (390, 844, 0), (390, 844, 1)])
def test_a_browser_draws_every_chart_without_an_error(tmp_path, width, height, steps) -> None:
    """One step makes no line: it is a point, or a bar."""
    record = read(log(tmp_path))
    if steps:
        record = Record(starts=record.starts, steps={1: step(1)}, phases={1: record.phases[1]})
    text = page(record)
    # What only a browser knows goes into the title.
    probe = (
        "<script>document.title = JSON.stringify({over: document.documentElement.scrollWidth - innerWidth, empty: "
        "[...document.querySelectorAll('[data-chart]')].filter((e) => !e.querySelector('svg *')).length, "
        "lines: document.querySelectorAll('svg path').length, points: document.querySelectorAll('svg circle').length, "
        "bars: document.querySelectorAll('svg g rect').length, text: [...document.querySelectorAll('svg text')]"
        ".filter((e) => e.getBoundingClientRect().right > innerWidth + 1).length})</script></body>"
    )
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", probe))
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
            f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},{height}", "--dump-dom", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(done.stdout.split("<title>")[1].split("</title>")[0])
    assert (found["lines"] > 12, found["points"] > 6, found["bars"] > 5) == (
        (False, True, True) if steps else (True, False, False)
    )
    assert found["over"] <= 0 and (found["empty"], found["text"]) == (0, 0)
