"""From an engine's buffers to named ranges: this rank's part of a checkpoint, and the manifest from all ranks' reports.

Every element is written by one rank: the one in whose shard it lies, also where all ranks hold it. What cannot be cut
(the state of optimizers that see whole parameters) is written by the rank in whose shard the parameter begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from shardline.checkpoint.engine.view import EngineView, optimizer_name
from shardline.checkpoint.format.checksum import crc32
from shardline.checkpoint.format.content import Captured, add_reports, parameter_entry
from shardline.checkpoint.format.manifest import key_of
from shardline.checkpoint.format.tensorfile import CODES, memory_of
from shardline.checkpoint.format.values import encode, name_of
from shardline.errors import CheckpointError
from shardline.sharding.bucket import RunTensors
from shardline.sharding.buffer import flat
from shardline.sharding.fragments import is_per_element

__all__ = [
    "capture_buffers",
    "capture_tensors",
    "checksums",
    "merge",
    "optimizer_record",
]

DEVICE_KEYS = ("fused", "foreach", "capturable")
"""Options that say how a device computes, not what: those of the reading job stay."""


def capture_tensors(found: Captured, engine: EngineView, *, frozen: bool = True) -> None:
    """Add weights and optimizer state of this rank's shards. ``frozen``: those of frozen parameters too."""
    for unit in engine.units:
        for bucket in unit.buckets:
            if not (bucket.plan.trainable or frozen):
                continue
            source, low, _ = bucket.weights.authoritative()
            average = bucket.weights.average
            for piece in bucket.plan.fragments(bucket.shard.start, bucket.shard.stop):
                size = piece.stop - piece.start
                tensor = source[piece.offset - low : piece.offset - low + size]
                found.add_piece("weight", piece.name, piece.start, piece.stop, tensor)
                if average is not None:
                    tensor = average[piece.offset - low : piece.offset - low + size]
                    found.add_piece("average", piece.name, piece.start, piece.stop, tensor)
                elif piece.name in engine.averages.of_frozen:
                    tensor = engine.averages.of_frozen[piece.name][piece.start : piece.stop]
                    found.add_piece("average", piece.name, piece.start, piece.stop, tensor)
                state = engine.frozen_states.get(piece.name)
                if state is not None:
                    for key, value in state.tensors.items():
                        found.add_piece(
                            f"state.{key}", piece.name, piece.start, piece.stop, value[piece.start : piece.stop]
                        )
                    if piece.start == 0:
                        found.add_uncut(piece.name, state.scalars)
    if engine.optimizer is not None:
        for run in engine.runs:
            _capture_state(found, run, engine.optimizer.state.get(run.param, {}))
    for tensor in found.tensors.values():
        if tensor.dtype not in CODES:
            raise CheckpointError(f"safetensors files cannot hold tensors of {tensor.dtype}.")


def _capture_state(found: Captured, run: RunTensors, state: Mapping[str, Any]) -> None:
    cut = {key: flat(value) for key, value in state.items() if is_per_element(value, run.param)}
    rest = {key: value for key, value in state.items() if key not in cut}
    if run.run.entry is None:
        wrong = [key for key, value in rest.items() if isinstance(value, Tensor) and value.dim() > 0]
        if wrong:
            raise CheckpointError(
                f"the optimizer's state {wrong[0]!r} has the shape {tuple(rest[wrong[0]].shape)}: neither that of the "
                f"elements it belongs to, nor a number, so it cannot be saved by ranges. Set shardline_kind = "
                f'"per_parameter" on the optimizer\'s class, so that it sees whole parameters.'
            )
    for piece in run.own_fragments():
        offset = piece.offset - run.run.start
        for key, value in cut.items():
            part = value[offset : offset + piece.stop - piece.start]
            found.add_piece(f"state.{key}", piece.name, piece.start, piece.stop, part)
        if piece.start == 0 and rest:
            found.add_uncut(piece.name, rest)


def checksums(buffers: Mapping[str, Tensor]) -> dict[str, int]:
    """Checksums by which ranks compare their buffers."""
    return {name: crc32(memory_of(buffer.detach().cpu().contiguous())) for name, buffer in buffers.items()}


def capture_buffers(
    found: Captured, buffers: Mapping[str, Tensor], everyone: Sequence[Mapping[str, int]], rank: int
) -> dict[str, list[int]]:
    """Add this rank's buffers; those that are rank 0's bit by bit are not written again.

    Args:
        everyone: the :func:`checksums` of all ranks.

    Returns:
        The ranks that wrote each buffer.
    """
    writers = {
        name: [other for other, theirs in enumerate(everyone) if other == 0 or theirs.get(name) != everyone[0][name]]
        for name in everyone[0]
    }
    for name, buffer in buffers.items():
        if rank in writers.get(name, ()):
            found.tensors[key_of("buffer", name)] = buffer
    return writers


def optimizer_record(engine: EngineView, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """Class and param groups' options of the optimizer."""
    if engine.optimizer is None:
        return None
    return {
        "class": optimizer_name(engine.optimizer),
        "groups": [
            encode(
                {key: value for key, value in group.items() if key not in ("params", *DEVICE_KEYS)},
                f"optimizer/groups[{index}]",
                tensors,
            )
            for index, group in enumerate(engine.optimizer.param_groups)
        ],
    }


def merge(engine: EngineView, reports: list[dict[str, Any]], *, frozen: bool) -> dict[str, Any]:
    """The manifest's ``parameters``: for each its shape, and where its elements are: ``[file, start, stop]``."""
    entries = {
        name: parameter_entry(
            spec.shape,
            name_of(spec.dtype),
            stride=spec.stride,
            aliases=[alias for alias in spec.aliases if alias != name],
            trainable=spec.trainable,
            group=engine.groups.get(name),
            saved=frozen or spec.trainable,
        )
        for name, spec in engine.specs.items()
    }
    return add_reports(entries, reports)
