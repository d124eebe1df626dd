"""How much of the budget each layer of a model needs, measured once and saved (PrefixKV, arXiv 2412.03409)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from lookm.attention import Pairs
from lookm.cache import LookMCache
from lookm.modality import cache_keyword, outermost
from lookm.policy import Policy
from lookm.published import needed


@dataclass(frozen=True)
class _Note(Policy):
    """Keep an even share, and note what each layer would need."""

    cover: float = 0.9
    noted: list[float] = field(default_factory=list)
    by_head: ClassVar[bool] = False

    def take(self, pairs: Pairs, left: Sequence[int], layers: int) -> Sequence[int]:
        counts = needed(pairs.scores, self.cover)
        self.noted.append(max(1.0, sum(counts) / len(counts)))
        return super().take(pairs, left, layers)


@torch.no_grad()
def layer_profile(model: nn.Module, inputs: Mapping[str, Any], cover: float = 0.9) -> tuple[float, ...]:
    """The share of each compressed layer in the tokens that all of them need: the `profile` of the policy prefixkv.

    A layer needs as many tokens, averaged over heads and rows, as receive the share `cover` of its accumulated
    attention. inputs: of the model's forward, a prompt like those to come. The numbers are positive and sum to 1; they
    are plain, to be saved as JSON. ValueError for a cover outside of 0 to 1.
    """
    if not 0 < cover < 1:
        raise ValueError(f"`cover` must be a share above 0 and below 1, got {cover!r}")
    note = _Note(cover=cover)
    cache = LookMCache(model, 0.5, note)
    whole = outermost(model)
    whole(**inputs, **{cache_keyword(whole): cache})
    total = sum(note.noted)
    return tuple(count / total for count in note.noted)
