"""What one step does to memory, counted: bytes written by copies or read from peers, and values read by the host."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardline.comm.control_page import Peer
from shardline.comm.peer_memory import PeerMemoryTransport
from shardline.runtime.modes import keep
from tests.harness import Setup, start
from tests.models import mse

WIDTH, DEPTH = 128, 4
"""Sizes are multiples of 64 times the ranks, so that units have no gaps."""

PARAMS = DEPTH * (2 * WIDTH * WIDTH + 2 * WIDTH)
MANY = 4096
"""Elements below which a tensor is an activation or a few numbers of the step, not a unit's buffer."""

SIZE = {"fp32": 4, "bf16": 2}
COPIES = ("copy_", "_foreach_copy_")
SUMS = ("add_", "add")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Watch(TorchDispatchMode):
    """Counts the bytes that copies, sums and fills write, or that are read from peers; values that come to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.written: Counter[str] = Counter()
        self.read = 0

    def __enter__(self):  # type: ignore[no-untyped-def]
        self._patch, read = pytest.MonkeyPatch(), Peer.read

        def count(peer: Peer, address: int, out: torch.Tensor) -> None:
            if out.numel() >= MANY:
                self.written["from peers"] += out.nbytes
            read(peer, address, out)

        self._patch.setattr(Peer, "read", count)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._patch.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        self.read += name == "_local_scalar_dense"
        result = func(*args, **(kwargs or {}))
        if name in (*COPIES, *SUMS, "zero_", "fill_", "_foreach_zero_", "clone", "_to_copy"):
            outputs = (
                args[0] if name.startswith("_foreach") or name.endswith("_") else (kwargs or {}).get("out", result)
            )
            for output in tree_leaves(outputs):
                if name.startswith("_foreach") or output.numel() >= MANY:
                    self.written[name] += output.numel() * output.element_size()
        return result


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, WIDTH, generator=generator)
    return x, torch.tanh(x)


def work(config: dict[str, object]) -> tuple[Counter[str], Counter[str], int] | None:
    """Bytes written by the third step's forward and backward, and by its step(); values that the host reads.

    None where ranks do not read each other: gloo's own copies are not dispatched.
    """
    engine = start(Stack, config)
    if not isinstance(engine.comm.gathers, PeerMemoryTransport):
        return engine.destroy()
    for step in range(2):
        engine.backward(mse(engine, engine.module, batch(step)))
        engine.step()
    engine.trainables.boundary.reads_at_once = False  # as on an accelerator
    with keep(Watch()) as passes:
        engine.backward(mse(engine, engine.module, batch(2)))
    with keep(Watch()) as update:
        engine.step()
    engine.destroy()
    return passes.written, update.written, passes.read + update.read


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_written_by_copies_and_sums(ranks, stage: int, dtype: str) -> None:
    """Gradients are packed once and summed once, weights are cast once and cross once; nothing is filled or cloned."""
    whole, shard = SIZE[dtype] * PARAMS, SIZE[dtype] * PARAMS // 2
    fp32_shard = 2 * PARAMS
    gathered = 2 * whole - whole // DEPTH if stage == 3 else 0  # the last block stays for the backward
    read = gathered // 2 + shard  # weights into place, gradients to be summed
    packed = {"_foreach_copy_": whole, "from peers": read}
    if dtype == "fp32":  # two terms of one dtype are summed into the shard in one pass
        passes = packed | {"copy_": gathered // 2, "add": fp32_shard}
    else:
        passes = packed | {"copy_": gathered // 2 + fp32_shard, "add_": fp32_shard}
    if stage == 0:  # the other half of the gradients; what every rank updates it casts itself
        update = {"from peers": fp32_shard, "copy_": whole if dtype == "bf16" else 0}
    else:  # the own half is cast, the other half of the weights crosses unless it is gathered at its use
        update = {"from peers": shard if stage < 3 else 0, "copy_": shard if dtype == "bf16" else 0}
    results = ranks(work, 2, Setup(dtype=dtype, micro=1).config(stage))
    if None in results:
        pytest.skip("these ranks do not read each other")
    for found_passes, found_update, read in results:
        assert (+found_passes, +found_update) == (+Counter(passes), +Counter(update))
        assert read == 0
