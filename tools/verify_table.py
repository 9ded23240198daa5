"""The largest differences that `lamella verify --all --json` found, as a Markdown table.

    lamella verify configs/run/quickstart.yaml --all --json > report.jsonl
    python tools/verify_table.py report.jsonl
"""

import json
import sys
from pathlib import Path

KINDS = ("output", "loss", "norm", "gradient", "weight", "adam")


def family(report: dict) -> tuple[str, ...]:
    """The dimensions that a layout splits over."""
    layout = report["layout"]
    words = [f"tensor {layout['tensor']}" + (" + sequence" if layout["sequence_parallel"] else "")]
    words = words if layout["tensor"] > 1 else []
    if layout["pipeline"] > 1:
        words.append(f"pipeline {layout['pipeline']}")
    if layout["expert"] > 1:
        words.append(f"expert {layout['expert']}")
    if layout["data"] > 1:
        words.append(f"data {layout['data']}")
    return tuple(words) or ("one process",)


def main() -> None:
    reports = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    families: dict[tuple[int, tuple[str, ...]], list[dict]] = {}
    for report in reports:
        families.setdefault((report["processes"], family(report)), []).append(report)
    print(f"| processes | layout | comparisons | {' | '.join(KINDS)} | equal |")
    print(f"|---|---|---|{'---|' * len(KINDS)}---|")
    for (processes, words), found in sorted(families.items(), key=lambda item: item[0][0]):
        worst = [largest(found, kind) for kind in KINDS]
        equal = "all" if all(r["passed"] for r in found) else f"{sum(r['passed'] for r in found)}"
        print(f"| {processes} | {' x '.join(words)} | {len(found)} | {' | '.join(worst)} | {equal} |")
    layouts = {json.dumps(r["layout"] | {"micro_batch": 0}) for r in reports}
    print(f"\n{len(layouts)} layouts, {len(reports)} comparisons, {sum(not r['passed'] for r in reports)} not equal.")


def largest(reports: list[dict], kind: str) -> str:
    errors = [d["error"] for r in reports for d in r["differences"] if d["kind"] == kind]
    return f"{max(errors):.0e}" if errors else "-"


if __name__ == "__main__":
    main()
