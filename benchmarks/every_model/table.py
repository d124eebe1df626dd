"""The README's table of models, from the record of the newest transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from packaging.version import Version

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
    models = record["models"]
    checks = " ".join(f"*{name}*: {text}" for name, text in record["checks"].items())
    works = sum(model["status"].startswith("works") for model in models)
    parts = [
        f"Every entry of the mappings of transformers {record['transformers']} for models that read images (or audio) "
        f"and for causal language models, {len(models)} in all, built tiny and checked on a processor with torch "
        f"{record['torch']} (`make families`): {works} work. {checks}"
    ]
    for vision, title in ((True, "reads images or audio"), (False, "causal language model")):
        chosen = [model for model in models if model["vision"] == vision]
        groups: dict[str, list[str]] = {}
        for model in sorted(chosen, key=_order):
            groups.setdefault(_outcome(model), []).append(model["model_type"])
        rows = [f"| {outcome} | {len(names)} | {_listed(names)} |" for outcome, names in groups.items()]
        parts.append("\n".join([f"| {title} | | |", "| --- | --- | --- |", *rows]))
    parts.append(_exceptions(models))
    return "\n\n".join(parts)


def _order(model: dict[str, Any]) -> tuple[int, int, str, str]:
    kinds = ("works", "works with image_mask=", "refused", "not in transformers")
    return kinds.index(model["status"]), list(INPUTS).index(model.get("inputs", "text")), _outcome(model), ""


def _outcome(model: dict[str, Any]) -> str:
    if model["status"] == "works":
        return INPUTS[model["inputs"]]
    if model["status"] == "refused":
        return f"refused: {_reason(model['words'])}"
    if model["status"] == "not in transformers":
        return "transformers itself cannot build it, or run it with a DynamicCache"
    return "works with `image_mask=`, which it asks for"


def _reason(words: str) -> str:
    """The first sentence of an error, without the model's name."""
    reason = words.partition(": ")[2].removeprefix("lookm: ")
    return reason.partition(" is not supported: ")[2] or reason.partition(". ")[0]


def _exceptions(models: list[dict[str, Any]]) -> str:
    left_out: dict[str, list[str]] = {}
    for model in models:
        for name in model.get("without", {}):
            left_out.setdefault(name, []).append(model["model_type"])
    return (
        "Without one check, because transformers itself does not pass it: "
        + "; ".join(f"*{name}* {_listed(names)}" for name, names in left_out.items())
        + "."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
