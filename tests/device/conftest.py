"""Ranks that have a simulated device each. This folder runs in a session of its own: ``make test-device``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardline.testing import Pool
from tests.conftest import Ranks
from tests.device import simulated


class DeviceRanks(Ranks):
    """Processes that import the simulated device before they make their process group."""

    def make_pool(self, world_size: int) -> Pool:
        return Pool(world_size, env={"SIMULATED_DEVICES": str(world_size)}, preload=[simulated.__name__])


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    shared = DeviceRanks()
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def cpu_ranks() -> Iterator[Ranks]:
    """The same on the CPU, to compare with."""
    shared = Ranks("gloo")
    yield shared
    shared.close()
