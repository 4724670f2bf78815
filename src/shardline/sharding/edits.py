"""What users do to the parameters of one bucket: in-place edits, writes by ``.data``, and conversions in a forward.

An in-place operation raises the parameter's version. What is written by ``.data`` raises none, so a ``.data``
that was read is remembered and compared. A parameter may be converted to another dtype while a forward or backward
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from weakref import ref

import torch
from torch import Tensor, nn

from shardline.errors import ModelError
from shardline.runtime.modes import outside_modes
from shardline.sharding.buffer import view
from shardline.sharding.flat_weights import FlatWeights
from shardline.sharding.parameter import assign
from shardline.sharding.rounding import RoundingWatch
from shardline.sharding.shard import Range, within

__all__ = ["Edits"]

_VERSION: Callable[[Tensor], int] = attrgetter("_version")
_ADDRESS: Callable[[Tensor], int] = Tensor.data_ptr


class Edits:
    """Notices writes to ``params`` while they are shown, and brings them into ``weights``.

    Args:
        may_convert: asked before a parameter is converted; see ``Unit.on_convert``. Where it returns True,
            :meth:`restore_views` is called at the end of the forward or backward.

    Attributes:
        rounded_away: the name of a frozen parameter that is edited again and again and does not change.
    """

    def __init__(self, params: Sequence[nn.Parameter], weights: FlatWeights, may_convert: Callable[[], bool]) -> None:
        self.params, self.weights, self._may_convert = params, weights, may_convert
        self.plan = weights.shard.plan
        self.rounded_away: str | None = None
        self._versions: list[int] = []
        self._offsets = [  # in bytes; what is empty has no address
            entry.offset * self.plan.dtype.itemsize if entry.param.numel else None for entry in self.plan.entries
        ]
        self._aliases: dict[int, list[ref[Tensor]]] = {}  # by index: what was read as .data and may be written to
        self._converted: set[int] = set()  # indices of those whose data is not a view for now
        self._rounding: dict[int, RoundingWatch] = {}  # of frozen parameters in low precision that were edited

    # -- noticing ---------------------------------------------------------------------------------------------------

    def note_versions(self) -> None:
        """Remember the parameters as they are now, so that later edits are noticed."""
        self._versions = [*map(_VERSION, self.params)]

    def forget_aliases(self) -> None:
        """The parameters are about to be sealed: a ``.data`` of a gather that is over changes nothing."""
        self._aliases.clear()

    def _edited(self) -> list[int]:
        """Indices of the parameters that were edited in place since :meth:`note_versions`."""
        versions = [*map(_VERSION, self.params)]
        if versions == self._versions:
            return []
        return [i for i, (now, before) in enumerate(zip(versions, self._versions, strict=True)) if now != before]

    def changed(self) -> set[int]:
        """Indices of the parameters that may have changed: edited, or handed out as ``.data``, which has no version."""
        return {*self._edited(), *self._aliases}

    def edited_names(self) -> list[str]:
        """Names of the parameters that were changed since they were last shown."""
        found = set(self._edited())
        full, resting, covered = self.weights.full, self.weights.resting, self.weights.shard.weights
        if full is not None and full.data_ptr() != resting.data_ptr():
            for index in self._aliases:
                for start, stop in within(self._spans([index]), covered):
                    if not torch.equal(full[start:stop], resting[start - covered[0] : stop - covered[0]]):
                        found.add(index)
        return [self.plan.entries[index].param.name for index in sorted(found)]

    def check_in_place(self) -> None:
        """See that every parameter shown is the one the engine knows, and a view of the full weights.

        Raises:
            ModelError: if a parameter or its tensor was replaced instead of edited.
        """
        full = self.weights.full
        if full is None:
            return
        base, size = full.data_ptr(), full.element_size()
        addresses = [0 if offset is None else base + offset for offset in self._offsets]
        if [*map(_ADDRESS, self.params)] == addresses and not self._edited():
            return  # every change of a shape raises the version
        for param, entry in zip(self.params, self.plan.entries, strict=True):
            moved = param.data_ptr() != base + entry.offset * size and entry.param.numel
            shaped = param.shape == entry.param.shape and param.stride() == entry.param.stride
            if moved or not shaped or param.dtype != self.plan.dtype:
                raise replaced_error(entry.param.name, param)

    # -- bringing in ------------------------------------------------------------------------------------------------

    def adopt_resting(self, *, restorable: bool) -> None:
        """Bring edits of resting weights (``clamp_``, ``load_state_dict``, ``.data``) into the masters.

        Args:
            restorable: whether the masters from before the edit come back if, before the next update, the weights do.

        Raises:
            ModelError: if a parameter's tensor was replaced instead of edited.
        """
        self.check_in_place()
        changed = self.changed()
        if changed:
            self.weights.update_masters(self.weights.resting, self._spans(changed), restorable=restorable)
            self._watch(self.weights.resting)
            self.note_versions()
            self._forget_dead_aliases()

    def adopt_gathered(self) -> None:
        """Bring edits of gathered weights into those at rest and the masters."""
        self.restore_views()
        changed = self.changed()
        if self.weights.full is not None and changed:
            self.write(self.weights.full, changed)

    def write(self, full: Tensor, changed: Collection[int] | None = None, *, restorable: bool = False) -> None:
        """Bring ``full`` into the weights at rest and the masters; of it what ``changed``, or all if that is left out.

        ``restorable`` is that of :meth:`adopt_resting`.
        """
        self.weights.write_from(full, self._spans(changed), restorable=restorable)
        self._watch(full)

    def _spans(self, changed: Collection[int] | None) -> list[Range]:
        """The ranges of the bucket in which parameters of these indices lie; neighbours make one."""
        if changed is None:
            return [(0, self.plan.size)]
        spans: list[Range] = []
        last = -2
        for index in sorted(changed):
            entry = self.plan.entries[index]
            start = spans.pop()[0] if index == last + 1 else entry.offset
            spans.append((start, entry.stop))
            last = index
        return spans

    def _watch(self, full: Tensor) -> None:
        """Notice edits of frozen weights that rounding loses. Trained ones have masters for that."""
        if self.plan.trainable or not self.plan.dtype.is_floating_point or self.plan.dtype.itemsize > 2:
            return
        edited = set(self._edited())
        for index in edited | set(self._aliases):
            entry = self.plan.entries[index]
            watch = self._rounding.setdefault(index, RoundingWatch())
            if watch.edited(full[entry.offset : entry.stop], certain=index in edited):
                self.rounded_away = entry.param.name

    def _forget_dead_aliases(self) -> None:
        """What was handed out and is gone can change nothing any more."""
        alive = ((index, [each for each in refs if each() is not None]) for index, refs in self._aliases.items())
        self._aliases = {index: refs for index, refs in alive if refs}

    # -- .data ------------------------------------------------------------------------------------------------------

    def on_data_read(self, index: int, alias: Tensor) -> None:
        """``alias``, the ``.data`` of a shown parameter, was read."""
        known = self._aliases.get(index, ())
        self._aliases[index] = [*(each for each in known if each() is not None), ref(alias)]

    @outside_modes
    def on_data_assigned(self, index: int, value: Tensor) -> None:
        """``param.data = value``: copied in; or, in another dtype, in its place until the forward or backward ends.

        Raises:
            ModelError: for a value of another shape, device or memory format, or of another dtype at any other time.
        """
        param, place = self.params[index], self._place(index)
        if value.shape == place.shape and value.device == place.device and not _is_reformatted(value, place):
            if value.dtype == place.dtype:
                self._copy_in(index, value, place)
                return
            if value.is_floating_point() and place.is_floating_point() and self._may_convert():
                assign(param, value.detach())
                self._converted.add(index)
                return
        raise replaced_error(self.plan.entries[index].param.name, value)

    def restore_views(self) -> None:
        """Make parameters that were converted views again; what was changed of their values is copied in."""
        for index in list(self._converted):
            place = self._place(index)
            with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
                value = self.params[index].detach()
                self._copy_in(index, torch.where(place.to(value.dtype) == value, place, value.to(place.dtype)), place)

    def _place(self, index: int) -> Tensor:
        if self.weights.full is None:
            raise AssertionError(f"{self.plan.entries[index].param.name} is shown, and its weights are not here")
        return view(self.weights.full, self.plan.entries[index])

    def _copy_in(self, index: int, value: Tensor, place: Tensor) -> None:
        with torch.no_grad():
            place.copy_(value)
        self._aliases.setdefault(index, [])
        if index in self._converted:
            self._converted.remove(index)
            assign(self.params[index], place)


def _is_reformatted(value: Tensor, place: Tensor) -> bool:
    """Whether ``value`` is the same in another memory format, which the buffer cannot show."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(value.dim())
    return wanted is not None and any(
        value.is_contiguous(memory_format=each) and not place.is_contiguous(memory_format=each)
        for each in (wanted, torch.contiguous_format)
    )


def replaced_error(name: str, found: Tensor) -> ModelError:
    return ModelError(
        f"parameter {name!r} was replaced after initialize: the model now holds a tensor of {tuple(found.shape)} "
        f"{found.dtype} with strides {found.stride()} outside the engine's buffers. Edit weights in place (copy_, "
        f"load_state_dict); convert dtype or memory format (.half(), .to(memory_format=...)) before "
        f"shardline.initialize."
    )
