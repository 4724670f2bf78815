"""What is published: the source distribution is complete, and the wheel made from it works where nothing else is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import shardline

ROOT = Path(__file__).parents[1]
MADE = {"build", "data", "dist", "runs", "wheels"}
"""What targets leave in the root of a folder of work."""
STAND_IN = "shardline/compat/deepspeed/path/deepspeed-0.19.8.dist-info/METADATA"
"""What importlib.metadata finds where Shardline stands in for DeepSpeed."""


def left_out(folder: str, names: list[str]) -> set[str]:
    made = MADE if Path(folder) == ROOT else set()
    return {name for name in names if name in made or name[0] == "." or name.endswith(("__pycache__", ".egg-info"))}


def backend(call: str, source: Path, out: Path) -> Path:
    """What ``python -m build --no-isolation`` asks of setuptools; the file that it made."""
    code = f"import setuptools.build_meta as backend; print(backend.{call}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(Names in the source distribution, the wheel that was made from it)."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "work", ignore=left_out)
    sdist = backend("build_sdist", folder / "work", folder)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(folder, filter="data")
    return names, backend("build_wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


def test_the_source_distribution_is_complete(built):
    names, _ = built
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "src" / "shardline").rglob("*.py")}
    assert package - names == set()
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "src/shardline/py.typed"} <= names
    assert {"tests/conftest.py", "docs/engine.md", "docs/images/engine.svg", "mkdocs.yml", "constraints.txt"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_holds_the_package_and_nothing_else(built):
    _, wheel = built
    assert wheel.name == f"shardline-{shardline.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(top for top in {name.partition("/")[0] for name in names} if top.endswith(".dist-info"))
        metadata = archive.read(f"{info}/METADATA").decode()
    files = (ROOT / "src" / "shardline").rglob("*")
    package = {path.relative_to(ROOT / "src").as_posix() for path in files if path.suffix in (".py", ".js", ".css")}
    assert {name for name in names if not name.startswith(info)} == package | {"shardline/py.typed", STAND_IN}
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in names)
    assert "# Shardline" in metadata  # the README is its description
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert {"Documentation", "Repository", "Changelog"} <= set(urls)
    assert all(f"Project-URL: {name}, {address}" in metadata for name, address in urls.items())


def test_the_wheel_trains_where_nothing_else_is_installed(built, tmp_path):
    """An environment of its own, with the dependencies of this one beside it; ``make dist`` installs those, too."""
    _, wheel = built
    venv.create(tmp_path / "empty", symlinks=True)
    python = tmp_path / "empty" / "bin" / "python"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*command: object) -> str:
        done = subprocess.run(
            [*map(str, command)], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A folder that a .pth file names has its own .pth files left alone: an editable install there is not seen.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    number, place = run(python, ROOT / "tests" / "one_step.py").split()
    assert number == shardline.__version__ and Path(place).is_relative_to(site)
    command = python.with_name("shardline")
    run(command, "run", "--nproc", 2, ROOT / "tests" / "one_step.py")
    assert run(command, "--version") == f"shardline {number}\n"
