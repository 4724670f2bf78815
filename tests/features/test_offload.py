"""States in host memory: the same bits as beside the weights, and no more copies than it takes.

There is no second device here, so the host plays both: :class:`Late` carries as slowly as a device may, and shows who
does not wait.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

import pytest
import torch

import shardline.comm.comm
from shardline.comm.transport import AllToAllTransport, HostStagedTransport
from shardline.config import load_config
from shardline.errors import OptimizerError
from shardline.features.offload import Offload
from shardline.sharding.build import resting_stage
from tests.harness import STAGES, Setup, assert_identical, spread, start, train
from tests.models import Lora, Mlp, TinyGpt, cross_entropy, mse, regression, tokens


class Late(Offload):
    """Copies on one CPU. What goes down is read at the last moment, and is not a number before."""

    made: list[Late] = []

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), pin=False)
        self.log: list[str] = []
        Late.made.append(self)

    def _start_copy(self, shard, host):
        host.fill_(torch.nan)
        return lambda: host.copy_(shard)

    def copy_to_device(self, unit, master, weights):
        self.log.append(f"up {unit}")
        assert master.data_ptr() != weights.data_ptr()
        super().copy_to_device(unit, master, weights)


def away(fn, *args, staged=False):
    """On a rank: call ``fn`` where ``offload_optimizer`` acts, and, if ``staged``, sums are made as on an accelerator.

    There a transport adds a finished sum to what is there, whereas on a CPU it adds rank by rank.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Late, "made", [])
        patch.setattr(Offload, "from_config", staticmethod(_late))
        if staged:
            patch.setattr(shardline.comm.comm, "attach", lambda *args, **kwargs: None)
            patch.setattr(
                shardline.comm.comm,
                "choose",
                lambda group, device, log, channel: HostStagedTransport(AllToAllTransport(group, log, channel)),
            )
        return fn(*args)


def _late(config, source):
    return Late() if config.zero_optimization.offload_optimizer.device == "cpu" else None


def offloaded(config):
    return config | {"zero_optimization": config["zero_optimization"] | {"offload_optimizer": {"device": "cpu"}}}


def both(setup, stages=STAGES):
    """Configurations without and with offload, in turns."""
    return [each for stage in stages for each in (setup.config(stage), offloaded(setup.config(stage)))]


def check_pairs(results):
    for found in results:
        for here, there in zip(found[::2], found[1::2], strict=True):
            assert_identical(there["state"], here["state"])
            for key in ("losses", "norms", "skipped"):
                assert repr(there[key]) == repr(here[key]), "a skipped step's norm is not a number"


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_stage_is_the_engine_without(ranks, dtype, world):
    setup = Setup(dtype, "AdamW", clip=0.25, micro=2)
    check_pairs(ranks(away, world, train, TinyGpt, cross_entropy, spread(tokens, 3, setup, world), both(setup)))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("dtype", "optimizer"), [("fp32", "SGD"), ("bf16", "AdamW")])
def test_accumulation(ranks, dtype, optimizer, world):
    setup = Setup(dtype, optimizer, clip=0.25, micro=2, accumulation=2)
    batches = spread(tokens, 3, setup, world)
    check_pairs(ranks(away, world, train, TinyGpt, cross_entropy, batches, both(setup), staged=True))


@pytest.mark.parametrize("world", [1, 2])
def test_overflow_in_fp16(ranks, world):
    setup = Setup("fp16", "AdamW", accumulation=2, micro=2, scale_power=20)
    results = ranks(
        away, world, train, TinyGpt, cross_entropy, spread(tokens, 6, setup, world), both(setup, (1, 3)), staged=True
    )
    assert 0 < results[0][1]["skipped"] < 6
    check_pairs(results)


def test_optimizers_without_fused_kernels_and_frozen_parameters(ranks):
    setup = Setup("bf16", "AdamW", clip=0.1, micro=2, more={"optimizer": {"type": "RMSprop", "params": {"lr": 0.01}}})
    batches = spread(partial(regression, width=64), 3, setup, 2)
    check_pairs(ranks(away, 2, train, partial(Lora, width=64), mse, batches, both(setup)))


def _events(configs, batches, rank_of):
    """Weights after steps with hooks, edits of every kind, and parameters that are frozen for a while."""
    return [_eventful(config, batches) for config in configs]


def _eventful(config, batches):
    engine = start(Mlp, config)
    rank = engine.global_rank
    seen = []

    def halve(fragments):
        for fragment in fragments:
            fragment.grad.mul_(0.5)
            seen.append((fragment.name, fragment.grad.clone(), fragment.weight.clone()))

    def clamp(fragments):
        for fragment in fragments:
            fragment.weight.clamp_(-0.1, 0.1)

    handles = []
    for index, ((micro,),) in enumerate(zip(batches, strict=True)):
        if index == 1:
            handles = [engine.before_step(halve), engine.after_step(clamp)]
        if index == 2:
            for handle in handles:
                handle.remove()
            with torch.no_grad(), engine.gathered_parameters(write=True):
                for param in engine.module.parameters():
                    param.mul_(1.5)
        if index in (3, 4):
            next(engine.module.parameters()).requires_grad_(index == 4)
        engine.backward(mse(engine, engine.module, micro[rank]))
        engine.step()
    state = engine.full_state_dict()
    engine.destroy()
    return state, seen


@pytest.mark.parametrize("world", [1, 2])
def test_hooks_edits_and_freezing(ranks, world):
    for dtype in ("fp32", "bf16"):
        setup = Setup(dtype, "AdamW", clip=0.25)
        batches = spread(regression, 6, setup, world)
        for found in ranks(away, world, _events, both(setup, (1, 3)), batches, None):
            for (here, saw), (there, saw_there) in zip(found[::2], found[1::2], strict=True):
                assert_identical(there, here)
                assert len(saw) == len(saw_there) > 0
                for a, b in zip(saw, saw_there, strict=True):
                    assert a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


def _moves(place, configs, batches):
    """Train under each configuration in turn, each going on from the checkpoint of the one before."""
    for turn, config in enumerate(configs):
        engine = start(Mlp, config)
        if turn:
            assert engine.load_checkpoint(place)[0] is not None
        for (micro,) in batches[2 * turn : 2 * turn + 2]:
            engine.backward(mse(engine, engine.module, micro[engine.global_rank]))
            engine.step()
        engine.save_checkpoint(place)
        state = engine.full_state_dict()
        engine.destroy()
    return state


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_checkpoints_go_both_ways(ranks, tmp_path, dtype):
    setup = Setup(dtype, "AdamW")
    batches = spread(regression, 6, setup, 2)
    plain = [setup.config(stage) for stage in (3, 1, 2)]
    mixed = [offloaded(plain[0]), plain[1], offloaded(plain[2])]
    expected = ranks(away, 2, _moves, tmp_path / "a", plain, batches)
    for got, want in zip(ranks(away, 2, _moves, tmp_path / "b", mixed, batches), expected, strict=True):
        assert_identical(got, want)


# --- what travels, and when -------------------------------------------------------------------------------------------


def _traffic(config, batches):
    """Copies by direction and unit, bytes by direction, of one window; and the elements of this rank's shards."""
    engine = start(Mlp, config)
    (late,) = Late.made
    late.counts.clear()
    late.bytes.clear()
    for micro in batches[0]:
        engine.backward(mse(engine, engine.module, micro[engine.global_rank]))
        engine.step()
    units = engine.trainables.layout.units
    elements = sum(bucket.shard.stop - bucket.shard.start for unit in units for bucket in unit.trainable)
    where = {
        (bucket.weights.master.data_ptr() != bucket.weights.resting.data_ptr(), bucket.grads.reduced is None)
        for unit in units
        for bucket in unit.buckets
    }
    engine.destroy()
    Late.made.clear()
    return dict(late.counts), dict(late.bytes), elements, len(units), where


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 2)])
def test_a_shard_goes_down_once_a_reduction_and_up_once_a_step(ranks, world, accumulation):
    setup = Setup("bf16", accumulation=accumulation)
    batches = spread(regression, 1, setup, world)
    for stage in STAGES:
        times = accumulation if stage >= 2 else 1
        for counts, moved, elements, units, where in ranks(
            away, world, _traffic, offloaded(setup.config(stage)), batches
        ):
            down = {("to host", unit): times for unit in range(units)}
            assert Counter(counts) == Counter(down | {("to device", unit): 1 for unit in range(units)})
            # A sum over ranks goes down as it was rounded once, in fp32; a gradient of one rank as it is.
            assert moved == {"to host": elements * times * (4 if world > 1 else 2), "to device": elements * 2}
            assert where == {(True, True)}


def _order(config, batches):
    engine = start(Mlp, config)
    (late,) = Late.made
    step, log = engine.optimizer.step, late.log
    engine.optimizer.step = lambda: (log.append("update"), step())
    log.clear()
    engine.backward(mse(engine, engine.module, batches[0][0][engine.global_rank]))
    engine.step()
    count = len(engine.trainables.layout.units)
    engine.destroy()
    return count, log


def test_weights_go_up_behind_the_next_units_update(ranks):
    setup = Setup()
    config, batches = offloaded(setup.config(1)), spread(regression, 1, setup, 1)
    ((count, log),) = ranks(away, 1, _order, config, batches)
    assert count > 2 and log == [word for unit in range(count) for word in ("update", f"up {unit}")]
    unknown = config | {"optimizer": {"type": "RMSprop", "params": {}}}
    ((count, log),) = ranks(away, 1, _order, unknown, batches)
    assert log == ["update", *(f"up {unit}" for unit in range(count))], "it might notice that it is called often"


def test_few_shards_are_under_way_and_they_arrive_in_order():
    late, arrived = Late(), []
    for unit in range(4):
        late.copy_to_host(unit, torch.full((3,), float(unit)), lambda host: arrived.append(host.tolist()))
        assert len(arrived) == max(0, unit - 1)
    late.wait_for_copies()
    late.wait_for_copies()
    assert arrived == [[float(unit)] * 3 for unit in range(4)]
    assert late.counts == {("to host", unit): 1 for unit in range(4)} and late.bytes == {"to host": 48}


# --- where it does not apply ------------------------------------------------------------------------------------------


class Together(torch.optim.SGD):
    shardline_kind = "global"


def test_states_in_host_memory_are_divided_at_every_stage(ranks):
    def config(stage):
        return load_config({"train_batch_size": 2, "zero_optimization": {"stage": stage}}, 1)

    assert [resting_stage(config(stage), None).number for stage in STAGES] == [0, 1, 2, 3]
    assert [resting_stage(config(stage), Late()).number for stage in STAGES] == [1, 1, 2, 3]
    assert ranks(away, 2, _global) == ["Together needs all parameters on one rank"] * 2


def _global():
    config = offloaded(Setup().config(0))
    del config["optimizer"]
    with pytest.raises(OptimizerError, match="Use stage 0 without offload_optimizer") as raised:
        start(Mlp, config, optimizer=lambda params: Together(params, lr=0.1))
    return str(raised.value)[:41]


def _on_a_cpu():
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("shardline").addHandler(handler)
    try:
        engine = start(Mlp, offloaded(Setup().config(1)))
        beside = all(
            bucket.weights.master.data_ptr() == bucket.weights.resting.data_ptr()
            for unit in engine.trainables.layout.units
            for bucket in unit.buckets
        )
        engine.destroy()
    finally:
        logging.getLogger("shardline").removeHandler(handler)
    return lines, beside


def test_on_a_cpu_it_says_that_it_has_no_effect(ranks):
    ((lines, beside),) = ranks(_on_a_cpu, 1)
    assert beside and any("offload_optimizer has no effect" in line for line in lines)


# --- on an accelerator ------------------------------------------------------------------------------------------------


def _on_a_device(config, batches):
    engine = start(Mlp, config)
    device = engine.device
    losses = []
    for window in batches:
        for micro in window:
            moved = tuple(each.to(device) for each in micro[engine.global_rank])
            loss = mse(engine, engine.module, moved)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    buckets = [bucket for unit in engine.trainables.layout.units for bucket in unit.buckets]
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    found = {
        "weights": {bucket.weights.resting.device.type for bucket in buckets},
        "masters": {bucket.weights.master.device.type for bucket in buckets},
        "pinned": {bucket.weights.master.is_pinned() for bucket in buckets},
        "states": {value.device.type for value in states if isinstance(value, torch.Tensor)},
        "state": engine.full_state_dict(),
        "losses": losses,
        "device": device.type,
    }
    engine.destroy()
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_an_accelerator(ranks, dtype, world):
    """SGD, whose fused kernels round alike on both sides; Adam's differ by the order of a few operations."""
    if torch.accelerator.device_count() < world:
        pytest.skip(f"{world} ranks need {world} accelerators: NCCL refuses two ranks on one")
    setup = Setup(dtype, "SGD", clip=0.25, accumulation=2)
    batches = spread(regression, 3, setup, world)
    for stage in STAGES:
        here = ranks(_on_a_device, world, setup.config(stage), batches)
        there = ranks(_on_a_device, world, offloaded(setup.config(stage)), batches)
        for without, with_it in zip(here, there, strict=True):
            device = with_it["device"]
            assert device != "cpu" and with_it["weights"] == without["masters"] == {device}
            assert with_it["masters"] == with_it["states"] == {"cpu"} and with_it["pinned"] == {True}
            torch.testing.assert_close(with_it["losses"], without["losses"], rtol=1e-5, atol=1e-6)
            for name, value in without["state"].items():
                torch.testing.assert_close(with_it["state"][name], value, rtol=1e-5, atol=1e-6)
