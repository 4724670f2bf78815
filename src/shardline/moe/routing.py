"""Which experts each token goes to, and what does not fit: GShard's gating (arXiv 2006.16668), Switch's for one.

An expert takes at most ``capacity`` tokens, so that the shapes of all work are known beforehand: no wait for a device,
and on every rank each expert runs in each forward, whatever was chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Routing", "capacity_of", "gumbel", "route"]


@dataclass(frozen=True)
class Routing:
    """Where tokens go.

    Attributes:
        expert: the experts of each token, best first; (tokens, k), int64.
        slot: their places there, below ``capacity`` where they are kept; (tokens, k), int64.
        weight: what the outputs count for, 0 where a token is dropped; (tokens, k), fp32, with a gradient.
        capacity: places of each expert.
        counts: tokens that chose each expert, dropped ones included; (experts,), int64.
        loss: smallest where all experts get the same share; 0-dim, fp32, with a gradient.
    """

    expert: Tensor
    slot: Tensor
    weight: Tensor
    capacity: int
    counts: Tensor
    loss: Tensor

    def dispatch(self, tokens: Tensor) -> Tensor:
        """``tokens`` (tokens, width) by expert and place: (experts, capacity, width), with zeros in empty places."""
        places, width = self.counts.numel() * self.capacity, tokens.shape[-1]
        given = tokens.unsqueeze(1).expand(*self.expert.shape, width).reshape(-1, width)
        filled = tokens.new_zeros(places + 1, width).index_copy(0, self._places().reshape(-1), given)
        return filled[:places].view(-1, self.capacity, width)

    def combine(self, outputs: Tensor) -> Tensor:
        """The weighted sum over each token's experts of ``outputs`` (experts, capacity, width): (tokens, width)."""
        flat = outputs.flatten(0, 1)
        flat = torch.cat([flat, flat.new_zeros(1, flat.shape[-1])])  # a dropped token gets nothing
        taken = flat.index_select(0, self._places().reshape(-1)).view(*self.expert.shape, -1)
        return (taken * self.weight.to(flat.dtype).unsqueeze(-1)).sum(1)

    def _places(self) -> Tensor:
        """The place of each choice in all experts' places, one after the other; the one beyond them where dropped."""
        place = self.expert * self.capacity + self.slot
        return torch.where(self.slot < self.capacity, place, self.counts.numel() * self.capacity)


def capacity_of(tokens: int, experts: int, factor: float, minimum: int) -> int:
    """Places of an expert: ``factor`` times its even share of ``tokens``, at least ``minimum``, at most all of them."""
    return min(max(math.ceil(tokens / experts * factor), minimum), tokens)


def gumbel(like: Tensor) -> Tensor:
    """Gumbel noise; the largest of logits plus noise is a draw from their softmax."""
    limits = torch.finfo(like.dtype)
    uniform = torch.rand_like(like) * (1 - limits.eps - limits.tiny) + limits.tiny
    return -(-uniform.log()).log()


def route(
    logits: Tensor,
    k: int,
    *,
    factor: float,
    minimum: int = 0,
    drop: bool = True,
    used: Tensor | None = None,
    sample: bool = False,
    random_drop: bool = False,
) -> Routing:
    """The best ``k`` (1 or 2) experts of each token.

    With one expert its weight is its probability. With two, their weights are their probabilities over the sum of
    those that are kept, and first choices are placed before second ones.

    Args:
        logits: (tokens, experts), fp32.
        factor: of the capacity, for each of the ``k`` choices.
        minimum: the least capacity.
        drop: without, the capacity is what the fullest expert needs; reading that waits for the device.
        used: (tokens,), false for padding, which goes nowhere.
        sample: draw the last of the ``k`` choices from its probabilities instead of taking the largest.
        random_drop: where an expert is full, drop tokens at random instead of the last ones. For ``k`` = 1.
    """
    tokens, experts = logits.shape
    gates = logits.softmax(1)
    first = (logits + gumbel(logits) if sample and k == 1 else gates).argmax(1)
    chosen = [first]
    if k == 2:
        rest = logits + gumbel(logits) if sample else logits
        chosen.append(rest.scatter(1, first.unsqueeze(1), -torch.inf).argmax(1))
    masks = [F.one_hot(each, experts) for each in chosen]
    if used is not None:
        masks = [mask * used.to(mask.dtype).reshape(-1, 1) for mask in masks]
    counts = torch.stack(masks).sum((0, 1))
    loss = (gates.mean(0) * masks[0].to(gates.dtype).mean(0)).sum() * experts
    capacity = capacity_of(tokens, experts, factor * k, minimum) if drop else max(int(counts.max()), 1)
    expert = torch.stack(chosen, 1)
    slot = _slots(masks, capacity, random_drop=random_drop and drop and k == 1)
    weight = gates.gather(1, expert) * (slot < capacity)
    if k == 2:
        weight = weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).eps)
    return Routing(expert, slot, weight, capacity, counts, loss)


def _slots(masks: list[Tensor], capacity: int, *, random_drop: bool) -> Tensor:
    """Places of each token's choices (tokens, k), ``capacity`` or more for what does not fit."""
    if random_drop:
        chosen = (masks[0] * torch.rand_like(masks[0], dtype=torch.float32)).topk(capacity, 0).indices
        masks = [masks[0] * torch.zeros_like(masks[0]).scatter(0, chosen, 1)]
    found, before = [], torch.zeros_like(masks[0][0])
    for mask in masks:
        place = ((mask.cumsum(0) - 1 + before) * mask).sum(1)
        found.append(torch.where(mask.any(1), place, capacity))
        before = before + mask.sum(0)
    return torch.stack(found, 1)
