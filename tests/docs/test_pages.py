"""The documentation: what it shows runs, what it names exists."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

from shardline import Engine
from shardline.testing import run_distributed
from tests.sockets import free_port

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"(<!-- not run: [^>]*-->\n)?```python\n(.*?)```", re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
FENCED = re.compile(r"```.*?```", re.DOTALL)
LOOSE = ("README.md", "CONTRIBUTING.md")
"""Pages whose other Python blocks are shorter than what would run."""
WARM = ("docs/tutorials/", "docs/errors/", "docs/reference/", "docs/getting-started.md", "docs/extending.md")
"""Pages whose blocks `test_code.py` runs; the others make or end a process group, and need a process of their own."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    """The Python blocks of a page that are to be run."""
    return [code for note, code in BLOCK.findall(text_of(page)) if not note]


def example() -> str:
    """The whole program of the README."""
    found = re.search(r"<!-- example:.*?-->\n```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    assert found, "the README has no example"
    return found[1]


def run(code: str, folder: Path) -> str:
    """Run ``code`` as a script of its own, in an environment without a launcher's variables; what it wrote."""
    script = folder / "train.py"
    script.write_text(code)
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in launcher}
    env = clean | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"\| loss ([\d.]+) \|", printed)]


def norms(printed: str) -> list[str]:
    return re.findall(r"\| grad norm (\S+) \|", printed)


def run_as_script(script: str, port: int) -> None:
    """In a process of its own that has imported torch: run ``script`` as torchrun starts the only rank of a job."""
    dist.destroy_process_group()  # which the script makes itself
    os.environ["MASTER_PORT"] = str(port)
    runpy.run_path(script, run_name="__main__")


def run_here(code: str) -> str:
    """On a rank: run ``code``; what the engine's logger printed."""
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    logger = logging.getLogger("shardline")
    logger.addHandler(handler)
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)
    finally:
        logger.removeHandler(handler)
    names["engine"].destroy()  # type: ignore[attr-defined]
    return printed.getvalue()


def test_the_example_is_ten_lines_and_learns(tmp_path, ranks):
    code = example()
    statements = [line for line in code.splitlines() if line and not line.startswith("import ")]
    assert len(statements) <= 11
    alone = run(code, tmp_path)
    found = losses(alone)
    assert len(found) == 5
    assert found[-1] < found[0] / 4
    together = ranks(run_here, 2, code)[0]
    assert set(norms(alone)) <= set(norms(together)), "the README says that both print the same gradient norms"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in LOOSE and not page.startswith(WARM) and blocks(page)]
)
def test_blocks_run_in_order(page, tmp_path):
    """All blocks of a page in one process, as torchrun would start the only one of a job."""
    script = tmp_path / "train.py"
    script.write_text("\n".join(blocks(page)))
    run_distributed(run_as_script, 1, str(script), free_port(), timeout=100)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = FENCED.sub("", text_of(page))
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [
        target
        for target in targets
        if target and not re.match(r"[a-z]+:", target) and not ((ROOT / page).parent / target).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    """A path in code style is one of the repository's, or of the package's."""
    named = set(re.findall(r"`([\w.-]+(?:/[\w.-]+)*\.(?:py|md|toml|txt)|(?:\w+/)+)`", FENCED.sub("", text_of(page))))
    roots = [
        ROOT,
        ROOT / "src",
        ROOT / "src" / "shardline",
        (ROOT / page).parent,
        ROOT / "tests" / "checkpoint",
        ROOT / "tests" / "docs",
    ]
    yours = {"train.py", "script.py"}
    made = ("build/", "runs/", "wheels/")
    found = {name for name in named - yours if not name.startswith(made)}
    missing = [name for name in found if not any((root / name).exists() for root in roots)]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z][\w-]*):", text_of("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([a-z][\w-]*)", COMMENT.sub("", text_of(page)), re.MULTILINE))
    assert named <= targets


def test_every_page_is_in_the_navigation():
    navigation = text_of("mkdocs.yml").partition("\nnav:\n")[2]
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    decisions = [page for page in pages if re.match(r"adr/\d", page)]
    assert [page for page in pages if page not in decisions and f" {page}\n" not in navigation] == []
    assert [page for page in decisions if f"({page.removeprefix('adr/')})" not in text_of("docs/adr/README.md")] == []


def test_the_reference_has_every_method_of_the_engine():
    own = (kind for kind in Engine.__mro__ if kind not in nn.Module.__mro__)
    public = {name for kind in own for name in vars(kind) if not name.startswith("_")}
    listed = re.findall(r"^        - (\w+)$", text_of("docs/reference/engine.md"), re.MULTILINE)
    assert sorted(listed) == sorted(public)
