"""Dialogues: many turns on a cache that was compressed once, after the first prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lookm.cache import LookMCache
from lookm.demo.task import EOS, Prompt, Turn, ask_note, ask_picture
from lookm.modality import cache_keyword
from lookm.report import Report


def script(prompt: Prompt, generator: torch.Generator) -> list[Turn]:
    """Every picture once, in a random order of its own for each row, then the note."""
    batch, images = prompt.facts.letter.shape
    order = torch.rand(batch, images, generator=generator).argsort(1)
    return [*(ask_picture(prompt.facts, order[:, turn]) for turn in range(images)), ask_note(prompt.facts)]


class Pictured(Protocol):
    """What a model reads: `input_ids` [B, N] and `pixel_values`, as a `Prompt` has them."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def pixel_values(self) -> Tensor: ...


@dataclass(frozen=True)
class Dialogue:
    """What the model said, one tensor [B, answer tokens] a turn, and what the cache held right after the prompt.

    lengths: one tensor [B] a turn, how many tokens the answer has up to its `<eos>`; only if converse is to count them.
    """

    said: list[Tensor]
    report: Report
    lengths: list[Tensor]


@torch.no_grad()
def converse(
    model: Any, prompt: Pictured, turns: Sequence[Turn], cache: LookMCache, *, count_to: int | None = None
) -> Dialogue:
    """Read the pictures and the first question into an empty cache, answer greedily, then ask the other turns.

    A model's own answers stay in the dialogue, right or wrong, as many tokens of them as a right answer has. With
    `count_to` an answer that has not ended by then is followed to its end, or to that many tokens, and what was said
    beyond is taken back: `lengths` tells how long answers get.
    """
    first = torch.cat([prompt.input_ids, turns[0].question], 1)
    options: dict[str, Any] = {cache_keyword(model): cache, "logits_to_keep": 1}
    logits = model(input_ids=first, pixel_values=prompt.pixel_values, **options).logits
    report = cache.report()
    said: list[Tensor] = []
    lengths: list[Tensor] = []
    for turn in turns:
        if said:
            question = torch.cat([said[-1][:, -1:], turn.question], 1)
            logits = model(input_ids=question, **options).logits
        words = [logits.argmax(-1)]
        for _ in range(turn.answer.shape[1] - 1):
            words.append(model(input_ids=words[-1], **options).logits.argmax(-1))
        said.append(torch.cat(words, 1))
        if count_to is not None:
            surplus = 0
            while len(words) < count_to and not (torch.cat(words, 1) == EOS).any(1).all():
                words.append(model(input_ids=words[-1], **options).logits.argmax(-1))
                surplus += 1
            cache.crop(-surplus)
            lengths.append(_length(torch.cat(words, 1)))
    return Dialogue(said, report, lengths)


def exact_matches(turns: Sequence[Turn], said: Sequence[Tensor]) -> Tensor:
    """[turns, B] bool: whether every token of an answer is right."""
    return torch.stack([(answer == turn.answer).all(1) for turn, answer in zip(turns, said, strict=True)])


def _length(words: Tensor) -> Tensor:
    """[B] tokens of words [B, n] up to the first `<eos>` and with it; n where there is none."""
    ended = (words == EOS).long().cumsum(1) - (words == EOS).long()
    return (ended == 0).sum(1)
