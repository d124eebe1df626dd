"""Run the sweep: python -m every_model [MODEL_TYPE ...] [--out FILE]

Writes a record of all models (by default benchmarks/results/families/<version of transformers>.json, only without
MODEL_TYPE), prints a line a model, and fails where one is wrong or crashes.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import transformers

from every_model.sweep import BROKEN, RESULTS, entries, record, sweep, write


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(prog="python -m every_model", description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")  # of models that transformers has deprecated, hundreds
    every = entries()
    unknown = set(chosen.model_types) - {entry.model_type for entry in every}
    if unknown:
        parser.error(f"transformers {transformers.__version__} has no model type {', '.join(sorted(unknown))}")
    todo = [entry for entry in every if not chosen.model_types or entry.model_type in chosen.model_types]
    rows, start = [], time.monotonic()
    for row in sweep(todo):
        rows.append(row)
        without = "".join(f"\n    {name}: {why}" for name, why in row.without.items())
        print(f"{row.model_type} ({row.model_class}, {row.inputs}): {row.status} {row.words}{without}", flush=True)
    counts = Counter(row.status for row in rows)
    print(f"{len(rows)} models in {time.monotonic() - start:.0f} s: {dict(counts)}")
    out = chosen.out or (None if chosen.model_types else RESULTS / f"{transformers.__version__}.json")
    if out is not None:
        write(out, record(rows))
    sys.exit(any(row.status in BROKEN for row in rows))


if __name__ == "__main__":
    main()
