"""Kill a run half-way with SIGKILL, resume it on another number of processes, and compare it with one left alone.

    python examples/gpt/kill_and_resume.py --steps 80 --ranks 2 --resume-on 3

Options that it does not know go to ``train.py``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from report import read, table

from shardline.checkpoint.format.directory import Directory

HERE = Path(__file__).resolve().parent
POLL = 0.1
"""Seconds between two looks at a run's losses."""
TOLERANCE = 2e-3
"""Nats per character: sums of bf16 gradients over another number of ranks are rounded elsewhere."""


def start(ranks: int, out: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """Start the training on ``ranks`` processes, in or from the folder ``out``."""
    launcher = [sys.executable, "-m", "shardline.cli", "run", "--nproc", str(ranks)]
    return subprocess.Popen([*launcher, str(HERE / "train.py"), f"--out={out}", *options])


def finish(job: subprocess.Popen[bytes]) -> None:
    """Wait for a run that has to end well; this program ends with its exit code if it does not."""
    if code := job.wait():
        raise SystemExit(code)


def reported(out: Path) -> int:
    """Return the last step that a run has written down the training loss of."""
    losses = out / "losses.jsonl"
    return max(read(losses)[0], default=0) if losses.exists() else 0


def kill(job: subprocess.Popen[bytes]) -> list[int]:
    """Send SIGKILL to the launcher and to every rank, and return the ranks' process ids."""
    ranks = [int(pid) for file in Path(f"/proc/{job.pid}/task").glob("*/children") for pid in file.read_text().split()]
    for pid in (job.pid, *ranks):
        with suppress(ProcessLookupError):  # the kernel ends ranks whose launcher is gone
            os.kill(pid, signal.SIGKILL)
    job.wait()
    return ranks


def main() -> None:
    """Run the three, and say what happened."""
    parser = argparse.ArgumentParser(description="Kill a training run, resume it, and compare.")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--ranks", type=int, default=2, help="processes at first")
    parser.add_argument("--resume-on", type=int, default=3, help="processes after the kill")
    parser.add_argument("--out", type=Path, default=Path("runs/gpt-resume"), help="folder for both runs; a new one")
    args, options = parser.parse_known_args()
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out} is not empty: name a new folder by --out, so that both runs begin at step 0.")
    straight, killed = args.out / "straight", args.out / "killed"
    options = [f"--steps={args.steps}", "--sample=0", *options]

    print(f"\n--- 1 of 3: {args.steps} steps on {args.ranks} processes, left alone", flush=True)
    finish(start(args.ranks, straight, options))

    print(f"\n--- 2 of 3: the same again, and SIGKILL after step {args.steps // 2}", flush=True)
    job = start(args.ranks, killed, options)
    while (last := reported(killed)) <= args.steps // 2 or last >= args.steps:
        if job.poll() is not None:
            raise SystemExit(f"the run ended by itself, with exit code {job.returncode}, before it could be killed.")
        time.sleep(POLL)
    pids = kill(job)
    last = reported(killed)
    whole = Directory(killed / "checkpoints").order()
    print(
        f"\n\nSent SIGKILL to {len(pids)} ranks (processes {', '.join(map(str, pids))}) and their launcher; the last "
        f"step that they reported is {last}.\n"
        f"Checkpoints that are there, the newest first: {', '.join(whole) or 'none'}",
        flush=True,
    )

    print(f"\n--- 3 of 3: the same command on {args.resume_on} processes", flush=True)
    finish(start(args.resume_on, killed, options))

    (_, alone), (_, resumed) = read(straight / "losses.jsonl"), read(killed / "losses.jsonl")
    end = max(alone)
    difference = abs(resumed[end] - alone[end])
    rows = {
        "left alone": f"{alone[end]:.6f} held-out loss after step {end}, on {args.ranks} processes",
        "killed, resumed": f"{resumed[end]:.6f} held-out loss after step {end}, on {args.ranks}, then {args.resume_on}",
        "difference": f"{difference:.1e}; the loss fell by {alone[0] - alone[end]:.3f}",
    }
    print(f"\n{table(rows)}")
    if difference > TOLERANCE:
        raise SystemExit(f"That is more than the {TOLERANCE} that rounding explains: the resumed run is another one.")


if __name__ == "__main__":
    main()
