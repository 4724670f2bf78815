"""Param groups of a checkpoint and of an optimizer: matched by the parameters in them, whatever their order.

Options (learning rates, betas) belong to parameters. So do the lists of one number per group that schedulers keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from shardline.checkpoint.engine.capture import DEVICE_KEYS
from shardline.checkpoint.engine.view import EngineView
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.errors import CheckpointError, shown
from shardline.optim import MuonAdamW

__all__ = ["Groups", "match_groups", "scheduler_state"]

_PER_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "lr_lambdas")
"""What torch's schedulers hold one of for each param group."""


@dataclass
class Groups:
    """Where this optimizer's groups take their options from.

    Attributes:
        sources: for each of them the group of the checkpoint, or ``None``: its options stay as configured.
        count: of the checkpoint's groups.
        options: by group of the checkpoint.
        notes: sentences for the user.
    """

    sources: list[int | None] = field(default_factory=list)
    count: int = 0
    options: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def in_order(self) -> bool:
        return self.sources == list(range(self.count))

    def apply(self, groups: Sequence[dict[str, Any]]) -> None:
        """Write the options into the optimizer's param groups."""
        for group, source in zip(groups, self.sources, strict=True):
            if source is not None:
                group.update(self.options[source])


def match_groups(engine: EngineView, reader: CheckpointReader) -> Groups:
    """Match the groups, before anything is changed.

    Raises:
        CheckpointError: for an option that cannot be one of this optimizer.
    """
    record, optimizer = reader.manifest.optimizer, engine.optimizer
    if record is None or optimizer is None:
        return Groups()
    found = Groups(count=len(record.groups), options=[_options(reader.value(group)) for group in record.groups])
    members: list[list[str]] = [[] for _ in optimizer.param_groups]
    for name, index in engine.groups.items():
        members[index].append(name)
    specs = engine.specs
    for index, (group, names) in enumerate(zip(optimizer.param_groups, members, strict=True)):
        theirs: dict[int, str] = {}  # the checkpoint's groups that hold parameters of this one: one of them
        for name in names:
            stored = next((reader.aliases[alias] for alias in specs[name].aliases if alias in reader.aliases), None)
            number = None if stored is None else reader.parameters[stored].group
            if number is not None and number < found.count:
                theirs.setdefault(number, name)
        differing = _differing([found.options[number] for number in theirs])
        source = None
        if not names and found.count == len(members):
            source = index
        elif theirs and not differing:
            source = next(iter(theirs))
        elif theirs:
            whose = " and ".join(f"group {number} ({shown(repr(name))})" for number, name in sorted(theirs.items()))
            found.notes.append(
                f"param group {index} has parameters that were in {whose} of the checkpoint, whose options differ in "
                f"{', '.join(shown(repr(key)) for key in differing)}: its options stay as configured"
            )
        elif names and found.count:
            found.notes.append(
                f"param group {index} has no parameter that was in a group of the checkpoint: its options stay as "
                f"configured"
            )
        if source is not None and isinstance(optimizer, MuonAdamW):
            half = found.options[source].get("use_muon")
            if half != group["use_muon"]:
                found.notes.append(
                    f"param group {index} has use_muon = {group['use_muon']} and had {half} in the checkpoint: its "
                    f"options stay as configured, and its state starts empty"
                )
                source = None
        if source is not None:
            _check_options(index, group, found.options[source])
        found.sources.append(source)
    if not found.count:
        found.notes.append("it holds no options of param groups (learning rates among them): they stay as configured")
    return found


def _options(group: Any) -> dict[str, Any]:
    if not isinstance(group, dict):
        raise CheckpointError("a param group in the checkpoint is malformed.")
    return {key: value for key, value in group.items() if key not in ("params", *DEVICE_KEYS)}


def _differing(options: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options that are not the same in all; tensors are compared by value."""
    keys = dict.fromkeys(key for each in options for key in each)
    return [key for key in keys if len({repr(_plain(each.get(key))) for each in options}) > 1]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _check_options(index: int, group: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        if key in group and not _alike(group[key], value):
            raise CheckpointError(
                f"the checkpoint has {shown(repr(value), 100)} for the option {shown(repr(key))} of param group "
                f"{index}, which is {shown(repr(group[key]), 100)} here: the kinds differ. Nothing was "
                f"loaded."
            )


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether a value can stand where ``ours`` does."""
    if ours is None or theirs is None:
        return ours is theirs or isinstance(theirs if ours is None else ours, bool | int | float | Tensor | list | dict)
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return type(ours) is type(theirs)
    if isinstance(ours, int | float | Tensor):
        return isinstance(theirs, int | float) or (isinstance(theirs, Tensor) and theirs.numel() == 1)
    if isinstance(ours, list | tuple):
        return isinstance(theirs, list | tuple) and (
            len(ours) != len(theirs) or all(_alike(one, other) for one, other in zip(ours, theirs, strict=True))
        )
    return isinstance(theirs, type(ours)) or isinstance(ours, type(theirs))


def scheduler_state(scheduler: Any, state: Any, groups: Groups) -> dict[str, Any]:
    """The state of a checkpoint as this ``scheduler`` takes it: only what it knows, and lists by group in its order.

    Raises:
        CheckpointError: for what cannot be its state.
    """
    if not isinstance(state, dict):
        raise CheckpointError("the scheduler's state in the checkpoint is malformed.")
    if not isinstance(scheduler, LRScheduler):
        return state  # the user's own, who knows its form
    own = scheduler.state_dict()
    known: dict[str, Any] = {}
    for key, value in state.items():
        if key not in own:
            continue
        if not _alike(own[key], value):
            raise CheckpointError(
                f"the checkpoint has {shown(repr(value), 100)} for {key!r} of the scheduler, which is "
                f"{shown(repr(own[key]), 100)} here: it was another scheduler's. Pass load_lr_scheduler_states=False."
            )
        known[key] = value
        if key == "_schedulers":
            inner: list[Any] = scheduler._schedulers  # type: ignore[attr-defined]
            if len(inner) != len(value):
                raise CheckpointError(
                    f"the checkpoint has the states of {len(value)} schedulers in one, and here are {len(inner)}. Pass "
                    f"load_lr_scheduler_states=False."
                )
            known[key] = [scheduler_state(one, other, groups) for one, other in zip(inner, value, strict=True)]
        elif key in _PER_GROUP and isinstance(value, list | tuple) and isinstance(own[key], list | tuple):
            known[key] = _in_our_order(key, own[key], value, groups)
    return known


def _in_our_order(key: str, ours: Sequence[Any], theirs: Sequence[Any], groups: Groups) -> list[Any]:
    if len(theirs) != groups.count or len(ours) != len(groups.sources):
        raise CheckpointError(
            f"the checkpoint has {len(theirs)} values for {key!r} of the scheduler and {groups.count} param groups. "
            f"Pass load_lr_scheduler_states=False."
        )
    moved = [own if source is None else theirs[source] for own, source in zip(ours, groups.sources, strict=True)]
    if not all(_alike(own, value) for own, value in zip(ours, moved, strict=True)):
        raise CheckpointError(f"the checkpoint's values for {key!r} of the scheduler are malformed.")
    return moved
