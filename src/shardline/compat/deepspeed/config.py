"""A configuration as DeepSpeed reads it, as one that Shardline reads: its defaults, its leniency."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from shardline.config import Config
from shardline.config.catalogue import catalogue
from shardline.config.deepspeed import is_comment
from shardline.config.text import parse
from shardline.errors import ConfigError

__all__ = ["Source", "read", "translate"]

Source = Mapping[str, Any] | str | os.PathLike[str]

DEFAULTS: dict[str, Any] = {
    "gradient_clipping": 1.0,
    "data_loader.weighting": "none",  # a batch counts as one, however many samples it holds
    "fp16.enabled": False,
    "bf16.enabled": False,
}
"""Where DeepSpeed's default, or its meaning of "auto", is not Shardline's."""


def read(source: Source | None) -> dict[str, Any]:
    """What the user wrote: a dict, a file of JSON with comments, or the same in urlsafe base64.

    Raises:
        ConfigError: there is none, or it is not a JSON object.
    """
    if isinstance(source, Mapping):
        return deepcopy(dict(source))
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"deepspeed.initialize was given a configuration of type {type(source).__name__}. Give config= a dict or "
            f"the path of a JSON file, or the script the option --deepspeed_config FILE."
        )
    path = Path(source)
    if os.path.exists(path):
        value = parse(path.read_text(encoding="utf-8"), f"The configuration {path}")
    else:
        try:
            value = parse(base64.urlsafe_b64decode(str(source)).decode(), "The configuration in base64")
        except (binascii.Error, ValueError):
            raise ConfigError(f"There is no configuration file {path} (in {Path.cwd()}).") from None
    if not isinstance(value, dict):
        raise ConfigError(f"The configuration {path} holds a {type(value).__name__}; allowed is one object {{...}}.")
    return value


def translate(raw: Mapping[str, Any], *, on_accelerator: bool) -> tuple[dict[str, Any], list[str]]:
    """``raw`` with DeepSpeed's defaults and spellings, and what there is to say about it.

    Unknown keys at the top level are dropped, as DeepSpeed does; what else Shardline does not know stays, so that its
    own reader refuses it.
    """
    config, notices = deepcopy(dict(raw)), []
    unknown = sorted(str(name) for name in config if not _is_known(name))
    if unknown:
        for name in unknown:
            del config[name]
        notices.append(f"unknown keys of the configuration, which DeepSpeed ignores as well: {', '.join(unknown)}")
    if isinstance(config.get("zero_optimization"), bool):  # DeepSpeed's oldest spelling of stage 1
        config["zero_optimization"] = {"stage": int(config["zero_optimization"])}
    for section in ("fp16", "bf16", "bfloat16"):
        if isinstance(config.get(section), bool):
            config[section] = {"enabled": config[section]}
    _make_boolean(config)
    for path, value in DEFAULTS.items():
        *parents, name = path.split(".")
        holder: Any = config
        for parent in parents:
            holder = holder.setdefault(parent, {}) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and holder.get(name) in (None, "auto"):
            holder[name] = value
    if config.get("bfloat16") is not None:  # the older name of the section
        config.pop("bf16", None)
        if isinstance(config["bfloat16"], dict) and config["bfloat16"].get("enabled") in (None, "auto"):
            config["bfloat16"]["enabled"] = False
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    offload = zero.get("offload_param")
    if on_accelerator and isinstance(offload, Mapping) and offload.get("device") == "cpu":
        del zero["offload_param"]
        notices.append(OFFLOAD_PARAM)
    return config, notices


OFFLOAD_PARAM = "offload_param"
"""Stands for a notice that needs the model: how many bytes stay on the device."""


def _is_known(name: object) -> bool:
    return is_comment(name) or name == "$schema" or str(name) in _top_level()


def _top_level() -> set[str]:
    return {path.partition(".")[0] for path in catalogue(Config)}


def _make_boolean(tree: dict[str, Any], path: str = "") -> None:
    """0 and 1 where the key is a boolean, as DeepSpeed takes them."""
    keys = catalogue(Config)
    for name, value in tree.items():
        at = f"{path}.{name}" if path else str(name)
        if isinstance(value, dict):
            _make_boolean(value, at)
        elif type(value) is int and value in (0, 1) and at in keys and keys[at].schema == {"type": "boolean"}:
            tree[name] = bool(value)
