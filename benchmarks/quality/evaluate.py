"""Exact match per answer of a demo model with its whole cache, on scans it never saw.

python benchmarks/quality/evaluate.py DIRECTORY [--detail]
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import defaultdict

import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from lookm.demo.task import (
    CLOSE_UP,
    DETAIL,
    LAYOUTS,
    MAX_IMAGES,
    Layout,
    Scans,
    Scene,
    Turn,
    ask_note,
    ask_picture,
    draw_prompts,
    held_out_scans,
)

Row = dict[str, object]
# clip lengths to measure in each scene
FRAMES = {CLOSE_UP: (1, 3), DETAIL: (1, 2)}


def evaluate(
    model: LlavaForConditionalGeneration, scans: Scans, *, dialogues: int = 64, scene: Scene = CLOSE_UP
) -> list[Row]:
    """One row for each layout and clip length, in percent; a dialogue asks all pictures, then the note."""
    return [measure(model, layout, clip, scans, dialogues, scene) for layout in LAYOUTS for clip in FRAMES[scene]]


@torch.no_grad()
def measure(
    model: LlavaForConditionalGeneration,
    layout: Layout,
    frames: int,
    scans: Scans,
    dialogues: int,
    scene: Scene,
    batch: int = 16,
) -> Row:
    """`first` is the first turn's answer, where nothing can be had by elimination; `later` all turns after it."""
    generator = torch.Generator().manual_seed(2406)
    hits: dict[str, list[Tensor]] = defaultdict(list)
    for _ in range(dialogues // batch):
        prompt = draw_prompts(batch, MAX_IMAGES, layout, frames, scans, generator, scene=scene)
        cache = DynamicCache(config=model.config.get_text_config())
        model(input_ids=prompt.input_ids, pixel_values=prompt.pixel_values, past_key_values=cache)
        order = torch.rand(batch, MAX_IMAGES, generator=generator).argsort(dim=1)
        for k in range(MAX_IMAGES):
            colour, digit, right = _answer(model, cache, ask_picture(prompt.facts, order[:, k])).unbind(dim=1)[:3]
            hits["colour"].append(colour)
            hits["digit"].append(digit)
            hits["later" if k else "first"].append(colour & digit & right)
        hits["note"].append(_answer(model, copy.deepcopy(cache), ask_note(prompt.facts)).all(dim=1))
    hits["answer"] = hits["first"] + hits["later"] + hits["note"]
    row: Row = {"layout": layout, "frames": frames, "tokens": prompt.input_ids.shape[1]}
    row["answers"] = sum(len(part) for part in hits["answer"])
    percent = {name: round(100 * torch.cat(parts).float().mean().item(), 2) for name, parts in hits.items()}
    return row | {name: percent[name] for name in ("answer", "first", "later", "colour", "digit", "note")}


def _answer(model: LlavaForConditionalGeneration, cache: DynamicCache, turn: Turn) -> Tensor:
    """Ask, then decode greedily: which of the answer's tokens came out right, [B, n]. The cache grows by both."""
    tokens, said = turn.question, []
    for _ in range(turn.answer.shape[1]):
        tokens = model(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(dim=-1)
        said.append(tokens)
    model(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
    return torch.cat(said, dim=1) == turn.answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--dialogues", type=int, default=64)
    parser.add_argument("--detail", action="store_true", help="small digits in large pictures")
    arguments = parser.parse_args()
    loaded = LlavaForConditionalGeneration.from_pretrained(arguments.directory).eval()
    asked = DETAIL if arguments.detail else CLOSE_UP
    for result in evaluate(loaded, held_out_scans(), dialogues=arguments.dialogues, scene=asked):
        print(json.dumps(result))
