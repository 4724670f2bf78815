"""What keeps the trainers from DeepSpeed on a CPU, patched: for the real one as for the stand-in."""

from __future__ import annotations

import os
from typing import Any


def use_accelerate() -> None:
    """Accelerate takes gloo only where it is named; else each rank believes that it is the only one."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def use_transformers() -> dict[str, Any]:
    """What ``TrainingArguments`` needs: it refuses bf16 on a CPU beside DeepSpeed, and the state is made already."""
    import transformers.training_args as arguments

    use_accelerate()
    arguments.is_torch_bf16_gpu_available = lambda: True
    return {"accelerator_config": {"use_configured_state": True}}
