"""Activation checkpointing by configuration: the same bits, fewer saved bytes, every block as often as it says."""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import shardline
import shardline.features.recompute
from shardline.errors import ModelError
from shardline.features.recompute import _compiled_call, copy_structure, recompute_blocks, recomputed_blocks
from tests.harness import STAGES, Setup, assert_identical, seeded, spread, start
from tests.models import WIDTH, Block, ConvNet, GptBlock, Mlp, TinyGpt, cross_entropy, mse, regression, tokens


class DropBlock(GptBlock):
    """Draws random numbers, takes a keyword, and returns more than tensors."""

    def forward(self, x, scale=None):
        return F.dropout(super().forward(x), 0.1, self.training) * scale, {"calls": 1}


class DropGpt(TinyGpt):
    """The tied GPT of such blocks."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.blocks = nn.ModuleList(DropBlock(WIDTH) for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x, told = block(x, scale=torch.tensor(1.1, dtype=x.dtype))
            assert told == {"calls": 1}
        return self.head(self.norm(x))


class NormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return x + self.norm(self.linear(x)).relu()


class NormMlp(Mlp):
    """Blocks with running statistics."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.blocks = nn.ModuleList(NormBlock() for _ in range(2))


class CacheLayer:
    """What one block keeps; the empty lists and the counter are made by the first write."""

    def __init__(self) -> None:
        self.keys = None

    def update(self, keys):
        first = self.keys is None
        self.keys = keys if first else torch.cat([self.keys, keys], 1)
        self.seen = 1 if first else self.seen + 1
        return self.keys


class Cache:
    """Grows by a layer at the first use of each block, as the key/value caches of decoders do."""

    def __init__(self) -> None:
        self.layers: list[CacheLayer] = []
        self.updated: dict[int, bool] = {}

    def update(self, index, keys):
        while len(self.layers) <= index:
            self.layers.append(CacheLayer())
        self.updated[index] = True
        return self.layers[index].update(keys)


class CacheBlock(Block):
    """Reads what the cache has for it, as many times as it is told it was called, and writes into all that it gets."""

    def forward(self, x, seen, cache=None, notes=None):
        first = not cache.updated.get(self.index)
        keys = cache.update(self.index, self.up(x)[:, None])
        if not first:
            keys = keys * 2
        seen.append(len(seen))
        notes["count"] = notes.get("count", 0) + 1
        return x + self.down(F.gelu(keys.cumsum(1)[:, -1])) * notes["count"] / len(seen)


class CacheMlp(Mlp):
    """Blocks that share a cache, a list and a dict."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.blocks = nn.ModuleList(CacheBlock() for _ in range(3))
        for index, block in enumerate(self.blocks):
            block.index = index

    def forward(self, x):
        cache, seen, notes = Cache(), [], {}
        for block in (*self.blocks, self.blocks[1]):
            x = block(x, seen, cache=cache, notes=notes)
        assert [layer.seen for layer in cache.layers] == [1, 2, 1] and seen == [0, 1, 2, 3] and notes == {"count": 4}
        return self.head(x)


CASES = {
    "gpt": (DropGpt, cross_entropy, tokens),
    "norms": (NormMlp, mse, regression),
    "cache": (CacheMlp, mse, regression),
}


def _section(every=1, offload=False):
    return {"activation_checkpointing": {"enabled": True, "every": every, "offload": offload}}


def _train(case, stage, dtype, more, compiled=False, steps=2):
    """Losses, weights, and the bytes that autograd saved in the last forward beside the engine's places."""
    torch._dynamo.reset()
    build, loss_of, make = CASES[case]
    setup = Setup(dtype=dtype, accumulation=2, more=more)
    engine = start(build, setup.config(stage))
    if compiled:
        engine.compile(backend="aot_eager")
    torch.manual_seed(dist.get_rank())
    losses = []
    for window in spread(make, steps, setup, dist.get_world_size()):
        for micro in window:
            saved = 0

            def pack(tensor):
                nonlocal saved
                saved += tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = loss_of(engine, engine.module, micro[dist.get_rank()])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    state = engine.full_state_dict()
    engine.destroy()
    return losses, state, saved


def _compare(case, dtype, stages=STAGES, compiled=False):
    return [[_train(case, stage, dtype, more, compiled) for more in ({}, _section(1), _section(2))] for stage in stages]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_bits_from_fewer_bytes(ranks, dtype, world) -> None:
    for result in ranks(_compare, world, "gpt", dtype):
        for plain, *others in result:
            for losses, state, _ in others:
                assert losses == plain[0]
                assert_identical(state, plain[1])
            kept, every, second = (saved for _, _, saved in (plain, *others))
            assert every < 0.25 * kept < second < 0.75 * kept, "of three blocks all, none, and the middle one keep"


def test_with_compiled_blocks(ranks) -> None:
    for result in ranks(_compare, 2, "gpt", "fp32", (0, 3), True):
        for plain, *others in result:
            for losses, state, _ in others:
                assert losses == plain[0]
                assert_identical(state, plain[1])
            assert others[0][2] < 0.25 * plain[2]


def test_running_statistics_count_a_batch_once(ranks) -> None:
    for result in ranks(_compare, 2, "norms", "fp32", (1, 3)):
        for plain, *others in result:
            assert plain[1]["blocks.0.norm.num_batches_tracked"] == 4
            for losses, state, _ in others:
                assert losses == plain[0]
                assert_identical(state, plain[1])


def test_what_a_block_writes_into_its_arguments_counts_once(ranks) -> None:
    """Also for what later calls of other blocks write, and at a second backward."""
    for result in ranks(_compare, 2, "cache", "fp32", (0, 3)):
        for plain, *others in result:
            for losses, state, _ in others:
                assert losses == plain[0]
                assert_identical(state, plain[1])


def test_each_run_gets_the_arguments_as_they_were() -> None:
    model, (x, y) = seeded(CacheMlp), regression(4)
    expected = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
    recompute_blocks(recomputed_blocks(model, 1), offload=False)
    loss = F.mse_loss(model(x), y)
    for _ in range(2):
        found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@dataclass(frozen=True, slots=True)
class Slotted:
    items: list
    count: int


class Pair(NamedTuple):
    items: list
    tensor: torch.Tensor


class Named(OrderedDict):
    """Its own methods are not the built-in type's, and it has attributes."""

    def __setitem__(self, key, value):
        super().__setitem__(key.lower(), value)

    def items(self):
        raise AssertionError("not to be called")


class Kind(Enum):
    ONE = [1]


class Owner:
    def __init__(self) -> None:
        self.items = [1]

    def __del__(self) -> None:
        pass


def test_structure_is_copied_and_what_it_holds_is_shared() -> None:
    named = Named(a=[1])
    named.extra = [2]
    default = defaultdict(list, a=[1])
    for value, inner in [
        ([[1]], lambda v: v[0]),
        (([1], 2), lambda v: v[0]),
        ({"a": [1]}, lambda v: v["a"]),
        (deque([[1], [2]], maxlen=2), lambda v: v[0]),
        (UserDict(a=[1]), lambda v: v["a"]),
        (SimpleNamespace(a=[1]), lambda v: v.a),
        (Slotted([1], 2), lambda v: v.items),
        (Pair([1], torch.ones(1)), lambda v: v.items),
        (named, lambda v: v["a"]),
        (named, lambda v: v.extra),
        (default, lambda v: v["b"]),
        ({1, 2}, lambda v: v),
    ]:
        made = copy_structure(value)
        assert type(made) is type(value) and made is not value
        assert inner(made) == inner(value) and inner(made) is not inner(value)
    assert copy_structure(deque([1], maxlen=1)).maxlen == 1
    shared = [torch.ones(2), nn.Linear(2, 2), threading.Lock(), re.compile("a"), Kind.ONE, Owner(), len, Owner, "a"]
    shared += [iter([1]), torch.Generator(), None]
    assert all(new is old for new, old in zip(copy_structure(shared), shared, strict=True))


def test_a_copy_has_the_aliases_and_cycles_of_the_original() -> None:
    items: list = []
    both = copy_structure((items, {"again": items}))
    assert both[0] is both[1]["again"] and both[0] is not items
    loop: tuple = ([],)
    loop[0].append(loop)
    made = copy_structure(loop)
    assert made is not loop and made[0][0] is made
    thing = SimpleNamespace()
    thing.itself = [thing]
    assert copy_structure(thing).itself[0] is not thing


def _forwards():
    """How often each block's forward ran: in a step, without gradients, and after destroy."""
    counts: Counter[int] = Counter()

    class Counting(Block):
        def forward(self, x):
            counts[self.index] += 1
            return super().forward(x)

    model = seeded(Mlp)
    for index in range(4):
        model.blocks[index] = Counting()
        model.blocks[index].index = index
    names = [name for name, _ in model.named_parameters()]
    engine = shardline.initialize(model=model, config=Setup(more=_section(2)).config(3))[0]
    x = regression(4)
    found = []
    engine.backward(mse(engine, model, x))
    engine.step()
    found.append([counts[index] for index in range(4)])
    counts.clear()
    with torch.no_grad():
        engine(x[0])
    found.append([counts[index] for index in range(4)])
    counts.clear()
    same_names = [name for name, _ in model.named_parameters()] == names
    engine.destroy()
    mse(model, model, x).backward()
    found.append([counts[index] for index in range(4)])
    return found, same_names


def test_every_second_block_and_only_for_a_backward(ranks) -> None:
    for (trained, evaluated, destroyed), same_names in ranks(_forwards):
        assert trained == [2, 1, 2, 1]
        assert evaluated == destroyed == [1, 1, 1, 1]
        assert same_names


def test_a_copy_is_ordinary() -> None:
    model = Mlp()
    undo = recompute_blocks(recomputed_blocks(model, 1), offload=False)
    assert copy.deepcopy(model).blocks[0]._compiled_call_impl is None
    undo()
    assert model.blocks[0]._compiled_call_impl is None


def test_what_the_user_compiled_stays_compiled() -> None:
    model = Mlp()
    model.blocks[0].compile(backend="eager")
    theirs = model.blocks[0]._compiled_call_impl
    wrapped = model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    undo = recompute_blocks(recomputed_blocks(model, 1), offload=False)
    assert _compiled_call(model.blocks[0]) is theirs and model.blocks[0]._compiled_call_impl is not theirs
    assert wrapped._orig_mod._compiled_call_impl is None, "the wrapper recomputes, not what is compiled in it"
    undo()
    assert model.blocks[0]._compiled_call_impl is theirs


def test_offload_moves_the_inputs_of_blocks(monkeypatch) -> None:
    moved = []

    class Recording(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(lambda tensor: moved.append(tuple(tensor.shape)) or tensor.clone(), lambda tensor: tensor)

    for keep in (torch.autograd.graph.save_on_cpu, Recording):
        monkeypatch.setattr(shardline.features.recompute, "save_on_cpu", keep)
        model, (x, _) = seeded(lambda: Mlp(depth=3)), regression(4)
        expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        recompute_blocks(recomputed_blocks(model, 1), offload=True)
        found = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [shape for shape in moved if shape != (0,)] == [(4, WIDTH)] * 3, "and nothing that is made inside of them"


def test_a_model_without_blocks_is_an_error() -> None:
    for model in (ConvNet(), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))):
        with pytest.raises(ModelError, match=r"no repeated blocks .* torch\.utils\.checkpoint"):
            recomputed_blocks(model, 1)


def _offload_on_cpu():
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("shardline").addHandler(handler)
    try:
        start(Mlp, Setup(more=_section(1, True)).config(0)).destroy()
    finally:
        logging.getLogger("shardline").removeHandler(handler)
    return lines


def test_offload_without_a_device_says_so(ranks) -> None:
    assert any("activation_checkpointing.offload has no effect" in line for line in ranks(_offload_on_cpu, 1)[0])
