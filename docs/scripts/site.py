"""What `make docs` does beside mkdocs: the project's addresses, and links to files that are no pages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(?=[)#])")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code>)")


def addresses() -> dict[str, str]:
    urls: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls


def on_config(config: Any) -> Any:
    urls = addresses()
    config.site_url, config.repo_url, config.repo_name = urls["Documentation"], urls["Repository"], "Repository"
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Let a link to a file of the repository that is not part of the site lead into the repository."""
    if page.file.src_uri == "README.md":  # the home page lists all others itself
        page.meta["hide"] = ["navigation", "toc"]
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def lead(match: re.Match[str]) -> str:
        target = (folder / match[1]).resolve()
        file = files.get_file_from_path(_in_docs(target))
        if (file and file.inclusion.is_included()) or not target.exists() or not target.is_relative_to(ROOT):
            return match[0]
        return f"{config.repo_url}/blob/main/{target.relative_to(ROOT).as_posix()}"

    return LINK.sub(lead, markdown)


def _in_docs(target: Path) -> str:
    docs = ROOT / "docs"
    return target.relative_to(docs).as_posix() if target.is_relative_to(docs) else ""


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name things as ``:func:`name```, which Markdown does not know: keep the name."""
    return ROLE.sub("", html)
