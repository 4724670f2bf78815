"""What DeepSpeed's users lean on, each against plain torch in one process, at every stage on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import shardline.compat.deepspeed as deepspeed
from shardline.errors import DisagreementError
from tests.compat.rows import differs, unchanged
from tests.compat.test_engine import SHARDED, batches, make_net

WORLD, STEPS = 2, 3
Step = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


def settings(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
        "zero_optimization": {"stage": stage, **SHARDED},
        **more,
    }


def error(net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(net(x).float(), y)


def plain(
    gradient: Callable[[nn.Module, int, int], None], net: nn.Module | None = None, steps: int = STEPS
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and norms where ``gradient(net, step, rank)`` runs the backwards of one rank, and ranks are averaged."""
    net = net or make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    norms = []
    for step in range(steps):
        for rank in range(WORLD):
            gradient(net, step, rank)
        for param in net.parameters():
            if param.grad is not None:
                param.grad /= WORLD
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), float("inf")).item())
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict(), norms


def two(step: int, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Two batches for each step and rank."""
    return batches(2 * STEPS, rank)[2 * step : 2 * step + 2]


# -- how a window's gradient comes about: each against its meaning in plain torch --------------------------------------


def by_plain_backward(engine: Any, step: int, rank: int) -> None:
    error(engine, *two(step, rank)[0]).backward()
    engine.step()


def one(net: nn.Module, step: int, rank: int) -> None:
    error(net, *two(step, rank)[0]).backward()


def by_output_gradient(engine: Any, step: int, rank: int) -> None:
    x, y = two(step, rank)[0]
    engine(x).backward(y)
    engine.step()


def output_gradient(net: nn.Module, step: int, rank: int) -> None:
    x, y = two(step, rank)[0]
    net(x).backward(y)


def by_two_backwards(engine: Any, step: int, rank: int) -> None:
    (x, y), other = two(step, rank)
    out = engine(x)
    engine.backward(F.mse_loss(out, y), retain_graph=True)
    engine.backward(out.abs().mean())
    error(engine, *other).backward()
    engine.step()


def two_backwards(net: nn.Module, step: int, rank: int) -> None:
    (x, y), other = two(step, rank)
    out = net(x)
    (F.mse_loss(out, y) + out.abs().mean() + error(net, *other)).backward()


def by_no_sync(engine: Any, step: int, rank: int) -> None:
    first, second = two(step, rank)
    with engine.no_sync():
        engine.backward(error(engine, *first))
    engine.backward(error(engine, *second))
    engine.step()


def by_hand(engine: Any, step: int, rank: int) -> None:
    first, second = two(step, rank)
    engine.set_gradient_accumulation_boundary(is_boundary=False)
    engine.backward(error(engine, *first))
    engine.step()
    assert not engine.is_gradient_accumulation_boundary()
    engine.set_gradient_accumulation_boundary(is_boundary=True)
    engine.backward(error(engine, *second))
    assert engine.is_gradient_accumulation_boundary()
    engine.step()


def sum_of_both(net: nn.Module, step: int, rank: int) -> None:
    for batch in two(step, rank):
        error(net, *batch).backward()


def by_counting(engine: Any, step: int, rank: int) -> None:
    """With two accumulation steps in the configuration."""
    for number, batch in enumerate(two(step, rank)):
        assert engine.is_gradient_accumulation_boundary() == (number == 1)
        engine.backward(error(engine, *batch))
        engine.step()


def mean_of_both(net: nn.Module, step: int, rank: int) -> None:
    for batch in two(step, rank):
        (error(net, *batch) / 2).backward()


def by_own_division(engine: Any, step: int, rank: int) -> None:
    for batch in two(step, rank):
        returned = engine.backward(error(engine, *batch) / 2, scale_wrt_gas=False)
        assert returned.dim() == 0
        engine.step()


def by_writing_gradients(engine: Any, step: int, rank: int) -> None:
    """Scaled and clipped by hand, between backward and step."""
    engine.backward(error(engine, *two(step, rank)[0]))
    weight = engine.module[2].weight
    found = deepspeed.utils.safe_get_full_grad(weight)
    assert found.shape == weight.shape
    deepspeed.utils.safe_set_full_grad(weight, found.clamp(-0.01, 0.01))
    torch.testing.assert_close(deepspeed.utils.safe_get_full_grad(weight), found.clamp(-0.01, 0.01))
    deepspeed.utils.safe_update_full_grad_vectorized([engine.module[0].bias], lambda grad, param: grad * 3)
    engine.step()


def check_written(found: dict[str, Tensor]) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        for rank in range(WORLD):
            (error(net, *two(step, rank)[0]) / WORLD).backward()
        net[2].weight.grad.clamp_(-0.01, 0.01)
        net[0].bias.grad *= 3
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(found, net.state_dict(), rtol=1e-5, atol=1e-6)


WAYS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain backward": (by_plain_backward, one, {}),
    "a gradient for outputs": (by_output_gradient, output_gradient, {}),
    "several backwards": (by_two_backwards, two_backwards, {}),
    "no_sync": (by_no_sync, sum_of_both, {}),
    "a boundary set by hand": (by_hand, sum_of_both, {}),
    "accumulation": (by_counting, mean_of_both, {"gradient_accumulation_steps": 2}),
    "scale_wrt_gas": (by_own_division, mean_of_both, {"gradient_accumulation_steps": 2}),
    "gradients written": (by_writing_gradients, None, {}),
}


def train(stage: int, names: list[str]) -> dict[str, tuple[dict[str, Tensor], list[float], list[float]]]:
    found = {}
    for name in names:
        way, _, more = WAYS[name]
        net = make_net()
        engine, optimizer, _, _ = deepspeed.initialize(
            model=net, model_parameters=net.parameters(), config=settings(stage, **more)
        )
        norms, also = [], []
        for step in range(STEPS):
            way(engine, step, dist.get_rank())
            norms.append(float(engine.get_global_grad_norm()))
            also.append(float(optimizer._global_grad_norm))
        found[name] = engine.full_state_dict(), norms, also
        engine.destroy()
    return found


@unchanged(
    "how gradients come about",
    "plain `backward`, gradients given for outputs, several backwards, `no_sync`, boundaries by hand, "
    "`scale_wrt_gas`, `safe_get/set_full_grad`, their norm at every stage",
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_of_a_window_and_their_norm(ranks, stage):
    for name, (weights, norms, also) in ranks(train, WORLD, stage, list(WAYS))[0].items():
        if WAYS[name][1] is None:
            check_written(weights)
            continue
        expected, lengths = plain(WAYS[name][1])
        torch.testing.assert_close(
            weights, expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        torch.testing.assert_close(norms, lengths, rtol=1e-4, atol=0)
        assert also == norms


# -- fp16 --------------------------------------------------------------------------------------------------------------


class Partly(nn.Module):
    """One layer is never used, and another by one rank alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.used, self.never, self.once = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor, once: bool = False) -> Tensor:
        x = self.used(x).tanh()
        return self.head(self.once(x).tanh() if once else x)


def in_fp16(stage: int) -> None:
    rank = dist.get_rank()
    fp16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
    net = Partly()
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    config = settings(stage, fp16=fp16, optimizer={"type": "Adam", "params": {"lr": 1e-3}})
    engine, optimizer, _, _ = deepspeed.initialize(model=net, config=config)
    assert (optimizer.dynamic_loss_scale, optimizer.scale_window, optimizer.cur_iter) == (True, 2, 0)
    plain = Partly()
    for step, (x, y) in enumerate(batches(STEPS, rank)):
        assert optimizer.cur_scale == engine.loss_scale() == 2.0 ** (8 + step // 2)
        loss = F.mse_loss(engine(x, once=rank == 0).float(), y)
        engine.scale(loss).backward() if step % 2 else engine.backward(loss)
        if not step:  # the same gradient, whichever way
            F.mse_loss(plain(x, once=rank == 0), y).backward()
            expected = plain.head.weight.grad.clone()
            dist.all_reduce(expected)
            found = deepspeed.utils.safe_get_full_grad(net.head.weight)
            torch.testing.assert_close(found.float(), expected / WORLD, rtol=2e-2, atol=1e-3)
        engine.step()
        assert (optimizer.overflow, optimizer.cur_iter) == (False, step + 1)
    after = engine.full_state_dict()
    assert torch.equal(after["never.weight"], before["never.weight"])
    for name in ("used.weight", "once.weight", "head.weight"):
        assert (after[name] - before[name]).abs().max() > 1e-3, name
    x, y = batches(1, rank)[0]
    engine.backward(F.mse_loss(engine(x * 1e4).float(), y) * 1e30)
    engine.step()
    assert optimizer.overflow
    assert not engine.was_step_applied()
    assert (engine.skipped_steps, engine.loss_scale()) == (1, 2.0**8)
    engine.destroy()


def scaled_alike(stage: int) -> list[dict[str, Tensor]]:
    """Steps by ``engine.backward``, and by a plain one from ``engine.scale``."""
    found = []
    for by_hand in (False, True):
        net = make_net()
        config = settings(stage, fp16={"enabled": True, "initial_scale_power": 10}, gradient_accumulation_steps=2)
        engine, *_ = deepspeed.initialize(model=net, config=config)
        for x, y in batches(4, dist.get_rank()):
            loss = F.mse_loss(engine(x).float(), y)
            if by_hand:
                engine.scale(loss).backward()
            else:
                engine.backward(loss)
            engine.step()
        found.append(engine.full_state_dict())
        engine.destroy()
    return found


@unchanged("how gradients come about", "empty ones in fp16, `engine.scale`")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp16_with_empty_gradients_and_losses_scaled_by_hand(ranks, stage):
    ranks(in_fp16, WORLD, stage)
    by_engine, by_hand = ranks(scaled_alike, WORLD, stage)[0]
    torch.testing.assert_close(by_engine, by_hand, rtol=1e-5, atol=1e-6)


# -- freezing ----------------------------------------------------------------------------------------------------------


def frozen(stage: int, folder: str) -> dict[str, Tensor]:
    """One layer is frozen from the start, another after the first step; saved without the frozen ones."""
    net = make_net()
    net[0].requires_grad_(False)
    trainable = [param for param in net.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(model=net, model_parameters=trainable, config=settings(stage))
    for step in range(STEPS):
        if step == 1:
            net[4].requires_grad_(False)
        one(engine, step, dist.get_rank())
        engine.step()
    weights = engine.full_state_dict()
    assert set(engine.module_state_dict(exclude_frozen_parameters=True)) == {"2.weight", "2.bias"}
    engine.save_checkpoint(folder, tag="part", exclude_frozen_parameters=True)
    engine.destroy()
    if dist.get_rank() == 0:
        read = deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint
        assert set(read(folder, "part", exclude_frozen_parameters=True)) == {"2.weight", "2.bias"}
    other = make_net()
    with torch.no_grad():
        other[2].weight.zero_()
    other[0].requires_grad_(False)
    again, *_ = deepspeed.initialize(model=other, config=settings(stage))
    again.load_checkpoint(folder, tag="part", load_module_strict=False, load_optimizer_states=False)
    torch.testing.assert_close(again.full_state_dict()["2.weight"], weights["2.weight"], rtol=0, atol=0)
    again.destroy()
    return weights


@unchanged("how gradients come about", "freezing, and checkpoints without what is frozen")
@pytest.mark.parametrize("stage", [1, 3])
def test_freezing(ranks, tmp_path, stage):
    found = ranks(frozen, WORLD, stage, str(tmp_path))[0]
    net = make_net()
    net[0].requires_grad_(False)

    def gradient(net: nn.Module, step: int, rank: int) -> None:
        if step:
            net[4].requires_grad_(False)
        one(net, step, rank)

    expected, _ = plain(gradient, net)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def steps_of(engine: Any, count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        one(engine, step, 0)
        engine.step()


WARMUP = {"warmup_min_lr": 1e-3, "warmup_num_steps": 6, "warmup_type": "linear"}
ADAM = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "scheduler": {"type": "WarmupLR", "params": WARMUP},
}


def saved(folder: str) -> dict[str, Tensor]:
    engine, *_ = deepspeed.initialize(model=make_net(), config=settings(2, **ADAM))
    steps_of(engine, 2)
    engine.save_checkpoint(folder, client_state={"epoch": 1})
    steps_of(engine, 1, first=2)
    weights = engine.full_state_dict()
    engine.destroy()
    return weights


def loaded(folder: str, stage: int) -> dict[str, Any]:
    """In other numbers of ranks: all of it, and parts."""
    found = {}
    choices = {
        "all": {},
        "module": {"load_module_only": True},
        "no optimizer": {"load_optimizer_states": False},
        "no schedule": {"load_lr_scheduler_states": False},
    }
    for name, options in choices.items():
        engine, _, _, scheduler = deepspeed.initialize(model=make_net(), config=settings(stage, **ADAM))
        path, client = engine.load_checkpoint(folder, **options)
        assert path is not None
        start = engine.full_state_dict()
        states = engine.full_optimizer_state_dict()["state"]
        found[name] = {
            "start": start, "states": len(states), "steps": engine.global_steps, "client": client,
            "schedule": scheduler.last_batch_iteration,
        }  # fmt: skip
        if name == "all":
            steps_of(engine, 1, first=2)
            found["after"] = engine.full_state_dict()
        engine.destroy()
    return found


@unchanged(
    "parts of a checkpoint, schedules, loaders",
    "`load_module_only`, `load_optimizer_states`, `load_lr_scheduler_states`, another number of ranks",
)
def test_parts_of_a_checkpoint_and_another_number_of_ranks(ranks, tmp_path):
    after = ranks(saved, 2, str(tmp_path))[0]
    for world, stage in ((1, 3), (3, 3), (2, 0)):
        for found in ranks(loaded, world, str(tmp_path), stage):
            torch.testing.assert_close(found["after"], after, rtol=1e-5, atol=1e-6)
            start = found["all"]["start"]
            for part in ("module", "no optimizer", "no schedule"):
                torch.testing.assert_close(found[part]["start"], start, rtol=0, atol=0)
            assert [found[part]["states"] for part in ("all", "module", "no optimizer", "no schedule")] == [6, 0, 0, 6]
            assert found["all"]["steps"] == 2
            assert found["all"]["client"]["epoch"] == 1
            assert found["all"]["schedule"] == found["no optimizer"]["schedule"] == 1


def optimizer_alone(stage: int) -> None:
    """Its state in torch's form goes into another engine."""
    engine, *_ = deepspeed.initialize(model=make_net(), config=settings(stage, **ADAM))
    steps_of(engine, 2)
    state, weights = engine.full_optimizer_state_dict(), engine.full_state_dict()
    engine.destroy()
    other, optimizer, _, _ = deepspeed.initialize(model=make_net(), config=settings(stage, **ADAM))
    optimizer.load_state_dict(state)
    torch.testing.assert_close(other.full_optimizer_state_dict()["state"], state["state"], rtol=0, atol=0)
    assert not torch.equal(other.full_state_dict()["0.weight"], weights["0.weight"])
    other.destroy()


def differing_tags(folder: str) -> None:
    for mode in ("Ignore", "Warn", "Fail"):
        config = settings(1, checkpoint={"tag_validation": mode})
        engine, *_ = deepspeed.initialize(model=make_net(), config=config)
        with pytest.raises(DisagreementError, match="tag"):
            engine.save_checkpoint(folder, tag=f"tag{dist.get_rank()}")
        assert engine.save_checkpoint(folder, tag="same")
        engine.destroy()


@unchanged("parts of a checkpoint, schedules, loaders", "the optimizer alone")
@differs("a tag that differs between ranks", "a warning, or what `tag_validation` says", "`DisagreementError`")
def test_optimizer_alone_and_tags(ranks, tmp_path):
    ranks(optimizer_alone, WORLD, 3)
    ranks(differing_tags, WORLD, str(tmp_path))


# -- schedules and loaders ---------------------------------------------------------------------------------------------


def schedules() -> None:
    from shardline.compat.deepspeed.runtime.lr_schedules import WARMUP_MAX_LR, WARMUP_MIN_LR, WARMUP_NUM_STEPS

    params = {WARMUP_MIN_LR: 0.0, WARMUP_MAX_LR: 0.1, WARMUP_NUM_STEPS: 4, "warmup_type": "linear"}
    config = settings(1, scheduler={"type": "WarmupLR", "params": params})
    engine, optimizer, _, scheduler = deepspeed.initialize(model=make_net(), config=config)
    rates = []
    for step in range(6):
        scheduler.get_lr()
        one(engine, step % STEPS, 0)
        engine.step()
        rates.append(scheduler.get_last_lr()[0])
        assert scheduler.last_batch_iteration == step
        assert engine.get_lr() == scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
    torch.testing.assert_close(rates, [0.0, 0.025, 0.05, 0.075, 0.1, 0.1])
    assert (scheduler.warmup_num_steps, scheduler.min_lrs, scheduler.max_lrs) == (4, [0.0], [0.1])
    engine.destroy()


def loaders() -> None:
    x = torch.arange(20.0).reshape(10, 2)
    data = torch.utils.data.TensorDataset(x)
    config = settings(0, data_loader={"shuffle": False, "drop_last": True})
    engine, _, loader, _ = deepspeed.initialize(model=nn.Linear(2, 1), config=config, training_data=data)
    assert len(loader) == len(list(loader)) == 1
    other = engine.deepspeed_io(data, batch_size=2, route="eval")
    rows = [row for (batch,) in other for row in batch[:, 0].int().tolist()]
    assert rows == [[0, 4, 8, 12], [2, 6, 10, 14]][dist.get_rank()]
    engine.destroy()


@unchanged("parts of a checkpoint, schedules, loaders", "attributes of schedules, `training_data`, `deepspeed_io`")
def test_schedules_and_loaders(ranks):
    ranks(schedules, WORLD)
    ranks(loaders, WORLD)
