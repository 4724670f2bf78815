"""Muon for the matrices of a model's blocks and AdamW for all else, in one optimizer.

Both halves are torch's own classes. The option ``use_muon`` of a param group says which half steps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Adam, Muon, Optimizer
from torch.optim.optimizer import ParamsT

from shardline.errors import ConfigError
from shardline.optim.closure import evaluate
from shardline.plan.describe import blocks, first_names, is_below

__all__ = ["MuonAdamW", "split_groups"]


class MuonAdamW(Optimizer):
    """``torch.optim.Muon`` for the param groups whose ``use_muon`` is true, ``torch.optim.AdamW`` for the others.

    Names and defaults are DeepSpeed's where it has them, else torch's. ``lr`` is that of both halves, ``muon_lr`` and
    ``adam_lr`` go before it; a group's own options go before all three. A group that does not say ``use_muon`` is
    AdamW's. Options of one half alone (``momentum``, ``betas``) are not taken over into a group of the other.

    State: ``momentum_buffer`` shaped and typed as the gradient, for matrices; for the others that of AdamW.

    Raises:
        ConfigError: for a parameter in a group of Muon that is not a matrix.
        ValueError: for hyperparameters out of range, as torch's classes do.
    """

    # A matrix is orthogonalized as a whole.
    shardline_kind = "per_parameter"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        *,
        muon_lr: float | Tensor | None = None,
        adam_lr: float | Tensor | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        adam_w_mode: bool = True,
        fused: bool | None = None,
    ) -> None:
        def rate(own: float | Tensor | None, default: float) -> float | Tensor:
            return next((each for each in (own, lr) if each is not None), default)

        # They check what they are given, hold the defaults of their half, and name its options.
        muon = Muon(
            _nothing(),
            lr=rate(muon_lr, 0.02),  # type: ignore[arg-type]
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        adam = Adam(
            _nothing(),
            lr=rate(adam_lr, 3e-4),
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=fused,
            decoupled_weight_decay=adam_w_mode,
        )
        self._options = {True: muon.defaults, False: adam.defaults}
        super().__init__(params, {"use_muon": False})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    @cached_property
    def _halves(self) -> tuple[tuple[bool, Optimizer], ...]:
        # Made when needed: a copy of an optimizer does not hold them.
        return (True, Muon(_nothing())), (False, Adam(_nothing()))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``muon_lr`` and ``adam_lr`` in it go before its ``lr``.

        Raises:
            ConfigError: for a parameter in a group of Muon that is not a matrix.
        """
        use_muon = bool(param_group.get("use_muon", False))
        mine, others = self._options[use_muon], self._options[not use_muon]
        own, other = ("muon_lr", "adam_lr") if use_muon else ("adam_lr", "muon_lr")
        given = {key: value for key, value in param_group.items() if key in mine or key not in others}
        if use_muon:
            given.pop("eps", None)  # Adam's; Muon's of this name is another
        given.pop(other, None)
        if own in given:
            given["lr"] = given.pop(own)
        super().add_param_group({**mine, **given, "use_muon": use_muon})
        added = self.param_groups[-1]
        wrong = next((param for param in added["params"] if use_muon and param.ndim != 2), None)
        if wrong is not None:
            self.param_groups.pop()
            raise ConfigError(
                f"a param group with use_muon holds a parameter of shape {tuple(wrong.shape)}, and Muon takes matrices "
                f"only. Leave it to AdamW: a group, or a parameter, with use_muon = False."
            )

    def drop_foreign_state(self) -> None:
        """Forget the state of parameters that were in the other half when it was made: it starts empty."""
        for group in self.param_groups:
            for param in group["params"]:
                if self.state.get(param) and ("momentum_buffer" in self.state[param]) != group["use_muon"]:
                    del self.state[param]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = evaluate(closure)
        for use_muon, half in self._halves:  # each time: groups and state are replaced from outside
            half.state = self.state
            half.param_groups = [group for group in self.param_groups if group["use_muon"] == use_muon]
            half.step()
        return loss


def _nothing() -> list[dict[str, Any]]:
    return [{"params": []}]


def split_groups(model: nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of ``groups`` as two: its matrices for Muon, then the rest for AdamW. An empty half is left out.

    For Muon are the matrices (2-D parameters) inside ``model``'s repeated blocks, embeddings excepted; in a model
    without blocks, all matrices but embeddings. An attribute ``use_muon`` of a parameter goes before that, and a group
    that says ``use_muon`` itself is left as it is.

    Raises:
        ConfigError: if nothing is left for Muon, or if a parameter is meant for it that is not a matrix.
    """
    chosen = _matrices(model)
    names = {param: aliases[0] for param, aliases in first_names(model).items()}

    def takes(param: Tensor) -> bool:
        told = getattr(param, "use_muon", None)
        return param in chosen if told is None else bool(told)

    found: list[dict[str, Any]] = []
    for group in groups:
        for use_muon in (True, False):
            half = [param for param in group["params"] if group.get("use_muon", takes(param)) == use_muon]
            if half:
                found.append({**group, "params": half, "use_muon": use_muon})
    meant = [param for group in found if group["use_muon"] for param in group["params"]]
    for param in meant:
        if not is_lazy(param) and param.ndim != 2:
            raise ConfigError(
                f"parameter {names.get(param, '')!r} has use_muon = True and the shape {tuple(param.shape)}, and Muon "
                f"takes matrices only. Set its use_muon to False, and AdamW steps it."
            )
    if not meant:
        raise ConfigError(
            f'optimizer.type is "Muon", and nothing that is trained is a matrix in a repeated block of '
            f"{type(model).__name__}. Set param.use_muon = True on the matrices that Muon is to step before "
            f'initialize, or use "AdamW".'
        )
    return found


def _matrices(model: nn.Module) -> set[Tensor]:
    """The parameters that Muon steps unless the user chooses otherwise."""
    roots = blocks(model) or [""]
    inside = {path for path, _ in model.named_modules() if any(path == root or is_below(path, root) for root in roots)}
    matrices: set[Tensor] = set()
    others: set[Tensor] = set()  # a tie with one of these counts as one
    for path, module in model.named_modules():
        for param in module._parameters.values():
            if param is not None:
                hidden = path in inside and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
                (matrices if hidden and not is_lazy(param) and param.ndim == 2 else others).add(param)
    return matrices - others
