"""The typed configuration: DeepSpeed's training keys that mean something here, and Shardline's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import PrivateAttr

from shardline.config import params
from shardline.config.kinds import Dtype, Integer, Model, Number, OptionalInteger, Section, Strings, key
from shardline.config.limits import check
from shardline.config.monitoring import (
    Comet,
    CommsLogger,
    CsvMonitor,
    FlopsProfiler,
    MLflow,
    ProgressBar,
    RunLog,
    Sinks,
    TensorBoard,
    WandB,
)
from shardline.config.reading import Reading

__all__ = [
    "BF16",
    "FP16",
    "ActivationCheckpointing",
    "Checkpoint",
    "Config",
    "DataLoader",
    "DataTypes",
    "LeafModule",
    "OffloadOptimizer",
    "OffloadParam",
    "Optimizer",
    "Scheduler",
    "TorchAutocast",
    "Watchdog",
    "ZeroOptimization",
]


_SEED = 2**63 - 1
"""The largest seed that every generator of torch takes."""
_SAMPLES = 10**9
_SCALE_POWER = 40
"""A larger loss scale takes even the smallest gradient that fp16 holds, 2^-24, beyond the largest, 65504."""


class FP16(Section):
    enabled: bool = key(False, "Parameters, activations and gradients in fp16 with fp32 masters and a loss scale.")
    auto_cast: bool = key(True, "Cast floating inputs of the forward to fp16 (DeepSpeed's default is false).")
    loss_scale: Number = key(0.0, "Static loss scale; 0 scales dynamically.", ge=0, le=2**_SCALE_POWER)
    initial_scale_power: Integer = key(16, "The dynamic scale starts at 2 to this power.", ge=0, le=_SCALE_POWER)
    loss_scale_window: Integer = key(1000, "Good steps before the dynamic scale doubles.", ge=1)
    hysteresis: Integer = key(2, "Overflows before the dynamic scale halves.", ge=1)
    consecutive_hysteresis: bool = key(False, "A good step refills the hysteresis.")
    min_loss_scale: Number = key(1.0, "The dynamic scale never falls below.", gt=0, le=2**_SCALE_POWER)


class BF16(Section):
    enabled: bool = key(False, "Parameters, activations and gradients in bf16 with fp32 masters.")
    check_grad_overflow: bool = key(True, "Skip a step whose gradients are not finite, and say so.")


class TorchAutocast(Section):
    enabled: bool = key(False, "fp32 parameters, forward under torch.autocast.")
    dtype: Dtype = key("bf16", "Autocast's lower dtype, bf16 or fp16.")


class DataTypes(Section):
    grad_accum_dtype: Dtype | None = key(
        None, "Dtype in which gradients are accumulated; null is fp32 (DeepSpeed's null is the model's dtype)."
    )
    buffer_dtype: Dtype | None = key(None, "Dtype of the model's floating buffers; null leaves them as they are.")
    module_dtypes: dict[str, Dtype] = key(
        dict,
        "Parameter dtype by name of a module or parameter, or by module class, and of all below it, such as "
        '{"LayerNorm": "fp32", "head": "fp32"}; the innermost counts. The end of a name, "mlp.gate", will do.',
        own=True,
    )


class LeafModule(Section):
    classes: Strings = key((), "Class names of modules that are one unit each with all below them.")
    names: Strings = key((), "Full names of modules that are one unit each with all below them.")
    name_suffixes: Strings = key((), "Ends of names of modules that are one unit each.")


class OffloadOptimizer(Section):
    device: Literal["none", "cpu", "nvme"] = key("none", "Where masters and optimizer state live; cpu: in host memory.")
    pin_memory: bool = key(True, "Page-locked host memory for what travels.")


class OffloadParam(Section):
    device: Literal["none", "cpu", "nvme"] = key("none", "Where released weights live.")
    pin_memory: bool = key(True, "Page-locked host memory.")


class ZeroOptimization(Section):
    stage: Integer = key(
        0, "What is sharded over the ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too.", ge=0, le=3
    )
    reshard_after_forward: bool = key(True, "Stage 3: release a unit's weights between forward and backward.", own=True)
    stage3_param_persistence_threshold: Integer = key(
        10_000,
        "Stage 3: units of fewer elements stay whole on every rank (DeepSpeed counts parameters, from 100000).",
        ge=0,
    )
    stage3_prefetch_bucket_size: Integer = key(
        50_000_000, "Stage 3: gather one unit ahead of its use; 0 does not.", ge=0
    )
    stage3_max_live_parameters: Integer = key(
        1_000_000_000,
        "Stage 3: elements of units that are kept although this rank passed them over, in case it uses them later.",
        ge=0,
    )
    unit_min_numel: Integer = key(100_000, "Smaller modules are merged into one unit, in elements.", own=True, ge=0)
    unit_max_numel: Integer = key(500_000_000, "A unit is split above this many elements.", own=True, ge=1)
    leaf_module: LeafModule = key(LeafModule, "Modules that are one unit each, whatever they hold.")
    offload_optimizer: OffloadOptimizer = key(OffloadOptimizer, "Optimizer state on another device.")
    offload_param: OffloadParam = key(OffloadParam, "Stage 3: released weights on another device.")


class Optimizer(Section):
    open_fields: ClassVar[tuple[str, ...]] = ("params",)

    type: str = key(
        ...,
        "Adam (decoupled decay unless adam_w_mode is false), AdamW, SGD, Adagrad, Lion, Lamb, Muon (with AdamW "
        "for all but the matrices of the blocks), or a torch.optim class.",
    )
    params: dict[str, Any] = key(dict, "Arguments of the optimizer.")

    @classmethod
    def model_of(cls, field: str, raw: Mapping[str, Any]) -> Model | None:
        return params.known(params.OPTIMIZERS, raw.get("type"))


class Scheduler(Section):
    open_fields: ClassVar[tuple[str, ...]] = ("params",)

    type: str = key(
        ..., "WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest, or a torch.optim.lr_scheduler class."
    )
    params: dict[str, Any] = key(dict, "Arguments of the scheduler.")

    @classmethod
    def model_of(cls, field: str, raw: Mapping[str, Any]) -> Model | None:
        return params.known(params.SCHEDULERS, raw.get("type"))


class DataLoader(Section):
    shuffle: bool = key(True, "Draw each epoch in a new order, from seed and epoch.", own=True)
    drop_last: bool = key(False, "Leave out a smaller last global batch (DeepSpeed: dataloader_drop_last).", own=True)
    num_workers: Integer = key(0, "Worker processes of the loader on each rank.", own=True, ge=0, le=4096)
    pin_memory: bool = key(False, "Copy batches to page-locked memory.", own=True)
    seed: OptionalInteger = key(
        None, "Seed of order and augmentation; null is the top-level seed.", own=True, ge=0, le=_SEED
    )
    uneven: bool = key(
        False,
        "Allow a train_batch_size that ranks x accumulation does not divide; sizes differ by one. By itself with "
        "--nnodes MIN:MAX, where it is needed.",
        own=True,
    )
    weighting: Literal["samples", "none"] = key(
        "samples", 'Average over samples, or with "none" over micro-batches of whatever size.', own=True
    )
    prefetch_factor: OptionalInteger = key(None, "Batches that each worker loads ahead.", own=True, ge=1)
    persistent_workers: bool = key(False, "Keep the workers from epoch to epoch.", own=True)


class Checkpoint(Section):
    dir: str | None = key(None, "Directory that checkpoints are saved to and resumed from.", own=True)
    every_steps: OptionalInteger = key(None, "Save by itself every so many steps.", own=True, ge=1)
    keep: OptionalInteger = key(None, "Keep this many of the newest checkpoints; null keeps all.", own=True, ge=1)
    async_save: bool = key(False, 'Write in the background; "async" is the same key.', own=True)
    resume: str | None = key(None, '"auto" resumes from the newest intact checkpoint, else a tag.', own=True)
    save_on_sigterm: bool = key(
        False, "At SIGTERM or SIGUSR1, save after the current step and exit with code 75.", own=True
    )


class Watchdog(Section):
    quiet_seconds: Number = key(
        10.0,
        "After a rank has waited so long while no rank moved, it is said who waits for whom.",
        own=True,
        gt=0,
        le=86400,
    )
    timeout_seconds: Number | None = key(
        None, "A rank waits so long for another, then the job ends; null: as the process group.", own=True, gt=0, le=1e7
    )


class Debug(Section):
    find_nonfinite: bool = key(
        False,
        "After a step whose gradients are not finite, run it again and name the module or parameter where that begins. "
        "The host then waits for each step.",
        own=True,
    )


class ActivationCheckpointing(Section):
    enabled: bool = key(False, "Recompute blocks in the backward instead of keeping their activations.", own=True)
    every: Integer = key(1, "Recompute every so many blocks.", own=True, ge=1)
    offload: bool = key(False, "Keep the inputs of recomputed blocks in host memory.", own=True)


class Config(Section):
    """A training configuration.

    Built by :func:`shardline.config.load_config` it is resolved: the three batch keys are integers. Built directly
    from keyword arguments it holds what was given, to be resolved by ``shardline.initialize``.

    Raises:
        ConfigError: a key or value that cannot be used; all problems at once, one sentence each.
    """

    train_batch_size: Integer = key(None, "Samples per optimizer step over all ranks.", ge=1, le=_SAMPLES)
    train_micro_batch_size_per_gpu: Integer = key(None, "Samples per forward on one rank.", ge=1, le=_SAMPLES)
    gradient_accumulation_steps: Integer = key(None, "Micro-batches per optimizer step on one rank.", ge=1, le=_SAMPLES)
    optimizer: Optimizer | None = key(None, "The optimizer, unless one is passed to initialize.")
    scheduler: Scheduler | None = key(None, "The learning-rate schedule, unless one is passed to initialize.")
    gradient_clipping: Number = key(
        0.0, "Largest global L2 norm of the gradients; 0 does not clip (DeepSpeed 0.19 clips at 1.0 by default).", ge=0
    )
    gradient_allreduce_op: Literal["mean", "sum"] = key("mean", "How gradients of the ranks are combined.")
    communication_data_type: Dtype | None = key(
        None,
        "Dtype of gradient reductions; null is the gradients' own: that of the weights, or of the sum over micro-steps "
        "where that travels (stages 0 and 1).",
    )
    communication_transport: Literal["auto", "gloo"] = key(
        "auto",
        'How CPU tensors travel: "auto" has ranks read each other\'s memory where all run on one host, else gloo.',
        own=True,
    )
    fp16: FP16 = key(FP16, "Training in fp16.")
    bf16: BF16 = key(BF16, 'Training in bf16; "bfloat16" is the same section.')
    torch_autocast: TorchAutocast = key(TorchAutocast, "Training under torch.autocast.")
    data_types: DataTypes = key(DataTypes, "Dtypes of accumulation, buffers and single modules.")
    zero_optimization: ZeroOptimization = key(ZeroOptimization, "What is sharded over the ranks, and in which units.")
    data_loader: DataLoader = key(DataLoader, "The loader that initialize builds from training_data.", own=True)
    checkpoint: Checkpoint = key(Checkpoint, "Saving and resuming.")
    activation_checkpointing: ActivationCheckpointing = key(ActivationCheckpointing, "Recomputing activations.")
    max_skipped_steps: OptionalInteger = key(
        50, "Steps in a row with gradients that are not finite, after which the run ends; null: never.", own=True, ge=1
    )
    watchdog: Watchdog = key(Watchdog, "What is said, and when, of ranks that do not come.", own=True)
    debug: Debug = key(Debug, "What helps to find a mistake, and takes time.", own=True)
    steps_per_print: OptionalInteger = key(None, "Print a line every so many steps; null and Infinity: never.", ge=1)
    wall_clock_breakdown: bool = key(False, "Time forward, backward, reduce and step, and print that.")
    progress_bar: ProgressBar = key(ProgressBar, "A progress bar.", own=True)
    run_log: RunLog = key(RunLog, "Everything that happens in a run, in a file that a report is made of.", own=True)
    tensorboard: TensorBoard = key(TensorBoard, "TensorBoard; needs shardline[tensorboard].")
    wandb: WandB = key(WandB, "Weights & Biases; needs shardline[wandb].")
    mlflow: MLflow = key(MLflow, "MLflow; needs shardline[mlflow].", own=True)
    comet: Comet = key(Comet, "Comet; needs the package comet_ml.")
    csv_monitor: CsvMonitor = key(CsvMonitor, "CSV files.")
    comms_logger: CommsLogger | None = key(None, "What travels between ranks.")
    flops_profiler: FlopsProfiler = key(FlopsProfiler, "Floating-point operations.")
    sinks: Sinks = key(dict, "Sinks that the program has registered, by name, with their arguments.", own=True)
    seed: Integer = key(1234, "Seed of the data order and of what Shardline draws itself.", own=True, ge=0, le=_SEED)

    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _no_effect: tuple[str, ...] = PrivateAttr(default=())

    if not TYPE_CHECKING:  # the checker keeps the typed signature that pydantic derives from the fields

        def __init__(self, **given: Any) -> None:
            check(given, "The configuration")
            reading = Reading(Config, origin="given")
            values = reading.values(Config, given)
            reading.finish()
            super().__init__(**values)
            self._raw = {name: _plain(value) for name, value in given.items()}
            self._origins = reading.origins
            self._no_effect = tuple(reading.no_effect)

    @property
    def raw(self) -> dict[str, Any]:
        """The configuration as the user wrote it."""
        return self._raw

    @property
    def origins(self) -> dict[str, str]:
        """Where each value came from by dotted path; a path that is missing holds its default."""
        return self._origins

    @property
    def no_effect(self) -> tuple[str, ...]:
        """Dotted keys that the user wrote, that are accepted, and that do nothing here."""
        return self._no_effect

    @property
    def is_observed(self) -> bool:
        """Whether a sink shows or keeps the figures of each step."""
        monitors = (self.tensorboard, self.wandb, self.mlflow, self.comet, self.csv_monitor)
        return bool(self.sinks or self.run_log.dir or any(each.enabled for each in monitors))

    def get(self, name: str, default: Any = None) -> Any:
        """Read ``raw`` like a dict, as clients of DeepSpeed's ``engine.config`` do."""
        return self._raw.get(name, default)

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration as JSON values; loading it again gives the same configuration."""
        return self.model_dump(mode="json")


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_unset=True) if isinstance(value, Section) else value
