"""Who waits for whom, from what the ranks wrote down: a paragraph for people.

Pure functions of a snapshot: the same on every rank that sees the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardline.watch.status import CHANNELS, Cell, State
from shardline.watch.words import CALLS, Phase, call_of, transfer

__all__ = ["Incident", "Seen", "find", "out_of_step", "position", "rule", "those"]


@dataclass(frozen=True)
class Seen:
    """One rank at one moment."""

    rank: int
    host: str
    pid: int
    process: str
    """``runs``, ``stopped``, ``ended``, or ``silent``: nothing comes from its host any more."""
    cells: tuple[int, ...]
    """Of its status, without the labels."""
    seconds: float
    """How long it has been where it is."""
    quiet: float = 0.0
    """How long it has written nothing new, as far as another rank saw; 0 if none did."""
    labels: tuple[tuple[int, ...], ...] = ()
    """Of its newest transfers on each channel, the newest last; empty where they are not known."""

    @property
    def waits(self) -> bool:
        return self.process == "runs" and self.cells[Cell.STATE] == State.WAITING

    @property
    def place(self) -> str:
        return f"process {self.pid} on {self.host}"

    def waits_for(self, other: Seen) -> bool:
        """Whether ``other`` has not started the transfer that this rank waits for."""
        cells = self.cells
        return self.waits and other.cells[Cell.COUNT + cells[Cell.CHANNEL]] < cells[Cell.NUMBER]


@dataclass(frozen=True)
class Incident:
    """Some ranks wait for others.

    Attributes:
        who: which ranks wait where, and for whom.
        why: what keeps those that are waited for.
        absent: ranks that are waited for and do not wait themselves.
        certain: whether this is a deadlock: every rank waits for one that waits.
    """

    who: str
    why: str
    absent: tuple[int, ...] = ()
    certain: bool = False

    @property
    def text(self) -> str:
        return f"{self.who}. {self.why}".rstrip()


def find(seen: Sequence[Seen], names: Sequence[str]) -> Incident | None:
    """What keeps the ranks that wait, if any does. ``names`` are those of the units."""
    waiting = [each for each in seen if each.waits]
    if not waiting:
        return None
    who = "; ".join(f"{_who(ranks)} {where}" for where, ranks in _by_position(waiting, names))
    awaited = [each for each in seen if any(other.waits_for(each) for other in waiting)]
    absent = [each for each in awaited if not each.waits]
    if different := _different(seen):
        step = min(each.cells[Cell.STEP] for each in seen)
        said, advice = out_of_step(step, different, names)
        return Incident(f"ranks are out of step: {said}", advice, certain=True)
    if not absent and awaited and all(any(each.waits_for(other) for other in seen) for each in waiting):
        found = ", ".join(f"{_who(ranks)} {where}" for where, ranks in _by_position(seen, names))
        said = f"ranks are out of step, and each waits for what another does not do: {found}"
        return Incident(said, rule(map(_call, seen)), certain=len(waiting) == len(seen))
    absent = absent or [each for each in seen if not each.waits]
    if not absent:
        return Incident(f"all ranks wait for a transfer that does not get through: {who}", "")
    of = ", ".join(f"rank {each.rank} ({each.place})" for each in absent)
    why = [_what_keeps(each, names) for each in absent if each.process != "silent"] + _silence(absent)
    if len(calls := {_call(each) for each in (*waiting, *absent) if each.process != "silent"}) > 1:
        why.append(rule(calls))
    return Incident(f"{who}, for {of}", " ".join(why), tuple(each.rank for each in absent))


def _different(seen: Sequence[Seen]) -> dict[int, int]:
    """The labels by rank of the first transfer that was not the same on all ranks; empty where all were, as far as it
    is known. Ranks of one host refuse such a one before it starts."""
    for channel in range(CHANNELS):
        labels: dict[int, dict[int, int]] = {}  # by number and rank
        for each in seen:
            if each.labels:
                recent, count = each.labels[channel], each.cells[Cell.COUNT + channel]
                for number, label in enumerate(recent, count - len(recent) + 1):
                    labels.setdefault(number, {})[each.rank] = label
        for _, by_rank in sorted(labels.items()):
            if len(set(by_rank.values())) > 1:
                return by_rank
    return {}


def out_of_step(step: int, labels: Mapping[int, int], names: Sequence[str]) -> tuple[str, str]:
    """Ranks start different things, after ``step`` steps: who does what, and the rule. ``labels`` are by rank."""
    said: dict[str, list[int]] = {}
    for rank, label in sorted(labels.items()):
        call = call_of(label)
        said.setdefault(f"{transfer(label, names)} in {f'{call}()' if call else 'its training'}", []).append(rank)
    ranks = ", ".join(f"{_who(ranks)} starts {what}" for what, ranks in said.items())
    return f"after step {step} {ranks}", rule(map(call_of, labels.values()))


def _silence(absent: Sequence[Seen]) -> list[str]:
    """A sentence for each host of which nothing is heard."""
    hosts: dict[str, list[Seen]] = {}
    for each in absent:
        if each.process == "silent":
            hosts.setdefault(each.host, []).append(each)
    return [
        f"Nothing has come from {host} (rank{'s' * (len(silent) > 1)} {those([each.rank for each in silent])}) for "
        f"{silent[0].seconds:.0f} s: its processes are gone or stopped, it is down, or the network to it is."
        for host, silent in hosts.items()
    ]


def _what_keeps(each: Seen, names: Sequence[str]) -> str:
    if each.process == "stopped":
        return (
            f"Rank {each.rank} is stopped, as by SIGSTOP or a debugger: `kill -CONT {each.pid}` on its host lets it "
            f"go on."
        )
    if each.process == "ended" or each.cells[Cell.STATE] == State.ENDED:
        return f"Rank {each.rank} has ended; it was last {position(each, names)}."
    return f"Rank {each.rank} has been {position(each, names)} for {each.seconds:.0f} s."


def rule(calls: Iterable[str]) -> str:
    """What must be done everywhere, where ranks are in different ``calls``; the empty one is a step."""
    found = set(calls)
    if "destroy" in found and len(found) > 1:
        return "Every rank must take the same number of steps before destroy(): did one have fewer batches?"
    if len(found) > 1:
        return f"{' and '.join(f'{name}()' for name in sorted(found - {''}))} must be called on all ranks."
    return "Every rank must take the same steps: the same forwards, backwards, steps and saves."


def _call(each: Seen) -> str:
    label = each.cells[Cell.LABEL]
    return call_of(label) if each.waits and label else CALLS[each.cells[Cell.CALL]]


def position(each: Seen, names: Sequence[str]) -> str:
    """Where a rank is, to follow "is" or "was"."""
    cells = each.cells
    done, call = cells[Cell.STEP], _call(each)
    if call:
        return f"in {call}() after step {done}"
    where = {
        Phase.OUTSIDE: f"in the script's own code after step {done}",
        Phase.FORWARD: f"in the forward of step {done + 1}",
        Phase.BACKWARD: f"in the backward of step {done + 1}",
        Phase.STEP: f"in the update of step {done + 1}",
    }[Phase(cells[Cell.PHASE])]
    return where + (f", micro-step {cells[Cell.MICRO_STEP] + 1}" if cells[Cell.MICRO_STEP] else "")


def _by_position(seen: Sequence[Seen], names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Ranks by what they do, the lowest rank first."""
    found: dict[str, list[int]] = {}
    for each in seen:
        if each.waits:
            where = f"waits in {transfer(each.cells[Cell.LABEL], names)} {position(each, names)}"
        else:
            where = f"is {position(each, names)}"
        found.setdefault(where, []).append(each.rank)
    return list(found.items())


def _who(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"each of ranks {those(ranks)}"


def those(ranks: Sequence[int]) -> str:
    """``0, 1, 2, 5`` -> ``0 to 2 and 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [word for run in runs for word in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
