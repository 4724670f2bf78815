"""What an engine made of a model: one table of its units, for a terminal, a notebook or a report."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from shardline.comm import Comm
from shardline.config import Config
from shardline.events import RunStarted
from shardline.observe.environment import environment
from shardline.plan.describe import blocks
from shardline.sharding.build import Layout
from shardline.sharding.unit import Unit

__all__ = ["Summary", "UnitRow", "amount", "start_of", "summarise"]

KINDS = ("weights", "gradients", "masters", "states")
_LEGEND = "Bytes on this rank: what rests between two steps, and the whole weights while a unit is in use."


@dataclass(frozen=True)
class UnitRow:
    """A unit of the model on this rank.

    Attributes:
        parameters, trained: elements of all its parameters, and of those that are trained.
        dtype: of its weights.
        weights: bytes that rest here between steps; full is ``full``.
        gradients: bytes of reduced gradients before a step.
        masters: bytes of fp32 masters; 0 where the weights are the masters.
        states: bytes of the optimizer's state, once it has stepped.
        full: bytes of the weights while the unit is in use.
        notes: what else is done to it: sharded, recomputed, offloaded.
    """

    name: str
    parameters: int
    trained: int
    dtype: str
    weights: int
    gradients: int
    masters: int
    states: int
    full: int
    notes: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self) | {"notes": list(self.notes)}


@dataclass(frozen=True)
class Summary:
    """Prints as a table; in a notebook it is one. Bytes are those of this rank."""

    model: str
    rows: tuple[UnitRow, ...]
    ranks: int
    device: str
    stage: int
    transport: str
    precision: str

    def __str__(self) -> str:
        head, body, total = _cells(self.rows)
        lines = [head, *body, total]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

        def line(cells: Sequence[str]) -> str:
            first, *middle, notes = (
                cell.ljust(width) if column in (0, len(head) - 1) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join([first, *middle, notes]).rstrip()

        rule = "-" * len(line(head))
        return "\n".join([self.title, _LEGEND, "", line(head), rule, *map(line, body), rule, line(total)])

    __repr__ = __str__

    @property
    def title(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{self.model}, stage {self.stage}, {self.precision}, {ranks} on {self.device}, {self.transport}"

    def _repr_html_(self) -> str:
        head, body, total = _cells(self.rows)

        def row(cells: Sequence[str], tag: str = "td") -> str:
            last = len(cells) - 1
            align = ["left" if column in (0, last) else "right" for column in range(len(cells))]
            return "".join(
                f'<{tag} style="text-align:{side};padding:2px 10px">{html.escape(cell)}</{tag}>'
                for side, cell in zip(align, cells, strict=True)
            )

        lines = "".join(f"<tr>{row(cells)}</tr>" for cells in body)
        said = f"{html.escape(self.title)}<br>{html.escape(_LEGEND)}"
        return (
            f"<p>{said}</p><table><thead><tr>{row(head, 'th')}</tr></thead><tbody>{lines}</tbody>"
            f"<tfoot><tr>{row(total, 'th')}</tr></tfoot></table>"
        )


def _cells(rows: Sequence[UnitRow]) -> tuple[list[str], list[list[str]], list[str]]:
    """Head, rows and sums, as text."""
    head = ["unit", "parameters", "trained", "dtype", *KINDS, "in use", "notes"]
    body = [
        [row.name, f"{row.parameters:,}", f"{row.trained:,}", row.dtype]
        + [amount(getattr(row, kind)) for kind in KINDS]
        + [amount(row.full), ", ".join(row.notes)]
        for row in rows
    ]
    sums = [amount(sum(getattr(row, kind) for row in rows)) for kind in KINDS]
    parameters, trained = (f"{sum(counts):,}" for counts in ([r.parameters for r in rows], [r.trained for r in rows]))
    return head, body, [f"{len(rows)} unit{'s' * (len(rows) != 1)}", parameters, trained, "", *sums, "", ""]


def amount(count: int) -> str:
    """A number of bytes for people: powers of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def summarise(model: nn.Module, layout: Layout, optimizer: Optimizer | None, config: Config, comm: Comm) -> Summary:
    """The summary of one engine as it is now."""
    again = config.activation_checkpointing
    recomputed = set(blocks(model)[:: again.every]) if again.enabled else set()
    modes = [mode for mode in ("bf16", "fp16") if getattr(config, mode).enabled]
    precision = modes[0] if modes else "fp32 under autocast" if config.torch_autocast.enabled else "fp32"
    return Summary(
        model=type(model).__name__,
        rows=tuple(_row(unit, layout, optimizer, recomputed) for unit in layout.units),
        ranks=comm.data.size,
        device=comm.device.type,
        stage=config.zero_optimization.stage,
        transport=_transport(comm),
        precision=precision,
    )


def _transport(comm: Comm) -> str:
    """How tensors travel, in words."""
    names = {
        "PeerMemoryTransport": "ranks read each other's memory",
        "AllToAllTransport": "over gloo",
        "NcclTransport": "over NCCL",
        "HostStagedTransport": "through host memory",
    }
    kind = type(comm.gathers).__name__
    return "nothing is sent" if comm.data.size == 1 else names.get(kind, kind)


def _row(unit: Unit, layout: Layout, optimizer: Optimizer | None, recomputed: set[str]) -> UnitRow:
    buckets = unit.buckets
    masters = [b.weights.master for b in unit.trainable if not b.weights.masters_are_weights]
    notes = [
        word
        for word, holds in (
            ("sharded", unit.sharded),
            ("recomputed", any(_is_within(root, recomputed) for root in unit.plan.roots)),
            ("states in host memory", unit.host is not None),
            ("frozen", not unit.trainable),
        )
        if holds
    ]
    return UnitRow(
        name=unit.name,
        parameters=sum(bucket.plan.numel for bucket in buckets),
        trained=sum(bucket.plan.numel for bucket in unit.trainable),
        dtype=", ".join(dict.fromkeys(str(bucket.plan.dtype).removeprefix("torch.") for bucket in buckets)),
        weights=sum(bucket.weights.resting.nbytes for bucket in buckets),
        gradients=sum((b.shard.states[1] - b.shard.states[0]) * b.grads.dtype.itemsize for b in unit.trainable),
        masters=sum(master.nbytes for master in masters if master is not None),
        states=0 if optimizer is None else _state_bytes(optimizer, unit, layout),
        full=sum(bucket.plan.size * bucket.plan.dtype.itemsize for bucket in buckets),
        notes=tuple(notes),
    )


def _is_within(name: str, blocks: set[str]) -> bool:
    """Whether the module ``name`` is one of ``blocks``, or a part of one."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in blocks for length in range(1, len(parts) + 1))


def _state_bytes(optimizer: Optimizer, unit: Unit, layout: Layout) -> int:
    """Of the optimizer's state of what ``unit`` holds."""
    states = [optimizer.state.get(run.param, {}) for run in layout.runs if run.bucket in unit.buckets]
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


def start_of(step: int, config: Config, comm: Comm, table: Summary) -> RunStarted:
    """The event with which a run begins, ``step`` steps having been done before."""
    return RunStarted(
        step=step,
        config=config.to_dict(),
        origins=dict(config.origins),
        environment=environment(comm.device, comm.data.size)
        | {"model": table.model, "transport": table.transport, "precision": table.precision},
        units=[row.values() for row in table.rows],
    )
