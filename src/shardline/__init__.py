"""Shardline: one call from a PyTorch model to sharded, mixed-precision, distributed training.

Names are imported when they are first used, so that ``import shardline`` costs nothing and touches no device.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardline.accelerator import get_accelerator
    from shardline.arguments import add_config_arguments
    from shardline.config import Config
    from shardline.engine import Engine
    from shardline.errors import ShardlineError
    from shardline.start import initialize
    from shardline.topology import init_distributed

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Engine",
    "ShardlineError",
    "__version__",
    "add_config_arguments",
    "get_accelerator",
    "init_distributed",
    "initialize",
]

_HOMES = {
    "Config": "config",
    "Engine": "engine",
    "ShardlineError": "errors",
    "add_config_arguments": "arguments",
    "get_accelerator": "accelerator",
    "init_distributed": "topology",
    "initialize": "start",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
