"""Whether an optimizer can step from a given state: it is tried on a small parameter, before the state is believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from shardline.optim.kinds import builder
from shardline.optim.muon import MuonAdamW

__all__ = ["step_from"]


def step_from(
    optimizer: Optimizer, options: Mapping[str, Any], shape: Sequence[int], state: Mapping[str, Any]
) -> Exception | None:
    """What a step of a new instance raises that finds ``state``; None where it steps, or does not even without it.

    Args:
        optimizer: whose class and defaults are tried; nothing of it changes.
        options: of its param group.
        shape: of the parameter, which is on the CPU, in fp32.
        state: of the parameter, on the CPU; it is used up.
    """
    build = builder(type(optimizer), optimizer.defaults, {k: v for k, v in options.items() if k != "params"})

    def step(state: dict[str, Any]) -> Exception | None:
        param = torch.zeros(tuple(shape), dtype=torch.float32, device="cpu", requires_grad=True)
        param.grad = torch.ones_like(param)
        try:
            with torch.random.fork_rng(devices=[]):
                tried = build([param])
                if state:
                    tried.state[param] = state
                if isinstance(tried, MuonAdamW):
                    tried.drop_foreign_state()  # as a load does
                tried.step()
        except Exception as error:
            return error
        return None

    return step(dict(state)) if step({}) is None else None
