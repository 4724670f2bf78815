"""Situations of a training script on a device: groups and streams of its own, buffers, loaders, checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardline
from tests.device import simulated
from tests.device.training import Net, batch, config, make, steps


def resume(settings: dict[str, Any], folder: str, background: bool) -> Any:
    engine = make(settings)
    steps(engine, 2)
    engine.save_checkpoint(folder, async_save=background)
    expected = [float(loss) for loss in steps(engine, 2, 2)]
    engine.destroy()
    engine = make(settings)
    assert engine.load_checkpoint(folder)[0] is not None
    counters = engine.global_steps, engine.global_samples, engine.skipped_steps
    found = [float(loss) for loss in steps(engine, 2, 2)]
    engine.destroy()
    return found, expected, counters, simulated.races()


@pytest.mark.parametrize(
    ("stage", "offload", "background"), [(3, False, False), (1, False, True), (2, True, True), (0, False, False)]
)
def test_a_resume_is_the_run_without_one(
    ranks: Any, tmp_path: Any, stage: int, offload: bool, background: bool
) -> None:
    settings = config(stage, offload=offload)
    for found, expected, counters, races in ranks(resume, 2, settings, str(tmp_path), background):
        assert found == expected
        assert counters == (2, 2 * 2 * 4, 0)
        assert races == []


def on_a_stream(settings: dict[str, Any]) -> Any:
    """The whole loop on a stream of the user's."""
    engine = make(settings)
    stream, main = torch.Stream(engine.device), torch.accelerator.current_stream()
    stream.wait_stream(main)
    with stream:
        losses = steps(engine, 3)
    main.wait_stream(stream)
    engine.destroy()
    return [float(loss) for loss in losses], simulated.races()


def on_the_default_stream(settings: dict[str, Any]) -> list[float]:
    engine = make(settings)
    losses = [float(loss) for loss in steps(engine, 3)]
    engine.destroy()
    return losses


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (3, False), (2, True)])
def test_a_loop_on_another_stream(ranks: Any, stage: int, offload: bool) -> None:
    settings = config(stage, offload=offload)
    expected = ranks(on_the_default_stream, 2, settings)
    assert ranks(on_a_stream, 2, settings) == [(losses, []) for losses in expected]


def test_the_device_is_current_in_a_group_of_the_script(ranks: Any) -> None:
    assert ranks(device_of_an_engine, 2) == [(0, 0), (1, 1)]


def device_of_an_engine() -> tuple[int, int]:
    """The group was made before, and nothing has chosen a device."""
    torch.accelerator.set_device_index(0)
    engine = make(config(2))
    found = engine.device.index, torch.accelerator.current_device_index()
    engine.destroy()
    torch.accelerator.set_device_index(0)
    return found


class Shared(nn.Module):
    """Two modules that hold one buffer, such as a mask or running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.first, self.second = nn.Linear(4, 4), nn.Module(), nn.Module()
        mask = torch.ones(8)
        self.first.register_buffer("mask", mask)
        self.second.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def shared_buffer() -> tuple[bool, str]:
    engine = shardline.initialize(model=Shared(), config={"train_micro_batch_size_per_gpu": 1})[0]
    first, second = engine.module.first.mask, engine.module.second.mask
    found = first is second, first.device.type
    engine.destroy()
    return found


def test_a_buffer_of_two_modules_stays_one(ranks: Any) -> None:
    assert ranks(shared_buffer, 2) == [(True, "cuda")] * 2


def with_hooks(stage: int) -> Any:
    engine = make(config(stage))
    seen: list[int] = []
    before = engine.before_step(lambda fragments: seen.append(len(fragments)))
    after = engine.after_step(lambda fragments: [piece.weight.clamp_(-0.2, 0.2) for piece in fragments] and None)
    steps(engine, 2)
    most = max(float(value.abs().max()) for name, value in engine.full_state_dict().items() if name != "seen")
    before.remove()
    after.remove()
    with torch.no_grad(), engine.gathered_parameters(write=True):
        engine.module.head.weight.mul_(0.5)
    steps(engine, 1, 2)
    engine.eval()
    with torch.no_grad():
        loss = float(engine(*batch(9, engine.comm.data.rank, engine.device)))
    engine.destroy()
    return len(seen), most <= 0.2 + 1e-6, loss == loss, simulated.races()


@pytest.mark.parametrize("stage", [1, 3])
def test_step_hooks_edits_and_evaluation(ranks: Any, stage: int) -> None:
    assert ranks(with_hooks, 2, stage) == [(2, True, True, [])] * 2


def recompute(offload: bool) -> Any:
    settings = config(3, activation_checkpointing={"enabled": True, "every": 1, "offload": offload})
    engine = make(settings)
    losses = [float(loss) for loss in steps(engine, 3)]
    engine.destroy()
    return losses, simulated.races()


@pytest.mark.parametrize("offload", [False, True])
def test_recomputation(ranks: Any, offload: bool) -> None:
    expected = ranks(on_the_default_stream, 2, config(3))
    assert ranks(recompute, 2, offload) == [(losses, []) for losses in expected]


def on_meta() -> Any:
    with torch.device("meta"):
        net = Net()
    net.seen = torch.zeros(())
    torch.manual_seed(0)
    engine = shardline.initialize(model=net, config=config(3))[0]
    losses = [float(loss) for loss in steps(engine, 2)]
    engine.destroy()
    return all(loss == loss for loss in losses), simulated.races()


def test_a_model_on_meta(ranks: Any) -> None:
    assert ranks(on_meta, 2) == [(True, [])] * 2
