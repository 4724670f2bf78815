"""Combinations of keys that cannot work, although each key alone can."""

from __future__ import annotations

from collections.abc import Iterator

from shardline.config.params import SCHEDULERS, known
from shardline.config.schema import Config

__all__ = ["broken"]


def broken(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Each rule that ``config`` breaks: the sentence, and the paths it is about."""
    modes = [name for name in ("fp16", "bf16", "torch_autocast") if getattr(config, name).enabled]
    switches = [f"{mode}.enabled" for mode in modes]
    if len(modes) > 1:
        allowed = "one of fp16, bf16 (parameters in that dtype, fp32 masters) and torch_autocast (fp32 parameters)"
        yield f"{' and '.join(switches)} are true; allowed is {allowed}.", switches

    if config.torch_autocast.enabled and config.torch_autocast.dtype == "fp32":
        yield 'torch_autocast.dtype is "fp32"; allowed is "bf16" or "fp16".', ["torch_autocast.dtype"]

    accumulation = config.data_types.grad_accum_dtype
    dtypes = ["fp32", *(mode for mode in modes if mode in ("fp16", "bf16"))]
    if accumulation is not None and accumulation not in dtypes:
        yield (
            f'data_types.grad_accum_dtype is "{accumulation}"; allowed is {" or ".join(dtypes)}, since gradients are '
            f"{dtypes[-1]}.",
            ["data_types.grad_accum_dtype", "fp16.enabled", "bf16.enabled"],
        )

    zero = config.zero_optimization
    if zero.unit_min_numel > zero.unit_max_numel:
        low, high = "zero_optimization.unit_min_numel", "zero_optimization.unit_max_numel"
        yield f"{low} {zero.unit_min_numel} is above {high} {zero.unit_max_numel}; lower it.", [low, high]

    fp16 = config.fp16
    if fp16.enabled and not fp16.loss_scale and fp16.min_loss_scale > 2.0**fp16.initial_scale_power:
        first = f"2^{fp16.initial_scale_power} = {2**fp16.initial_scale_power}"
        yield (
            f"fp16.min_loss_scale {fp16.min_loss_scale:g} is above the first scale {first}; lower it.",
            ["fp16.min_loss_scale", "fp16.initial_scale_power"],
        )

    loader = config.data_loader
    for name in ("prefetch_factor", "persistent_workers"):
        if getattr(loader, name) and not loader.num_workers:
            paths = [f"data_loader.{name}", "data_loader.num_workers"]
            yield f"{paths[0]} needs workers, and {paths[1]} is 0; set it to 1 or more.", paths

    for name in ("every_steps", "keep", "async_save", "resume", "save_on_sigterm"):
        if getattr(config.checkpoint, name) and not config.checkpoint.dir:
            paths = [f"checkpoint.{name}", "checkpoint.dir"]
            yield f"{paths[0]} needs {paths[1]}, a directory that every rank sees.", paths

    yield from _falling(config)


_RISES = {
    "WarmupLR": [("warmup_min_lr", "warmup_max_lr")],
    "WarmupDecayLR": [("warmup_min_lr", "warmup_max_lr")],
    "OneCycle": [("cycle_min_lr", "cycle_max_lr"), ("cycle_min_mom", "cycle_max_mom")],
}


def _falling(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Schedules whose parameters make a rise fall. Values that are left out are checked by the class."""
    if config.scheduler is None:
        return
    params = config.scheduler.params
    model = known(SCHEDULERS, getattr(config.scheduler, "type", None))  # a wrong one is left out
    for low, high in next((pairs for name, pairs in _RISES.items() if SCHEDULERS[name] is model), ()):
        lows, highs = (_groups(params.get(name)) for name in (low, high))
        size = max(len(lows), len(highs)) if lows and highs else 0
        lows, highs = (values * size if len(values) == 1 else values for values in (lows, highs))
        for below, above in zip(lows, highs, strict=False):  # the class compares the lengths with the groups
            if below > above:
                paths = [f"scheduler.params.{name}" for name in (low, high)]
                yield f"{paths[0]} {below:g} is above {paths[1]} {above:g}; lower it.", paths
                break


def _groups(value: object) -> tuple[float, ...]:
    """One value for all groups, or one for each; empty where it is left out."""
    if isinstance(value, int | float):
        return (value,)
    return value if isinstance(value, tuple) else ()
