"""Combinations of keys that cannot work, although each key alone can."""

from __future__ import annotations

from collections.abc import Iterator

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

    for name in ("every_steps", "resume", "save_on_sigterm"):
        if getattr(config.checkpoint, name) and not config.checkpoint.dir:
            paths = [f"checkpoint.{name}", "checkpoint.dir"]
            yield f"{paths[0]} needs {paths[1]}, a directory that every rank sees.", paths
