"""Processes that are not of the job connect to all that listens in it while it runs, and write into its store."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.sockets import descendants, listening

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="sockets are found under /proc"),
    pytest.mark.slow,
]

SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
import shardline

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
config = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 3, "unit_min_numel": 1},
    "communication_transport": sys.argv[1],
    "watchdog": {"quiet_seconds": 1.0, "timeout_seconds": 20.0},
}
engine, *_ = shardline.initialize(model=model, config=config)
folder, rank = Path(sys.argv[2]), engine.global_rank
(folder / f"started{rank}").write_text(os.environ["MASTER_PORT"])
steps = 0
while torch.distributed.get_rank() >= 0:
    engine.backward(engine(torch.full((4, 8), 0.5)).pow(2).mean())
    engine.step()
    steps += 1
    time.sleep(0.01)
    over = torch.tensor([float((folder / "over").exists())])
    torch.distributed.all_reduce(over)
    if over.item():
        break
(folder / f"done{rank}").write_text(str(steps))
engine.destroy()
"""
LAUNCHERS = {
    "shardline run": ["-m", "shardline", "run", "--nproc", "2", "--device", "cpu"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}
NOISE = (
    lambda draw: b"",
    lambda draw: b"\0" * 8,
    lambda draw: draw.randbytes(draw.randrange(1, 200)),
    lambda draw: b"GET / HTTP/1.0\r\n\r\n",
    lambda draw: bytes([draw.randrange(20)]) + (1 << 62).to_bytes(8, "little") + draw.randbytes(20),
)


def disturb(ports: list[int], seconds: float) -> int:
    """Connect again and again, send what is no message or half of one, and leave some connections open."""
    draw, begin, count, kept = random.Random(5), time.monotonic(), 0, []
    while time.monotonic() - begin < seconds:
        for port in ports:
            with suppress(OSError):
                connection = socket.create_connection(("127.0.0.1", port), timeout=1)
                connection.sendall(draw.choice(NOISE)(draw))
                count += 1
                kept.append(connection) if len(kept) < 50 else connection.close()
        time.sleep(0.005)
    for connection in kept:
        connection.close()
    return count


def overwrite(port: int) -> int:
    """Give each key of the store another value. Returns how many there were."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))
    keys = store.list_keys()
    for key in keys:
        store.set(key, "garbage")
    return len(keys)


@pytest.mark.parametrize("transport", ["auto", "gloo"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_that_runs_goes_on(tmp_path, launcher, transport):
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path[:0] = {sys.path!r}\n{SCRIPT}")
    command = [sys.executable, *LAUNCHERS[launcher], str(script), transport, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        try:
            give_up = time.monotonic() + 120
            while not all((tmp_path / f"started{rank}").exists() for rank in range(2)):
                assert job.poll() is None and time.monotonic() < give_up, job.communicate(timeout=20)[0]
                time.sleep(0.05)
            ports = sorted({port for _, port in listening(job.pid, *descendants(job.pid))})
            assert disturb(ports, 3.0) > 100
            if launcher != "torchrun":  # whose agents wait at their end for keys of their own
                assert overwrite(int((tmp_path / "started0").read_text()))
            time.sleep(3)  # the tables of the watch have been read since
            (tmp_path / "over").touch()
            printed, _ = job.communicate(timeout=100)
        finally:
            job.kill()
    assert job.returncode == 0, printed
    assert (tmp_path / "done0").read_text() == (tmp_path / "done1").read_text()
