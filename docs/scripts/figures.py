"""Write the benchmark's figures into README.md, between its markers, from the report in docs/performance.md.

python docs/scripts/figures.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, REPORT = ROOT / "README.md", ROOT / "docs" / "performance.md"
MARKERS = re.compile(r"(<!-- figures: [^>]*-->\n).*?(<!-- /figures -->)", re.DOTALL)
ROWS = {
    "DDP, fused AdamW": ["ddp"],
    "ZeroRedundancyOptimizer": ["zero-redundancy"],
    "FSDP2": ["fsdp2"],
    "DeepSpeed {version}, stage 1 / 2 / 3": ["deepspeed-1", "deepspeed-2", "deepspeed-3"],
    "Shardline, stage 0 / 1 / 2 / 3": ["shardline-0", "shardline-1", "shardline-2", "shardline-3"],
}
"""A row of the README by the engines of the report that it shows."""


def measured(report: str, dtype: str) -> dict[str, tuple[str, str]]:
    """Step over compute only, and peak MB, of each engine on the GPT."""
    section = report.partition(f"### GPT of 34M parameters, {dtype}, 2 ranks\n")[2].partition("\n### ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    head = rows[0]
    step, peak = head.index("step / compute only"), head.index("peak, MB")
    return {row[0]: (row[step], row[peak]) for row in rows[2:]}


def block(report: str) -> str:
    """What stands between the markers."""
    tables = {dtype: measured(report, dtype) for dtype in ("fp32", "bf16")}
    conditions = re.search(
        r"^(\d{4}-\d\d-\d\d, .*?DeepSpeed ([\d.]+));\s(`make bench.*?`)", report, re.MULTILINE | re.DOTALL
    )
    held = re.search(r"^(\d+) of (\d+) hold\.$", report, re.MULTILINE)
    assert conditions and held, f"{REPORT} does not say where and when it was measured, or how much holds"
    lines = ["| | step, fp32 | step, bf16 | peak MB a rank, fp32 | bf16 |", "|---|---|---|---|---|"]
    for label, engines in ROWS.items():
        cells = [" / ".join(tables[dtype][name][column] for name in engines)
                 for column in (0, 1) for dtype in ("fp32", "bf16")]  # fmt: skip
        lines.append(f"| {label.format(version=conditions[2])} | {' | '.join(cells)} |")
    where = conditions[1].replace("\n", " ")
    lines += [
        "",
        f"{where}; {conditions[3]}. Of {held[2]} targets that the benchmark holds Shardline to, {held[1]} hold;",
        "[docs/performance.md](docs/performance.md) has each, and what the others miss.",
    ]
    return "\n".join(lines) + "\n"


def written(readme: str, report: str) -> str:
    """The README with the report's figures."""
    return MARKERS.sub(lambda found: found[1] + block(report) + found[2], readme)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8"), REPORT.read_text(encoding="utf-8")), encoding="utf-8")
