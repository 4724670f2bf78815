"""From a dict, a file or a Config to the resolved configuration for a world size."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from shardline.config import batch
from shardline.config.deepspeed import ALIASES, BY_TRAINER, CHECK_FILLED, TRAINERS
from shardline.config.limits import BYTES, check
from shardline.config.reading import Reading
from shardline.config.rules import broken
from shardline.config.schema import Config
from shardline.config.sentences import found
from shardline.config.text import parse
from shardline.errors import ConfigError, shown

__all__ = ["Source", "load_config"]

Source = Mapping[str, Any] | str | os.PathLike[str] | Config | None


def load_config(
    source: Source, world_size: int, *, batches: bool = True, changing: bool = False, filled_by: str | None = None
) -> Config:
    """The resolved configuration on ``world_size`` ranks: batch sizes computed, every ``"auto"`` settled.

    Args:
        source: a dict, the path of a JSON file, the same JSON in urlsafe base64, or a Config.
        world_size: number of ranks that share a global batch.
        batches: whether batches are made from it. Without, a batch size may be missing: a micro-batch then counts as
            one sample.
        changing: whether the job may go on with another number of ranks: the global batch stays the same then.
        filled_by: a trainer that fills in what is ``"auto"``: ``"transformers"``. Stand-ins take its place.

    Raises:
        ConfigError: the source cannot be read, or holds keys, values or combinations that cannot be used: all problems
            at once, one sentence each.
    """
    raw, where = _read(source)
    filled = _fill(raw, TRAINERS[filled_by]) if filled_by else []
    reading = Reading(Config, origin="file" if where else "given")
    config = Config.model_construct(**reading.values(Config, raw))
    for enabled, other in (("fp16", "bf16"), ("bf16", "fp16")):
        if getattr(config, enabled).enabled and reading.undecided.pop(f"{other}.enabled", None):
            reading.origins[f"{other}.enabled"] = f"auto: false, since {enabled} is on"
    update: dict[str, Any] = {}
    if reading.bad.isdisjoint({*batch.KEYS, "data_loader.uneven", "data_loader"}):
        reading.origins |= dict.fromkeys(filled, f"a stand-in for what {filled_by} fills in")
        try:
            train, micro, accumulation = (getattr(config, name) for name in batch.KEYS)
            if not batches and train is None and micro is None:
                micro = 1
                reading.origins[batch.MICRO] = "none given, and no training_data: a micro-batch counts as one sample"
            uneven = config.data_loader.uneven
            if changing and (batches or train is not None):
                given = uneven if batch.UNEVEN in reading.origins else None
                solved = batch.solve_changing(train, micro, accumulation, world_size, given)
                if batch.UNEVEN in solved.origins:
                    update["data_loader"] = config.data_loader.model_copy(update={"uneven": True})
            else:
                solved = batch.solve(train, micro, accumulation, world_size, uneven)
            update |= zip(batch.KEYS, (solved.train, solved.micro, solved.accumulation), strict=True)
            reading.origins |= solved.origins
        except batch.BatchError as error:
            auto = [name for name in batch.KEYS if reading.origins.get(name, "").startswith("auto")]
            if auto and train is None and micro is None:
                says = f'{" and ".join(auto)} {"is" if len(auto) == 1 else "are"} "auto"'
                reading.problem(auto[0], f"{says}, which {BY_TRAINER}; write numbers ({CHECK_FILLED}).")
            else:
                reading.problem(batch.KEYS[0], str(error))
    for sentence, paths in broken(config):
        if reading.bad.isdisjoint(paths):
            reading.problem(paths[0], sentence)
    reading.finish(where)
    config = config.model_copy(update=update)
    config._raw = raw
    config._origins = reading.origins
    config._no_effect = tuple(reading.no_effect)
    return config


def _read(source: Source) -> tuple[dict[str, Any], str]:
    """What the user wrote, and the name of the file it came from (empty for a value)."""
    if isinstance(source, Config):
        return deepcopy(source.raw), ""
    if isinstance(source, Mapping):
        check(source, "The configuration")
        return deepcopy(dict(source)), ""
    if isinstance(source, str | os.PathLike):
        path, name = Path(source), shown(source)
        if not os.path.exists(path) and (decoded := _base64(str(source))):
            return _object(decoded, "in base64"), "in base64"
        return _object(_text(path, name), name), name
    if source is None:
        raise ConfigError(
            "There is no configuration; pass config= to initialize, a dict or the path of a JSON file, such as "
            '{"train_batch_size": 16, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}.'
        )
    raise ConfigError(f"The configuration is a {type(source).__name__}; allowed is a dict, a path or a Config.")


def _text(path: Path, name: str) -> str:
    """The text in a file; of one that is too large, or has no end, no more is read than is needed to know that."""
    try:
        with path.open("rb") as file:
            content = file.read(BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(f"The configuration file {name} cannot be read: {reason} (in {Path.cwd()}).") from None
    if len(content) > BYTES:
        raise ConfigError(
            f"The configuration file {name} holds more than {BYTES} bytes; no configuration needs so many."
        )
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"The configuration file {name} is not text in UTF-8.") from None


def _fill(raw: dict[str, Any], stand_ins: Mapping[str, Any]) -> list[str]:
    """Write ``stand_ins`` into ``raw`` where it says "auto"; return the paths. A batch that is given stays."""
    given = raw.get(batch.TRAIN) not in (None, "auto")
    if raw.get(batch.MICRO) is None:
        raw[batch.MICRO] = "auto"  # a trainer has one in any case
    half = raw.get("fp16")
    fp16 = isinstance(half, Mapping) and half.get("enabled") is True
    filled = []
    for path, value in stand_ins.items():
        for written in (path, *(old + path.removeprefix(new) for old, new in ALIASES.items() if _is_at(path, new))):
            *parents, name = written.split(".")
            holder: Any = raw
            for parent in parents:
                holder = holder.get(parent) if isinstance(holder, dict) else None
            if isinstance(holder, dict) and holder.get(name) == "auto":
                computed = given and path in batch.KEYS
                holder[name] = None if computed else value and not fp16 if path == "bf16.enabled" else value
                filled += [] if computed else [path]
    return filled


def _is_at(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}.")


def _base64(source: str) -> str | None:
    """The JSON object that ``source`` encodes, None if it does not: DeepSpeed's launcher passes configurations so."""
    if len(source) > 2 * BYTES:
        return None
    try:
        text = base64.urlsafe_b64decode(source).decode()
    except (binascii.Error, ValueError):
        return None
    return text if text.lstrip().startswith("{") else None


def _object(text: str, where: str) -> dict[str, Any]:
    value = parse(text, f"The configuration {where}")
    if not isinstance(value, dict):
        raise ConfigError(f"The configuration {where} holds {found(value)}; allowed is one object {{...}}.")
    check(value, f"The configuration {where}")
    return value
