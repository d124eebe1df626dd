"""What few bits cost in answers: python benchmarks/quality/formats.py

The policy auto at 20 %, whole and in every format, on the test beds' units for the end; written after every cell to
benchmarks/quality/results/formats.json, and not measured again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from quality.beds.bed import FULL, Bed
from quality.beds.demo import DEMO
from quality.beds.detail import DETAIL
from quality.beds.text import TEXT, why_missing
from quality.measure import write
from quality.table import BEDS, RESULTS, cells_of, difference, full_of, of
from tables import markdown

from lookm import POLICIES
from lookm.options import FORMATS

FILE = RESULTS / "formats.json"
POLICY, BUDGET = "auto", 0.2


def measure(beds: Sequence[Bed], file: Path = FILE) -> None:
    """The full cache, the policy whole, and the policy in every format, on every bed."""
    cells = cells_of(file)
    wanted: list[tuple[str, str | None, float]] = [("full", None, 1.0), (POLICY, None, BUDGET)]
    wanted += [(POLICY, name, BUDGET) for name in FORMATS]
    for bed in beds:
        for policy, quantize, budget in wanted:
            key: dict[str, Any] = {"bed": bed.name, "policy": policy, "quantize": quantize, "budget": budget}
            if any(all(cell[field] == value for field, value in key.items()) for cell in cells):
                continue
            chosen = FULL if policy == "full" else POLICIES[policy]
            options = {} if quantize is None else {"quantize": quantize}
            cells.append(key | {"units": bed.measure(chosen, budget, "final", **options)})
            write(file, cells)
            print(json.dumps(key))


def formats() -> str:
    """A format a row: share of the full cache's bytes, the metrics, and how they differ from those of whole pairs."""
    found, rows = cells_of(FILE), []
    for bed in dict.fromkeys(cell["bed"] for cell in found):
        own = [cell for cell in found if cell["bed"] == bed]
        full = full_of(own)
        held = sum(unit["bytes"] for unit in full["units"])
        whole = next(cell for cell in own if cell["policy"] == POLICY and cell["quantize"] is None)
        for cell in own:
            row = [bed, "full cache" if cell is full else cell["quantize"] or "whole"]
            row.append(f"{100 * sum(unit['bytes'] for unit in cell['units']) / held:.1f} %")
            for metric in BEDS[bed].metrics:
                text = metric.shown(of(cell, metric, full))
                if cell["quantize"] is not None:
                    mean, low, high = difference(cell, whole, metric)
                    digits = max(1, metric.digits)
                    text += f"; {mean:+.{digits}f} ({low:+.{digits}f}, {high:+.{digits}f})"
                row.append(text)
            rows.append(row)
    return markdown(["bed", "pairs", "bytes", "after, or continuation", "before, or recall"], rows) if rows else ""


def main() -> None:
    torch.set_num_threads(1)
    missing = why_missing()
    if missing is not None:
        print(f"text skipped: {missing}")
    measure([DEMO, DETAIL, *([] if missing else [TEXT])])


if __name__ == "__main__":
    main()
