"""A user's optimizer goes on as the same object over other tensors, so that whatever holds it goes on working."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from shardline.errors import OptimizerError

__all__ = ["replace_params"]

State = Mapping[Tensor, Mapping[str, Any]]


def replace_params(
    optimizer: Optimizer, groups: Sequence[Sequence[Tensor]], carry: Callable[[State], State] | None = None
) -> None:
    """Put ``groups[i]`` in place of the tensors of param group i. The group dicts stay, with all their options.

    ``carry`` maps the state of an optimizer that has stepped (old parameter to its entries) to that of the new tensors;
    it gets the whole, because one new tensor may hold pieces of many old ones. Raises `OptimizerError` if there is
    state and no ``carry``, or if the optimizer keeps its parameters in an attribute of its own as well: it would go on
    updating the old ones. Call `prepare` afterwards.
    """
    name = type(optimizer).__name__
    # Adagrad makes its state when it is built and would make the same again; before the first step it holds nothing.
    state = {param: entries for param, entries in optimizer.state.items() if entries and entries.get("step") != 0}
    if state and carry is None:
        raise OptimizerError(
            f"The optimizer {name} already holds state for {len(state)} parameters, from steps before initialize or a "
            "loaded state_dict, and that state cannot be carried over. Pass an optimizer that has not stepped yet, and "
            "load a checkpoint through the engine."
        )
    old = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for attribute, value in vars(optimizer).items():
        if attribute not in ("param_groups", "state") and any(id(one) in old for one in _tensors(value)):
            raise OptimizerError(
                f"The optimizer {name} keeps its parameters in its attribute {attribute!r} as well as in param_groups, "
                "so they cannot be replaced by shards. Use an optimizer that reads param_groups only."
            )
    moved = carry(state) if carry is not None else {}
    for group, tensors in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = list(tensors)
        group.pop("param_names", None)  # they named the old parameters, one by one
    optimizer.state.clear()
    optimizer.state.update({param: dict(entries) for param, entries in moved.items()})


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    return [one for one in value if isinstance(one, Tensor)] if isinstance(value, list | tuple | set) else []
