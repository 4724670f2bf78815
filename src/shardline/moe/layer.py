"""A layer of experts, whole on every rank as far as the stage says so: it is sharded as any other module."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardline.errors import ModelError
from shardline.moe.routing import Routing, route

__all__ = ["Gate", "MoE"]

_JITTER = 1e-2


class Gate(nn.Module):
    """Chooses experts by a linear layer, in fp32. The arguments are those of :class:`MoE`."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        super().__init__()
        self.wg = nn.Linear(hidden_size, num_experts, bias=False)
        self.k = k
        self._factors = {True: capacity_factor, False: eval_capacity_factor}
        self._min_capacity, self._drop, self._random_drop = min_capacity, drop_tokens, use_rts
        self._noise, self._sample_second = noisy_gate_policy, top2_2nd_expert_sampling

    def forward(self, tokens: Tensor, used: Tensor | None = None) -> Routing:
        """The experts of ``tokens`` (tokens, width); random numbers are drawn in training only."""
        tokens = tokens.float()
        if self.training and self._noise == "Jitter":
            tokens = tokens * (1 - _JITTER + 2 * _JITTER * torch.rand_like(tokens))
        return route(
            F.linear(tokens, self.wg.weight.float()),
            self.k,
            factor=self._factors[self.training],
            minimum=self._min_capacity,
            drop=self._drop,
            used=used,
            sample=self.training and (self._noise == "RSample" if self.k == 1 else self._sample_second),
            random_drop=self.training and self._random_drop,
        )


class MoE(nn.Module):
    """Copies of ``expert``, of which each token passes through the best ``k``.

    It is trained as any other module, at every stage: experts are sharded over all ranks, and each rank routes its own
    tokens. Every expert runs in every forward, so ranks that route differently issue the same collectives.

    Args:
        hidden_size: width of a token.
        expert: maps (capacity, width) to the same; of several results the first counts. It is copied ``num_experts``
            times, and the copies start equal.
        num_experts: how many there are.
        ep_size: over how many ranks experts are spread; 1.
        k: experts of each token, 1 or 2.
        capacity_factor: an expert takes ``k * capacity_factor * tokens / num_experts`` tokens of a rank, rounded up.
        eval_capacity_factor: the same in evaluation.
        min_capacity: but at least so many.
        use_residual: add ``expert`` itself for all tokens, the two weighted by a learned coefficient.
        noisy_gate_policy: in training, ``"Jitter"`` (inputs of the gate times 0.99 to 1.01) or ``"RSample"`` (the
            expert of ``k`` = 1 is drawn from its probabilities).
        drop_tokens: without, experts take all that is sent to them; the device is waited for in each forward.
        use_rts: with ``k`` = 1, what does not fit is chosen at random, in training; otherwise the last tokens.
        top2_2nd_expert_sampling: with ``k`` = 2, the second expert is drawn from its probabilities, in training.

    Raises:
        ModelError: for a combination that is not offered.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        super().__init__()
        _check(num_experts, ep_size, k, noisy_gate_policy)
        self.num_experts = num_experts
        self.gate = Gate(
            hidden_size, num_experts, k, capacity_factor, eval_capacity_factor, min_capacity, noisy_gate_policy,
            drop_tokens, use_rts, top2_2nd_expert_sampling,
        )  # fmt: skip
        self.experts = nn.ModuleList(deepcopy(expert) for _ in range(num_experts))
        self.mlp = expert if use_residual else None
        self.coefficient = nn.Linear(hidden_size, 2) if use_residual else None

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Pass tokens through their experts.

        Args:
            hidden_states: (..., ``hidden_size``).
            used_token: one value for each token, false for padding, which passes through no expert.

        Returns:
            the output, of the shape of ``hidden_states``; the load-balancing loss (0-dim, fp32), to be added to the
            model's with a small weight; and how many tokens chose each expert (``num_experts``,), int64.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing: Routing = self.gate(tokens, used_token)
        given = routing.dispatch(tokens)
        taken = [_first(expert(each)) for expert, each in zip(self.experts, given.unbind(), strict=True)]
        output = routing.combine(torch.stack(taken)).reshape(hidden_states.shape)
        if self.mlp is not None and self.coefficient is not None:
            share = self.coefficient(hidden_states).softmax(-1)
            output = output * share[..., :1] + _first(self.mlp(hidden_states)) * share[..., 1:]
        return output, routing.loss, routing.counts


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _check(num_experts: int, ep_size: int, k: int, noisy_gate_policy: str | None) -> None:
    if ep_size != 1:
        raise ModelError(
            f"MoE was given ep_size={ep_size}. Groups of ranks for experts are not offered yet: leave ep_size at 1; "
            f"stage 3 shards the experts over all ranks, as it does all weights."
        )
    if k not in (1, 2):
        raise ModelError(f"MoE was given k={k}. A token passes through 1 or 2 experts here.")
    if num_experts < k:
        raise ModelError(f"MoE was given num_experts={num_experts}, and each token passes through {k}.")
    if noisy_gate_policy not in (None, "None", "Jitter", "RSample"):
        raise ModelError(f'MoE was given noisy_gate_policy={noisy_gate_policy!r}; it is None, "Jitter" or "RSample".')
