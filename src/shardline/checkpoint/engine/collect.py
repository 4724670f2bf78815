"""From an engine to the content of a checkpoint: tensors for this rank's file, and the manifest's body on rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from shardline.checkpoint.engine.capture import (
    capture_buffers,
    capture_tensors,
    checksums,
    merge,
    optimizer_record,
)
from shardline.checkpoint.engine.extra import capture_extra
from shardline.checkpoint.engine.randomness import RandomState
from shardline.checkpoint.engine.trainer import Trainer
from shardline.checkpoint.engine.view import EngineView
from shardline.checkpoint.format.commit import together
from shardline.checkpoint.format.content import Body, Captured, Content, buffer_entry
from shardline.checkpoint.format.values import encode, name_of
from shardline.comm import check_alike
from shardline.errors import UsageError
from shardline.plan.describe import persistent_buffers

__all__ = ["collect"]


def collect(
    trainer: Trainer, tag: str, counters: Mapping[str, int], client_state: Mapping[str, Any], *, frozen: bool
) -> Content:
    """What this rank saves of ``trainer``; its tensors are views. Collective.

    Inside an accumulation window random states, buffers and the loader's position are those of its start.

    Args:
        tag: must be the same on all ranks.
        counters: those to save.
        client_state: the user's values; rank 0's are saved.
        frozen: whether the weights of frozen parameters are saved.

    Raises:
        CheckpointError: on every rank, for a value that a checkpoint cannot hold on any.
        DisagreementError: for different tags.
    """
    engine, within, start = trainer.checkpoint_view(), trainer.in_window(), trainer.window_start
    comm = engine.comm
    buffers = start.buffers() if within else {name: b.detach() for name, b in persistent_buffers(engine.module)}
    found, bodies = Captured(), list[Body]()

    def capture() -> dict[str, Any]:
        """The part that may fail on one rank only: values that cannot be saved. Returns what ranks compare."""
        capture_tensors(found, engine, frozen=frozen)
        tensors: dict[str, Tensor] = {}
        extra = capture_extra(engine.module, tensors)  # on every rank: it may be collective
        found.tensors.update(start.loaders.to_tensors())
        if comm.data.rank == 0:
            found.tensors.update(tensors)
            bodies.append(_body(trainer, engine, counters, client_state, extra, found.tensors, within=within))
        return {"tag": tag, "loaders": start.loaders.names, "buffers": checksums(buffers)}

    everyone = together(comm.messages, "collecting the checkpoint", capture)
    check_alike(
        [
            {"the tag of the checkpoint": theirs["tag"], "the loaders registered": theirs["loaders"]}
            for theirs in everyone
        ]
    )
    writers = capture_buffers(found, buffers, [theirs["buffers"] for theirs in everyone], comm.data.rank)
    random = start.random if within and start.random is not None else RandomState.now(comm.device)
    tensors, values = random.to_tensors()
    found.tensors.update(tensors)

    def body(reports: list[dict[str, Any]]) -> Body:
        return replace(
            bodies[0],
            parameters=merge(engine, reports, frozen=frozen),
            buffers={
                name: buffer_entry(buffer.shape, name_of(buffer.dtype), writers[name])
                for name, buffer in buffers.items()
            },
            random=[report["random"] for report in reports],
        )

    return Content(found.tensors, found.report() | {"random": values}, body)


def _body(
    trainer: Trainer,
    engine: EngineView,
    counters: Mapping[str, int],
    client_state: Mapping[str, Any],
    extra_state: Mapping[str, Any],
    tensors: dict[str, Tensor],
    *,
    within: bool,
) -> Body:
    """The manifest's body as far as rank 0 knows it; the tensors of its values are added to ``tensors``."""
    scheduler, loader = trainer.lr_scheduler, trainer.training_dataloader
    if not isinstance(client_state, Mapping):
        raise UsageError(f"client_state is a {type(client_state).__name__}; it must be a dict.")
    at = trainer.window_start.position if within else None
    return Body(
        world_size=engine.comm.data.size,
        stage=trainer.config.zero_optimization.stage,
        counters=counters,
        optimizer=optimizer_record(engine, tensors),
        scheduler=None if scheduler is None else encode(scheduler.state_dict(), "scheduler", tensors),
        scaler=trainer.scaler.state_dict() if trainer.scaler.dynamic else None,
        loader=None if loader is None else loader.state_dict(at=at),
        loaders=trainer.window_start.loaders.names,
        seed=trainer.config.seed,
        config=trainer.config.to_dict(),
        client_state=encode(dict(client_state), "client_state", tensors),
        extra_state=extra_state,
        sinks=trainer.save_sinks(),
    )
