"""Optimizers: built by name, taken over from a user, and judged by what they may be computed on.

How a step is skipped when a gradient is not finite, and how gradients are unscaled, depends on the optimizer:

* `takes_grad_scale` is true: after `prepare`, the engine sets ``optimizer.grad_scale`` and ``optimizer.found_inf``
  (0-dim fp32 tensors on the parameters' device) and calls ``step()``. Gradients are divided by ``grad_scale``; with
  ``found_inf == 1`` nothing changes, step counters included. No host synchronisation.
* it is false: torch's other optimizers ignore both attributes or raise on them. The engine divides the gradients itself
  and calls ``step()`` only after it has read on the host that they are finite.
"""

from shardline.optim.amp import placed, prepare, takes_grad_scale
from shardline.optim.kinds import Kind, kind
from shardline.optim.lamb import Lamb
from shardline.optim.lion import Lion
from shardline.optim.muon import MuonAdamW
from shardline.optim.registry import arrange, build
from shardline.optim.takeover import replace_params

__all__ = [
    "Kind",
    "Lamb",
    "Lion",
    "MuonAdamW",
    "arrange",
    "build",
    "kind",
    "placed",
    "prepare",
    "replace_params",
    "takes_grad_scale",
]
