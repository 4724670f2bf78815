"""What a save in the background writes: copies on the host, in memory that is kept from save to save.

Weights and buffers can be edited at any moment, so they are copied before anything that is called later. The
optimizer's state changes in a step only, which is where it is waited for.

What is on a device is copied by a stream of its own. The host waits for that on the thread that writes. Where something
must not be overwritten yet, the stream that computes waits, and the host goes on; what is in host memory already is
copied by that thread, and a step waits for it on the host.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from shardline.checkpoint.format.manifest import is_state
from shardline.errors import CheckpointError
from shardline.runtime.pinned import empty_pinned

__all__ = ["Staging"]

_ALIGNED = 64


class Staging:
    """The copies of one save at a time."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._layout: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = {}  # what that was made for
        self._later: list[tuple[Tensor, Tensor]] = []  # state in host memory: copy and source
        self._states: list[tuple[str, Tensor, int]] = []  # key, source, and its version: to be seen unchanged
        self._changed: str | None = None
        self._lock = threading.Lock()
        self._streams: dict[torch.device, torch.Stream] = {}
        self._arrivals: dict[torch.device, torch.Event] = {}  # of everything that is on its way from a device
        self._sources: list[Tensor] = []  # their memory must not be used again before
        self._error: Exception | None = None
        self._done = threading.Event()
        self._done.set()

    def begin(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``tensors``, which have their values after :meth:`finish`.

        It does not raise: the other ranks would wait for this one. :meth:`finish` does.
        """
        self._error, self._changed = None, None
        try:
            self._place(tensors)
            self._sources = list(tensors.values())
            states = {key: tensor for key, tensor in tensors.items() if is_state(key)}
            rest = [(self._kept[key], tensor) for key, tensor in tensors.items() if key not in states]
            _copy(pair for pair in rest if pair[1].device.type == "cpu")
            for device, event in self._send(rest).items():
                torch.accelerator.current_stream(device).wait_event(event)
            pairs = [(self._kept[key], tensor) for key, tensor in states.items()]
            self._later = [pair for pair in pairs if pair[1].device.type == "cpu"]
            self._send(pairs)
            self._states = [(key, tensor, tensor._version) for key, tensor in states.items()]
            if self._later:
                self._done.clear()
        except Exception as error:
            self._error = error
        return dict(self._kept)

    def finish(self) -> None:
        """Return when every copy has its values; on any thread.

        Raises:
            CheckpointError: if the optimizer's state was changed meanwhile by something else than a step.
            Exception: what went wrong in :meth:`begin`.
        """
        if self._error is not None:
            raise self._error
        _copy(self._later)
        self._arrive()
        self._look()
        self.give_up()
        if self._changed is not None:
            raise CheckpointError(
                f"{self._changed!r} of the optimizer was changed while it was copied in the background. Call "
                f"engine.checkpoints.wait() before you change it, or save without async_save."
            )

    def give_up(self) -> None:
        """Nothing more is copied."""
        try:
            self._arrive()
        finally:
            self._later, self._states, self._sources = [], [], []
            self._done.set()

    def before_step(self) -> None:
        """The optimizer's state changes in what is called, and queued on the current stream, from here on."""
        self._done.wait()
        self._look()
        for device, event in self._arrivals.items():
            torch.accelerator.current_stream(device).wait_event(event)

    def clear(self) -> None:
        """Release the memory."""
        self._arrive()
        self._kept, self._layout = {}, {}

    def _place(self, tensors: Mapping[str, Tensor]) -> None:
        """Make memory for copies: one piece for each device, since thousands of small ones would be locked slowly."""
        layout = {key: (tensor.shape, tensor.dtype, tensor.device) for key, tensor in tensors.items()}
        if layout == self._layout:
            return
        self._kept, self._layout = {}, {}  # given back first
        kept = {}
        for device in {tensor.device for tensor in tensors.values()}:
            places, size = {}, 0
            for key, tensor in tensors.items():
                if tensor.device == device:
                    places[key] = size
                    size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
            memory = empty_pinned(size, torch.uint8, device)
            for key, place in places.items():
                shape, dtype, _ = layout[key]
                kept[key] = memory[place : place + tensors[key].nbytes].view(dtype).view(shape)
        self._kept, self._layout = kept, layout

    def _send(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[torch.device, torch.Event]:
        """Start to copy what is on devices, behind what is queued there; the events of the last copies."""
        sources = defaultdict(list)
        for target, source in pairs:
            if source.device.type != "cpu":
                sources[source.device].append((target, source))
        events = {}
        for device, those in sources.items():
            if device not in self._streams:
                self._streams[device] = torch.Stream(device)
            stream = self._streams[device]
            stream.wait_stream(torch.accelerator.current_stream(device))
            with stream:
                for target, source in those:
                    target.copy_(source, non_blocking=True)
                events[device] = stream.record_event()
        self._arrivals = self._arrivals | events
        return events

    def _arrive(self) -> None:
        arrivals, self._arrivals = self._arrivals, {}
        for event in arrivals.values():
            event.synchronize()

    def _look(self) -> None:
        """See that no state was changed since the save began; once, before a step changes them."""
        with self._lock:
            states, self._states = self._states, []
            for key, source, version in states:
                if source._version != version:
                    self._changed = key


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source)
