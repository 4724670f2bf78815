"""One model that trains and serves: whole weights as a stream, engines that only evaluate, states out of the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardline
from shardline.errors import UsageError
from tests.harness import Setup, assert_identical, live_bytes, peak_bytes, seeded, start

WIDTH, LAYERS = 64, 6
SINGLE = {"zero_optimization": {"unit_min_numel": 1, "stage3_param_persistence_threshold": 0}}


class Net(nn.Module):
    """Equal blocks with a dtype and a frozen parameter of their own, and tied ends."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS))
        for block in self.blocks:
            block[0].bias.requires_grad_(False)
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def generate(self, x, times):
        for _ in range(times):
            x = self(x)
        return x


def train(engine, steps, seed=0):
    for step in range(steps):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * seed + step))
        engine.backward(engine(x).float().square().mean())
        engine.step()


# -- a stream of weights ----------------------------------------------------------------------------------------------


def streamed(dtype, stage):
    engine = start(Net, Setup(dtype=dtype).config(stage))
    train(engine, 1)
    compute = engine.precision.compute
    for wanted in (None, torch.float32, torch.float16):
        found = []
        for name, tensor in engine.stream_weights(bucket_bytes=3 * WIDTH * WIDTH, dtype=wanted):
            assert tensor.is_contiguous() and not tensor.requires_grad
            found.append((name, tensor))
        whole = engine.full_state_dict(dtype=wanted or compute)
        names = [name for name in whole if name != "last.weight"]  # tied
        assert [name for name, _ in found] == names
        assert_identical(dict(found), {name: whole[name] for name in names})
        for _, tensor in found:
            tensor.zero_()  # the caller's own
    train(engine, 1, seed=1)
    for number, _ in enumerate(engine.stream_weights()):
        if number == 2:
            break
    left = engine.stream_weights()
    next(left)
    del left
    train(engine, 1, seed=2)
    result = engine.full_state_dict()
    engine.destroy()
    engine = start(Net, Setup(dtype=dtype).config(stage))
    for seed in range(3):
        train(engine, 1, seed)
    assert_identical(result, engine.full_state_dict())
    engine.destroy()


def streamed_everywhere():
    for dtype, stage in (("bf16", 0), ("bf16", 2), ("bf16", 3), ("fp32", 0), ("fp32", 3)):
        streamed(dtype, stage)


@pytest.mark.parametrize("world", [1, 2])
def test_the_stream_is_the_whole_model_and_changes_nothing(ranks, world):
    ranks(streamed_everywhere, world)


def most_at_once(stage, dtype, bucket):
    """Bytes beyond the engine's at the peak of a loop that keeps nothing."""
    engine = start(Net, Setup(dtype="bf16").config(stage))

    def loop():
        for _ in engine.stream_weights(bucket_bytes=bucket, dtype=dtype):
            pass

    loop()
    found = peak_bytes(loop)
    engine.destroy()
    return found


def peaks(cases):
    return [most_at_once(*case) for case in cases]


def test_no_more_than_a_bucket_and_two_units_is_held(ranks):
    unit = WIDTH * WIDTH + WIDTH
    cases = [(stage, dtype, bucket) for stage in (0, 3) for dtype in (None, torch.float32) for bucket in (1, 10**9)]
    for found in ranks(peaks, 2, cases):
        for (stage, dtype, bucket), peak in zip(cases, found, strict=True):
            size = 4 if dtype else 2
            copies = max(min(bucket, size * unit), size * WIDTH * WIDTH)  # a weight is not cut
            assert peak <= copies + 2 * size * unit + 2048, (stage, dtype, bucket)


def said_of_streams():
    engine = start(Net, Setup().config(3))
    said = []

    def attempt(call):
        try:
            call()
        except UsageError as error:
            said.append(str(error))

    def step_inside():
        for number, _ in enumerate(engine.stream_weights()):
            if number == 1:
                train(engine, 1)

    def inside_gathered():
        with engine.gathered_parameters():
            engine.stream_weights()

    attempt(lambda: engine.stream_weights(bucket_bytes=0))
    attempt(step_inside)
    attempt(inside_gathered)
    train(engine, 1)
    engine.destroy()
    attempt(engine.stream_weights)
    return said


def test_what_a_stream_cannot_be_is_said(ranks):
    for said in ranks(said_of_streams, 2):
        wanted = ["bucket_bytes=0", "weights were changed while", "inside a forward or", "after destroy()"]
        assert [want in text for want, text in zip(wanted, said, strict=True)] == [True] * 4


# -- engines without an optimizer -------------------------------------------------------------------------------------


def reference(stage):
    model = seeded(Net).requires_grad_(True)
    numel = sum(param.numel() for param in model.parameters())
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.eval().generate(x, 3)
    held = live_bytes()
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage} | SINGLE["zero_optimization"]}
    engine, optimizer, *_ = shardline.initialize(model=model, config=config)
    assert optimizer is None and engine.eval() is engine
    with torch.no_grad():
        outputs = [engine.generate(x, 3), engine(engine(engine(x)))]
    with engine.gathered_parameters(), torch.no_grad():
        outputs.append(engine.generate(x, 3))
    assert all(torch.equal(output, expected) for output in outputs)
    del outputs, expected
    grown = live_bytes() - held
    said = []
    for call in (lambda: engine.backward(engine(x).mean()), engine.step):
        try:
            call()
        except UsageError as error:
            said.append(str(error))
    weights = dict(engine.stream_weights())
    engine.destroy()
    return grown, 4 * numel, said, len(weights)


def references():
    return [reference(stage) for stage in (0, 3)]


@pytest.mark.parametrize("world", [1, 2])
def test_an_engine_without_an_optimizer_holds_weights_alone(ranks, world):
    for rank in ranks(references, world):
        for stage, (grown, whole, said, count) in zip((0, 3), rank, strict=True):
            kept = whole / world if stage == 3 else whole
            assert grown <= kept - whole + 8192, (stage, grown)  # the model's own tensors are gone
            assert len(said) == 2 and all("needs an optimizer, and this engine has none" in text for text in said)
            assert count == 1 + 2 * LAYERS


# -- states out of the way --------------------------------------------------------------------------------------------


def away(stage, folder):
    """On a CPU nothing moves; what follows is the same."""
    found = []
    for moves in (False, True):
        engine = start(Net, Setup(dtype="bf16").config(stage))
        for seed in range(3):
            train(engine, 1, seed)
            if moves:
                assert engine.offload_states() == 0
            engine(torch.ones(4, WIDTH))
            engine.save_checkpoint(f"{folder}/{moves}")
            if moves and seed == 1:
                assert engine.reload_states() == 0
        found.append(engine.full_state_dict())
        engine.destroy()
    assert_identical(*found)


def test_states_may_go_and_come_on_a_cpu(ranks, tmp_path):
    ranks(away, 2, 3, str(tmp_path))
