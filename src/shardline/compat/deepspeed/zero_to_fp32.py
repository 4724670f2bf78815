"""A checkpoint of the engine as one state dict of fp32 weights, without ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardline.checkpoint.foreign.huggingface import export_checkpoint
from shardline.checkpoint.format.directory import Directory
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.errors import CheckpointError

__all__ = [
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
]

PathLike = str | os.PathLike[str]


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: PathLike,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Tensor]:
    """The weights (from the fp32 masters) and buffers of a checkpoint, on CPU; tied ones are one tensor.

    Raises:
        CheckpointError: there is no intact checkpoint.
    """
    reader = CheckpointReader(_locate(checkpoint_dir, tag))
    try:
        found = {}
        for name, param in reader.parameters.items():
            if param.weight is None or (exclude_frozen_parameters and not param.trainable):
                continue
            weight = _fp32(reader.full(name))
            found.update(dict.fromkeys((name, *param.aliases), weight))
        found.update({name: reader.buffer(name, 0) for name in reader.manifest.buffers})
        return found
    finally:
        reader.close()


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: PathLike,
    output_dir: PathLike,
    max_shard_size: str | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write them: as safetensors of at most ``max_shard_size``, or by ``torch.save`` to ``pytorch_model.bin``."""
    if safe_serialization and not exclude_frozen_parameters:
        reader = CheckpointReader(_locate(checkpoint_dir, tag))
        try:
            export_checkpoint(reader, output_dir, torch.float32, _bytes(max_shard_size))
        finally:
            reader.close()
        return
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters)
    os.makedirs(output_dir, exist_ok=True)
    if safe_serialization:
        from safetensors.torch import save_file

        save_file({name: value.clone() for name, value in state.items()}, Path(output_dir) / "model.safetensors")
    else:
        torch.save(state, Path(output_dir) / "pytorch_model.bin")


def load_state_dict_from_zero_checkpoint(model: nn.Module, checkpoint_dir: PathLike, tag: str | None = None) -> Any:
    """Load them into ``model``, which has no engine, and return it, on CPU."""
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


def _locate(checkpoint_dir: PathLike, tag: str | None) -> Path:
    directory = Directory(checkpoint_dir)
    if tag is None and directory.is_checkpoint():
        return Path(checkpoint_dir)
    tags = directory.order() if tag is None else [str(tag)]
    whole = {each.tag: each.path for each in directory.checkpoints() if each.problem is None}
    for each in tags:
        if each in whole:
            return whole[each]
    wanted = f"no checkpoint {tag!r}" if tag is not None else "no intact checkpoint"
    raise CheckpointError(f"There is {wanted} in {checkpoint_dir}. There are: {', '.join(whole) or 'none'}.")


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _bytes(size: str | None) -> int:
    """``"5GB"`` in bytes; None is without a limit."""
    if size is None:
        return 1 << 62
    for unit, factor in (("GIB", 2**30), ("MIB", 2**20), ("KIB", 2**10), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size.upper().endswith(unit):
            return int(float(size[: -len(unit)]) * factor)
    return int(size)
