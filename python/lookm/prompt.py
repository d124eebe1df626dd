"""The tokens of a prompt under compression, as plans and policies see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PADDING, IMAGE, TEXT, PROTECTED = 0, 1, 2, 3


def on_device(counts: Sequence[int], device: torch.device) -> Tensor:
    """[B, 1] of a number a row, filled on the device: a copy from the host would wait for it."""
    return torch.cat([torch.full((1, 1), count, dtype=torch.long, device=device) for count in counts])


def right_aligned(counts: Sequence[int], places: int, device: torch.device) -> Tensor | None:
    """[B, places] bool, the last counts[row] places of each row; None: all places of all."""
    if min(counts) == places:
        return None
    return torch.arange(places, 0, -1, device=device) <= on_device(counts, device)


@dataclass(frozen=True)
class Prompt:
    """The tokens under compression: N seen so far, `remaining` still to come (chunked prefill).

    image, valid: [B, N] bool, True for image or video tokens and for tokens that are not padding; valid None: no
        padding.
    keep, recent, sinks: what the budget allows each row, in tokens.
    starts: [B, N] bool, True where a new image (or frame) begins inside a run of image tokens; None: nowhere.
    """

    image: Tensor
    valid: Tensor | None
    keep: Sequence[int]
    recent: Sequence[int]
    sinks: Sequence[int]
    remaining: int = 0
    starts: Tensor | None = None

    @cached_property
    def segment(self) -> Tensor:
        """[B, N] int32: which image (or frame) a token belongs to, counted from 0 in each row; -1 for text.

        A run of image tokens is one image, unless the inputs told how many tokens each has (lookm.segments).
        """
        begins = self.image.clone()
        begins[:, 1:] &= ~self.image[:, :-1]
        if self.starts is not None:
            begins |= self.starts & self.image
        return (begins.cumsum(1) - 1).masked_fill(~self.image, -1).int()

    @cached_property
    def there(self) -> Tensor:
        """[B, N] bool: tokens that are not padding."""
        return torch.ones_like(self.image) if self.valid is None else self.valid

    def last(self, counts: Sequence[int]) -> Tensor:
        """[B, N] bool: the last counts[row] valid tokens of each row's whole prompt."""
        return self._within(counts, from_end=True)

    def first(self, counts: Sequence[int]) -> Tensor:
        """[B, N] bool: the first counts[row] valid tokens of each row."""
        return self._within(counts, from_end=False)

    def _within(self, counts: Sequence[int], from_end: bool) -> Tensor:
        valid = self.there
        place = valid.flip(1).cumsum(1).flip(1) + self.remaining if from_end else valid.cumsum(1)
        return valid & (place <= on_device(counts, valid.device))

    def tiers(self, text_prior: bool) -> Tensor:
        """[B, N] int32 selection classes for select_tokens: protected, text, image, padding."""
        tier = (
            torch.where(self.image, IMAGE, TEXT) if text_prior else torch.full_like(self.image, IMAGE, dtype=torch.long)
        )
        tier = tier.masked_fill(self.last(self.recent) | self.first(self.sinks), PROTECTED)
        if self.valid is not None:
            tier = tier.masked_fill(~self.valid, PADDING)
        return tier.int()
