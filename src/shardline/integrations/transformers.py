"""Transformers' ``Trainer``, and any trainer built on it, over an engine of :func:`shardline.shard`.

trainer = Trainer(model, arguments, train_dataset=data, shardline={"zero_optimization": {"stage": 3}})

class MyTrainer(ShardlineMixin, trl.SFTTrainer): ...

model = from_pretrained(AutoModelForCausalLM, "folder")  # sharded over the ranks as it is read
"""

from __future__ import annotations

from typing import Any

from shardline.engine.in_place import InPlaceEngine
from shardline.integrations import require

require("transformers", "shardline.integrations.transformers")

import transformers  # noqa: E402

from shardline.integrations.accelerate import Accelerator, holds_engine, load_engines  # noqa: E402
from shardline.integrations.pretrained import from_pretrained  # noqa: E402
from shardline.sharding.sharded_param import sharded_param_of  # noqa: E402

__all__ = ["ShardlineMixin", "Trainer", "from_pretrained"]


class ShardlineMixin:
    """To be put before a subclass of ``transformers.Trainer``: it trains on an engine.

    Batch sizes, accumulation, clipping, precision (``bf16=True`` is autocast), schedule and compilation are those of
    the ``TrainingArguments``. A checkpoint holds the whole model as the trainer saves it, and the engine's own
    checkpoint instead of ``optimizer.pt``: it resumes at any stage and number of ranks.

    Args:
        *args: those of the trainer.
        shardline: the configuration of :func:`shardline.shard`: a dict, a path or a ``shardline.Config``.
        **kwargs: those of the trainer.
    """

    accelerator: Accelerator
    model: Any
    args: Any

    def __init__(self, *args: Any, shardline: Any = None, **kwargs: Any) -> None:
        self._shardline_config = shardline
        self._whole: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)

    @property
    def engine(self) -> InPlaceEngine | None:
        """The engine, from the beginning of ``train()``."""
        return self.accelerator.engine_of(self.model)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        Accelerator.of(self.accelerator, self._shardline_config)

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        if not any(
            sharded_param_of(param) is not None for param in model.parameters()
        ):  # else the engine moves the parts
            super()._move_model_to_device(model, device)  # type: ignore[misc]

    # -- generating ---------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's. Where it generates and weights are sharded, ranks go on until the last one has ended."""
        return super().evaluate(*args, **self._generation() | kwargs)  # type: ignore[misc]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; see :meth:`evaluate`."""
        return super().predict(*args, **self._generation() | kwargs)  # type: ignore[misc]

    def _generation(self) -> dict[str, Any]:
        """What a trainer that predicts by generating (``Seq2SeqTrainer``) gives ``generate``."""
        generates = getattr(self.args, "predict_with_generate", False)
        return (
            {"synced_gpus": True} if generates and self.engine is not None and self.engine.weights_are_sharded else {}
        )

    # -- saving -------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, as the trainer does. Collective."""
        if self.engine is not None:
            self._whole = self.engine.full_state_dict(rank0_only=not self.args.save_on_each_node)
        try:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        finally:
            self._whole = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, self._whole if state_dict is None else state_dict)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self.accelerator.saving(self.model, output_dir, frozen=not hasattr(self.model, "peft_config")):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    # -- loading ------------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.engine is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        elif not holds_engine(resume_from_checkpoint):  # else weights come with the optimizer's state
            with self.engine.gathered_parameters(write=True):
                super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not holds_engine(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        with self.accelerator.loading(self.model, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        best, engine = self.state.best_model_checkpoint, self.engine  # type: ignore[attr-defined]
        if engine is None:
            super()._load_best_model()  # type: ignore[misc]
        elif holds_engine(best):
            load_engines([engine], best, weights_only=True)
        else:
            with engine.gathered_parameters(write=True):
                super()._load_best_model()  # type: ignore[misc]


class Trainer(ShardlineMixin, transformers.Trainer):
    """``transformers.Trainer`` on an engine; see :class:`ShardlineMixin`."""
