from pathlib import Path

from shardline.config.catalogue import catalogue, split
from shardline.config.document import document
from shardline.config.schema import Config

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == document(), "run: python -m shardline.config.document > docs/config.md"


def test_every_key_is_on_the_page():
    text = document()
    for path in catalogue(Config):
        assert f"`{path}`" in text or f"| `{split(path)[1]}` |" in text, path
