"""Constants of DeepSpeed that scripts read."""

from __future__ import annotations

from enum import Enum, IntEnum

from shardline.compat.deepspeed._version import VERSION
from shardline.runtime.process_group import DEFAULT_PORT, DEFAULT_TIMEOUT

__all__ = ["OffloadDeviceEnum", "OffloadStateTypeEnum", "ZeroStageEnum"]

ADAM_OPTIMIZER = "adam"
LAMB_OPTIMIZER = "lamb"
DEEPSPEED_ENVIRONMENT_NAME = ".deepspeed_env"
TORCH_DISTRIBUTED_DEFAULT_PORT = DEFAULT_PORT
default_pg_timeout = DEFAULT_TIMEOUT

__git_hash__ = __git_branch__ = git_hash = git_branch = "shardline"
__version_major__, __version_minor__, __version_patch__ = map(int, VERSION.split("."))


class OffloadDeviceEnum(str, Enum):  # noqa: UP042 (compared with plain strings, and formatted as its class is)
    """Where what is offloaded goes."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, Enum):  # noqa: UP042
    """What ``offload_states`` of DeepSpeed takes."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


class ZeroStageEnum(IntEnum):
    """The stages by name."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3
