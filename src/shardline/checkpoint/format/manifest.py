"""The manifest of a checkpoint, ``manifest.json``, as a typed value, read and checked in this one place. No torch.

Anyone who can write to a directory can also write a matching checksum, so a right one does not vouch for the content.
Here everything has a type and a range, the pieces of each tensor cover it, and what they hold fits into the files. Keys
that are not known are ignored: a change of what known ones mean raises the version. Checks stop at the first mistake,
so that their memory does not grow with the number of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    model_validator,
)

from shardline.checkpoint.format.files import read_limited
from shardline.errors import CheckpointError, UsageError, shown, text_of

__all__ = [
    "FILE_NAME", "FORMAT", "ITEM_BYTES", "LATEST", "MANIFEST", "MANIFEST_SUM", "VERSION", "BufferEntry", "Counters",
    "FileEntry", "Manifest", "ParameterEntry", "Stored", "check_tag", "file_name", "is_state", "is_tag", "key_of",
    "largest_manifest", "read_manifest",
]  # fmt: skip

FORMAT, VERSION = "shardline", 1
MANIFEST, MANIFEST_SUM, LATEST = "manifest.json", "manifest.sha256", "latest"
FILE_NAME = re.compile(r"rank-[0-9]{5,7}\.safetensors")

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1, "complex64": 8, "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}  # fmt: skip
"""Bytes of an element, by torch's name of the dtype: those that a tensor file can hold."""

_BASE_BYTES = 32 << 20
_BYTES_PER_FILE = 128 << 10
LAST_SEQUENCE = (1 << 32) - 1
"""No directory sees so many saves: a higher number is damage, and would leave none for the next save."""
_MOST = 1 << 53  # the largest count that every JSON reader keeps exact

T = TypeVar("T", bound=BaseModel)


def file_name(rank: int) -> str:
    """The tensor file of ``rank``."""
    return f"rank-{rank:05d}.safetensors"


def key_of(role: str, name: str) -> str:
    """The key of a tensor in a file; ``role`` is "weight", "average" or "state.<key>" of a parameter, or "buffer"."""
    return f"{role}/{name}"


def is_state(key: str) -> bool:
    """Whether the tensor of ``key`` belongs to the optimizer's state."""
    return key.startswith("state.")


def is_tag(text: str) -> bool:
    """Whether a checkpoint can have this name: one that leads nowhere else and shows as it is."""
    return (
        0 < len(text) <= 200
        and text.isprintable()
        and len(text.encode()) <= 200
        and not text.startswith(".")
        and text.strip() == text
        and text != LATEST
        and "/" not in text
    )


def check_tag(tag: str) -> str:
    """``tag`` if it can be a directory's name.

    Raises:
        UsageError: if not.
    """
    if not is_tag(tag):
        raise UsageError(
            f"the tag {shown(repr(tag))} cannot be the name of a checkpoint. Use up to 200 printable characters "
            f"without '/', not beginning with '.' or a space, and not {LATEST!r}."
        )
    return tag


def largest_manifest(files: int) -> int:
    """Bytes that a manifest of so many tensor files may have.

    A parameter with two moments takes about 450 bytes, so that the base is for 70,000 of them, or for values of the
    user's. For each file there are the pieces that its rank wrote, of 35 bytes each: 3 for each unit and 3 more for
    each parameter, where it is cut.
    """
    return _BASE_BYTES + _BYTES_PER_FILE * files


# -- types ------------------------------------------------------------------------------------------------------------


def _pieces(value: Any, _: Any) -> list[list[int]]:
    """Checked here: one error, however many are wrong."""
    if type(value) is not list:
        raise ValueError("it is not a list")
    for piece in value:
        if type(piece) is not list or len(piece) != 3 or any(type(number) is not int for number in piece):
            raise ValueError(f"{shown(repr(piece), 60)} is no [file, start, stop]")
    return value


def _ranks(value: Any, _: Any) -> list[int]:
    if type(value) is not list or any(type(number) is not int for number in value):
        raise ValueError("it is not a list of ranks")
    if value[:1] != [0] or value != sorted(set(value)):
        raise ValueError("it is not a list of ranks that begins with 0 and goes up")
    return value


def _dtype(value: str) -> str:
    if value not in ITEM_BYTES:
        raise ValueError(f"{shown(repr(value), 40)} is not a dtype of a tensor file")
    return value


def _tag(value: str) -> str:
    if not is_tag(value):
        raise ValueError(f"{shown(repr(value), 60)} cannot be the name of a checkpoint")
    return value


Count = Annotated[int, Field(ge=0, le=_MOST)]
Dtype = Annotated[str, AfterValidator(_dtype)]
Sizes = Annotated[list[Count], Field(max_length=64)]
Short = Annotated[str, Field(max_length=200)]
Hex = Annotated[str, Field(max_length=40, pattern=r"^-?(0x[01]\.[0-9a-f]+p[+-][0-9]+|inf)$|^nan$")]


class _Value(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", arbitrary_types_allowed=False)


class FileEntry(_Value):
    """A tensor file: its size and CRC-32."""

    name: Annotated[str, Field(pattern=f"^{FILE_NAME.pattern}$")]
    bytes: Count
    crc32: Annotated[int, Field(ge=0, lt=1 << 32)]


class Stored(_Value):
    """Where the elements of a tensor are: in ``pieces`` ``[file, start, stop]``, or whole in one ``file``.

    Attributes:
        shape: of a tensor that is stored whole.
    """

    dtype: Dtype
    pieces: Annotated[list[list[int]], WrapValidator(_pieces)] | None = None
    shape: Sizes | None = None
    file: Count | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Stored:
        if (self.pieces is None) == (self.file is None) or (self.file is None) != (self.shape is None):
            raise ValueError("it must have either pieces, or a file and a shape")
        return self


class ParameterEntry(_Value):
    """One parameter: its elements are counted in the order in which a tensor of strides ``stride`` stores them."""

    aliases: Annotated[list[str], Field(max_length=1000)]
    shape: Sizes
    stride: Sizes
    dtype: Short
    trainable: bool
    group: Annotated[int, Field(ge=0, lt=1 << 20)] | None
    weight: Stored | None
    average: Stored | None = None
    state: Annotated[dict[str, Stored], Field(max_length=100)]
    scalars: Annotated[dict[str, Any], Field(max_length=100)]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def stored(self, role: str) -> Stored:
        """Of ``"weight"``, ``"average"`` or ``"state.<key>"``, which must be there."""
        roles = {"weight": self.weight, "average": self.average}
        found = roles[role] if role in roles else self.state[role.removeprefix("state.")]
        if found is None:
            raise CheckpointError("the checkpoint was saved without the weights of frozen parameters.")
        return found

    @model_validator(mode="after")
    def _dense(self) -> ParameterEntry:
        if len(self.shape) != len(self.stride):
            raise ValueError("shape and stride have different lengths")
        expected = 1
        for stride, length in sorted(zip(self.stride, self.shape, strict=True)) if self.numel else ():
            if length > 1:
                if stride != expected:
                    raise ValueError(f"no dense tensor of shape {self.shape} has the strides {self.stride}")
                expected *= length
        for what, stored in (("weight", self.weight), ("average", self.average)):
            if stored is not None and stored.pieces is None:
                raise ValueError(f"its {what} is not stored in pieces")
        return self


class BufferEntry(_Value):
    """One buffer; ranks that are not in ``files`` had the values of file 0."""

    shape: Sizes
    dtype: Dtype
    files: Annotated[list[int], WrapValidator(_ranks)]


class Counters(_Value):
    """How far the training had come."""

    global_steps: Count
    micro_steps: Count
    global_samples: Count
    skipped_steps: Count
    average_updates: Count = 0


class Scaler(_Value):
    """The dynamic loss scale."""

    scale: Annotated[float, Field(gt=0, le=2.0**127, allow_inf_nan=False)]
    patience: Annotated[int, Field(ge=0, lt=1 << 31)]
    good_steps: Count


class OptimizerEntry(_Value):
    """Class and param groups' options of the optimizer; the options are values of ``values.py``."""

    kind: Annotated[str, Field(alias="class", max_length=200)]
    groups: Annotated[list[dict[str, Any]], Field(max_length=10_000)]


def _tuple(value: Any) -> Any:
    return tuple(value) if type(value) is list else value


class RandomEntry(_Value):
    """What of a rank's random states is not a tensor.

    Attributes:
        python: version, and the cached normal number or None.
        numpy: kind, position in its 624 words, whether there is a cached normal number, and that.
    """

    python: Annotated[tuple[Annotated[int, Field(ge=3, le=3)], Hex | None], BeforeValidator(_tuple)]
    numpy: (
        Annotated[
            tuple[
                Annotated[str, Field(pattern="^MT19937$")],
                Annotated[int, Field(ge=0, le=624)],
                Annotated[int, Field(ge=0, le=1)],
                Hex,
            ],
            BeforeValidator(_tuple),
        ]
        | None
    ) = None


class Manifest(_Value):
    """A checkpoint. ``scheduler``, ``client_state`` and ``extra_state`` are values of ``values.py``.

    Attributes:
        id: random name of this save.
        sequence: number of the save in its directory.
        latest: whether a load without a tag may take it.
        random: by rank; empty in a checkpoint that another program wrote.
        extra_state: what modules' ``get_extra_state`` returned, by the module's name.
        loaders: names of the loaders that the user brought; each rank's file holds where its own were.
        sinks: what sinks need to go on with the same run (the id that a tracker gave it), by name.
    """

    format: Short
    version: Count
    id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    sequence: Annotated[int, Field(ge=0, le=LAST_SEQUENCE)]
    tag: Annotated[str, AfterValidator(_tag)]
    latest: bool
    files: Annotated[list[FileEntry], Field(min_length=1)]
    parameters: dict[str, ParameterEntry]
    buffers: dict[str, BufferEntry]
    optimizer: OptimizerEntry | None
    scheduler: dict[str, Any] | None
    scaler: Scaler | None
    loader: dict[str, Any] | None
    loaders: Annotated[list[Short], Field(max_length=1000)] = []
    client_state: dict[str, Any]
    extra_state: dict[str, Any] = {}
    sinks: Annotated[dict[str, dict[Short, Short]], Field(max_length=100)] = {}
    counters: Counters
    random: list[RandomEntry]
    config: dict[str, Any]
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
    stage: Annotated[int, Field(ge=0, le=3)]
    world_size: Annotated[int, Field(ge=1, lt=10_000_000)]
    created: Short
    shardline: Short
    torch: Short

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        if len(self.files) != self.world_size:
            raise ValueError(f"{len(self.files)} files of {self.world_size} ranks")
        if len({entry.name for entry in self.files}) != len(self.files):
            raise ValueError("two files have one name")
        if len(self.random) not in (0, self.world_size):
            raise ValueError(f"random states of {len(self.random)} of {self.world_size} ranks")
        groups = 0 if self.optimizer is None else len(self.optimizer.groups)
        space = _Space(self.files)
        for name, entry in self.parameters.items():
            if entry.group is not None and groups and entry.group >= groups:
                raise ValueError(f"{shown(repr(name))} is in param group {entry.group} of {groups}")
            for stored in (entry.weight, entry.average, *entry.state.values()):
                if stored is not None:
                    space.reserve(name, stored, entry.numel)
        for name, buffer in self.buffers.items():
            for file in buffer.files:
                space.reserve(name, Stored(dtype=buffer.dtype, shape=buffer.shape, file=file), 0)
        groups_of_options = [] if self.optimizer is None else self.optimizer.groups
        check_tensors([self.scheduler, self.client_state, self.extra_state, groups_of_options])
        return self

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """The manifest that is written as the JSON text ``data``.

        Raises:
            CheckpointError: a clause that says what is wrong.
        """
        try:
            raw = json.loads(data.decode(), parse_constant=_no_number)
        except RecursionError:
            raise CheckpointError("is nested too deep") from None
        except ValueError as error:
            raise CheckpointError(f"is not JSON: {shown(error)}") from None
        if not isinstance(raw, dict):
            raise CheckpointError("is not a JSON object")
        if raw.get("format") != FORMAT or type(raw.get("version")) is not int or not 1 <= raw["version"] <= VERSION:
            raise CheckpointError(
                f"has the format {shown(repr(raw.get('format')), 60)} version {shown(repr(raw.get('version')), 60)}; "
                f"this version of Shardline reads {FORMAT!r} up to version {VERSION}. Use the version that wrote it "
                f"({shown(repr(raw.get('shardline')), 60)}) or a newer one"
            )
        known = {field.alias or name for name, field in cls.model_fields.items()}
        raw = {key: value for key, value in raw.items() if key in known}
        for key, kind in _ENTRIES.items():
            entries = raw.get(key)
            if isinstance(entries, dict):
                raw[key] = {name: _one(kind, entry, f"{key}.{name}") for name, entry in entries.items()}
            elif isinstance(entries, list):
                raw[key] = [_one(kind, entry, f"{key}[{number}]") for number, entry in enumerate(entries)]
        return _one(cls, raw, "")


_ENTRIES: Mapping[str, type[BaseModel]] = {
    "parameters": ParameterEntry, "buffers": BufferEntry, "files": FileEntry, "random": RandomEntry,
}  # fmt: skip
"""What there may be many of; each is checked by itself, so that the first mistake is the last."""


class _Space:
    """What is left of the files for tensors: no manifest can ask for more memory than there are bytes."""

    def __init__(self, files: list[FileEntry]) -> None:
        self._remaining = [entry.bytes for entry in files]

    def reserve(self, name: str, stored: Stored, numel: int) -> None:
        size = ITEM_BYTES[stored.dtype]
        if stored.file is not None and stored.shape is not None:
            self._spend(name, stored.file, math.prod(stored.shape) * size)
            return
        done = 0
        for file, start, stop in sorted(stored.pieces or (), key=lambda piece: piece[1]):
            if start != done or stop < start:
                raise ValueError(f"the pieces of {shown(repr(name))} leave elements out, or hold some twice")
            self._spend(name, file, (stop - start) * size)
            done = stop
        if done != numel:
            raise ValueError(f"the pieces of {shown(repr(name))} hold {done} of its {numel} elements")

    def _spend(self, name: str, file: int, size: int) -> None:
        if not 0 <= file < len(self._remaining):
            raise ValueError(f"{shown(repr(name))} is in file {file} of {len(self._remaining)}")
        self._remaining[file] -= size
        if self._remaining[file] < 0:
            raise ValueError(f"{shown(repr(name))} and those before it do not fit into file {file}")


def check_tensors(values: list[Any]) -> None:
    """Each tensor of a file belongs to one value: else a short manifest could ask for the same large one a million
    times."""
    seen: set[str] = set()
    while values:
        value = values.pop()
        if isinstance(value, dict) and "$tensor" in value:
            key = value["$tensor"]
            if not isinstance(key, str) or key in seen:
                raise ValueError(f"the tensor {shown(repr(key), 100)} belongs to two values, or to none")
            seen.add(key)
        elif isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _one(model: type[T], raw: Any, where: str) -> T:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(filter(None, (where, *map(str, first["loc"]))))
        said = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(
            f"has a wrong form: {shown(place, 200) + ': ' if place else ''}{shown(said, 300)}"
        ) from None


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``, checked against its own checksum.

    Raises:
        CheckpointError: if there is none, it is damaged, its format is newer than this version reads, or its form is
            none that a save writes.
    """
    file = path / MANIFEST
    try:
        data = read_limited(file, largest_manifest(_count_files(path)))
        expected = read_limited(path / MANIFEST_SUM, 1000).decode().split()[:1]
    except (OSError, ValueError) as error:
        if _is_deepspeed(path):
            raise CheckpointError(
                f"{shown(path)} is a checkpoint of DeepSpeed. Import it: shardline checkpoint import-deepspeed "
                f"{shown(path.parent)} OUT --tag {shown(path.name)}"
            ) from None
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise CheckpointError(
            f"{shown(path)} is not an intact checkpoint: its manifest cannot be read ({reason})."
        ) from None
    if [hashlib.sha256(data).hexdigest()] != expected:
        raise CheckpointError(f"{shown(file)} is damaged: its SHA-256 is not the one in {MANIFEST_SUM}.")
    try:
        return Manifest.parse(data)
    except CheckpointError as error:
        raise CheckpointError(f"{shown(file)} {text_of(error)}.") from None


def _count_files(path: Path) -> int:
    with os.scandir(path) as entries:
        return sum(FILE_NAME.fullmatch(entry.name) is not None for entry in entries)


def _is_deepspeed(path: Path) -> bool:
    try:
        return any(path.glob("*mp_rank_*_model_states.pt"))
    except OSError:
        return False
