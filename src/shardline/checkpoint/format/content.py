"""What a save hands to the commit: tensors for this rank's file, a report about them, and the body of the manifest.

One form for all writers of the format: the engine, the import from DeepSpeed, ``torch.distributed.checkpoint``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from shardline._version import __version__
from shardline.checkpoint.format.manifest import key_of
from shardline.checkpoint.format.values import encode, name_of

__all__ = ["Body", "Captured", "Content", "add_reports", "buffer_entry", "parameter_entry"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Body:
    """The manifest as its writer fills it in; the commit adds name, number and files of the checkpoint.

    The fields are those of :class:`shardline.checkpoint.format.manifest.Manifest`, as JSON values. Defaults stand for
    state that a writer does not have.

    Attributes:
        imported_from: engine, version and layout that an import comes from.
    """

    created: str = field(default_factory=_now)
    shardline: str = __version__
    torch: str = torch.__version__
    imported_from: Mapping[str, Any] | None = None
    world_size: int
    stage: int = 0
    counters: Mapping[str, int]
    optimizer: Mapping[str, Any] | None = None
    scheduler: Any = None
    scaler: Mapping[str, Any] | None = None
    loader: Mapping[str, Any] | None = None
    loaders: Sequence[str] = ()
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    client_state: Any = field(default_factory=dict)
    extra_state: Mapping[str, Any] = field(default_factory=dict)
    sinks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    buffers: Mapping[str, Any] = field(default_factory=dict)
    random: Sequence[Any] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields by name; nothing is copied."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if name != "imported_from" or value is not None}


@dataclass
class Content:
    """What this rank saves.

    Attributes:
        tensors: for its file.
        report: a JSON value for rank 0, about the tensors.
        body: on rank 0: makes the body of the manifest from the reports of all ranks.
        ready: returns when the tensors have their values.
    """

    tensors: Mapping[str, Tensor]
    report: Any
    body: Callable[[list[Any]], Body]
    ready: Callable[[], None] = lambda: None


@dataclass
class Captured:
    """This rank's part: tensors for its file (views, nothing is copied), and what the other ranks must know of them.

    Attributes:
        pieces: ``[role, name, start, stop, dtype]``: elements ``start`` to ``stop`` of a parameter, in storage order.
        uncut: ``[role, name, shape, dtype]``: tensors that belong to a parameter and cannot be cut.
        scalars: state without dimensions, by parameter.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    pieces: list[list[Any]] = field(default_factory=list)
    uncut: list[list[Any]] = field(default_factory=list)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_piece(self, role: str, name: str, start: int, stop: int, tensor: Tensor) -> None:
        self.tensors[key_of(role, name)] = tensor
        self.pieces.append([role, name, start, stop, name_of(tensor.dtype)])

    def add_uncut(self, name: str, values: Mapping[str, Any]) -> None:
        """The state of a parameter that is not cut: scalars, and tensors of shapes of their own."""
        scalars = self.scalars.setdefault(name, {})
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                role = f"state.{key}"
                self.tensors[key_of(role, name)] = value.detach()
                self.uncut.append([role, name, list(value.shape), name_of(value.dtype)])
            else:
                scalars[key] = encode(value, f"the optimizer's state {key!r} of {name!r}", {})
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    scalars[key]["on"] = "device"

    def report(self) -> dict[str, Any]:
        """The lists as a JSON value: see :func:`add_reports`."""
        return {"pieces": self.pieces, "uncut": self.uncut, "scalars": self.scalars}


def parameter_entry(
    shape: Sequence[int],
    dtype: str = "",
    *,
    stride: Sequence[int] | None = None,
    aliases: Iterable[str] = (),
    trainable: bool = True,
    group: int | None = None,
    saved: bool = True,
) -> dict[str, Any]:
    """A parameter of the manifest, before the reports say where its elements are.

    Args:
        dtype: of the parameter.
        stride: of the storage order in which elements are counted; contiguous if left out.
        aliases: its other names.
        group: of the optimizer.
        saved: whether its weight is in the checkpoint.
    """
    contiguous = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return {
        "aliases": list(aliases),
        "shape": list(shape),
        "stride": contiguous if stride is None else list(stride),
        "dtype": dtype,
        "trainable": trainable,
        "group": group,
        "weight": {"dtype": dtype, "pieces": []} if saved else None,
        "state": {},
        "scalars": {},
    }


def buffer_entry(shape: Sequence[int], dtype: str, files: Sequence[int] = (0,)) -> dict[str, Any]:
    """A buffer of the manifest, written by the ranks ``files``."""
    return {"shape": list(shape), "dtype": dtype, "files": list(files)}


def add_reports(parameters: dict[str, Any], reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add to entries of parameters what each rank's :meth:`Captured.report` says is in its file; returns them."""
    for file, report in enumerate(reports):
        for role, name, start, stop, dtype in report["pieces"]:
            entry = parameters[name]
            place = entry if role in ("weight", "average") else entry["state"]
            stored = place.setdefault(_key(role), {"dtype": dtype, "pieces": []})
            stored["dtype"] = dtype
            stored["pieces"].append([file, start, stop])
        for role, name, shape, dtype in report["uncut"]:
            parameters[name]["state"][_key(role)] = {"dtype": dtype, "shape": shape, "file": file}
        for name, scalars in report["scalars"].items():
            parameters[name]["scalars"] |= scalars
    return parameters


def _key(role: str) -> str:
    return role.removeprefix("state.")
