"""The README's figures are those of the benchmark's report."""

from __future__ import annotations

import re

from docs.scripts import figures


def test_the_readme_shows_the_report():
    readme, report = figures.README.read_text(encoding="utf-8"), figures.REPORT.read_text(encoding="utf-8")
    assert figures.MARKERS.search(readme)
    assert figures.written(readme, report) == readme, "run: python docs/scripts/figures.py"


def test_figures_are_taken_from_the_row_of_their_engine():
    report = figures.REPORT.read_text(encoding="utf-8")
    table = figures.block(report)
    ours = re.search(r"\| Shardline[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|", table)
    assert ours is not None
    for cell, column, section in ((1, 2, "fp32"), (2, 2, "bf16"), (3, 3, "fp32")):
        for stage, value in enumerate(ours[cell].split("/")):
            after = report.partition(f"34M parameters, {section}")[2]
            line = next(line for line in after.splitlines() if line.startswith(f"| shardline-{stage} |"))
            assert line.split("|")[column + 1].strip() == value.strip()


def test_another_report_gives_other_figures():
    readme, report = figures.README.read_text(encoding="utf-8"), figures.REPORT.read_text(encoding="utf-8")
    changed = re.sub(r"(\| shardline-3 \| \d+ \| )[\d.]+", r"\g<1>9.99", report, count=1)
    changed = re.sub(r"^\d+ of 136 hold\.", "1 of 136 hold.", changed, flags=re.MULTILINE)
    assert "9.99" in figures.written(readme, changed) and "136 targets that" in figures.written(readme, changed)
    assert ", 1 hold;" in figures.written(readme, changed)
