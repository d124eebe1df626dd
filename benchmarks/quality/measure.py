"""Measure policies on the test beds: python benchmarks/quality/measure.py --split final

One result file for each bed and split, under benchmarks/quality/results/, written after every cell. What is in it with
the same fields of the policy is not measured again, so an interrupted run is called once more. Beds may be measured by
several processes at once, one bed may not: each would write the file without the other's cells.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lookm import POLICIES, Policy
from lookm.policy import ALIASES, resolve_policy

sys.path.insert(0, str(Path(__file__).parents[1]))
from quality.beds.bed import FULL, Bed, Split
from quality.beds.demo import DEMO
from quality.beds.detail import DETAIL, DETAIL16
from quality.beds.text import TEXT, TEXT_BF16, why_missing
from quality.table import cells_of, file_of

BEDS: dict[str, Bed] = {bed.name: bed for bed in (DEMO, DETAIL, DETAIL16, TEXT, TEXT_BF16)}
BUDGETS = (0.5, 0.2, 0.1, 0.05)


def measure(
    bed: Bed,
    split: Split,
    wanted: Sequence[tuple[str, Policy, float]],
    file: Path,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """All cells of a result file, after those of `wanted`, (name, policy, budget), that it lacks were measured."""
    cells = cells_of(file)
    for name, policy, budget in wanted:
        # as the file has them: a tuple is a list there
        fields = json.loads(json.dumps(asdict(policy)))
        key = {"policy": name, "fields": fields, "budget": budget}
        if any(all(cell[field] == value for field, value in key.items()) for cell in cells):
            continue
        # of a policy whose defaults have changed the old figures are no longer its own
        same = {"policy": name, "budget": budget, "protect_text": policy.protect_text}
        cells = [cell for cell in cells if not all(cell[field] == value for field, value in same.items())]
        cells.append({**same, "fields": fields, "units": bed.measure(policy, budget, split)})
        write(file, cells)
        say(f"{bed.name} {split}: {name} at {budget}")
    return cells


def write(file: Path, cells: list[dict[str, Any]]) -> None:
    """At once or not at all."""
    versions = {package: version(package) for package in ("lookm-kernels", "torch", "transformers")}
    partial = file.with_suffix(".partial")
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    partial.write_text(f'{{"versions": {json.dumps(versions)}, "cells": [\n{lines}\n]}}\n')
    os.replace(partial, file)


def cells_wanted(
    policies: Sequence[str], budgets: Sequence[float], protect_text: bool
) -> list[tuple[str, Policy, float]]:
    """The full cache, then every policy at every budget; with protect_text those that have a text prior once more."""
    names = dict.fromkeys(ALIASES.get(name, name) for name in policies)
    wanted = [("full", FULL, 1.0)]
    for name in names:
        policy = resolve_policy(name, {})
        variants = [policy]
        if protect_text and policy.text_prior and not policy.uneven:
            variants.append(resolve_policy(name, {"protect_text": True}))
        wanted += [(name, variant, budget) for variant in variants for budget in budgets if policy != FULL]
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="+", choices=list(BEDS), default=list(BEDS))
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--split", choices=("tune", "final"), default="tune")
    parser.add_argument("--protect-text", action="store_true", help="policies with a text prior also so, as rows apart")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.beds:
        missing = why_missing() if name.startswith("text") else None
        if missing is not None:
            print(f"{name} skipped: {missing}")
            continue
        wanted = cells_wanted(arguments.policies, arguments.budgets, arguments.protect_text)
        measure(BEDS[name], arguments.split, wanted, file_of(name, arguments.split))


if __name__ == "__main__":
    main()
