"""The page docs/migrate-from-deepspeed.md, from the tables of the stand-in and the tests that hold each row.

python -m tests.compat.document > docs/migrate-from-deepspeed.md
"""

from __future__ import annotations

from collections.abc import Iterable

from shardline.compat.deepspeed import refusals, table
from shardline.compat.deepspeed._version import VERSION
from shardline.compat.deepspeed.engine import NOT_OFFERED

UNCHANGED = (
    (
        "Transformers 5.23: `Trainer(deepspeed=)`",
        'dict or file with "auto"; stages 0 to 3 in fp32, 0, 2 and 3 in bf16; accumulation with an incomplete last '
        "window, clipping, gradient checkpointing, evaluation in between, `save_model`; resumed on another number of "
        "ranks and at another stage; `from_pretrained` under `zero.Init`; a second Trainer over the model",
        "test_transformers.py",
    ),
    (
        "Accelerate 1.15: `DeepSpeedPlugin`",
        "`prepare`, `accumulate`, `clip_grad_norm_`, a torch schedule, `save_state`, `load_state`, `get_state_dict`, "
        "`unwrap_model`; stages 0, 2, 3",
        "test_accelerate.py",
    ),
    ("PEFT 0.21: LoRA under the Trainer", "stages 2 and 3; the adapter is read by a plain model", "test_peft.py"),
    (
        "TRL 1.16: `SFTTrainer`, `DPOTrainer`, `GRPOTrainer`",
        "stages 2 and 3; DPO with a reference model, GRPO without one",
        "test_trl.py",
    ),
    (
        "Lightning Fabric 2.6: `DeepSpeedStrategy`",
        "stages 2 and 3; `init_module`, `setup`, `optimizer.step()`, `save`, `load`",
        "test_lightning.py",
    ),
    (
        "Lightning's Trainer 2.6: `DeepSpeedStrategy`",
        "stages 2, 3 and 3 with offload; accumulation, clipping, validation, checkpoints",
        "test_lightning.py",
    ),
    (
        "a loop of one's own",
        "`initialize`, `backward`, `step`, boundaries set by hand, `save_checkpoint(client_state=)`, "
        "`load_checkpoint`, `zero_to_fp32`, `ds_to_universal`, `zero.Init`, `GatheredParameters`, "
        "`safe_get/set_full_fp32_param`, `safe_get/set_full_optimizer_state`, `set_z3_leaf_modules`, `offload_states`, "
        "`RepeatingLoader`, `checkpointing`",
        "test_engine.py",
    ),
    (
        "scripts like DeepSpeed's examples",
        "CIFAR-10 (also `--moe`, bf16, fp16), BERT with LAMB and fp16 (saved, resumed), a GAN of two engines in fp16, "
        "a residual network with `StepLR` (saved, resumed at another stage)",
        "test_scripts.py",
    ),
    (
        "how gradients come about",
        "plain `backward`, gradients given for outputs, several backwards, `no_sync`, boundaries by hand, "
        "`scale_wrt_gas`, `engine.scale`, `safe_get/set_full_grad`, their norm at every stage; freezing; parts of a "
        "checkpoint, another number of ranks; schedules, loaders",
        "test_behaviour.py",
    ),
    (
        "the same training beside DeepSpeed 0.19.8",
        "50 steps at stages 0 to 3: fp32 losses, norms and weights within 1e-6; bf16 no further from it than its "
        "stages are from each other (on a CPU it refuses fp16)",
        "test_parity.py",
    ),
    ("`deepspeed.moe`", "top-1 and top-2 gating, param groups of experts", "test_experts.py"),
    ("the launcher", "`--num_gpus`, `--include`, `--hostfile`, `--module`, `--local_rank`", "test_launching.py"),
)
"""What runs as it is, what of it was tried, and the test (below tests/compat)."""

DIFFERENCES = (
    ("`deepspeed.zero.Init`", "every rank holds 1/world of a parameter as soon as it is made",
     "the model is whole on every rank until `initialize`, and a notice says so; `shardline.empty_weights()` is never"),
    ("reading a sharded parameter at stage 3", "an empty tensor", "`SealedError`, with what to call"),
    ("`state_dict()` of the model at stage 3", "empty tensors",
     "tensors on meta, of true shapes and without elements; a notice says so"),
    ("`GatheredParameters` without `modifier_rank`, and a change in it", "the change is lost", "`UsageError`"),
    ("`optimizer` that `initialize` returns", "a ZeRO optimizer",
     "a proxy whose `step()` is `engine.step()`; `engine.optimizer` is torch's, whose own `step()` raises"),
    ("`engine.step()` without a backward", "does nothing, or fails inside", "`UsageError`"),
    ("`MoE` in evaluation", "draws random numbers as in training", "draws none"),
    ("`MoE` with `ep_size` above 1", "experts in groups of ranks", "refused: stage 3 divides them over all ranks"),
    ("`safe_*_local_*`", "1/world of each parameter", "refused: ranks hold whole parameters and fragments"),
    ("masters in bf16 and fp16", "start from the rounded weights", "start from the weights as they were given"),
    ("order of `training_data`", "`DistributedSampler`", "Shardline's loader: reshuffled each epoch, nothing repeated"),
    ("`save_checkpoint`", "DeepSpeed's files",
     "Shardline's: any layout loads any other; `shardline checkpoint import-deepspeed` reads DeepSpeed's"),
    ("a tag that differs between ranks", "a warning", "`DisagreementError`"),
    ("unknown keys of the configuration", "ignored at the top level", "the same, and named once; below it refused"),
    ("`offload_param` on an accelerator", "weights rest in host memory",
     "accepted with a notice of the bytes that stay on the device"),
    ("Apex, compression in the configuration", "act", "refused when they are switched on"),
    ("names in TensorBoard, W&B, Comet and CSV files", "`Train/Samples/lr`, by samples",
     "`train/lr`, by step, with `train/samples` beside it: `docs/observing.md` has all"),
    ("`--bind_cores_to_rank`", "binds", "accepted with a notice: each rank gets its share of threads"),
    ("`--hostfile` of several hosts", "starts all of them by ssh",
     "start the command on each, with `--no_ssh --node_rank R --master_addr HOST`"),
    ("`Tensor.ds_status` once an engine of stage 3 was made", "on its parameters",
     "AVAILABLE on every tensor: what reads a sharded one in a forward gathers it. There is no `ds_id`, `ds_shape`, "
     "`ds_numel`: shapes are true"),
    ("`save_16bit_model`", "`pytorch_model.bin`", "the same; safetensors where the name says so"),
    ("`import deepspeed` beside a real DeepSpeed", "", "the real one, unless `--as-deepspeed` was given"),
)  # fmt: skip
"""What it is about, in DeepSpeed, here."""

HEAD = f"""# From DeepSpeed without an edit

<!-- Made by `python -m tests.compat.document`; the tests hold it to the tables of shardline.compat.deepspeed. -->

A script that says `import deepspeed`, or a trainer that is built on it, runs on Shardline as it is:

    shardline run --as-deepspeed train.py --deepspeed --deepspeed_config ds.json
    python -m shardline.compat.deepspeed train.py ...          # one process, or under another launcher

or with one line changed: `import shardline.compat.deepspeed as deepspeed`. In that process and in those that it starts,
`import deepspeed`, `from deepspeed.x.y import z` and `importlib.metadata` find Shardline under the names of DeepSpeed
{VERSION}, and a line at the start says so. Elsewhere nothing changes: a real DeepSpeed is never shadowed unasked.

`shardline run --as-deepspeed` takes the options of DeepSpeed's launcher, and like it gives the script `--local_rank=N`.
A script that does not know that option is started with `--no_local_rank`; those on Transformers or Accelerate are.

A second `train()` of one Trainer fails in Transformers 5.23 beside any DeepSpeed, since Accelerate has let go of the
engine. Call `trainer.accelerator.free_memory()`, then make new `TrainingArguments` and a new Trainer over
`trainer.model`.

To move to Shardline's own calls instead, see [migration.md](migration.md#from-deepspeed).

## On a CPU

Three clients keep any DeepSpeed from a CPU. Accelerate takes each rank for the only one unless it is given the backend
(here `init_distributed` raises, and says how: `accelerate.PartialState(backend="gloo")` with
`ACCELERATE_USE_DEEPSPEED=true`), Transformers refuses bf16, and Lightning demands a GPU. The tests patch them:
`tests/compat/clients/on_cpu.py`, and the strategy of `tests/compat/clients/fabric.py`.
"""


def rows(header: tuple[str, ...], cells: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def refused() -> list[tuple[str, str]]:
    """Names by reason, in the order of the tables."""
    by_reason: dict[str, list[str]] = {}
    for module, names in refusals.NAMES.items():
        for name, reason in names.items():
            by_reason.setdefault(reason, []).append(f"`{f'{module}.{name}'.lstrip('.')}`")
    for module, reason in refusals.MODULES.items():
        by_reason.setdefault(reason, []).append(f"`{module}.*`")
    for name, reason in NOT_OFFERED.items():
        by_reason.setdefault(reason, []).append(f"`engine.{name}`")
    return [(", ".join(names), reason) for reason, names in by_reason.items()]


def page() -> str:
    """The whole page."""
    offered = sorted(
        (f"`deepspeed.{module}`".replace(".`", "`"), ", ".join(f"`{name}`" for name in sorted(names)))
        for module, names in table.NAMES.items()
        if names
    )
    tried = ((client, what, f"`tests/compat/{test}`") for client, what, test in UNCHANGED)
    return "\n".join([
        HEAD,
        "## Runs unchanged\n",
        "Losses and weights are those of a run without DeepSpeed in one process, in fp32. `make test-deepspeed` runs "
        "it,\nwith the real packages.\n",
        rows(("client", "tried", "test"), tried),
        "## Differs, and how\n",
        rows(("", f"DeepSpeed {VERSION}", "here"), DIFFERENCES),
        "What the engine itself does otherwise is in [migration.md](migration.md#from-deepspeed).\n",
        "## Refused, and what instead\n",
        "These can be imported. Their use raises one error, with the reason.\n",
        rows(("name", "reason, and what instead"), refused()),
        "## Names\n",
        "`deepspeed.comm` is `torch.distributed` with `init_distributed`, `get_local_rank`, `get_world_group`.\n"
        "`deepspeed.zero`, `deepspeed.checkpointing` and `deepspeed.accelerator` are modules of their own. All else:\n",
        rows(("module", "names"), offered),
    ])  # fmt: skip


if __name__ == "__main__":
    print(page(), end="")
