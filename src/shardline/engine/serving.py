"""Between training and serving: a model's whole weights as a stream, and its states out of the device's memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shardline.checkpoint.engine.checkpointer import Checkpointer
from shardline.engine.trainables import Trainables
from shardline.errors import UsageError
from shardline.runtime.modes import outside_modes
from shardline.sharding.bucket import Bucket
from shardline.sharding.buffer import view
from shardline.sharding.unit import Unit

__all__ = ["Serving"]


class Serving:
    """The methods of an engine that trains and serves one model in turn."""

    trainables: Trainables
    checkpoints: Checkpointer

    # -- weights ----------------------------------------------------------------------------------------------------

    def stream_weights(
        self, bucket_bytes: int = 256 << 20, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """All weights, whole, one after the other: ``(name, tensor)``. Collective, at any stage.

        Every rank runs the loop to the same place; to leave it early is fine where all ranks do. A tensor is a copy on
        the engine's device, contiguous, and the caller's own. Beside what the loop keeps, this holds one unit, or one
        that is on its way, and at most ``bucket_bytes`` of copies. Tied weights come once, under their first name.

        Args:
            bucket_bytes: how much is copied ahead of the loop. A larger weight comes alone.
            dtype: of floating weights; ``None`` leaves that in which the model computes. A wider one comes from the
                masters.

        Raises:
            UsageError: if ``bucket_bytes`` is less than 1; inside a forward or ``gathered_parameters()``; if the
                weights are changed, by ``step()`` or a load, while the loop runs.
        """
        self.trainables.check_open("stream_weights()")
        if bucket_bytes < 1:
            raise UsageError(
                f"stream_weights was given bucket_bytes={bucket_bytes}; it is a number of bytes, 1 or more."
            )
        if self.trainables.in_use:
            raise UsageError(
                "stream_weights() was called inside a forward or inside gathered_parameters(). Call it outside of them."
            )
        self.trainables.adopt_edits()
        layout = self.trainables.layout
        order = {name: place for place, name in enumerate(layout.params)}
        generations = _generations(layout.units)

        def check() -> None:
            trainables = self.trainables
            if trainables.is_closed or trainables.layout is not layout or _generations(layout.units) != generations:
                raise UsageError(
                    "the weights were changed while a loop over stream_weights() ran: it would give some of before and "
                    "some of after. Call step(), loads and destroy() outside of the loop."
                )

        return _stream(layout.units, order, bucket_bytes, dtype, check)

    # -- states -----------------------------------------------------------------------------------------------------

    @outside_modes
    def offload_states(self) -> int:
        """Move masters and optimizer state to host memory, for a phase in which the device serves something else.

        Each rank may do so by itself. Forwards, :meth:`stream_weights`, whole weights and checkpoints go on working,
        and the next backward or load brings the states back as :meth:`reload_states` does. Masters that are the
        weights themselves (in fp32) stay, and so does what is in host memory already: all of it, where the engine
        computes on a CPU.

        Returns:
            How many bytes of the device's memory that has given back.
        """
        return self._move_states("offload_states()", away=True)

    @outside_modes
    def reload_states(self) -> int:
        """Bring back what :meth:`offload_states` has moved. Returns how many bytes that were."""
        return self._move_states("reload_states()", away=False)

    def _move_states(self, what: str, *, away: bool) -> int:
        self.trainables.check_open(what)
        self.checkpoints.before_step()  # a save may still read them
        return self.trainables.move_states(away=away)


def _generations(units: Sequence[Unit]) -> list[int]:
    return [bucket.weights.generation for unit in units for bucket in unit.buckets]


def _stream(
    units: Sequence[Unit],
    order: Mapping[str, int],
    bucket_bytes: int,
    dtype: torch.dtype | None,
    check: Callable[[], None],
) -> Iterator[tuple[str, Tensor]]:
    """See :meth:`Serving.stream_weights`. ``order``: the place of each name among those of its unit."""
    ready: deque[tuple[str, Tensor]] = deque()
    coming = _start(units[0], dtype) if units else []
    try:
        for unit, behind in zip(units, [*units[1:], None], strict=True):
            whole, coming = [(bucket, wait()) for bucket, wait in coming], []
            places = [(entry, buffer) for bucket, buffer in whole for entry in bucket.plan.entries]
            places.sort(key=lambda place: order[place[0].param.name])
            size = 0
            while places:
                entry, buffer = places.pop(0)
                part = view(buffer, entry)
                kept = dtype if dtype is not None and part.is_floating_point() else part.dtype
                if ready and size + part.numel() * kept.itemsize > bucket_bytes:
                    yield from _hand_out(ready, check)
                    size = 0
                ready.append((entry.param.name, _copy(part, kept, unit.comm.device)))
                size += part.numel() * kept.itemsize
            del whole, buffer, part
            if behind is not None:
                coming = _start(behind, dtype)  # it travels while the loop uses what is ready
            yield from _hand_out(ready, check)
    finally:
        for _, wait in coming:  # the loop was left
            wait()


@outside_modes
def _start(unit: Unit, dtype: torch.dtype | None) -> list[tuple[Bucket, Callable[[], Tensor]]]:
    return [
        (bucket, bucket.weights.start_full(unit.index, masters=dtype not in (None, bucket.plan.dtype)))
        for bucket in unit.buckets
    ]


@outside_modes
def _copy(part: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(part.shape, dtype=dtype, device=device).copy_(part.detach())


def _hand_out(ready: deque[tuple[str, Tensor]], check: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
    while ready:
        yield ready.popleft()
        check()
