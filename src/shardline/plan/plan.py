"""The Plan: a pure value that says which elements of which parameter lie where, on which rank, in which unit.

It is computed from names, shapes, strides, dtypes, trainability, param groups and the world size alone, on every rank
alike. It knows no process group and does not depend on the stage: the engine, the memory formulas and the checkpoint
all read the same value.

    Plan -> units -> buckets -> entries
            a unit   a flat   a parameter's
            moves    layout   place in it
            together

Offsets and cuts are multiples of :data:`ALIGNMENT` elements. Fused CPU kernels treat the vector body and
the scalar tail of an array differently, so only aligned cuts leave every bit as it would be without the cut.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from shardline.names import outwards
from shardline.plan.placement import Placement, Stage

__all__ = [
    "ALIGNMENT",
    "BucketPlan",
    "Entry",
    "Fragment",
    "ModuleSpec",
    "ParamSpec",
    "Plan",
    "Run",
    "UnitPlan",
    "make_plan",
    "runs_fit",
]

ALIGNMENT = 64
"""Elements to which every parameter's offset and every shard boundary is aligned."""

_OWN_BUCKET_NUMEL = 1 << 16
"""Elements from which a parameter is a bucket of its own in a single process, if what autograd hands over as its
gradient is kept without a copy: there is no communication to batch."""


@dataclass(frozen=True)
class ParamSpec:
    """What the plan holds of one parameter.

    Attributes:
        name: its first name in the model.
        aliases: every name under which the model holds it, ``name`` included (more than one when tied).
        shape: its true shape.
        stride: its dense strides in elements, as stored (channels_last weights keep their order).
        dtype: the dtype in which it takes part in forward and backward.
        group: index of its optimizer param group, or ``None`` when it is frozen.
        state_steps: how many steps its optimizer state has seen. Parameters of one group that differ in it (one was
            frozen for a while) cannot share a run.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    group: int | None
    state_steps: int = 0

    @property
    def trainable(self) -> bool:
        return self.group is not None

    @cached_property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class ModuleSpec:
    """What the plan holds of one module: its path, its class, and the parameters it holds directly.

    Attributes:
        path: dotted path from the model, ``""`` for the model itself.
        kind: class name.
        repeats: whether its children are repeated blocks (``ModuleList``, ``Sequential``).
        params: first names of the parameters it holds itself, without those of its children.
    """

    path: str
    kind: str
    repeats: bool
    params: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """A parameter's place in its bucket: elements ``offset`` to ``offset + numel``, in storage order."""

    param: ParamSpec
    offset: int

    @property
    def stop(self) -> int:
        return self.offset + self.param.numel


@dataclass(frozen=True)
class Fragment:
    """Elements ``start`` to ``stop`` of the parameter ``name`` (storage order), found at ``offset`` in a bucket."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Run:
    """A stretch of one rank's shard that belongs to one param group: what the optimizer sees as one tensor.

    ``entry`` is set where the optimizer must see the whole parameter in its own shape.
    """

    group: int
    start: int
    stop: int
    entry: Entry | None = None


@dataclass(frozen=True)
class BucketPlan:
    """One flat layout of a unit: its parameters of one dtype and trainability, cut into one shard per rank.

    Attributes:
        dtype: of the weights.
        trainable: whether it has gradients, masters and optimizer state.
        entries: its parameters in order of offset; those of one param group lie together.
        cuts: ``world_size + 1`` offsets; rank r's shard is ``cuts[r]`` to ``cuts[r + 1]``.
        param_aligned: whether cuts fall between parameters only, for optimizers that need them whole.
    """

    dtype: torch.dtype
    trainable: bool
    entries: tuple[Entry, ...]
    cuts: tuple[int, ...]
    param_aligned: bool = False

    @property
    def size(self) -> int:
        """Elements of the whole bucket, padding included."""
        return self.cuts[-1]

    @cached_property
    def numel(self) -> int:
        """Elements that belong to parameters."""
        return sum(entry.param.numel for entry in self.entries)

    def shard(self, rank: int) -> tuple[int, int]:
        """Offsets at which ``rank``'s shard starts and stops."""
        return self.cuts[rank], self.cuts[rank + 1]

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Ranges that belong to no parameter: alignment between entries and padding at the end."""
        found, position = [], 0
        for entry in self.entries:
            if entry.offset > position:
                found.append((position, entry.offset))
            position = entry.stop
        if self.size > position:
            found.append((position, self.size))
        return tuple(found)

    def fragments(self, start: int, stop: int) -> Iterator[Fragment]:
        """The pieces of parameters that lie between two offsets, in order."""
        first = max(0, bisect_right(self._offsets, start) - 1)
        for entry in self.entries[first:]:
            if entry.offset >= stop:
                return
            low, high = max(start, entry.offset), min(stop, entry.stop)
            if low < high:
                yield Fragment(entry.param.name, low - entry.offset, high - entry.offset, low)

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """The optimizer's tensors between two offsets: one for each param group, or one for each whole parameter."""
        if self.param_aligned:
            for entry in self.entries:
                if start <= entry.offset and entry.stop <= stop and entry.param.numel:
                    yield Run(entry.param.group or 0, entry.offset, entry.stop, entry)
            return
        for group, low, high in self._groups:
            low, high = max(start, low), min(stop, high)
            if low < high:
                yield Run(group, low, high)

    @cached_property
    def _offsets(self) -> list[int]:
        return [entry.offset for entry in self.entries]

    @cached_property
    def _groups(self) -> list[tuple[int, int, int]]:
        """(group, start, stop): each reaches to where the next one starts, so no padding is stepped over."""
        starts: dict[tuple[int, int], int] = {}
        for entry in self.entries:
            starts.setdefault(_run_key(entry.param), entry.offset)
        bounds = [*list(starts.values())[1:], self.size]
        return [(key[0], start, stop) for (key, start), stop in zip(starts.items(), bounds, strict=True)]


@dataclass(frozen=True)
class UnitPlan:
    """Parameters that are gathered and reduced together, and the modules that use them.

    Attributes:
        index: position in plan order.
        name: for messages: the path of its first root.
        roots: paths of the modules whose forward spans the unit's use.
        users: paths of all modules at which a use can begin: the roots, and every module that holds a parameter of it.
    """

    index: int
    name: str
    buckets: tuple[BucketPlan, ...]
    roots: tuple[str, ...]
    users: tuple[str, ...]

    @property
    def numel(self) -> int:
        return sum(bucket.numel for bucket in self.buckets)


@dataclass(frozen=True)
class Plan:
    """The whole layout. ``units`` are in plan order, which is the order in which the model defines its modules."""

    units: tuple[UnitPlan, ...]
    world_size: int
    _where: dict[str, tuple[UnitPlan, BucketPlan, Entry]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for unit in self.units:
            for bucket in unit.buckets:
                for entry in bucket.entries:
                    self._where[entry.param.name] = (unit, bucket, entry)

    def where(self, name: str) -> tuple[UnitPlan, BucketPlan, Entry]:
        """The unit, bucket and entry of the parameter whose first name is ``name``.

        Raises:
            KeyError: if the plan holds no such parameter.
        """
        return self._where[name]

    @cached_property
    def params(self) -> tuple[ParamSpec, ...]:
        return tuple(entry.param for unit in self.units for bucket in unit.buckets for entry in bucket.entries)

    def state_bytes(self, stage: Stage, rank: int, *, moments: int = 2, accumulate: torch.dtype = torch.float32) -> int:
        """Bytes that ``rank`` holds between steps: weights, gradients, masters and ``moments`` fp32 states.

        Per trainable parameter on N ranks with Adam this is, at stages 0 to 3, in fp32 16; 8 + 8/N; 4 + 12/N; 16/N and
        in bf16 with fp32 accumulation 18; 6 + 12/N; 2 + 16/N; 18/N, plus the padding of the layout.
        """
        total = 0
        for unit in self.units:
            for bucket in unit.buckets:
                start, stop = bucket.shard(rank)
                size = {Placement.SHARDED: stop - start}
                total += size.get(stage.weights, bucket.size) * bucket.dtype.itemsize
                if bucket.trainable:
                    states = size.get(stage.states, bucket.size)
                    total += size.get(stage.gradients, bucket.size) * accumulate.itemsize
                    total += states * 4 * (moments + (bucket.dtype.itemsize < 4))
        return total

    @cached_property
    def fingerprint(self) -> str:
        """A digest of everything in the plan: equal on two ranks exactly when their layouts are."""
        rows = [
            [unit.name, *(
                [str(bucket.dtype), bucket.cuts, bucket.param_aligned,
                 [[e.param.name, e.offset, e.param.shape, e.param.stride, *_run_key(e.param)] for e in bucket.entries]]
                for bucket in unit.buckets
            )]
            for unit in self.units
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@dataclass
class _Candidate:
    """A candidate for a unit."""

    roots: list[str]
    block: bool  # one of the model's repeated blocks, as opposed to a leaf outside of them
    params: list[ParamSpec] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return sum(param.numel for param in self.params)


def make_plan(
    params: Sequence[ParamSpec],
    modules: Sequence[ModuleSpec],
    world_size: int,
    *,
    min_numel: int = 100_000,
    max_numel: int = 500_000_000,
    chosen: Sequence[str] = (),
    param_aligned: bool = False,
    kept_grads: Collection[torch.dtype] = (),
) -> Plan:
    """Lay out a model.

    A unit is one repeated block of the model, or a module outside the blocks that holds parameters itself; what is
    smaller than ``min_numel`` is merged with its neighbours, a block larger than ``max_numel`` is taken apart.

    Args:
        params: the parameters in the order in which the model defines them.
        modules: the modules in the order of ``nn.Module.named_modules``.
        world_size: ranks over which buckets are cut.
        min_numel: elements below which a candidate is merged with its neighbours.
        max_numel: elements above which a block is taken apart, and up to which candidates are merged.
        chosen: paths of modules that become units whatever their size.
        param_aligned: cut shards between parameters only, for optimizers that must see each parameter whole.
        kept_grads: the dtypes of parameters whose gradients a single process keeps as autograd made them.
    """
    by_name = {param.name: param for param in params}
    candidates = _candidates(by_name, modules, max_numel, set(chosen))
    merged = _merge(candidates, min_numel, max_numel, set(chosen))
    holders: dict[str, list[str]] = {}
    for module in modules:
        for name in module.params:
            holders.setdefault(name, []).append(module.path)
    own_dtypes = kept_grads if world_size == 1 else ()
    units: list[UnitPlan] = []
    for candidate in merged:
        held = {path for param in candidate.params for path in holders[param.name]}
        users = [module.path for module in modules if module.path in held or module.path in candidate.roots]
        units.append(
            UnitPlan(
                index=len(units),
                name=candidate.roots[0] or "(model)",
                buckets=tuple(_buckets(candidate.params, world_size, param_aligned, own_dtypes)),
                roots=tuple(candidate.roots),
                users=tuple(users),
            )
        )
    return Plan(tuple(units), world_size)


def _candidates(
    params: Mapping[str, ParamSpec], modules: Sequence[ModuleSpec], max_numel: int, chosen: set[str]
) -> list[_Candidate]:
    """Blocks and leaves in definition order. A tied parameter goes to the first candidate that holds it."""
    repeats = {module.path for module in modules if module.repeats}
    below: dict[str, set[str]] = {module.path: set() for module in modules}
    for module in modules:
        for path in outwards(module.path):
            below[path].update(module.params)
    found: dict[str, _Candidate] = {}
    taken: set[str] = set()
    for module in modules:
        roots = [path for path in outwards(module.path) if path in found and found[path].block]
        root = next((path for path in roots if path in chosen), roots[-1] if roots else None)
        if root is None or module.path in chosen:
            size = sum(params[name].numel for name in below[module.path])
            is_block = bool(module.path) and module.path.rpartition(".")[0] in repeats and size <= max_numel
            # A repeated container of blocks is not itself a block: its elements are.
            is_block = is_block and not module.repeats
            if not (is_block or module.path in chosen or module.params):
                continue
            root = module.path
            found[root] = _Candidate([root], block=is_block or module.path in chosen)
        for name in module.params:
            if name not in taken:
                taken.add(name)
                found[root].params.append(params[name])
    return [candidate for candidate in found.values() if candidate.params]


def _merge(candidates: list[_Candidate], min_numel: int, max_numel: int, chosen: set[str]) -> list[_Candidate]:
    """Join small candidates with a neighbour of their own kind, so that no collective moves a handful of elements."""

    def joinable(first: _Candidate, second: _Candidate) -> bool:
        roots = [*first.roots, *second.roots]
        return (
            first.block == second.block
            and first.numel + second.numel <= max_numel
            # Parameters of the root module are in use during the whole forward, so they are not merged with others.
            and "" not in roots
            and not chosen.intersection(roots)
        )

    merged: list[_Candidate] = []
    for position, candidate in enumerate(candidates):
        following = candidates[position + 1] if position + 1 < len(candidates) else None
        last = merged[-1] if merged else None
        small_and_last_of_its_kind = candidate.numel < min_numel and (
            following is None or not joinable(candidate, following)
        )
        if last and joinable(last, candidate) and (last.numel < min_numel or small_and_last_of_its_kind):
            last.roots += candidate.roots
            last.params += candidate.params
        else:
            merged.append(candidate)
    return merged


def _buckets(
    params: Sequence[ParamSpec], world_size: int, param_aligned: bool, own_dtypes: Collection[torch.dtype]
) -> Iterator[BucketPlan]:
    """A bucket for each large parameter of ``own_dtypes``; one for each dtype and trainability among the others."""
    own = {
        param.name
        for param in params
        if param.trainable and param.dtype in own_dtypes and param.numel >= _OWN_BUCKET_NUMEL
    }
    kinds: dict[tuple[torch.dtype, bool], list[ParamSpec]] = {}
    for param in params:
        if param.name in own:  # without padding, as its gradient is
            yield BucketPlan(param.dtype, True, (Entry(param, 0),), (0, param.numel), param_aligned)
        else:
            kinds.setdefault((param.dtype, param.trainable), []).append(param)
    for (dtype, trainable), members in kinds.items():
        entries, offset = [], 0
        for param in sorted(members, key=_run_key):  # stable: definition order within a run
            entries.append(Entry(param, offset))
            offset = _align(offset + param.numel)
        make_cuts = _param_cuts if param_aligned and trainable else _equal_cuts
        yield BucketPlan(
            dtype, trainable, tuple(entries), make_cuts(entries, offset, world_size), param_aligned and trainable
        )


def _run_key(param: ParamSpec) -> tuple[int, int]:
    """Parameters with the same key may share a run."""
    return (param.group or 0, param.state_steps)


def runs_fit(units: Iterable[UnitPlan], state_steps: Mapping[str, int]) -> bool:
    """Whether parameters that share a run have optimizer states that have seen as many steps."""
    for unit in units:
        for bucket in unit.buckets:
            seen: dict[tuple[int, int], int] = {}
            for entry in bucket.entries if bucket.trainable and not bucket.param_aligned else ():
                steps = state_steps[entry.param.name]
                if seen.setdefault(_run_key(entry.param), steps) != steps:
                    return False
    return True


def _align(offset: int, unit: int = ALIGNMENT) -> int:
    return -(-offset // unit) * unit


def _equal_cuts(entries: Sequence[Entry], end: int, world_size: int) -> tuple[int, ...]:
    """Shards of one size: the padding at the end is at most ``world_size * ALIGNMENT`` elements."""
    shard = _align(-(-end // world_size))
    return tuple(rank * shard for rank in range(world_size + 1))


def _param_cuts(entries: Sequence[Entry], end: int, world_size: int) -> tuple[int, ...]:
    """Between parameters, each as near as possible to where equal shards would be cut."""
    allowed = [*(entry.offset for entry in entries), end]
    cuts = [0]
    for rank in range(1, world_size):
        target = end * rank / world_size
        cuts.append(max(cuts[-1], min(allowed, key=lambda offset: abs(offset - target))))
    return (*cuts, end)
