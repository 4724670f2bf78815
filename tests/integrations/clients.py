"""What the tests of the integrations share: skips, tiny models without a network, figures to compare."""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

STAGES = (0, 1, 2, 3)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
os.environ |= OFFLINE  # read when the packages are imported, in the ranks too


def needs(*packages: str) -> list[pytest.MarkDecorator]:
    """Marks of a test module that runs real packages: skipped, with the reason, where one is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    reason = f"needs {', '.join(missing)}: make test-integrations"
    return [
        pytest.mark.skipif(bool(missing), reason=reason),
        pytest.mark.timeout(400),
        pytest.mark.filterwarnings("ignore"),
    ]


def config(stage: int, **more: Any) -> dict[str, Any]:
    """Small models shard as large ones do."""
    zero = {"stage": stage, "unit_min_numel": 1, "stage3_param_persistence_threshold": 0}
    return {"zero_optimization": zero, **more}


def fresh() -> None:
    """Forget what the last case on this warm process has told Accelerate, and be quiet."""
    from accelerate.state import AcceleratorState, GradientState

    os.environ |= OFFLINE
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    warnings.simplefilter("ignore")


def under_torchrun() -> None:
    """Lightning finds the processes that are there."""
    os.environ["TORCHELASTIC_RUN_ID"] = "tests"


def norms(state: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.double().norm().item() for name, value in state.items()}


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# -- a regression, for loops -------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def dataset() -> TensorDataset:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.sum(1, keepdim=True))


def rows_of_rank() -> list[tuple[Tensor, Tensor]]:
    """The data, 4 rows at a time, of which this rank has its share."""
    rank, (x, y) = int(os.environ.get("RANK", 0)), dataset().tensors
    return [(a[rank :: world()], b[rank :: world()]) for a, b in zip(x.split(4), y.split(4), strict=True)]


def means(loss: Tensor) -> float:
    """The mean of ``loss`` over the ranks."""
    loss = loss.detach().clone()
    if world() > 1:
        dist.all_reduce(loss)
    return float(loss) / world()


# -- a language model, for trainers ------------------------------------------------------------------------------------

SAMPLES, LENGTH, VOCAB = 44, 12, 32


def texts(seed: int, count: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def gpt(**more: Any) -> Any:
    """A GPT-2 of two layers, without dropout, so that one process and several draw nothing different."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": VOCAB, "n_positions": LENGTH}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **none, bos_token_id=0, eos_token_id=0, **more))


def lora(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    adapter = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True)
    return get_peft_model(model, adapter)


def common(out: str, **more: Any) -> dict[str, Any]:
    """Arguments of a trainer: 11 batches of 4 in windows of 2, so that the last window of an epoch holds one."""
    return {
        "output_dir": out,
        "per_device_train_batch_size": 4 // world(),
        "per_device_eval_batch_size": 4 // world(),
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 5e-3,
        "weight_decay": 0.01,
        "warmup_steps": 2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        "save_strategy": "no",
        **more,
    }


def logged(trainer: Any) -> dict[str, Any]:
    """What a trainer has logged, and the whole weights."""
    logs, engine = trainer.state.log_history, getattr(trainer, "engine", None)
    state = trainer.model.state_dict() if engine is None else engine.full_state_dict()
    return {
        "losses": [each["loss"] for each in logs if "loss" in each],
        "norms": [float(each["grad_norm"]) for each in logs if "grad_norm" in each],
        "rates": [each["learning_rate"] for each in logs if "learning_rate" in each],
        "eval": [each["eval_loss"] for each in logs if "eval_loss" in each],
        "weights": norms(state),
        "steps": trainer.state.global_step,
    }


def assert_alike(found: dict[str, Any], wanted: dict[str, Any], rel: float = 1e-5) -> None:
    """The same figures."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=rel, abs=rel), name
