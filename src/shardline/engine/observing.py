"""What shows an engine at work: sinks, its summary, traces."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from shardline.comm import Comm
from shardline.config import Config
from shardline.engine.outcome import Outcome
from shardline.engine.report import Reporter
from shardline.engine.trainables import Trainables
from shardline.errors import UsageError
from shardline.events import Events
from shardline.observe.profile import Profile
from shardline.observe.sinks import Sinks
from shardline.observe.summary import Summary, summarise

__all__ = ["Observing"]


class Observing:
    """The methods of an engine by which people see what it does."""

    module: nn.Module
    optimizer: Optimizer | None
    config: Config
    comm: Comm
    events: Events
    trainables: Trainables
    sinks: Sinks
    _outcome: Outcome
    _reporter: Reporter

    def attach_sinks(self, sinks: Sinks) -> None:
        """Let ``sinks`` listen until :meth:`destroy`, or the end of the process."""
        self.sinks = sinks
        sinks.attach(self.events, self._outcome.finish)

    def summary(self) -> Summary:
        """One table: units, parameters, bytes on this rank by kind, transport, what is recomputed or offloaded.

        ``print(engine.summary())`` shows it; a notebook shows it as a table. Waits for nothing.
        """
        return summarise(self.module, self.trainables.layout, self.optimizer, self.config, self.comm)

    def profile(self, steps: int = 3, dir: str | os.PathLike[str] = "profile") -> Path:
        """Trace the next ``steps`` optimizer steps of this rank by ``torch.profiler``.

        Ranges of the trace say what the engine does: phases, and gathers, reductions and refreshes with the names of
        the parameters they are of. Open the file in https://ui.perfetto.dev. Without this call nothing is slower.

        Returns:
            The file, ``dir/rank<n>.json``, which is written when the last of these steps ends.

        Raises:
            UsageError: if a profile runs, or for fewer steps than one.
        """
        self.trainables.check_trains("profile()")
        if steps < 1 or self._reporter.is_profiling:
            found = "while a profile runs" if self._reporter.is_profiling else f"with steps={steps}"
            raise UsageError(f"profile() was called {found}. Call it with at least one step, after those of the last.")
        path = Path(dir) / f"rank{self.comm.data.rank}.json"
        self._reporter.start_profile(Profile(self.trainables.layout.units, self.comm.device, steps, path))
        return path
