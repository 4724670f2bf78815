"""Imports checkpoints of DeepSpeed (0.19): masters, Adam states, schedule and counters of stages 0 to 3.

stages 0      mp_rank_00_model_states.pt holds everything
stages 1, 2   each rank's *_optim_states.pt holds a part of one flat vector for each param group
stage 3       each rank's *_optim_states.pt holds ceil(numel / ranks) elements of each parameter, end to end
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardline.checkpoint.engine.extra import EXTRA_KEY
from shardline.checkpoint.foreign.pickled import Opaque, load
from shardline.checkpoint.format.commit import SingleProcess, commit
from shardline.checkpoint.format.content import (
    Body,
    Captured,
    Content,
    add_reports,
    buffer_entry,
    parameter_entry,
)
from shardline.checkpoint.format.files import read_limited
from shardline.checkpoint.format.manifest import check_tag, key_of
from shardline.checkpoint.format.values import encode, name_of
from shardline.errors import CheckpointError

__all__ = ["import_deepspeed"]

OPAQUE = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.precision_config.PrecisionMode",
)
_OWN_KEYS = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
    "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version",
    "checkpoint_parallel_dimensions", "optimizer_checkpoint",
}  # fmt: skip
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "initial_lr")

Trained = dict[str, dict[str, Tensor]]
"""By parameter: ``weight`` (fp32) and the moments, each in the parameter's shape."""


def import_deepspeed(source: str | os.PathLike[str], out: str | os.PathLike[str], tag: str | None = None) -> Path:
    """Read a DeepSpeed checkpoint directory and write it as one of Shardline's. In one process, all in memory.

    Args:
        source: the directory that was given to DeepSpeed's ``save_checkpoint``.
        tag: which; ``latest``'s if left out.

    Returns:
        The new checkpoint.

    Raises:
        CheckpointError: for files that are missing or damaged, or hold anything but tensors and plain values.
    """
    root = Path(source)
    if tag is None:
        try:
            tag = read_limited(root / "latest", 1000).decode().strip()
        except (OSError, UnicodeDecodeError):
            raise CheckpointError(f"{root} has no file 'latest'. Choose one with --tag.") from None
    path = root / check_tag(tag)
    models = _by_rank(path, r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
    optims = _by_rank(path, r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
    if not models:
        raise CheckpointError(
            f"{path} holds no model_states.pt: so it is not a DeepSpeed checkpoint that can be imported."
        )
    first = load(models[0], OPAQUE)
    extra = {name: first["module"].pop(name) for name in list(first["module"]) if name.split(".")[-1] == EXTRA_KEY}
    states = [load(file, OPAQUE)["optimizer_state_dict"] for file in optims]
    ranks = int(first.get("dp_world_size", len(optims) or 1))
    if optims and len(optims) != ranks:
        raise CheckpointError(
            f"{path} holds {len(optims)} files of optimizer states for {ranks} ranks: some are missing."
        )
    if not states:
        stage, (trained, groups) = 0, _stage_0(first, path)
    elif "fp32_flat_groups" in states[0]:
        stage, (trained, groups) = 3, _stage_3(first, states)
    else:
        stage, (trained, groups) = 2, _stage_2(first, states)
    frozen = _frozen(first, models, trained, ranks)
    return _write(out, tag, first, trained, groups, frozen, extra, stage, ranks)


def _by_rank(path: Path, pattern: str) -> list[Path]:
    found: dict[int, Path] = {}
    for file in path.glob("*.pt"):
        matched = re.fullmatch(pattern, file.name)
        if matched is None:
            continue
        if int(matched[2]):
            raise CheckpointError(f"{file} is of a model-parallel job, which cannot be imported.")
        found[int(matched[1] or 0)] = file
    if sorted(found) != list(range(len(found))):
        raise CheckpointError(f"{path} holds files of the ranks {sorted(found)} only: some are missing.")
    return [found[rank] for rank in sorted(found)]


def _steps(first: Mapping[str, Any], state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    step = state.get("step", group.get("step", first["global_steps"] - first["skipped_steps"]))
    return torch.tensor(float(step))


def _stage_0(first: Mapping[str, Any], path: Path) -> tuple[Trained, list[dict[str, Any]]]:
    """States are numbered in the order of the param groups; names are not recorded."""
    optimizer = first["optimizer"]
    if optimizer is None:
        return {}, []
    inner = optimizer.get("optimizer_state_dict", optimizer)
    groups, states = inner["param_groups"], inner["state"]
    order = [index for group in groups for index in group["params"]]
    masters = [tensor for group in optimizer.get("fp32_groups", ()) for tensor in group]
    names: list[str] = []
    seen: set[int] = set()
    for name, tensor in first["module"].items():
        if name not in first["buffer_names"] and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            names.append(name)
    names = _align(names, first["module"], [states[index]["exp_avg"].shape for index in order], masters, path)
    trained: Trained = {}
    for position, (name, index) in enumerate(zip(names, order, strict=True)):
        group = next(group for group in groups if index in group["params"])
        state = states[index]
        trained[name] = {key: state[key] for key in _MOMENTS if key in state}
        trained[name]["weight"] = masters[position] if masters else first["module"][name].float()
        trained[name]["step"] = _steps(first, state, group)
        trained[name]["group"] = torch.tensor(groups.index(group))
    return trained, groups


def _align(
    names: Sequence[str], module: Mapping[str, Tensor], shapes: Sequence[Any], masters: Sequence[Tensor], path: Path
) -> list[str]:
    """The names that states belong to: all, or those left when frozen ones, which have no state, are passed over."""
    found: list[str] = []
    for name in names:
        position = len(found)
        if position == len(shapes):
            break
        fits = module[name].shape == shapes[position]
        if fits and masters:  # the weights are the rounded masters
            fits = torch.equal(masters[position].to(module[name].dtype), module[name])
        if fits:
            found.append(name)
    ambiguous = not masters and len(names) != len(shapes) and _ways(names, module, shapes) != 1
    if len(found) != len(shapes) or ambiguous:
        raise CheckpointError(
            f"{path} has {len(shapes)} optimizer states for {len(names)} parameters and does not record whose they are "
            f"(stage 0 with frozen parameters). Save it once more with DeepSpeed at stage 1, and import that."
        )
    return found


def _ways(names: Sequence[str], module: Mapping[str, Tensor], shapes: Sequence[Any]) -> int:
    """In how many ways states of these shapes can belong to parameters, in order."""
    ways = [1] + [0] * len(shapes)
    for name in names:
        for position in range(len(shapes), 0, -1):
            if module[name].shape == shapes[position - 1]:
                ways[position] += ways[position - 1]
    return ways[-1]


def _stage_2(first: Mapping[str, Any], states: Sequence[Any]) -> tuple[Trained, list[dict[str, Any]]]:
    bases = [state["base_optimizer_state"] for state in states]
    groups = bases[0]["param_groups"]
    trained: Trained = {}
    for number, shapes in enumerate(first["param_shapes"]):
        vectors = {"weight": torch.cat([state["single_partition_of_fp32_groups"][number] for state in states])}
        mine = bases[0]["state"].get(number, {})
        for key in _MOMENTS:
            if key in mine:
                vectors[key] = torch.cat([base["state"][number][key] for base in bases])
        offset = 0
        for name, shape in shapes.items():
            stop = offset + math.prod(shape)
            trained[name] = {key: _cut(vector, offset, stop, shape, name) for key, vector in vectors.items()}
            trained[name]["step"] = _steps(first, mine, groups[number])
            trained[name]["group"] = torch.tensor(number)
            offset = stop
    return trained, groups


def _cut(vector: Tensor, start: int, stop: int, shape: Sequence[int], name: str) -> Tensor:
    if stop > vector.numel():
        raise CheckpointError(f"the flat vector of {vector.numel()} elements ends before {name!r}, up to {stop}.")
    return vector[start:stop].view(tuple(shape))


def _stage_3(first: Mapping[str, Any], states: Sequence[Any]) -> tuple[Trained, list[dict[str, Any]]]:
    inner = [state["optimizer_state_dict"] for state in states]
    groups = inner[0]["param_groups"]
    numbers = range(len(states[0]["fp32_flat_groups"]))
    vectors = {"weight": [torch.cat(list(state["fp32_flat_groups"])) for state in states]}
    for key in _MOMENTS:
        if any(key in inner[0]["state"].get(number, {}) for number in numbers):
            vectors[key] = [torch.cat([each["state"][number][key] for number in numbers]) for each in inner]
    trained: Trained = {}
    offset = 0
    for number, shapes in enumerate(first["param_shapes"]):
        for name, shape in shapes.items():
            numel = math.prod(shape)
            share = -(-numel // len(states))
            trained[name] = {
                key: torch.cat([_cut(part, offset, offset + share, (share,), name) for part in parts])[:numel].view(
                    tuple(shape)
                )
                for key, parts in vectors.items()
            }
            trained[name]["step"] = _steps(first, inner[0]["state"].get(0, {}), groups[0])
            trained[name]["group"] = torch.tensor(number)
            offset += share
    return trained, groups


def _frozen(first: Mapping[str, Any], models: Sequence[Path], trained: Trained, ranks: int) -> dict[str, Tensor]:
    """Parameters without optimizer state, whole."""
    shapes = first.get("frozen_param_shapes")
    if shapes is None:
        tied = {id(tensor): name for name, tensor in first["module"].items()}
        return {
            name: tensor
            for name, tensor in first["module"].items()
            if name not in trained and name not in first["buffer_names"] and tied[id(tensor)] == name
            and name not in _aliases(first, trained)
        }  # fmt: skip
    if len(models) == 1:
        return dict(first["frozen_param_fragments"] or {})
    parts = [first, *(load(file, OPAQUE) for file in models[1:])]
    return {
        name: torch.cat([part["frozen_param_fragments"][name].view(-1) for part in parts])[: math.prod(shape)].view(
            tuple(shape)
        )
        for name, shape in shapes.items()
    }


def _aliases(first: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, str]:
    """Other name to first name of tied parameters."""
    found = dict(first.get("shared_params") or {})
    if first.get("shared_params") is None:
        owners = {first["module"][name].data_ptr(): name for name in known if name in first["module"]}
        for name, tensor in first["module"].items():
            owner = owners.get(tensor.data_ptr())
            if name not in known and owner is not None and tensor.numel():
                found[name] = owner
    return found


def _write(
    out: str | os.PathLike[str],
    tag: str,
    first: Mapping[str, Any],
    trained: Trained,
    groups: list[dict[str, Any]],
    frozen: Mapping[str, Tensor],
    extra: Mapping[str, Any],
    stage: int,
    ranks: int,
) -> Path:
    found = Captured()
    parameters = _capture(found, trained, frozen, _aliases(first, {**trained, **frozen}))
    buffers = {name: first["module"][name] for name in first["buffer_names"] if name in first["module"]}
    found.tensors.update({key_of("buffer", name): buffer for name, buffer in buffers.items()})
    client = {key: value for key, value in first.items() if key not in _OWN_KEYS and not isinstance(value, Opaque)}
    config = first.get("ds_config") or {}
    schedule = first.get("lr_scheduler") or {}
    optimizer = {"class": _class(config, groups), "groups": [_options(group) for group in groups]} if groups else None
    body = Body(
        imported_from={"deepspeed": first.get("ds_version"), "stage": stage, "world_size": ranks},
        world_size=1,
        counters=_counters(first, config),
        optimizer=optimizer,
        scheduler=(
            {"last_epoch": int(schedule["last_batch_iteration"]) + 1} if "last_batch_iteration" in schedule else None
        ),
        client_state=encode(client, "client_state", found.tensors),
        extra_state={
            name.removesuffix(EXTRA_KEY).removesuffix("."): encode(value, f"extra_state[{name!r}]", found.tensors)
            for name, value in extra.items()
        },
        parameters=add_reports(parameters, [found.report()]),
        buffers={name: buffer_entry(buffer.shape, name_of(buffer.dtype)) for name, buffer in buffers.items()},
    )
    return commit(out, tag, Content(found.tensors, None, lambda reports: body), SingleProcess(), lambda point: None)


def _capture(
    found: Captured, trained: Trained, frozen: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """Add all tensors to ``found``; returns the parameters' entries of the manifest."""
    entries = {}
    for name, values in _parameters(trained, frozen):
        weight = values["weight"].contiguous()
        entries[name] = parameter_entry(
            weight.shape,
            name_of(weight.dtype),
            aliases=sorted(alias for alias, owner in aliases.items() if owner == name),
            trainable=name in trained,
            group=int(values["group"]) if "group" in values else None,
        )
        found.add_piece("weight", name, 0, weight.numel(), weight.view(-1))
        for key in _MOMENTS:
            if key in values:
                moment = values[key].contiguous().view(-1)
                found.add_piece(f"state.{key}", name, 0, moment.numel(), moment)
        if "step" in values:
            found.add_uncut(name, {"step": values["step"]})
    return entries


def _counters(first: Mapping[str, Any], config: Any) -> dict[str, int]:
    steps = int(first["global_steps"])
    accumulation = config.get("gradient_accumulation_steps") if isinstance(config, dict) else None
    return {
        "global_steps": steps,
        "micro_steps": steps * (accumulation if isinstance(accumulation, int) else 1),
        "global_samples": int(first.get("global_samples", 0)),
        "skipped_steps": int(first.get("skipped_steps", 0)),
    }


def _parameters(trained: Trained, frozen: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    yield from trained.items()
    for name, tensor in frozen.items():
        yield name, {"weight": tensor}


def _class(config: Any, groups: Sequence[Mapping[str, Any]]) -> str:
    """DeepSpeed's Adam decouples weight decay by default, which is torch's AdamW."""
    section = config.get("optimizer") if isinstance(config, dict) else None
    params = (section or {}).get("params") or {}
    coupled = str((section or {}).get("type", "adam")).lower() == "adam" and params.get("adam_w_mode") is False
    return "Adam" if coupled or groups[0].get("decoupled_weight_decay") is False else "AdamW"


def _options(group: Mapping[str, Any]) -> Any:
    options = {key: group[key] for key in _OPTIONS if key in group}
    return encode({key: tuple(value) if key == "betas" else value for key, value in options.items()}, "groups", {})
