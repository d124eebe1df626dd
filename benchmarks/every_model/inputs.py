"""Prompts for a tiny model: rows of text around the placeholders of one image, with its pixels or without."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from every_model.specs import Spec
from every_model.tiny import AUDIO_ID, FIRST_SPECIAL, FIRST_TEXT, IMAGE_ID, PAD, VIDEO_ID

PLACEHOLDERS = 16
ROWS = ((7, 13), (3, 6))  # text tokens before and after the image
PLACEHOLDER_IDS = {
    IMAGE_ID: ("image_token_id", "image_token_index"),
    VIDEO_ID: ("video_token_id", "video_token_index"),
    AUDIO_ID: ("audio_token_id", "audio_token_index"),
}


@dataclass(frozen=True)
class Row:
    """Token ids, which of them stand for an image, and the arrays of that image (none without pixels)."""

    ids: tuple[int, ...]
    image: tuple[bool, ...]
    arrays: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    def then(self, ids: Sequence[int]) -> Row:
        """This row and more text."""
        return Row((*self.ids, *ids), (*self.image, *[False] * len(ids)), self.arrays)


def placeholder(config: PreTrainedConfig, spec: Spec) -> int | None:
    """The id that stands for images (else for video, else for audio) in this configuration; None: there is none."""
    named = (token for token, names in PLACEHOLDER_IDS.items() if any(getattr(config, x, None) == token for x in names))
    return next(named, None) if spec.placeholder is None else spec.placeholder


def kind(config: PreTrainedConfig, spec: Spec) -> str:
    """What the prompts bring: "pixels", "placeholders" alone or "text"."""
    if spec.image is not None:
        return "pixels"
    return "text" if placeholder(config, spec) is None else "placeholders"


def text(count: int, seed: int) -> list[int]:
    """Random text tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TEXT, FIRST_SPECIAL, (count,), generator=generator).tolist()


def draw(config: PreTrainedConfig, spec: Spec) -> list[Row]:
    """The rows of ROWS: text, one image (text in a model without any), text."""
    token, rows = placeholder(config, spec), []
    for seed, (before, after) in enumerate(ROWS):
        middle = text(PLACEHOLDERS, 20 + seed) if token is None else [*spec.before, *[token] * spec.tokens, *spec.after]
        arrays = {} if spec.image is None else spec.image(torch.Generator().manual_seed(seed))
        ids = [*text(before, seed), *middle, *text(after, 10 + seed)]
        rows.append(Row(tuple(ids), tuple(one == token for one in ids), arrays))
    return rows


def arguments(model: PreTrainedModel, spec: Spec, rows: Sequence[Row], shown: bool = True) -> dict[str, Any]:
    """Arguments of forward and generate; shorter rows are padded on the left. shown: with the images' arrays."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + list(row.ids) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if shown:
        found |= {name: torch.cat([row.arrays[name] for row in rows]) for name in rows[0].arrays}
        known = inspect.signature(model.forward).parameters
        found |= {name: image_mask(rows).long() for name in spec.types if name in known}
    return found


def image_mask(rows: Sequence[Row]) -> Tensor:
    """[B, N] bool: placeholders of rows padded on the left."""
    width = max(map(len, rows))
    return torch.tensor([[False] * (width - len(row)) + list(row.image) for row in rows])
