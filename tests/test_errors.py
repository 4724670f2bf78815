"""The error tree: codes, and the pages that explain them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

import shardline
from shardline.errors import ShardlineError, text_of

DOCS = Path(__file__).parents[1] / "docs"
CLASSES = [
    value
    for name in shardline.__all__
    if isinstance(value := getattr(shardline, name), type)
    and issubclass(value, ShardlineError)
    and value is not ShardlineError
]


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_ends_with_its_code(cls):
    error = cls("The key is unknown.")
    assert str(error) == f"The key is unknown. [{cls.code}]"
    assert error.message == text_of(error) == "The key is unknown."
    assert str(cls("Two problems:\n  - one\n  - two")).splitlines()[-1] == f"[{cls.code}]"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (cls, str(error))


def test_a_code_means_one_class():
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes) == 11
    assert all(re.fullmatch(r"SL\d{3}", code) for code in codes)
    assert all("code" in vars(cls) for cls in CLASSES)


def test_what_has_no_page_of_its_own():
    assert (str(ShardlineError("as it is")), ShardlineError("").page) == ("as it is", "")
    assert text_of(ValueError("not ours")) == "not ours"

    class Mute(Exception):
        def __str__(self):
            raise KeyError("no text")

    assert text_of(Mute()) == "(its text cannot be had: KeyError)"

    class Special(shardline.CheckpointError):
        """A subclass is explained where its base is."""

    assert Special("").page == shardline.CheckpointError("").page


@pytest.mark.parametrize("cls", CLASSES)
def test_each_code_has_a_page_and_a_line_in_the_index(cls):
    name, _, anchor = cls("").page.partition("#")
    page = (DOCS / name).read_text(encoding="utf-8")
    assert page.startswith(f"# {cls.__name__} {{#{anchor}}}\n")
    assert "| what the message says | cause | what to do |" in page
    index = (DOCS / "errors" / "README.md").read_text(encoding="utf-8")
    assert f"| [{cls.code}]({Path(name).name}#{anchor}) | `shardline.{cls.__name__}` |" in index


def test_pages_are_of_classes_that_exist():
    named = {path.stem for path in (DOCS / "errors").glob("*.md")} - {"README"}
    assert named == {cls.__name__ for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES)
def test_what_a_page_quotes_is_said_somewhere(cls):
    """Messages in the first column, in pieces between ``...``, stand in the package's text or are the system's."""
    folder = Path(shardline.__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]
    said = re.sub(r"""["']\s*\n\s*f?["']""", "", "\n".join(texts)).lower()
    page = (DOCS / "errors" / f"{cls.__name__}.md").read_text(encoding="utf-8").partition("|---|---|---|\n")[2]
    column = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    quotes = [quote for cell in column for quote in re.findall(r"`([^`]+)`", cell) if " " in quote]
    pieces = {piece.strip(" ;,?") for quote in quotes for piece in quote.split("...")} - {"", "No space left"}
    assert quotes and [piece for piece in sorted(pieces) if piece.lower() not in said] == []
