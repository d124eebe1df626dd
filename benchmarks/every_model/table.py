"""The README's table of models, from the record of the newest transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from packaging.version import Version
from tables import markdown

RESULTS = Path(__file__).parent.parent / "results" / "families"
INPUTS = {
    "pixels": "works, checked with pixels",
    "placeholders": "works, checked with placeholder ids alone",
    "text": "works, checked with text",
}


def newest() -> dict[str, Any]:
    """The record of the newest transformers."""
    path = max(RESULTS.glob("*.json"), key=lambda path: Version(path.stem))
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def coverage() -> str:
    """What was checked, then a row of model types for each thing that became of them."""
    record = newest()
    models = sorted(record["models"], key=_order)
    vision = [model for model in models if model["vision"]]
    text = [model for model in models if not model["vision"]]
    checks = "\n".join(f"- {name}: {meaning}" for name, meaning in record["checks"].items())
    return (
        f"Every entry of the mappings of transformers {record['transformers']} for models that read images or audio and "
        "for causal language models, built from the default configuration with small sizes (what else is changed is in "
        "[specs.py](benchmarks/every_model/specs.py)), random weights, and checked on a processor with torch "
        f"{record['torch']} (`make families`). {_working(vision)} that read images or audio work, and {_working(text)} "
        f"causal language models:\n\n{checks}\n\n{_table(vision)}\n\n<details><summary>causal language models"
        f"</summary>\n\n{_table(text)}\n\n</details>\n\n{_exceptions(models)}"
    )


def _working(models: list[dict[str, Any]]) -> str:
    return f"{sum(model['status'].startswith('works') for model in models)} of {len(models)}"


def _table(models: list[dict[str, Any]]) -> str:
    groups: dict[str, list[str]] = {}
    for model in models:
        groups.setdefault(_outcome(model), []).append(model["model_type"])
    rows = [[outcome, str(len(names)), _listed(names)] for outcome, names in groups.items()]
    return markdown(["", "", "model types"], rows)


def _order(model: dict[str, Any]) -> tuple[int, int, str, str]:
    status = ("works", "works with image_mask=", "refused", "not in transformers").index(model["status"])
    checked_with = list(INPUTS).index(model["inputs"]) if model["status"] == "works" else 0
    return status, checked_with, _outcome(model), model["model_type"]


def _outcome(model: dict[str, Any]) -> str:
    if model["status"] == "works":
        return INPUTS[model["inputs"]]
    if model["status"] == "refused":
        return f"refused: {_reason(model)}"
    if model["status"] == "not in transformers":
        return "transformers itself cannot build it, or run it with a DynamicCache"
    return "works with `image_mask=`, which it asks for"


def _reason(model: dict[str, Any]) -> str:
    """The first part of an error, without the model's name."""
    reason = model["words"].partition(": ")[2].removeprefix("lookm: ")
    reason = reason.partition(" is not supported: ")[2] or reason
    first = re.split(r"\. |; |: ", reason)[0]
    return re.sub(rf" for {re.escape(model['model_type'])}$", " for it", first)


def _exceptions(models: list[dict[str, Any]]) -> str:
    left_out: dict[str, list[str]] = {}
    for model in models:
        for name in model.get("without", {}):
            left_out.setdefault(name, []).append(model["model_type"])
    return (
        "Without one of the checks, which transformers itself does not pass with a DynamicCache: "
        + "; ".join(f"*{name}* {_listed(names)}" for name, names in left_out.items())
        + "."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
