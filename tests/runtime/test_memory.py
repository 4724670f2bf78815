from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from shardline.runtime.memory import peak_bytes, resident_bytes

MB = 1_000_000


def test_memory_is_seen_while_it_is_used_and_the_peak_stays():
    code = (
        "import torch\n"
        "from shardline.runtime.memory import peak_bytes, resident_bytes\n"
        "cpu = torch.device('cpu')\n"
        "print(resident_bytes(), peak_bytes(cpu))\n"
        "big = torch.ones(50_000_000)\n"
        "print(resident_bytes(), peak_bytes(cpu))\n"
        "del big\n"
        "print(resident_bytes(), peak_bytes(cpu))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    (now0, _), (now1, peak1), (now2, peak2) = ([int(n) for n in line.split()] for line in result.stdout.splitlines())
    assert now1 - now0 == pytest.approx(200 * MB, abs=20 * MB)
    assert now2 - now0 == pytest.approx(0, abs=20 * MB)
    assert peak2 >= peak1 - MB >= now1 - 2 * MB


def test_resident_is_at_most_the_peak():
    assert 0 < resident_bytes() <= peak_bytes(torch.device("cpu")) + MB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_peak_on_an_accelerator():
    device = torch.accelerator.current_accelerator()
    torch.accelerator.memory.reset_peak_memory_stats()  # an earlier test may have had more
    before = peak_bytes(device)
    big = torch.ones(10_000_000, device=device)
    assert peak_bytes(device) >= before + big.nbytes - MB
