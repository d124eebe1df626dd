"""Policies and budgets side by side: exact match of the answers in later turns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lookm.cache import LookMCache
from lookm.demo.dialogue import converse, exact_matches, script
from lookm.demo.task import LAYOUTS, Scans, draw_prompts


@dataclass(frozen=True)
class Cell:
    """One policy at one budget. exact_match in percent of `answers` later-turn answers, by layout and together.

    kept: tokens a row and layer holds after the prompt, of `seen`; bytes: keys and values of one row in all layers.
    """

    policy: str
    budget: float | int | str
    exact_match: float
    exact_match_after: float
    exact_match_before: float
    answers: int
    seen: float
    kept: float
    bytes: float


def compare(
    model: Any,
    scans: Scans,
    policies: Sequence[str],
    budgets: Sequence[float | int | str],
    *,
    images: int,
    frames: int = 3,
    dialogues: int = 16,
    seed: int = 0,
) -> Iterator[Cell]:
    """The full cache, then every policy at every budget, all on the same prompts: `dialogues` of each layout."""
    for policy, budget in [("full", 1.0), *((policy, budget) for policy in policies for budget in budgets)]:
        generator = torch.Generator().manual_seed(seed)
        shares = {}
        for layout in LAYOUTS:
            prompt = draw_prompts(dialogues, images, layout, frames, scans, generator)
            turns = script(prompt, generator)
            dialogue = converse(model, prompt, turns, LookMCache(model, budget, policy))
            shares[layout] = exact_matches(turns, dialogue.said)[1:].float()
        layer = dialogue.report.mean()
        matches = {layout: 100 * share.mean().item() for layout, share in shares.items()}
        yield Cell(
            policy=policy,
            budget=budget,
            exact_match=sum(matches.values()) / len(matches),
            exact_match_after=matches["after"],
            exact_match_before=matches["before"],
            answers=sum(share.numel() for share in shares.values()),
            seen=layer["seen"] / dialogues,
            kept=layer["kept"] / dialogues,
            bytes=dialogue.report.bytes / dialogues,
        )


def write_cells(cells: Sequence[Cell], seed: int, path: Path) -> None:
    """The cells as JSON, with what is needed to draw the same prompts again."""
    versions = {package: version(package) for package in ("lookm-kernels", "torch", "transformers")}
    table = {"seed": seed, "versions": versions, "cells": [asdict(cell) for cell in cells]}
    path.write_text(json.dumps(table, indent=1) + "\n")
