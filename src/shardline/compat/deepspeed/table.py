"""Which name of DeepSpeed, in which of its modules, is which of ours.

A value is ``module:attribute``; the attribute is left out where it has the same name. A module without a dot is a file
of this folder, one with dots is imported as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from shardline.compat.deepspeed import refusals

__all__ = ["ALIASES", "FILES", "NAMES", "SCHEDULE_OPTIONS", "is_module", "resolve", "submodules"]

PACKAGE = "shardline.compat.deepspeed"

FILES = ("accelerator", "checkpointing", "comm", "constants", "zero")
"""Modules of DeepSpeed that are files here."""

_ZERO = dict.fromkeys(
    (
        "Init",
        "GatheredParameters",
        "register_external_parameter",
        "ZeroParamStatus",
    ),
    "zero",
)
_LEAVES = dict.fromkeys(
    (
        "get_z3_leaf_modules",
        "set_z3_leaf_module",
        "set_z3_leaf_modules",
        "set_z3_leaf_modules_by_name",
        "set_z3_leaf_modules_by_suffix",
        "unset_z3_leaf_modules",
        "z3_leaf_module",
        "z3_leaf_parameter",
    ),
    "leaves",
)
_LOGGING = dict.fromkeys(
    (
        "log_dist",
        "logger",
        "print_rank_0",
        "warning_once",
    ),
    "logging",
)
_FRAGMENTS = {
    f"safe_{verb}_{extent}_{what}": "fragments"
    for verb in ("get", "set")
    for extent in ("full", "local")
    for what in ("fp32_param", "grad", "optimizer_state")
}
_TO_FP32 = dict.fromkeys(
    (
        "convert_zero_checkpoint_to_fp32_state_dict",
        "get_fp32_state_dict_from_zero_checkpoint",
        "load_state_dict_from_zero_checkpoint",
    ),
    "zero_to_fp32",
)
SCHEDULE_OPTIONS = (
    "lr_range_test_min_lr", "lr_range_test_step_rate", "lr_range_test_step_size", "lr_range_test_staircase",
    "cycle_first_step_size", "cycle_first_stair_count", "cycle_second_step_size", "cycle_second_stair_count",
    "decay_step_size", "cycle_min_lr", "cycle_max_lr", "decay_lr_rate", "cycle_min_mom", "cycle_max_mom",
    "decay_mom_rate", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "warmup_min_ratio",
    "cos_min_ratio", "total_num_steps",
)  # fmt: skip
"""Options of schedules; each is also a constant of its name in capitals."""
_SCHEDULES = dict.fromkeys(
    (
        "LRRangeTest",
        "OneCycle",
        "WarmupLR",
        "WarmupDecayLR",
        "WarmupCosineLR",
    ),
    "schedules",
)
_CONSTANTS = dict.fromkeys(
    (
        *(name.upper() for name in SCHEDULE_OPTIONS),
        "LR_RANGE_TEST",
        "ONE_CYCLE",
        "WARMUP_COSINE_LR",
        "WARMUP_DECAY_LR",
        "WARMUP_LINEAR_RATE",
        "WARMUP_LOG_RATE",
        "WARMUP_LR",
        "get_lr_from_config",
    ),
    "schedules",
)
_GROUPS = dict.fromkeys(
    (
        "_get_data_parallel_group",
        "_get_data_parallel_rank",
        "_get_data_parallel_world_size",
        "_get_model_parallel_world_size",
        "initialize",
    ),
    "groups",
)
_EXPERTS = dict.fromkeys(
    (
        "configure_moe_param_groups",
        "has_moe_layers",
        "is_moe_param",
        "is_moe_param_group",
        "split_params_into_different_moe_groups_for_optimizer",
        "split_params_into_shared_and_expert_params",
    ),
    "experts",
)
_OPTIMIZER = {"DeepSpeedOptimizer": "optimizer"}
_ENGINE = {"DeepSpeedEngine": "engine", "DeepSpeedOptimizerCallable": "engine", "DeepSpeedSchedulerCallable": "engine"}

NAMES: dict[str, dict[str, str]] = {
    "": {
        "DeepSpeedConfig": "shardline.config:Config",
        "DeepSpeedConfigError": "shardline.errors:ConfigError",
        "DeepSpeedOptimizer": "optimizer",
        "ADAM_OPTIMIZER": "constants",
        "LAMB_OPTIMIZER": "constants",
        "OnDevice": "devices",
        "__git_branch__": "constants",
        "__git_hash__": "constants",
        "__version__": "_version:VERSION",
        "__version_major__": "constants",
        "__version_minor__": "constants",
        "__version_patch__": "constants",
        "add_config_arguments": "shardline.config.arguments",
        "dist": "comm:",
        "get_accelerator": "accelerator",
        "init_distributed": "comm",
        "initialize": "start",
        "log_dist": "logging",
        "logger": "logging",
        "version": "_version:VERSION",
        **_ENGINE,
        **_SCHEDULES,
    },
    "checkpoint": {},
    "checkpoint.ds_to_universal": dict.fromkeys(("main", "parse_arguments"), "universal"),
    "checkpoint.utils": {"clone_tensors_for_torch_save": "saving"},
    "git_version_info": {"git_branch": "constants", "git_hash": "constants", "version": "_version:VERSION"},
    "launcher": {},
    "launcher.runner": {"DEEPSPEED_ENVIRONMENT_NAME": "constants"},
    "moe": {},
    "moe.layer": {"MoE": "experts"},
    "moe.sharded_moe": {"top1gating": "experts", "top2gating": "experts"},
    "moe.utils": _EXPERTS,
    "ops": {},
    "ops.adagrad": {"DeepSpeedCPUAdagrad": "optimizers"},
    "ops.adam": {"DeepSpeedCPUAdam": "optimizers", "FusedAdam": "optimizers"},
    "ops.lamb": {"FusedLamb": "optimizers"},
    "ops.lion": {"DeepSpeedCPULion": "optimizers", "FusedLion": "optimizers"},
    "runtime": {**_OPTIMIZER},
    "runtime.activation_checkpointing": {},
    "runtime.base_optimizer": _OPTIMIZER,
    "runtime.config": {
        "ADAM_OPTIMIZER": "constants",
        "DeepSpeedConfig": "shardline.config:Config",
        "DeepSpeedConfigError": "shardline.errors:ConfigError",
        "LAMB_OPTIMIZER": "constants",
    },
    "runtime.dataloader": {"RepeatingLoader": "loader"},
    "runtime.engine": _ENGINE,
    "runtime.lr_schedules": {"VALID_LR_SCHEDULES": "shardline.optim.lr", **_CONSTANTS, **_SCHEDULES},
    "runtime.utils": {"clip_grad_norm_": "torch.nn.utils", "see_memory_usage": "logging"},
    "runtime.zero": _ZERO,
    "runtime.zero.config": {"ZeroStageEnum": "constants"},
    "runtime.zero.offload_config": {"OffloadDeviceEnum": "constants", "OffloadStateTypeEnum": "constants"},
    "runtime.zero.partition_parameters": {
        **_ZERO,
        "_orig_torch_arange": "zero",
        "get_accelerator": "accelerator",
        "zero_wrapper_for_fp_tensor_constructor": "zero",
    },
    "utils": {
        "OnDevice": "devices",
        "RepeatingLoader": "loader",
        "safe_update_full_grad_vectorized": "fragments",
        **_LEAVES,
        **_LOGGING,
        **_FRAGMENTS,
    },
    "utils.groups": _GROUPS,
    "utils.logging": _LOGGING,
    "utils.tensor_fragment": {"safe_update_full_grad_vectorized": "fragments", **_FRAGMENTS},
    "utils.z3_leaf_module": _LEAVES,
    "utils.zero_to_fp32": _TO_FP32,
}
"""By module: what can be imported from it. Modules named here or in FILES exist; so do those of ``refusals``."""

ALIASES = {
    "accelerator.real_accelerator": "accelerator",
    "comm.comm": "comm",
    "runtime.activation_checkpointing.checkpointing": "checkpointing",
}
"""Modules of DeepSpeed whose names an outer module holds as well."""


def is_module(path: str) -> bool:
    """Whether ``path`` (below ``deepspeed``) is a module of DeepSpeed that is known here."""
    return path in FILES or path in NAMES or path in ALIASES or path in refusals.NAMES or reason_of(path) is not None


def reason_of(path: str) -> str | None:
    """Why nothing of the module ``path`` is there; None where something is."""
    while path:
        if path in refusals.MODULES:
            return refusals.MODULES[path]
        path = path.rpartition(".")[0]
    return None


def submodules(path: str) -> set[str]:
    """The last parts of the names of modules below ``path``."""
    everything: Iterable[str] = (*FILES, *NAMES, *ALIASES, *refusals.NAMES, *refusals.MODULES)
    start = f"{path}." if path else ""
    return {each.removeprefix(start).partition(".")[0] for each in everything if each.startswith(start) and each} - {""}


def resolve(path: str, name: str) -> Any:
    """What ``name`` of the module ``path`` is.

    Raises:
        AttributeError: for a name that is not known.
    """
    home = NAMES.get(path, {}).get(name)
    inner = f"{path}.{name}" if path else name
    if home is not None:
        module, _, attribute = home.partition(":")
        found = import_module(module if "." in module else f"{PACKAGE}.{module}")
        return found if home.endswith(":") else getattr(found, attribute or name)
    if not name.startswith("__"):
        reason = refusals.NAMES.get(path, {}).get(name) or reason_of(path)
        if reason is not None and inner not in refusals.MODULES:
            return refusals.refused(inner, reason)
        if is_module(inner):
            return import_module(f"{PACKAGE}.{inner}")
    raise AttributeError(f"module {f'deepspeed.{path}'.rstrip('.')!r} has no attribute {name!r}")
