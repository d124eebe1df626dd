"""Training sequences: a prompt followed by a whole dialogue, and which tokens of it are to be learnt."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lookm.demo.task import (
    BOS,
    CLOSE_UP,
    COLOURS,
    EOS,
    TOKEN,
    VOCABULARY,
    Facts,
    Layout,
    Scans,
    Scene,
    ask_note,
    ask_picture,
    draw_facts,
    draw_prompts,
    lay_out,
)

IGNORED = -100
JITTER = 1.25


@dataclass(frozen=True)
class Sequence:
    """`input_ids` and `labels` [B, N], pixels or None, and (kind, first, end) of each answer: labels are only there.

    Kind `picture` is the first question about a picture, `later` those after it: they are easier, as the answer may be
    had by elimination or, where a picture is asked twice, copied.
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None
    answers: list[tuple[str, int, int]]


def picture_sequence(
    batch: int,
    images: int,
    layout: Layout,
    frames: int,
    scans: Scans,
    generator: torch.Generator,
    order: random.Random,
    *,
    scene: Scene = CLOSE_UP,
) -> Sequence:
    """The real task: every picture asked once and the note once, in random order."""
    prompt = draw_prompts(batch, images, layout, frames, scans, generator, jitter=JITTER, scene=scene)
    chosen = torch.rand(batch, images, generator=generator).argsort(dim=1)
    return _dialogue(prompt.input_ids, prompt.pixel_values, prompt.facts, chosen, order)


def text_sequence(
    batch: int,
    images: int,
    layout: Layout,
    run: int,
    scans: Scans,
    generator: torch.Generator,
    order: random.Random,
    *,
    questions: int,
    adjacent: bool,
) -> Sequence:
    """The same in words: each picture is `run` tokens, one names its colour, one its digit, the rest are dots.

    If `adjacent`, the two words come first and in the order of the answer: "red 7 . . A". Then the layout `before`
    asks for no more than copying what last followed the letter, which is learnt at once.
    """
    facts = draw_facts(batch, images, scans, generator)
    runs = torch.full((batch, images, run), TOKEN["."])
    if adjacent:
        place = torch.arange(run).expand(batch, images, run)
    else:
        place = torch.rand(batch, images, run, generator=generator).argsort(dim=2)
    runs.scatter_(2, place[..., :1], facts.colour[..., None] + TOKEN["red"])
    runs.scatter_(2, place[..., 1:2], facts.digit[..., None] + TOKEN["0"])
    chosen = torch.randint(images, (batch, questions), generator=generator)
    return _dialogue(lay_out(facts, layout, runs), None, facts, chosen, order)


def recall_sequence(batch: int, pairs: int, layout: Layout, generator: torch.Generator, *, questions: int) -> Sequence:
    """Any word as a name, any two words as its content: "blue 4 C 7 A red ; Q 7 -> A red <eos>".

    Looking up a name is one skill whatever the words are, and it is found much sooner where every word can be one.
    """
    first = TOKEN[next(iter(COLOURS))]
    words = torch.rand(batch, len(VOCABULARY) - first, generator=generator).argsort(dim=1)[:, : 3 * pairs] + first
    asked = torch.randint(pairs, (batch, questions), generator=generator)
    table = words.view(batch, pairs, 3).gather(1, asked[:, :, None].expand(-1, -1, 3))
    turns = torch.cat([torch.full_like(table[..., :1], TOKEN["Q"]), table, torch.full_like(table[..., :1], EOS)], dim=2)
    labels = turns.clone()
    labels[..., :2] = IGNORED
    if layout == "after":
        words = words.view(batch, pairs, 3).roll(-1, dims=2).flatten(1)
    else:
        words = functional.pad(words, (0, 1), value=TOKEN[";"])
    prompt = functional.pad(words, (1, 0), value=BOS)
    ids = torch.cat([prompt, turns.flatten(1)], dim=1)
    end = prompt.shape[1] + 5
    answers = [("recall", end - 3, end)]
    return Sequence(ids, torch.cat([torch.full_like(prompt, IGNORED), labels.flatten(1)], dim=1), None, answers)


def _dialogue(prompt: Tensor, pixels: Tensor | None, facts: Facts, chosen: Tensor, order: random.Random) -> Sequence:
    """Ask about the pictures `chosen` [B, Q] in turn, and once, anywhere among them, for the note."""
    kinds = ["picture"] * chosen.shape[1] + ["note"]
    order.shuffle(kinds)
    ids, labels, answers, asked, length = [prompt], [torch.full_like(prompt, IGNORED)], [], 0, prompt.shape[1]
    for kind in kinds:
        if kind == "note":
            turn = ask_note(facts)
        else:
            turn = ask_picture(facts, chosen[:, asked])
            asked += 1
        ids += turn
        labels += [torch.full_like(turn.question, IGNORED), turn.answer]
        first = length + turn.question.shape[1]
        length = first + turn.answer.shape[1]
        answers.append(("later" if kind == "picture" and asked > 1 else kind, first, length))
    return Sequence(torch.cat(ids, dim=1), torch.cat(labels, dim=1), pixels, answers)
