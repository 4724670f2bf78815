"""The page docs/migrate-from-deepspeed.md, from the tables of the stand-in and the rows that stand at the tests.

python -m tests.compat.document > docs/migrate-from-deepspeed.md
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from shardline.compat.deepspeed import refusals, table
from shardline.compat.deepspeed._version import VERSION
from shardline.compat.deepspeed.engine import NOT_OFFERED
from tests.compat import rows

for file in sorted(Path(__file__).parent.glob("test_*.py")):
    if file.stem != "test_document":
        import_module(f"tests.compat.{file.stem}")  # its rows

UNCHANGED = sorted(rows.UNCHANGED, key=lambda row: (row.test.partition("::")[0], row.line))
DIFFERENCES = sorted(rows.DIFFERENCES, key=lambda row: (row.test.partition("::")[0], row.line))

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

A second `train()` of one Trainer fails in Transformers 5.23 with any DeepSpeed, since Accelerate has let go of the
engine. Say `trainer.model_wrapped = trainer.model` between the two: it makes a new one then.

To move to Shardline's own calls instead, see [migration.md](migration.md#from-deepspeed).

## On a CPU

Three clients keep any DeepSpeed from a CPU. Accelerate takes each rank for the only one unless it is given the backend
(here `init_distributed` raises, and says how: `accelerate.PartialState(backend="gloo")` with
`ACCELERATE_USE_DEEPSPEED=true`), Transformers refuses bf16, and Lightning demands a GPU. The tests patch them:
`tests/compat/clients/on_cpu.py`, and the strategy of `tests/compat/clients/fabric.py`.
"""


def lines_of(header: tuple[str, ...], cells: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tried() -> list[tuple[str, str, str]]:
    """Each client with what was tried of it and the files of its tests."""
    clients: dict[str, tuple[list[str], list[str]]] = {}
    for row in UNCHANGED:
        what, files = clients.setdefault(row.client, ([], []))
        what.append(row.tried)
        if (file := f"`tests/compat/{row.test.partition('::')[0]}`") not in files:
            files.append(file)
    return [(client, "; ".join(what), ", ".join(files)) for client, (what, files) in clients.items()]


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
    differing = ((row.what, row.there, row.here, f"`{row.test}`") for row in DIFFERENCES)
    return "\n".join([
        HEAD,
        "## Runs unchanged\n",
        "Losses and weights are those of a run without DeepSpeed in one process, in fp32. `make test-deepspeed` runs "
        "it,\nwith the real packages.\n",
        lines_of(("client", "tried", "test"), tried()),
        "## Differs, and how\n",
        lines_of(("", f"DeepSpeed {VERSION}", "here", "test"), differing),
        "What the engine itself does otherwise is in [migration.md](migration.md#from-deepspeed).\n",
        "## Refused, and what instead\n",
        "These can be imported. Their use raises one error, with the reason.\n",
        lines_of(("name", "reason, and what instead"), refused()),
        "## Names\n",
        "`deepspeed.comm` is `torch.distributed` with `init_distributed`, `get_local_rank`, `get_world_group`.\n"
        "`deepspeed.zero`, `deepspeed.checkpointing` and `deepspeed.accelerator` are modules of their own. All else:\n",
        lines_of(("module", "names"), offered),
    ])  # fmt: skip


if __name__ == "__main__":
    print(page(), end="")
