"""The tour: every module of the package is named, and what is named exists."""

from __future__ import annotations

import re

from docs.scripts import modules


def listed() -> set[str]:
    text = (modules.ROOT / "docs" / "modules.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE))


def test_every_module_is_named():
    there = {path.relative_to(modules.PACKAGE).as_posix() for path in modules.PACKAGE.rglob("*.py")}
    assert listed() == there, "run: python docs/scripts/modules.py > docs/modules.md"


def test_the_tour_leads_through_every_room():
    tour = (
        (modules.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A tour")[2].partition("\n## ")[0]
    )
    rooms = {path.parent.name for path in modules.PACKAGE.glob("*/__init__.py")}
    assert [room for room in sorted(rooms) if f"`{room}/" not in tour] == []
    assert "`sharding/boundary.py`" in tour and "(docs/modules.md)" in tour


def test_levels_are_those_of_the_import_contract():
    document = modules.document()
    levels = [int(number) for number in re.findall(r"^## Level (\d+)$", document, re.MULTILINE)]
    assert levels == list(range(len(modules.levels()) - 1, -1, -1))
    lowest = document.partition("## Level 0\n")[2]
    assert "`errors.py`" in lowest and "engine/" not in lowest


def test_a_module_has_a_sentence():
    without = [str(path) for path in modules.PACKAGE.rglob("*.py") if not modules.sentence(path)]
    assert without == []
