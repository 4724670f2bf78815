"""What differs from DeepSpeed, a row of the page each; rows of other kinds stand at their own tests."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import shardline.compat.deepspeed as deepspeed
from shardline.errors import ConfigError, SealedError, UsageError
from tests.compat.rows import differs
from tests.compat.test_behaviour import settings
from tests.compat.test_config import resolved
from tests.compat.test_engine import batches, make_net
from tests.harness import is_whole

utils = deepspeed.utils


def begun(stage=3, net=None, **more):
    return deepspeed.initialize(model=net or make_net(), config=settings(stage, **more))


def step(engine, number=0):
    x, y = batches(3, dist.get_rank())[number]
    engine.backward(F.mse_loss(engine(x).float(), y))
    engine.step()


# -- weights at stage 3 ------------------------------------------------------------------------------------------------


def built():
    with deepspeed.zero.Init(config_dict_or_path=settings(3, bf16={"enabled": True})):
        net = make_net()
    whole = make_net()
    for param, wanted in zip(net.parameters(), whole.parameters(), strict=True):
        assert (param.shape, param.dtype, param.device) == (wanted.shape, torch.float32, wanted.device)
        assert not is_whole(param) or param.numel() == 1
    with deepspeed.zero.GatheredParameters(net.parameters()):
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in whole.state_dict().items())
    deepspeed.zero.Init(module=whole)
    assert not any(is_whole(param) for param in whole.parameters() if param.numel() > 1)


@differs(
    "dtype and device under `deepspeed.zero.Init`",
    "parameters become fp16 or bf16 and go to the accelerator, as the configuration says",
    "each rank holds its part at once as well, in the dtype and on the device of the constructor",
)
def test_a_model_is_divided_as_it_is_made(ranks):
    ranks(built, 2)


def sealed():
    engine, *_ = begun()
    with pytest.raises(SealedError, match=r"gathered_parameters"):
        engine.module[2].weight.sum()
    engine.destroy()


@differs("reading a sharded parameter at stage 3", "an empty tensor", "`SealedError`, with what to call")
def test_sharded_parameters_are_not_read(ranks):
    ranks(sealed, 2)


def on_meta():
    engine, *_ = begun()
    said = []
    logging.getLogger("shardline").addFilter(lambda record: said.append(record.getMessage()) or True)
    listed = engine.module.state_dict()
    assert {value.device.type for value in listed.values()} == {"meta"}
    assert {name: value.shape for name, value in listed.items()} == {
        name: value.shape for name, value in make_net().state_dict().items()
    }
    engine.destroy()
    return said


@differs(
    "`state_dict()` of the model at stage 3",
    "empty tensors",
    "tensors on meta, of true shapes and without elements; a notice says so",
)
def test_a_state_dict_has_shapes_alone(ranks):
    assert any("full_state_dict" in each for each in ranks(on_meta, 2)[0])


def read_only():
    engine, *_ = begun()
    weight = engine.module[2].weight
    with pytest.raises(UsageError, match=r"2\.weight"), deepspeed.zero.GatheredParameters(weight), torch.no_grad():
        weight.fill_(1.0)
    engine.destroy()


@differs("`GatheredParameters` without `modifier_rank`, and a change in it", "the change is lost", "`UsageError`")
def test_a_change_without_a_modifier_is_told(ranks):
    ranks(read_only, 2)


def status():
    engine, *_ = begun()
    weight = engine.module[2].weight
    available = deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.AVAILABLE
    assert weight.ds_status is torch.ones(1).ds_status is available
    assert not any(hasattr(weight, name) for name in ("ds_id", "ds_shape", "ds_numel")) and weight.shape == (16, 16)
    engine.destroy()
    del torch.Tensor.ds_status


@differs(
    "`Tensor.ds_status` once an engine of stage 3 was made",
    "on its parameters",
    "AVAILABLE on every tensor: what reads a sharded one in a forward gathers it. There is no `ds_id`, `ds_shape`, "
    "`ds_numel`: shapes are true",
)
def test_the_status_of_parameters(ranks):
    ranks(status, 2)


def local(stage):
    """The parts in the order of the ranks are the whole; what is written counts."""
    engine, *_ = begun(stage, optimizer={"type": "Adam", "params": {"lr": 1e-2}})
    step(engine)
    x, y = batches(3, dist.get_rank())[1]
    engine.backward(F.mse_loss(engine(x), y))
    for param in engine.module.parameters():
        pairs = [
            (utils.safe_get_local_fp32_param(param), utils.safe_get_full_fp32_param(param)),
            (utils.safe_get_local_grad(param), utils.safe_get_full_grad(param)),
            tuple(
                get(param, "exp_avg")
                for get in (utils.safe_get_local_optimizer_state, utils.safe_get_full_optimizer_state)
            ),
        ]
        for part, whole in pairs:
            parts = [None, None]
            dist.all_gather_object(parts, part.clone())
            assert part.dim() == 1
            assert torch.equal(torch.cat(parts) if stage else part, whole.flatten())
    weight = engine.module[2].weight
    own = utils.safe_get_local_grad(weight).numel()
    utils.safe_set_local_grad(weight, torch.full((own,), 0.5))
    assert torch.equal(utils.safe_get_full_grad(weight), torch.full((16, 16), 0.5))
    utils.safe_set_local_fp32_param(weight, torch.full((own,), 0.25))
    assert torch.equal(utils.safe_get_full_fp32_param(weight), torch.full((16, 16), 0.25))
    utils.safe_set_local_optimizer_state(weight, torch.full((own,), 2.0), "exp_avg")
    assert torch.equal(utils.safe_get_full_optimizer_state(weight, "exp_avg"), torch.full((16, 16), 2.0))
    with pytest.raises(UsageError, match=rf"shape \(7, 7\).*This rank has {own} elements"):
        utils.safe_set_local_grad(weight, torch.ones(7, 7))
    if own:
        with pytest.raises(UsageError, match="no state 'absent'"):
            utils.safe_get_local_optimizer_state(weight, "absent")
    engine.step()
    assert (utils.safe_get_full_fp32_param(weight) < 0.25).all()  # a step from what was written
    with pytest.raises(UsageError, match="that no engine trains"):
        utils.safe_get_local_grad(nn.Parameter(torch.ones(2)))
    engine.destroy()


@differs(
    "`safe_*_local_*`",
    "1/world of each parameter, at stage 3",
    "the elements in this rank's shard, at every stage: many of one parameter, none of another. Set as they were "
    "got; a "
    "change of masters reaches weights in bf16 and fp16 with the next step",
)
def test_parts_of_a_rank(ranks):
    for stage in (0, 2, 3):
        ranks(local, 2, stage)


# -- the loop ----------------------------------------------------------------------------------------------------------


def proxy():
    engine, optimizer, *_ = begun()
    x, y = batches(1, dist.get_rank())[0]
    engine.backward(F.mse_loss(engine(x), y))
    optimizer.step()
    assert engine.global_steps == 1 and isinstance(engine.optimizer, torch.optim.SGD)
    with pytest.raises(UsageError, match=r"engine\.step"):
        engine.optimizer.step()
    engine.destroy()


@differs(
    "`optimizer` that `initialize` returns",
    "a ZeRO optimizer",
    "a proxy whose `step()` is `engine.step()`; `engine.optimizer` is torch's, whose own `step()` raises",
)
def test_the_optimizer_is_a_proxy(ranks):
    ranks(proxy, 2)


def nothing_to_step():
    engine, *_ = begun(1)
    with pytest.raises(UsageError, match="backward"):
        engine.step()
    engine.destroy()


@differs("`engine.step()` without a backward", "does nothing, or fails inside", "`UsageError`")
def test_a_step_needs_a_backward(ranks):
    ranks(nothing_to_step, 2)


def masters(dtype):
    net = make_net()
    given = net[2].weight.detach().clone()
    engine, *_ = begun(1, net, **{dtype: {"enabled": True}})
    assert engine.module[2].weight.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float16)
    assert torch.equal(utils.safe_get_full_fp32_param(engine.module[2].weight), given)
    engine.destroy()


@differs("masters in bf16 and fp16", "start from the rounded weights", "start from the weights as they were given")
def test_masters_start_from_what_was_given(ranks):
    for dtype in ("bf16", "fp16"):
        ranks(masters, 2, dtype)


def order():
    data = torch.utils.data.TensorDataset(torch.arange(11.0).unsqueeze(1))
    engine, _, loader, _ = deepspeed.initialize(model=nn.Linear(1, 1), config=settings(0), training_data=data)
    epochs = []
    for _ in range(2):
        seen = [None, None]
        dist.all_gather_object(seen, [int(row) for (batch,) in loader for row in batch])
        epochs.append(seen)
    engine.destroy()
    return epochs


@differs(
    "order of `training_data`", "`DistributedSampler`", "Shardline's loader: reshuffled each epoch, nothing repeated"
)
def test_nothing_is_repeated_in_an_epoch(ranks):
    first, second = ranks(order, 2)[0]
    for epoch in (first, second):
        assert sorted(row for own in epoch for row in own) == list(range(11))  # on 2 ranks
    assert first != second


def gate():
    torch.manual_seed(5)
    moe = deepspeed.moe.layer.MoE(8, nn.Linear(8, 8), 2, noisy_gate_policy="RSample", use_rts=True)
    states = []
    for mode in (True, False):
        before = torch.get_rng_state()
        moe.train(mode)(torch.ones(4, 8))
        states.append(torch.equal(before, torch.get_rng_state()))
    return states


@differs("`MoE` in evaluation", "draws random numbers as in training", "draws none")
def test_experts_draw_nothing_in_evaluation():
    assert gate() == [False, True]


# -- files -------------------------------------------------------------------------------------------------------------


def saved(folder):
    engine, *_ = begun(3)
    step(engine)
    engine.save_checkpoint(folder)
    engine.save_16bit_model(folder)
    engine.save_16bit_model(folder, "model.safetensors")
    weights = engine.full_state_dict()
    engine.destroy()
    other, *_ = begun(0)
    other.load_checkpoint(folder)
    assert all(torch.equal(value, weights[name]) for name, value in other.full_state_dict().items())
    other.destroy()
    return weights


@differs(
    "`save_checkpoint`",
    "DeepSpeed's files",
    "Shardline's: any layout loads any other; `shardline checkpoint import-deepspeed` reads DeepSpeed's",
)
def test_files_of_a_checkpoint(ranks, tmp_path):
    ranks(saved, 2, str(tmp_path))
    files = [path.name for path in Path(tmp_path, "global_step1").rglob("*") if path.is_file()]
    assert any(name.endswith(".safetensors") for name in files) and not any(name.endswith(".pt") for name in files)


@differs("`save_16bit_model`", "`pytorch_model.bin`", "the same; safetensors where the name says so")
def test_whole_weights(ranks, tmp_path):
    from safetensors.torch import load_file

    weights = ranks(saved, 2, str(tmp_path))[0]
    for found in (torch.load(tmp_path / "pytorch_model.bin"), load_file(tmp_path / "model.safetensors")):
        torch.testing.assert_close(found, dict(weights), rtol=0, atol=0)


def curves(folder):
    engine, *_ = begun(1, csv_monitor={"enabled": True, "output_path": folder, "job_name": "job"})
    for number in range(2):
        step(engine, number)
    engine.destroy()


@differs(
    "names in TensorBoard, W&B, Comet and CSV files",
    "`Train/Samples/lr`, by samples",
    "`train/lr`, by step, and `train/samples`: `docs/observing.md` has all",
)
def test_names_of_curves(ranks, tmp_path):
    ranks(curves, 2, str(tmp_path))
    names = {path.stem for path in tmp_path.rglob("*.csv")}
    assert {"train_lr", "train_samples"} <= names and not any(name.startswith("Train") for name in names)


# -- the configuration -------------------------------------------------------------------------------------------------


@differs("Apex, compression in the configuration", "act", "refused when they are switched on")
def test_what_the_configuration_cannot_ask_for():
    weights = {"weight_quantization": {"shared_parameters": {"enabled": True}}}
    for section, words in (({"amp": {"enabled": True}}, "amp"), ({"compression_training": weights}, "compression")):
        with pytest.raises(ConfigError, match=words):
            resolved(section)
    assert resolved({"amp": {"enabled": False}})[1] == []
