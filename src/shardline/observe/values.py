"""The figures of an event by name: what curves are called, in every tracker alike."""

from __future__ import annotations

from shardline.events import Event, PhaseTimes, Scalars, StepDone, StepSkipped

__all__ = ["device_tflops", "values_of"]


_last: tuple[Event | None, tuple[int, dict[str, float]]] = (None, (0, {}))
"""What the last event was, and what it gave: several sinks ask for the same."""


def values_of(event: Event) -> tuple[int, dict[str, float]]:
    """The step of ``event`` and its figures by name, which are not to be changed; none where it holds no figures.

    A figure of each param group, or of each rank, has the number behind its name: ``train/lr_0``.
    """
    global _last
    if _last[0] is not event:
        _last = event, _values_of(event)
    return _last[1]


def _values_of(event: Event) -> tuple[int, dict[str, float]]:
    match event:
        case StepDone():
            return event.step, _of_step(event)
        case StepSkipped(step=step, loss_scale_after=float(scale)):
            return step, {"train/loss_scale": scale}
        case PhaseTimes(step=step, seconds=seconds):
            return step, {f"time/{phase}": value for phase, value in seconds.items()}
        case Scalars(step=step, values=values):
            return step, {name: float(value) for name, value in values.items()}
    return 0, {}


def _of_step(event: StepDone) -> dict[str, float]:
    rates = [float(rate) for rate in event.lr]
    found: dict[str, float | None] = {
        "train/loss": event.loss,
        **(_numbered("train/lr", rates) if len(set(rates)) > 1 else {"train/lr": rates[0]} if rates else {}),
        "train/grad_norm": event.grad_norm,
        **_numbered("train/grad_norm", event.grad_norms),
        "train/loss_scale": event.loss_scale,
        "train/samples": float(event.total_samples),
        "train/skipped_steps": float(event.skipped),
        "time/step": event.seconds,
        "memory/peak_bytes": float(event.memory_bytes),
        **_numbered("wait/rank", event.waited),
        **{f"sent/{operation}": float(count) for operation, count in event.sent.items()},
    }
    if event.seconds > 0:
        found["speed/samples_per_second"] = event.samples / event.seconds
        if event.tokens:
            found["speed/tokens_per_second"] = event.tokens / event.seconds
    found["speed/tflops_per_device"] = device_tflops(event)
    found["speed/mfu"] = event.mfu
    return {name: value for name, value in found.items() if value is not None}


def device_tflops(event: StepDone) -> float | None:
    """TFLOP/s of one device, where operations were counted."""
    if event.flops is None or event.seconds <= 0:
        return None
    return event.flops / max(1, len(event.waited)) / event.seconds / 1e12


def _numbered(name: str, values: tuple[float, ...] | list[float]) -> dict[str, float]:
    return {f"{name}_{index}": value for index, value in enumerate(values)}
