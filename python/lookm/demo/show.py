"""`lookm demo`: a dialogue with the full and the compressed cache side by side, a table of policies, one picture."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor
from transformers.utils import logging

from lookm.cache import LookMCache
from lookm.demo.checkpoint import load
from lookm.demo.compare import Cell, compare, write_cells
from lookm.demo.dialogue import converse, exact_matches, script
from lookm.demo.picture import draw_kept
from lookm.demo.task import LAYOUTS, Layout, draw_prompts, held_out_scans
from lookm.policy import ALIASES, POLICIES, resolve_policy
from lookm.report import format_bytes

BUDGETS = (0.5, 0.2, 0.1)
FRAMES = 3


def run(budget: float | int | str, images: int, policy: str, layout: str, out: Path, seed: int | None) -> None:
    """The whole demo; writes kept.png and table.json into `out`. ValueError for an unknown layout or policy `full`."""
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not resolve_policy(policy, {}).evicts:
        raise ValueError(f"`policy` must evict something to be compared with the full cache, got {policy!r}")
    out.mkdir(parents=True, exist_ok=True)
    seed = secrets.randbelow(10**6) if seed is None else seed
    console = Console()
    logging.disable_progress_bar()
    # with tensors this small a second thread costs more than it brings
    torch.set_num_threads(1)
    model, processor = load()
    show_dialogue(console, model, processor, budget, images, policy, layout, out / "kept.png", seed)
    budgets = list(dict.fromkeys([*BUDGETS, budget]))
    short = {name: alias for alias, name in ALIASES.items()}
    policies = [short.get(name, name) for name, each in POLICIES.items() if each.evicts]
    cells = track(
        compare(model, held_out_scans(), policies, budgets, images=images, frames=FRAMES, seed=seed),
        description="comparing policies",
        total=1 + len(policies) * len(budgets),
        console=console,
    )
    table = list(cells)
    write_cells(table, seed, out / "table.json")
    console.print(policy_table(table))
    console.print(f"written: {out / 'kept.png'}, {out / 'table.json'}")


def show_dialogue(
    console: Console,
    model: Any,
    processor: Any,
    budget: float | int | str,
    images: int,
    policy: str,
    layout: Layout,
    path: Path,
    seed: int,
) -> None:
    """One prompt, all its questions, answered from both caches; the picture of what stayed goes to `path`."""
    generator = torch.Generator().manual_seed(seed)
    prompt = draw_prompts(1, images, layout, FRAMES, held_out_scans(), generator)
    turns = script(prompt, generator)
    caches = {
        name: LookMCache(model, *what) for name, what in {"full": (1.0, "full"), policy: (budget, policy)}.items()
    }
    dialogues = {name: converse(model, prompt, turns, cache) for name, cache in caches.items()}

    tokens = prompt.input_ids.shape[1] + turns[0].question.shape[1]
    console.print(f"A prompt of {tokens} tokens, its first question included (lookm demo --seed {seed}):")
    console.print(Text(prompt.text(0), style="dim"))
    table = Table(
        *(Column(heading, overflow="fold") for heading in ("question", "truth", *(f"{name} cache" for name in caches)))
    )
    right = {name: exact_matches(turns, dialogue.said)[:, 0].tolist() for name, dialogue in dialogues.items()}
    for index, turn in enumerate(turns):
        answers = [
            Text(words(processor, dialogue.said[index]), style="green" if right[name][index] else "bold red")
            for name, dialogue in dialogues.items()
        ]
        table.add_row(words(processor, turn.question), words(processor, turn.answer), *answers)
    table.add_section()
    reports = [dialogue.report for dialogue in dialogues.values()]
    table.add_row("cache", "", *(format_bytes(report.bytes) for report in reports))
    console.print(table)
    console.print(str(reports[-1]), highlight=False, soft_wrap=True)
    cache = caches[policy]
    positions = [cache.kept_positions(layer) for layer in range(len(cache.layers))]
    draw_kept(prompt, positions, f"image tokens that {policy} keeps at budget {budget}").save(path)


def words(processor: Any, tokens: Tensor) -> str:
    """The readable text of the first row of tokens [B, n]."""
    return str(processor.decode(tokens[0], skip_special_tokens=True))


def policy_table(cells: Sequence[Cell]) -> Table:
    """The comparison for a terminal: a row a policy, a column a budget."""
    budgets = list(dict.fromkeys(cell.budget for cell in cells))
    # in a narrow terminal a cell goes on in the next line: rich would cut it
    table = Table(
        *(Column(heading, overflow="fold") for heading in ("policy", *map(str, budgets))),
        title=f"exact match in % (names after|before their pictures), {cells[0].answers} later-turn answers, "
        f"prompts of {cells[0].seen:.0f} tokens",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for policy in dict.fromkeys(cell.policy for cell in cells):
        own = {cell.budget: cell for cell in cells if cell.policy == policy}
        table.add_row(policy, *(matches(own[budget]) if budget in own else "" for budget in budgets))
    table.add_section()
    any_policy = {cell.budget: cell for cell in cells}
    table.add_row("tokens kept", *(f"{any_policy[budget].kept:.0f}" for budget in budgets))
    table.add_row("cache", *(format_bytes(any_policy[budget].bytes) for budget in budgets))
    return table


def matches(cell: Cell) -> str:
    """Exact match of both layouts, then of each."""
    return f"{cell.exact_match:.0f} ({cell.exact_match_after:.0f}|{cell.exact_match_before:.0f})"
