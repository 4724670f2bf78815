"""DeepSpeed's keys that have no typed field: other names, keys without an effect, keys that are not supported.

All three tables go by dotted path; a row is removed when its key becomes a field of the schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardline.config.kinds import left_out

__all__ = [
    "ALIASES",
    "AUTO_IS_A_VALUE",
    "AUTO_MEANS",
    "AUTO_NEEDS",
    "BY_TRAINER",
    "CHECK_FILLED",
    "NOT_NULL",
    "NO_EFFECT",
    "TRAINERS",
    "UNSUPPORTED",
    "Ineffective",
    "Unsupported",
    "is_comment",
]

ALIASES: dict[str, str] = {
    "bfloat16": "bf16",
    "dataloader_drop_last": "data_loader.drop_last",
    "checkpoint.async": "checkpoint.async_save",
    "zero_optimization.prefetch_bucket_size": "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.model_persistence_threshold": "zero_optimization.stage3_model_persistence_threshold",
    "zero_optimization.max_live_parameters": "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.max_reuse_distance": "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.module_granularity_threshold": "zero_optimization.stage3_module_granularity_threshold",
    "zero_optimization.use_all_reduce_for_fetch_params": "zero_optimization.stage3_use_all_reduce_for_fetch_params",
    "zero_optimization.allgather_sequential": "zero_optimization.stage3_allgather_sequential",
    "zero_optimization.gather_16bit_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
}

# "auto" means the default, except here: it is the value itself, another value, or a decision without a neutral default.
AUTO_IS_A_VALUE = frozenset({"checkpoint.resume"})
AUTO_MEANS: dict[str, tuple[Any, str]] = {"scheduler.params.warmup_max_lr": (None, "the optimizer's lr")}
BY_TRAINER = "Hugging Face's Trainer fills in from its own arguments"
CHECK_FILLED = "`shardline config check --filled-by transformers` checks the file as it would be then"
_BY_TRAINER = f"{BY_TRAINER} and nothing else can ({CHECK_FILLED})"
AUTO_NEEDS: dict[str, str] = {
    "gradient_clipping": f"{_BY_TRAINER}; write a number, 0.0 for no clipping",
    "fp16.enabled": f"{_BY_TRAINER}; write true or false",
    "bf16.enabled": f"{_BY_TRAINER}; write true or false",
    "torch_autocast.enabled": "nothing here can decide; write true or false",
    "zero_optimization.stage": "nothing here can decide; write 0, 1, 2 or 3",
}


# Null means the default, except here.
NOT_NULL = frozenset({"zero_optimization.stage"})

# What a trainer writes instead of "auto": stand-ins for its arguments.
TRAINERS: dict[str, dict[str, Any]] = {
    "transformers": {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16.enabled": True,
        "fp16.enabled": False,
        "optimizer.params.lr": 5e-5,
        "scheduler.params.warmup_max_lr": 5e-5,
        "scheduler.params.total_num_steps": 1000,
    }
}


def is_comment(name: object) -> bool:
    """Whether a key of this name is a comment, which JSON has no syntax for."""
    return isinstance(name, str) and name.startswith(("_", "//"))


@dataclass(frozen=True)
class Ineffective:
    """A key that is accepted, checked for its type and then ignored, with the reason why there is nothing to do."""

    kind: str
    reason: str

    def schema(self) -> dict[str, Any]:
        return dict(JSON_KINDS[self.kind])

    def accepts(self, value: object) -> bool:
        match self.kind:
            case "boolean":
                return isinstance(value, bool)
            case "number":
                return isinstance(value, int | float) and not isinstance(value, bool)
            case "object":
                return isinstance(value, Mapping | bool)
            case "tag validation":
                return isinstance(value, str) and value in JSON_KINDS[self.kind]["enum"]
        return True


JSON_KINDS: dict[str, dict[str, Any]] = {
    "boolean": {"type": "boolean"},
    "number": {"type": "number"},
    "object": {"type": ["object", "boolean"]},
    "tag validation": {
        "enum": [word for name in ("Ignore", "Warn", "Fail") for word in (name, name.lower(), name.upper())]
    },
    "any": {},
}


@dataclass(frozen=True)
class Unsupported:
    """A value that Shardline knowingly refuses: everything but ``off``, or, where ``refused`` is given, just that.

    ``switch`` names the key that turns a whole section on; ``present`` says that the section is on without it, and
    ``inside`` that the switches are in the sections inside it.
    """

    reason: str
    off: tuple[Any, ...] = (False,)
    refused: tuple[Any, ...] = ()
    switch: str | None = None
    present: bool = False
    inside: bool = False

    def accepts(self, value: object) -> bool:
        if self.inside:
            return left_out(value) or (isinstance(value, Mapping) and not self._is_on_inside(value))
        if self.refused:
            return not any(_same(value, item) for item in self.refused)
        if self.switch or self.present:
            if not isinstance(value, Mapping) or not value:
                return left_out(value) or value == {}
            if self.switch not in value:
                return not self.present
            value = value[self.switch]
        return any(_same(value, item) for item in (None, *self.off))

    def _is_on_inside(self, section: Mapping[Any, Any]) -> bool:
        return any(
            self._is_on_inside(value) if isinstance(value, Mapping) else name == self.switch and not left_out(value)
            for name, value in section.items()
        )

    def schema(self) -> dict[str, Any]:
        if self.inside:
            level: dict[str, Any] = {}
            for _ in range(3):
                level = {"properties": {self.switch: {"enum": [None, False]}}, "additionalProperties": level}
            return {"type": ["object", "null", "boolean"], "not": {"const": True}, **level}
        if self.refused:
            return {"not": {"enum": list(self.refused)}}
        if not (self.switch or self.present):
            return {"enum": [None, *self.off]}
        switched_off: dict[str, Any] = {"type": "object"}
        if self.switch:
            switched_off["properties"] = {self.switch: {"enum": [None, *self.off]}}
            if self.present:
                switched_off["required"] = [self.switch]
        else:
            switched_off["maxProperties"] = 0
        empty = {"type": "object", "maxProperties": 0}
        return {"anyOf": [{"enum": [None, False]}, switched_off, empty]}


def _same(a: object, b: object) -> bool:
    """Equality as JSON sees it: 1 is 1.0 but not true; names go without regard to case."""
    if isinstance(a, str) and isinstance(b, str):
        return a.lower() == b.lower()
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _boolean(reason: str) -> Ineffective:
    return Ineffective("boolean", reason)


def _number(reason: str) -> Ineffective:
    return Ineffective("number", reason)


_BUCKETS = "a reduction or gather moves one unit; its size is set by unit_min_numel and unit_max_numel"
_LIVE = "a unit is released after its last use, as the recorded order says"
_CHECKPOINTING = "acts only on calls of DeepSpeed's own checkpoint function; here enabled, every and offload say it all"
_PRINTS = "the step line (steps_per_print) and the events of the engine say it"
_LAYOUT = "a checkpoint is named ranges of tensors, so any layout loads any other"
_TRANSFERS = "all gathers and reductions of the engine are counted, by operation"
_OFFLOAD = "a detail of DeepSpeed's offload buffers"

NO_EFFECT: dict[str, Ineffective] = {
    "prescale_gradients": _boolean("the division is part of the optimizer step, behind the sum"),
    "gradient_predivide_factor": _number("the division is part of the optimizer step, behind the sum"),
    "seq_parallel_communication_data_type": Ineffective("any", "there is no sequence parallelism"),
    "disable_allgather": _boolean("DeepSpeed reads it no more"),
    "zero_allow_untested_optimizer": _boolean("every optimizer is classified, and tried out if unknown, at initialize"),
    "zero_force_ds_cpu_optimizer": _boolean("optimizers are torch's and run on every device"),
    "disable_python_gc": _boolean("Python's garbage collector is left to the script; call gc.disable() in it"),
    "memory_breakdown": _boolean(_PRINTS),
    "dump_state": _boolean("`shardline config explain` prints the resolved configuration"),
    "log_level": Ineffective("any", 'set the level of the standard logger "shardline"'),
    "vocabulary_size": _number("it only warns in DeepSpeed"),
    "use_data_before_expert_parallelism": _boolean("there is no expert parallelism"),
    "timers": Ineffective("object", "wall_clock_breakdown is the switch for timers"),
    "aio": Ineffective("object", "it tunes NVMe offload, which is not supported"),
    "comms_logger.prof_all": _boolean(_TRANSFERS),
    "comms_logger.prof_ops": Ineffective("any", _TRANSFERS),
    "comms_logger.debug": _boolean(_TRANSFERS),
    "flops_profiler.recompute_fwd_factor": _number("what is recomputed is counted, and is not part of MFU"),
    "flops_profiler.top_modules": _number("the table has all modules"),
    "optimizer.legacy_fusion": _boolean("there is one implementation"),
    "bf16.immediate_grad_update": _boolean("gradients are accumulated as data_types.grad_accum_dtype says"),
    "torch_autocast.lower_precision_safe_modules": Ineffective("any", "torch's autocast decides by operation"),
    "data_types.keep_in_fp32_modules": Ineffective(
        "any", "it is about buffers, which keep their dtype unless buffer_dtype is set; module_dtypes is for parameters"
    ),
    "zero_optimization.compute_grad_norm": _boolean("the norm is a by-product of the check for overflow"),
    "zero_optimization.parameter_alignment": _boolean("shards always begin at multiples of 64 elements"),
    "zero_optimization.allgather_partitions": _boolean("weights are always all-gathered"),
    "zero_optimization.allgather_bucket_size": _number(_BUCKETS),
    "zero_optimization.overlap_comm": _boolean("communication always overlaps where the device has streams"),
    "zero_optimization.reduce_scatter": _boolean("gradients are always reduce-scattered"),
    "zero_optimization.reduce_bucket_size": _number(_BUCKETS),
    "zero_optimization.use_multi_rank_bucket_allreduce": _boolean(_BUCKETS),
    "zero_optimization.contiguous_gradients": _boolean("a unit's gradients are always one flat buffer"),
    "zero_optimization.round_robin_gradients": _boolean("every rank owns an equal part of every unit"),
    "zero_optimization.ignore_unused_parameters": _boolean("an unused parameter always counts as a zero gradient"),
    "zero_optimization.load_from_fp32_weights": _boolean("masters are always restored from the fp32 weights"),
    "zero_optimization.elastic_checkpoint": _boolean(_LAYOUT),
    "zero_optimization.sub_group_size": _number("the optimizer takes one run per unit"),
    "zero_optimization.stage3_model_persistence_threshold": _number("stage3_param_persistence_threshold alone decides"),
    "zero_optimization.stage3_max_reuse_distance": _number(_LIVE),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _boolean("whole weights can always be gathered"),
    "zero_optimization.stage3_module_granularity_threshold": _number("unit_min_numel merges small modules"),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _boolean("weights are always all-gathered"),
    "zero_optimization.stage3_allgather_sequential": _boolean("a unit is gathered straight into the weights"),
    "zero_optimization.memory_efficient_linear": _boolean("torch's own linear layer is used as it is"),
    "zero_optimization.override_module_apply": _boolean("Module.apply is not patched"),
    "zero_optimization.pipeline_loading_checkpoint": _boolean("a rank reads only its own ranges"),
    "zero_optimization.log_trace_cache_warnings": _boolean("there is no trace that could be invalidated"),
    "zero_optimization.enable_sanity_checks": _boolean("states are always checked"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": _boolean("a detail of DeepSpeed's Muon"),
    "zero_optimization.grad_hooks": _boolean("DeepSpeed documents it and refuses it"),
    "zero_optimization.cpu_offload_use_pin_memory": _boolean("deprecated; see offload_optimizer.pin_memory"),
    **{
        f"zero_optimization.offload_optimizer.{name}": Ineffective("any", _OFFLOAD)
        for name in ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init", "cpuadam_cores_perc")
    },
    **{
        f"zero_optimization.offload_param.{name}": Ineffective("any", _OFFLOAD)
        for name in ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")
    },
    **{
        f"activation_checkpointing.{name}": Ineffective("any", _CHECKPOINTING)
        for name in (
            "partition_activations",
            "contiguous_memory_optimization",
            "cpu_checkpointing",
            "number_checkpoints",
            "synchronize_checkpoint_boundary",
            "profile",
        )
    },
    "checkpoint.tag_validation": Ineffective(
        "tag validation", "ranks always agree on the tag before anything is written"
    ),
    "checkpoint.load_universal": _boolean(_LAYOUT),
    "checkpoint.parallel_write": Ineffective("object", "every rank always writes its own part"),
    "checkpoint.checkpoint_serialization": _boolean("tensors are never pickled"),
    "checkpoint.writer": Ineffective("object", "there is one writer"),
}

_COMPRESSED = "communication is not compressed; communication_data_type sets the dtype of reductions"
_ONE_BIT = f"{_COMPRESSED}, and Adam, AdamW or Lamb take its place"
_DATA = "order your dataset or pass your own loader"
_HALF_MASTERS = "masters and moments are kept in fp32, whose share falls with the number of ranks at stages 1 to 3"
_TWO_HOPS = "sharding inside a node and replicating across is not built yet; stage 3 shards over all ranks"

UNSUPPORTED: dict[str, Unsupported] = {
    "gradient_allreduce_op": Unsupported(
        'gradients are averaged by the weights of the samples; write "mean", and scale the loss by the world size '
        "for a sum",
        refused=("sum",),
    ),
    "managed_gradient_accumulation": Unsupported(
        "the engine counts micro-steps; call engine.set_gradient_accumulation_boundary to decide yourself", off=(True,)
    ),
    "sparse_gradients": Unsupported("sparse embedding gradients are reduced as dense ones"),
    "graph_harvesting": Unsupported("CUDA graphs are torch.compile's business (mode reduce-overhead)"),
    "data_parallel_size": Unsupported("the data-parallel size is the world size", off=()),
    "sequence_parallel_size": Unsupported("there is no sequence parallelism", off=(0, 1)),
    "optimizer.type": Unsupported(
        f"{_ONE_BIT}; those of package mup are built by you and passed to initialize",
        refused=("OneBitAdam", "ZeroOneAdam", "OneBitLamb", "MuAdam", "MuAdamW", "MuSGD"),
    ),
    "optimizer.params.max_grad_norm": Unsupported("write gradient_clipping at the top level instead", off=()),
    "fp16.fp16_master_weights_and_grads": Unsupported(_HALF_MASTERS),
    "bf16.bf16_master_weights_and_grads": Unsupported(_HALF_MASTERS),
    "bf16.bf16_optimizer_states": Unsupported(_HALF_MASTERS),
    "data_types.param_dtype": Unsupported(
        "fp16.enabled and bf16.enabled set the parameters' dtype, data_types.module_dtypes the exceptions", off=()
    ),
    "zero_optimization.legacy_stage1": Unsupported("there is one stage 1"),
    "zero_optimization.cpu_offload": Unsupported(
        'it is DeepSpeed\'s old name of offload_optimizer; write "offload_optimizer": {"device": "cpu"} instead'
    ),
    "zero_optimization.cpu_offload_param": Unsupported(
        "it is DeepSpeed's old name of offload_param, and weights stay on the device; stage 3 shards them"
    ),
    "zero_optimization.offload_optimizer.device": Unsupported(
        'optimizer state never goes to NVMe; "cpu" keeps it in host memory, and stages 1 to 3 divide it over the ranks',
        refused=("nvme",),
    ),
    "zero_optimization.offload_optimizer.ratio": Unsupported("there is no partial offload", off=(1.0,)),
    "zero_optimization.offload_optimizer.super_offload": Unsupported("there is no partial offload"),
    "zero_optimization.offload_param.device": Unsupported(
        "weights never go to NVMe; stage 3 shards them over the ranks", refused=("nvme",)
    ),
    "zero_optimization.mics_shard_size": Unsupported(f"MiCS: {_TWO_HOPS}", off=(-1, 0)),
    "zero_optimization.mics_hierarchical_params_gather": Unsupported(f"MiCS: {_TWO_HOPS}"),
    "zero_optimization.zero_hpz_partition_size": Unsupported(f"ZeRO++: {_TWO_HOPS}", off=(0, 1)),
    "zero_optimization.zero_quantized_weights": Unsupported(f"ZeRO++: {_COMPRESSED}"),
    "zero_optimization.zero_quantized_nontrainable_weights": Unsupported(f"ZeRO++: {_COMPRESSED}"),
    "zero_optimization.zero_quantized_gradients": Unsupported(f"ZeRO++: {_COMPRESSED}"),
    "zero_optimization.zeropp_loco_param": Unsupported(f"ZeRO++: {_COMPRESSED}", present=True),
    "zero_optimization.zenflow": Unsupported(
        "the optimizer step is never delayed or split by importance", present=True
    ),
    "checkpoint.use_node_local_storage": Unsupported("all ranks write to one shared directory"),
    "nebula": Unsupported("checkpoints are written by Shardline alone", switch="enabled"),
    "datastates_ckpt": Unsupported("checkpoints are written by Shardline alone", present=True),
    "compile": Unsupported("call engine.compile(), which compiles block by block", switch="deepcompile"),
    "amp": Unsupported("NVIDIA Apex is retired; enable bf16, fp16 or torch_autocast", switch="enabled"),
    "tensor_parallel": Unsupported("there is no tensor parallelism", off=(0, 1), switch="autotp_size", present=True),
    "expert_parallel": Unsupported("there is no expert parallelism", switch="enabled"),
    "pipeline": Unsupported("there is no pipeline parallelism; stage 3 trains large models", present=True),
    "hybrid_engine": Unsupported("generate inside engine.gathered_parameters()", switch="enabled"),
    "elasticity": Unsupported(
        "set the three batch keys; train_batch_size stays when the world changes", switch="enabled"
    ),
    "autotuning": Unsupported("nothing is tuned by trial runs", switch="enabled"),
    "comet.api_key": Unsupported(
        "checkpoints and reports hold the configuration; set COMET_API_KEY, or let Comet keep the key", off=()
    ),
    "data_efficiency": Unsupported(_DATA, switch="enabled"),
    "curriculum_learning": Unsupported(_DATA, switch="enabled"),
    "progressive_layer_drop": Unsupported("the model decides which layers run", switch="enabled"),
    "eigenvalue": Unsupported("nothing is quantized while training", switch="enabled"),
    "quantize_training": Unsupported("nothing is quantized while training", switch="enabled"),
    "weight_quantization": Unsupported("nothing is quantized while training", present=True),
    "compression_training": Unsupported("nothing is quantized or pruned while training", switch="enabled", inside=True),
    "sparse_attention": Unsupported("use torch's scaled_dot_product_attention or flex_attention", present=True),
}
