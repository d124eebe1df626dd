"""Beds made of dialogues with a small model; `DEMO` is the model and the prompts of `lookm demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lookm
from lookm.demo import checkpoint
from lookm.demo.dialogue import Dialogue, converse, exact_matches, script
from lookm.demo.task import CLOSE_UP, LAYOUTS, MAX_IMAGES, Layout, Scans, Scene, Turn, draw_prompts, held_out_scans

from .bed import FULL, Split

# a unit's id is the seed of its dialogue; even ones have the names after the pictures, odd ones before
UNITS = {"tune": range(32), "final": range(1000, 1048)}
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Script:
    """Dialogues of one layout, row by row: what the model reads, and what it is asked."""

    units: Sequence[int]
    layout: Layout
    input_ids: Tensor
    pixel_values: Tensor
    turns: list[Turn]


@dataclass
class DialogueBed:
    """Dialogues about eight named clips of held-out scans; a unit is one dialogue.

    Metrics of a unit: `layout`; `answers` in later turns (the first answer comes from the whole cache), how many of
    them are `right`, how many `agree` with what the full cache answers, right or wrong, and their mean `length` in
    tokens up to `<eos>`, followed for at most eight; `kept`, the tokens a layer keeps of a row, and `bytes` a row.
    """

    name: str
    model_folder: Path
    scene: Scene
    frames: int
    _scripts: dict[Split, list[Script]] = field(default_factory=dict, init=False, repr=False)
    _full: dict[Split, list[Dialogue]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def model(self) -> Any:
        return checkpoint.load(self.model_folder)[0]

    @cached_property
    def scans(self) -> Scans:
        return held_out_scans()

    def units(self, split: Split) -> Sequence[int]:
        """The seeds of a split's dialogues."""
        return UNITS[split]

    def measure(self, policy: lookm.Policy, budget: float | int, split: Split, **options: Any) -> list[dict[str, Any]]:
        """One dict a dialogue, see the class."""
        if split not in self._scripts:
            self._scripts[split] = [self.draw(layout, split) for layout in LAYOUTS]
            self._full[split] = [self.answer(drawn, FULL, 1.0) for drawn in self._scripts[split]]
        found = {}
        for drawn, full in zip(self._scripts[split], self._full[split], strict=True):
            dialogue = full if policy == FULL else self.answer(drawn, policy, budget, **options)
            right = exact_matches(drawn.turns, dialogue.said)[1:].sum(0)
            agree = torch.stack([(ours == its).all(1) for ours, its in zip(dialogue.said, full.said, strict=True)])
            length = torch.stack(dialogue.lengths)[1:].float().mean(0)
            rows = len(drawn.units)
            for row, unit in enumerate(drawn.units):
                found[unit] = {
                    "unit": unit,
                    "layout": drawn.layout,
                    "answers": len(drawn.turns) - 1,
                    "right": int(right[row]),
                    "agree": int(agree[1:, row].sum()),
                    "length": length[row].item(),
                    "kept": dialogue.report.mean()["kept"] / rows,
                    "bytes": dialogue.report.bytes / rows,
                }
        return [found[unit] for unit in self.units(split)]

    def answer(self, drawn: Script, policy: lookm.Policy, budget: float | int, **options: Any) -> Dialogue:
        """All dialogues of a script at once."""
        cache = lookm.LookMCache(self.model, budget, policy, **options)
        return converse(self.model, drawn, drawn.turns, cache, count_to=ANSWER_TOKENS)

    def draw(self, layout: Layout, split: Split) -> Script:
        """The dialogues of a split in one layout, each drawn from its own seed."""
        units = [unit for unit in self.units(split) if LAYOUTS[unit % 2] == layout]
        prompts, turns = [], []
        for unit in units:
            generator = torch.Generator().manual_seed(unit)
            prompt = draw_prompts(1, MAX_IMAGES, layout, self.frames, self.scans, generator, scene=self.scene)
            prompts.append(prompt)
            turns.append(script(prompt, generator))
        return Script(
            units,
            layout,
            torch.cat([prompt.input_ids for prompt in prompts]),
            torch.cat([prompt.pixel_values for prompt in prompts]),
            [Turn(*(torch.cat(part) for part in zip(*turn, strict=True))) for turn in zip(*turns, strict=True)],
        )


DEMO = DialogueBed("demo", checkpoint.MODEL, CLOSE_UP, frames=3)
