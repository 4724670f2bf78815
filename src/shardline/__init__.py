"""Shardline: one call from a PyTorch model to sharded, mixed-precision, distributed training.

Names are imported when they are first used, so that ``import shardline`` costs nothing and touches no device.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shardline._version import __version__

if TYPE_CHECKING:
    from shardline.config import Config
    from shardline.config.arguments import add_config_arguments
    from shardline.engine import Engine
    from shardline.engine.ema import EMA
    from shardline.engine.in_place import shard
    from shardline.engine.initialize import initialize
    from shardline.engine.weights import gathered_parameters
    from shardline.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DisagreementError,
        LaunchError,
        LostRankError,
        ModelError,
        NonFiniteError,
        OptimizerError,
        SealedError,
        ShardlineError,
        UsageError,
    )
    from shardline.features.meta import empty_weights
    from shardline.features.sharded import sharded_weights
    from shardline.runtime.accelerator import get_accelerator
    from shardline.runtime.process_group import init_distributed

__all__ = [
    "EMA",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "DisagreementError",
    "Engine",
    "LaunchError",
    "LostRankError",
    "ModelError",
    "NonFiniteError",
    "OptimizerError",
    "SealedError",
    "ShardlineError",
    "UsageError",
    "__version__",
    "add_config_arguments",
    "empty_weights",
    "gathered_parameters",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "shard",
    "sharded_weights",
]

_HOMES = {
    "EMA": "engine.ema",
    "CheckpointError": "errors",
    "Config": "config",
    "ConfigError": "errors",
    "DataError": "errors",
    "DisagreementError": "errors",
    "Engine": "engine",
    "LaunchError": "errors",
    "LostRankError": "errors",
    "ModelError": "errors",
    "NonFiniteError": "errors",
    "OptimizerError": "errors",
    "SealedError": "errors",
    "ShardlineError": "errors",
    "UsageError": "errors",
    "add_config_arguments": "config.arguments",
    "empty_weights": "features.meta",
    "gathered_parameters": "engine.weights",
    "get_accelerator": "runtime.accelerator",
    "init_distributed": "runtime.process_group",
    "initialize": "engine.initialize",
    "shard": "engine.in_place",
    "sharded_weights": "features.sharded",
}


_ROOMS = {"checkpoint"}
"""Public modules, of which ``import shardline`` is enough."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
