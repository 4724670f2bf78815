"""Names of DeepSpeed that are not offered: they can be imported, and say why when they are used."""

from __future__ import annotations

from typing import Any, NoReturn

from shardline.errors import UsageError

__all__ = ["MODULES", "NAMES", "Refused", "refused"]

_INFERENCE = "there is no inference engine: save the weights (engine.export) and serve them with one"
_PIPELINE = "there is no pipeline parallelism: train the plain module at stage 3"
_TENSOR = "there is no tensor parallelism: stage 3 shards the weights over all ranks"
_SEQUENCE = "there is no sequence parallelism"
_COMPRESSION = "nothing is quantized or pruned while training"
_ONE_BIT = "communication is not compressed: use Adam, AdamW or Lamb"
_HYBRID = "there is no hybrid engine: generate inside deepspeed.zero.GatheredParameters"
_EXPERTS = "experts are not spread over groups of ranks: leave ep_size at 1, and stage 3 shards them over all ranks"
_EXPERT_PARTS = "deepspeed.moe.layer.MoE is one module here"
_DATA = "data efficiency is not offered: order the dataset, or bring a loader"
_KERNELS = "DeepSpeed's kernels are not offered: torch's own optimizers and attention take their place"
_NVME = "nothing is kept on NVMe"
_PROFILER = "DeepSpeed's profilers are not offered: use the section flops_profiler, and engine.profile(steps=)"
_MONITOR = "the configuration's sections make the monitors: use engine.monitor, or engine.events"
_ELASTIC = "there is no elastic batch: set the batch keys; a checkpoint loads on any number of ranks"
_TUNING = "nothing is tuned by trial runs"
_INTERNAL = "it is a part of DeepSpeed's own machinery"

NAMES: dict[str, dict[str, str]] = {
    "": {
        "DeepSpeedHybridEngine": _HYBRID,
        "InferenceEngine": _INFERENCE,
        "PipelineEngine": _PIPELINE,
        "PipelineModule": _PIPELINE,
        "init_inference": _INFERENCE,
        "default_inference_config": _INFERENCE,
        "DeepSpeedInferenceConfig": _INFERENCE,
        "tp_model_init": _TENSOR,
        "set_autotp_mode": _TENSOR,
        "replace_transformer_layer": _INFERENCE,
        "revert_transformer_layer": _INFERENCE,
        "DeepSpeedTransformerLayer": _KERNELS,
        "DeepSpeedTransformerConfig": _KERNELS,
        "add_tuning_arguments": "schedules are set in the configuration's scheduler section",
    },
    "zero": {
        "MiCS_Init": "sharding inside a node and replicating across is not built yet: use deepspeed.zero.Init",
        "TiledLinear": "torch's own linear layer is used as it is",
        "TiledLinearReturnBias": "torch's own linear layer is used as it is",
        "ZeRoTraceMode": _INTERNAL,
    },
    "moe.experts": {"Experts": _EXPERT_PARTS},
    "moe.sharded_moe": {"MOELayer": _EXPERT_PARTS, "TopKGate": _EXPERT_PARTS},
    "ops.adam": {"ZenFlowSelectiveAdamW": "the optimizer step is never delayed or split by importance"},
    "runtime.pipe.topology": {
        "PipeModelDataParallelTopology": _PIPELINE,
        "PipeDataParallelTopology": _PIPELINE,
        "ProcessTopology": _PIPELINE,
    },
    "runtime.sequence_parallel.ulysses_sp": {
        "UlyssesSPAttentionHF": _SEQUENCE,
        "UlyssesSPDataLoaderAdapter": _SEQUENCE,
    },
    "utils.groups": {
        "_get_sequence_parallel_group": _SEQUENCE,
        "_get_sequence_parallel_rank": _SEQUENCE,
        "_get_sequence_parallel_world_size": _SEQUENCE,
        "_get_expert_parallel_group": _EXPERTS,
        "_get_expert_data_parallel_group": _EXPERTS,
    },
    "checkpoint": {
        "DeepSpeedCheckpoint": "read a checkpoint of DeepSpeed by `shardline checkpoint import-deepspeed DIR OUT`",
    },
}
"""By module: name, and why it is not there."""

MODULES: dict[str, str] = {
    "autotuning": _TUNING,
    "compile": "call engine.compile(), which compiles block by block",
    "compression": _COMPRESSION,
    "elasticity": _ELASTIC,
    "inference": _INFERENCE,
    "linear": "DeepSpeed's LoRA layers are not offered: use PEFT",
    "model_implementations": _INFERENCE,
    "module_inject": _INFERENCE,
    "moe.mappings": _TENSOR,
    "monitor": _MONITOR,
    "nebula": "checkpoints are written by Shardline alone",
    "nvme": _NVME,
    "ops.aio": _NVME,
    "ops.deepspeed4science": _KERNELS,
    "ops.fp_quantizer": _COMPRESSION,
    "ops.op_builder": _KERNELS,
    "ops.quantizer": _COMPRESSION,
    "ops.sparse_attention": _KERNELS,
    "ops.transformer": _KERNELS,
    "pipe": _PIPELINE,
    "profiling": _PROFILER,
    "runtime.bf16_optimizer": _INTERNAL,
    "runtime.comm": _ONE_BIT,
    "runtime.compression": _ONE_BIT,
    "runtime.data_pipeline": _DATA,
    "runtime.domino": _TENSOR,
    "runtime.eigenvalue": _COMPRESSION,
    "runtime.fp16": _ONE_BIT,
    "runtime.hybrid_engine": _HYBRID,
    "runtime.pipe": _PIPELINE,
    "runtime.progressive_layer_drop": _DATA,
    "runtime.quantize": _COMPRESSION,
    "runtime.sequence_parallel": _SEQUENCE,
    "runtime.superoffload": "there is no partial offload",
    "runtime.swap_tensor": _NVME,
    "runtime.tensor_parallel": _TENSOR,
    "runtime.weight_quantizer": _COMPRESSION,
    "runtime.zenflow": "the optimizer step is never delayed or split by importance",
    "runtime.zero.mics": "sharding inside a node and replicating across is not built yet",
    "runtime.zero.stage3": _INTERNAL,
    "runtime.zero.stage_1_and_2": _INTERNAL,
    "sequence": _SEQUENCE,
}
"""Modules of which no name is there, with all below them."""


class _Absence(type):
    """The class of a name that is not there: it can be imported, annotated with and looked for by ``isinstance``."""

    _reason: str

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        cls._refuse()

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        cls._refuse()

    def _refuse(cls) -> NoReturn:
        raise UsageError(f"deepspeed.{cls.__qualname__} is not offered by Shardline's stand-in: {cls._reason}.")


class Refused(metaclass=_Absence):
    """The base of all names that are not there."""

    _reason = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "_reason" not in vars(cls):
            next(base for base in cls.__mro__[1:] if "_reason" in vars(base))._refuse()  # type: ignore[attr-defined]


def refused(path: str, reason: str) -> type:
    """An object for ``path`` (a dotted name below ``deepspeed``) whose use raises :class:`UsageError`."""
    return _Absence(path.rpartition(".")[2], (Refused,), {"_reason": reason, "__qualname__": path})
