"""Environments of launchers, and machines with accelerators that are not there."""

from __future__ import annotations

import os

import pytest
import torch

from tests.runtime.launchers import TORCHRUN


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly these launcher variables."""

    def set_to(variables):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "MASTER_", "GLOO_", "NCCL_")) or name in TORCHRUN:
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_to({})
    return set_to


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def accelerators(monkeypatch):
    """Pretends that so many CUDA devices are visible."""

    def pretend(count):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    return pretend
