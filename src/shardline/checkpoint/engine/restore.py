"""From named ranges back into an engine's buffers: each rank reads what its layout needs, whatever the writer's was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardline.checkpoint.engine.extra import EXTRA_KEY, takers
from shardline.checkpoint.engine.groups import Groups
from shardline.checkpoint.engine.view import EngineView, optimizer_name
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.checkpoint.format.values import decode, dtype_named
from shardline.errors import CheckpointError, UsageError, shown
from shardline.names import join, listed
from shardline.optim import prepare
from shardline.plan import Fragment, runs_fit
from shardline.plan.describe import persistent_buffers
from shardline.sharding.bucket import RunTensors
from shardline.sharding.buffer import flat
from shardline.sharding.fragments import ParamState

__all__ = [
    "Match",
    "finish_load",
    "load_averages",
    "load_buffers",
    "load_optimizer",
    "load_weights",
    "match",
    "steps_to_lay_out",
]


@dataclass
class Match:
    """How the names of a model and of a checkpoint go together.

    Attributes:
        params: name in the checkpoint by first name in the model.
        missing: parameters, buffers and extra state of the model that the checkpoint does not hold.
        unexpected: those of the checkpoint that the model does not have.
        notes: sentences for the user.
    """

    params: dict[str, str] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def match(engine: EngineView, reader: CheckpointReader, *, strict: bool) -> Match:
    """Compare names and shapes, before anything is changed.

    Raises:
        CheckpointError: for another shape, and if ``strict`` for names that only one side has; each is named.
    """
    found = Match()
    wrong = []
    excluded = {name for name, entry in reader.parameters.items() if entry.weight is None}
    for name, spec in engine.specs.items():
        theirs = next((reader.aliases[alias] for alias in spec.aliases if alias in reader.aliases), None)
        if theirs is None:
            found.missing.append(name)
        elif theirs not in excluded:
            shape = tuple(reader.parameters[theirs].shape)
            if shape != spec.shape:
                wrong.append(f"parameter {name!r} has the shape {spec.shape} in the model, {shape} in the checkpoint")
            found.params[name] = theirs
        else:
            found.notes.append(f"frozen parameter {name!r} was left out of the checkpoint and stays as it is")
    known = {alias for spec in engine.specs.values() for alias in spec.aliases}
    found.unexpected += [
        name for name, entry in reader.parameters.items() if not known.intersection((name, *entry.aliases))
    ]
    ours = dict(persistent_buffers(engine.module))
    theirs_buffers = reader.manifest.buffers
    for name, buffer in ours.items():
        if name not in theirs_buffers:
            found.missing.append(name)
        elif tuple(theirs_buffers[name].shape) != tuple(buffer.shape):
            shape = tuple(theirs_buffers[name].shape)
            wrong.append(f"buffer {name!r} has the shape {tuple(buffer.shape)} in the model, {shape} in the checkpoint")
        else:
            found.buffers.append(name)
    found.unexpected += [name for name in theirs_buffers if name not in ours]
    found.missing += [
        join(path, EXTRA_KEY) for path in takers(engine.module) if path not in reader.manifest.extra_state
    ]
    modules = dict(engine.module.named_modules())
    found.unexpected += [join(path, EXTRA_KEY) for path in reader.manifest.extra_state if path not in modules]
    if wrong:
        raise CheckpointError(f"{reader.path} does not fit the model: {_some(wrong)}. Nothing was loaded.")
    if found.missing or found.unexpected:
        differences = []
        if found.missing:
            differences.append(f"not in the checkpoint: {_some(found.missing)}")
        if found.unexpected:
            differences.append(f"not in the model: {_some(found.unexpected)}")
        said = "; ".join(differences)
        if strict:
            raise CheckpointError(
                f"{reader.path} does not fit the model: {said}. Nothing was loaded. Pass load_module_strict=False to "
                f"load what both have."
            )
        found.notes.append(f"{said}; the rest was loaded")
    return found


def _some(items: list[str], limit: int = 20) -> str:
    return listed([shown(item, 300) for item in items], limit)


def load_weights(engine: EngineView, reader: CheckpointReader, found: Match) -> None:
    """Read masters and weights, and bring them where they rest. Collective where stages gather.

    Raises:
        UsageError: if a unit is in use.
    """
    busy = [unit.name for unit in engine.units if unit.holds]
    if busy:
        raise UsageError(
            f"load_checkpoint() was called while unit {busy[0]!r} is in use. Call it outside of forward and of "
            f"gathered_parameters()."
        )
    for unit in engine.units:
        unit.reshard()
        engine.comm.wait_for_readers()
        for bucket in unit.buckets:
            target, low, high = bucket.weights.authoritative()
            strides = {entry.param.name: entry.param.stride for entry in bucket.plan.entries}
            for piece in bucket.plan.fragments(low, high):
                if piece.name in found.params:
                    out = target[piece.offset - low : piece.offset - low + piece.stop - piece.start]
                    name = found.params[piece.name]
                    reader.fill(out, name, "weight", piece.start, piece.stop, strides[piece.name])


def load_averages(engine: EngineView, reader: CheckpointReader, found: Match, *, wanted: bool) -> None:
    """Read the moving averages of weights that were loaded. What has none begins with its weight.

    Args:
        wanted: whether those of the checkpoint are taken at all.
    """
    specs, averages = engine.specs, engine.averages
    held = {
        name: theirs
        for name, theirs in found.params.items()
        if wanted and reader.parameters[theirs].average is not None
    }
    if not held and not averages.followed:
        averages.drop(engine.units)
        return
    if not held:
        found.notes.append("the moving average starts from the loaded weights")
    averages.drop(engine.units)
    averages.begin(engine.units)
    for unit in engine.units:
        for bucket in unit.buckets:
            low, high = bucket.shard.states
            average = bucket.weights.average
            for piece in bucket.plan.fragments(low, high):
                if average is not None and piece.name in held:
                    out = average[piece.offset - low : piece.offset - low + piece.stop - piece.start]
                    stride = specs[piece.name].stride
                    reader.fill(out, held[piece.name], "average", piece.start, piece.stop, stride)
    for name, theirs in held.items():
        spec = specs[name]
        if not spec.trainable:
            stored = reader.parameters[theirs].stored("average")
            out = torch.empty(spec.numel, dtype=dtype_named(stored.dtype), device=engine.units[0].state_device)
            reader.fill(out, theirs, "average", 0, spec.numel, spec.stride)
            averages.of_frozen[name] = out


def finish_load(engine: EngineView) -> None:
    """Update the weights of all ranks from the masters, without counting that as an edit. Collective."""
    works = []
    for unit in engine.units:
        works += unit.refresh()
        unit.advance_generation()
    for work in works:
        work.wait()
    params = [param for unit in engine.units for bucket in unit.buckets for param in bucket.params]
    torch.autograd.graph.increment_version(params)
    for unit in engine.units:
        unit.note_versions()


def load_buffers(engine: EngineView, reader: CheckpointReader, found: Match) -> None:
    """Each rank's own at the same world size, rank 0's elsewhere."""
    same = reader.manifest.world_size == engine.comm.data.size
    known = set(found.buffers)
    with torch.no_grad():
        for name, buffer in persistent_buffers(engine.module):
            if name in known:
                buffer.copy_(reader.buffer(name, engine.comm.data.rank if same else 0))


# -- the optimizer ----------------------------------------------------------------------------------------------------


def steps_to_lay_out(engine: EngineView, reader: CheckpointReader, found: Match) -> dict[str, int] | None:
    """Steps that each trained parameter's state has seen, if parameters of one run differ in that, else ``None``.

    They cannot share a run then, and the model must be laid out again.
    """
    steps = {name: _steps(reader, found.params.get(name)) for name, spec in engine.specs.items() if spec.trainable}
    return None if runs_fit([unit.plan for unit in engine.units], steps) else steps


def _steps(reader: CheckpointReader, name: str | None) -> int:
    scalars = reader.parameters[name].scalars if name is not None else {}
    value = decode(scalars.get("step", 0), _no_tensor)
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise CheckpointError(f"{shown(repr(name))} has seen {shown(repr(value), 60)} steps in the manifest.") from None


def _no_tensor(key: str) -> Tensor:
    raise CheckpointError(f"the manifest refers to a tensor {key!r} where only numbers can be.")


def load_optimizer(engine: EngineView, reader: CheckpointReader, found: Match, groups: Groups) -> str | None:
    """Read this rank's part of the optimizer's state and the options of its param groups.

    Returns:
        Why only the weights could be taken, or ``None``.
    """
    optimizer, record = engine.optimizer, reader.manifest.optimizer
    if optimizer is None or record is None:
        return "the checkpoint holds no optimizer state" if optimizer is not None else None
    if record.kind != optimizer_name(optimizer):
        return (
            f"the checkpoint was written with the optimizer {shown(record.kind)}, and this job has "
            f"{optimizer_name(optimizer)}: the weights were loaded, the optimizer starts without state"
        )
    groups.apply(optimizer.param_groups)
    optimizer.state.clear()
    strides = {name: spec.stride for name, spec in engine.specs.items()}
    for run in engine.runs:
        state = _run_state(run, reader, found.params, strides, _group_of(optimizer, run.param))
        if state:
            optimizer.state[run.param] = state
    prepare(optimizer)
    engine.frozen_states.clear()
    for name, spec in engine.specs.items():
        theirs_name = found.params.get(name)
        if theirs_name is not None and not spec.trainable and _has_state(reader, theirs_name):
            engine.frozen_states[name] = _frozen_state(reader, theirs_name, spec.stride, engine.units[0].state_device)
    return None


def _group_of(optimizer: Any, param: Tensor) -> Mapping[str, Any]:
    for group in optimizer.param_groups:
        if any(each is param for each in group["params"]):
            return group  # type: ignore[no-any-return]
    return {}


def _has_state(reader: CheckpointReader, name: str) -> bool:
    entry = reader.parameters[name]
    return bool(entry.state or entry.scalars)


def _run_state(
    run: RunTensors,
    reader: CheckpointReader,
    names: Mapping[str, str],
    strides: Mapping[str, tuple[int, ...]],
    group: Mapping[str, Any],
) -> dict[str, Any]:
    pieces = [piece for piece in run.fragments if piece.name in names and _has_state(reader, names[piece.name])]
    state: dict[str, Any] = {}
    keys = {key: entry for piece in pieces for key, entry in reader.parameters[names[piece.name]].state.items()}
    for key, stored in keys.items():
        role = f"state.{key}"
        if stored.file is not None:
            state[key] = reader.full(names[pieces[0].name], role).to(run.param.device)
            continue
        written = reader.parameters[names[pieces[0].name]].weight
        as_weight = written is not None and stored.dtype == written.dtype
        dtype = run.param.dtype if as_weight else dtype_named(stored.dtype)
        whole = torch.zeros_like(run.param, dtype=dtype)
        for piece in pieces:
            if key in reader.parameters[names[piece.name]].state:
                _fill(flat(whole), piece, run, reader, names[piece.name], role, strides[piece.name])
        state[key] = whole
    if pieces:
        for key, value in reader.parameters[names[pieces[0].name]].scalars.items():
            state[key] = _scalar(key, value, run.param, group)
    return state


def _fill(
    out: Tensor,
    piece: Fragment,
    run: RunTensors,
    reader: CheckpointReader,
    name: str,
    role: str,
    stride: tuple[int, ...],
) -> None:
    low = piece.offset - run.run.start
    reader.fill(out[low : low + piece.stop - piece.start], name, role, piece.start, piece.stop, stride)


def _scalar(key: str, value: Any, param: Tensor, group: Mapping[str, Any]) -> Any:
    decoded = decode(value, _no_tensor)
    if not isinstance(decoded, Tensor):
        return decoded
    if key == "step":  # as torch.optim does when it loads a state_dict
        return decoded.to(param.device) if group.get("capturable") or group.get("fused") else decoded
    return decoded.to(param.device) if isinstance(value, dict) and value.get("on") == "device" else decoded


def _frozen_state(reader: CheckpointReader, name: str, stride: tuple[int, ...], device: torch.device) -> ParamState:
    entry = reader.parameters[name]
    state = ParamState(scalars={key: decode(value, _no_tensor) for key, value in entry.scalars.items()})
    for key, stored in entry.state.items():
        if stored.file is not None:
            state.scalars[key] = reader.full(name, f"state.{key}").to(device)
        else:
            state.tensors[key] = torch.empty(entry.numel, dtype=dtype_named(stored.dtype), device=device)
            reader.fill(state.tensors[key], name, f"state.{key}", 0, entry.numel, stride)
    return state
