"""What an optimizer must see at once to be right: single elements, whole parameters, or all parameters together.

A list answers for known classes. For any other a probe runs new instances on small CPU tensors and compares what the
split changes; it knows nothing of the optimizer but its constructor and its hyperparameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

from shardline.errors import OptimizerError
from shardline.optim.lamb import Lamb
from shardline.optim.lion import Lion

__all__ = ["KNOWN", "Kind", "builder", "kind", "probe"]

Kind = Literal["elementwise", "per_parameter", "global"]
"""``elementwise``: right on any piece of a parameter. ``per_parameter``: right on whole parameters of their own shape.
``global``: right only where one instance holds all parameters."""

ELEMENTWISE = (Adadelta, Adagrad, Adam, Adamax, AdamW, ASGD, Lion, NAdam, RAdam, RMSprop, Rprop, SGD)
PER_PARAMETER = (Adafactor, Lamb, Muon)
KNOWN: dict[type[Optimizer], Kind] = {
    **dict.fromkeys(ELEMENTWISE, "elementwise"),
    **dict.fromkeys(PER_PARAMETER, "per_parameter"),
}
REFUSED = {
    LBFGS: "its step needs a closure that computes the loss again, and engine.step() has none",
    SparseAdam: "it takes sparse gradients only, and the engine's gradients are dense",
}

RUN = 64
"""Elements in a run of the probe: cuts are multiples of it."""
SHAPE = (128, 128)
"""Of one parameter of the probe: above the 4,096 elements from which 8-bit optimizers quantise their state."""
STEPS = 5


def kind(optimizer: Optimizer | type[Optimizer], defaults: Mapping[str, Any] | None = None) -> Kind:
    """The kind of an optimizer, or of a class with the hyperparameters ``defaults``.

    An attribute ``shardline_kind`` on the optimizer or its class states the kind and is believed. Otherwise the list,
    matched by exact class (a subclass may compute something else), otherwise `probe`.

    Raises `OptimizerError` for an optimizer that the engine cannot step (LBFGS needs a closure) and for one that the
    probe cannot build or step.
    """
    cls = optimizer if isinstance(optimizer, type) else type(optimizer)
    declared: Kind | None = getattr(optimizer, "shardline_kind", None)
    if declared is not None:
        if declared not in ("elementwise", "per_parameter", "global"):
            raise OptimizerError(
                f"{cls.__name__}.shardline_kind is {declared!r}; it must be 'elementwise', 'per_parameter' or 'global'."
            )
        return declared
    if cls in REFUSED:
        raise OptimizerError(f"The optimizer {cls.__name__} cannot be used: {REFUSED[cls]}. Use another optimizer.")
    if cls in KNOWN:
        return KNOWN[cls]
    if isinstance(optimizer, type):
        return probe(optimizer, dict(defaults or {}), [{}])
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return probe(cls, optimizer.defaults | dict(defaults or {}), options)


def probe(cls: type[Optimizer], defaults: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Kind:
    """The kind of ``cls``, found by running it; the widest over the ``groups``, each the options of a param group.

    Two parameters of 128 x 128 take a few steps: together in one instance, each in its own instance, flattened, and
    cut into runs of 64. Whatever changes a result tells the kind. Gradients differ in size between steps and between
    runs by orders of magnitude, so that limits and block-wise quantisation come into play. Random numbers are drawn
    from the same seed in each instance, so a stochastic optimizer comes out as ``global``. The caller's random state,
    and every device, are left alone.
    """
    order: list[Kind] = ["elementwise", "per_parameter", "global"]
    found = [_probe_group(builder(cls, defaults, group), cls) for group in groups]
    return max(found, key=order.index)


Build = Callable[[list[Tensor]], Optimizer]


def _probe_group(build: Build, cls: type[Optimizer]) -> Kind:
    _refuse_closure(cls)
    first, second = _problem()
    try:
        together = _train(build, [first, second])
        apart = _train(build, [first]) + _train(build, [second])
    except Exception as error:
        raise OptimizerError(
            f"The optimizer {cls.__name__} is not known, and trying it on small CPU tensors failed with "
            f"{type(error).__name__}: {error}. Without knowing whether it may be computed on shards it cannot be used. "
            "State it by an attribute of the class: shardline_kind = 'elementwise' (right on any piece of a "
            "parameter), 'per_parameter' or 'global'; or use an optimizer of torch.optim."
        ) from error
    if not _same(together, apart):
        return "global"
    try:
        flat = _train(build, [first.flat()])
        runs = _train(build, first.runs())
    except Exception:
        return "per_parameter"  # such as Muon, which takes matrices only
    whole = apart[0].flatten()
    return "elementwise" if _same([whole, whole], [flat[0], torch.cat(runs)]) else "per_parameter"


class _Case:
    """One parameter: where it starts, and its gradient at each step (stacked in front)."""

    def __init__(self, start: Tensor, grads: Tensor) -> None:
        self.start, self.grads = start, grads

    def flat(self) -> _Case:
        return _Case(self.start.flatten(), self.grads.flatten(1))

    def runs(self) -> list[_Case]:
        starts, grads = self.start.view(-1, RUN), self.grads.view(STEPS, -1, RUN)
        return [_Case(start, grads[:, i]) for i, start in enumerate(starts)]


def _problem() -> tuple[_Case, _Case]:
    generator = torch.Generator().manual_seed(0)

    def case() -> _Case:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        sizes = 10.0 ** normal(SHAPE[0], 1) * 10.0 ** normal(STEPS, 1, 1)
        return _Case(normal(*SHAPE), normal(STEPS, *SHAPE) * sizes)

    return case(), case()


def _train(build: Build, cases: Sequence[_Case]) -> list[Tensor]:
    """How far each parameter of one instance moved."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the accelerators too
        params = [case.start.clone().requires_grad_() for case in cases]
        optimizer = build(list(params))
        for step in range(STEPS):
            for param, case in zip(params, cases, strict=True):
                param.grad = case.grads[step].clone()
            optimizer.step()
    return [param.detach() - case.start for param, case in zip(params, cases, strict=True)]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Equal relative to the largest move, within what another order of summation does to fp64."""
    scale = max(float(a.abs().max()) for a in one)
    return all(bool(((a - b).abs() <= 1e-9 * scale).all()) for a, b in zip(one, other, strict=True))


def builder(cls: type[Optimizer], defaults: Mapping[str, Any], group: Mapping[str, Any]) -> Build:
    """Builds ``cls`` as the user did, with one param group: defaults that its constructor takes, and the options."""
    taken = inspect.signature(cls).parameters
    arguments = {key: _small(key, value) for key, value in defaults.items() if key in taken and key != "params"}
    # What a scheduler or the naming of parameters wrote into the group is not an option of the optimizer.
    options = {k: _small(k, v) for k, v in group.items() if k not in ("initial_lr", "param_names")}
    return lambda params: cls([{"params": params, **options}], **arguments)


def _small(name: str, value: Any) -> Any:
    """A hyperparameter for the probe: on the CPU, and with a rate that moves the weights at all."""
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if name == "lr" and isinstance(value, int | float):
        return max(value, 1e-2)  # a warm-up has set it to 0
    return False if name == "capturable" else value


def _refuse_closure(cls: type[Optimizer]) -> None:
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise OptimizerError(
            f"The optimizer {cls.__name__} cannot be used: its step needs a closure that computes the loss again, and "
            "engine.step() has none. Use another optimizer."
        )
