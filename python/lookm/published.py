"""Rules published since LOOK-M, each a policy of a few lines; what they reach here is in benchmarks/quality/README.md.

They follow the papers' rules for scores, budgets and merging, on this package's terms: budgets are strict and handed
out in one pass over the layers, so a rule that first looks at all layers gets what the layers before it left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lookm import policies as _registered_before  # noqa: F401  (their order is that of the tables)
from lookm.attention import Attention, Pairs
from lookm.policy import Merging, Policy, is_number, register_policy
from lookm.prompt import Prompt, on_device


def needed(scores: Tensor, cover: float) -> list[int]:
    """How many of the best tokens of each row cover a share of the scores [B, H, N], averaged over its heads."""
    best = scores.sort(dim=-1, descending=True).values.cumsum(-1)
    return _by_row(best < cover * best[..., -1:])


def _by_row(tokens: Tensor) -> list[int]:
    """How many tokens [B, H, N] bool each row has, averaged over its heads."""
    return [int(count) for count in tokens.sum(-1).float().mean(1).ceil().tolist()]


def _at_most_even(wanted: Sequence[int], left: Sequence[int], layers: int) -> list[int]:
    """What is wanted, an even share of what is left at most; the rest is carried on."""
    return [min(tokens, own // layers) for tokens, own in zip(wanted, left, strict=True)]


@register_policy("madakv", recent_share=0.1)
@dataclass(frozen=True)
class MadaKV(Policy):
    """Heads share their budget by modality, layers by need (MadaKV, ACL 2025).

    window: last queries that look; cover: share of their attention that a layer's tokens are to cover.
    """

    window: int = 32
    cover: float = 0.9
    by_head: ClassVar[bool] = False

    def query_weight(self, prompt: Prompt) -> Tensor:
        """The last queries alone."""
        return prompt.last([self.window] * len(prompt.image)).float()

    def take(self, pairs: Pairs, left: Sequence[int], layers: int) -> Sequence[int]:
        """Tokens that cover the attention, an even share of what is left at most; the rest is carried on."""
        return _at_most_even(needed(pairs.scores, self.cover), left, layers)

    def levels(self, pairs: Pairs) -> Tensor:
        """The best text tokens and the best image tokens, as many of each as the head's attention has share there."""
        image = pairs.prompt.image[:, None].expand_as(pairs.scores)
        share = (pairs.scores * image).sum(-1, keepdim=True) / pairs.scores.sum(-1, keepdim=True).clamp(min=1e-9)
        keep = on_device(pairs.prompt.keep, share.device)[..., None]
        order = pairs.scores.argsort(dim=-1, descending=True, stable=True)
        own = image.gather(-1, order)
        rank = torch.where(own, own.cumsum(-1), (~own).cumsum(-1))
        first = rank <= keep * torch.where(own, share, 1 - share)
        return torch.zeros_like(order).scatter_(-1, order, first.long())


@register_policy("mixkv", text_prior=True)
@dataclass(frozen=True)
class MixKV(Policy):
    """Attention and value norm mixed with diversity, by how alike a head's keys are (MixKV, arXiv 2510.20707)."""

    def finish(self, pairs: Pairs) -> Tensor:
        """(1 - r) (attention + value norm) + r diversity, each scaled to the mean of the attention.

        r = (T^2 |mean k|^2 - T) / (T (T - 1)) over unit keys k; diversity = -k . mean k, moved to begin at 0.
        """
        there = pairs.prompt.there[:, None]
        attention, size = super().finish(pairs), there.sum(-1)
        unit = normalize(pairs.key.float(), dim=-1) * there[..., None]
        mean = unit.sum(2) / size[..., None].clamp(min=1)
        alike = ((size * mean.square().sum(-1) - 1) / (size - 1).clamp(min=1)).clamp(0, 1)[..., None]
        diversity = -(unit * mean[:, :, None]).sum(-1)
        diversity = (diversity - diversity.masked_fill(~there, float("inf")).amin(-1, keepdim=True)) * there
        norm = pairs.value.float().norm(dim=-1) * there

        def scaled(x: Tensor) -> Tensor:
            return x * attention.sum(-1, keepdim=True) / x.sum(-1, keepdim=True).clamp(min=1e-9)

        return (1 - alike) * (attention + scaled(norm)) + alike * scaled(diversity)


@register_policy("vlcache", recent_share=0.1)
@dataclass(frozen=True)
class VLCache(Policy):
    """The attention of the text at the end; layers by how dense it is (VL-Cache, arXiv 2410.23317).

    window: last tokens whose text looks; threshold: entries of a row below this share of its maximum are
    nothing.
    """

    window: int = 64
    threshold: float = 0.01
    by_head: ClassVar[bool] = False

    def query_weight(self, prompt: Prompt) -> Tensor:
        """The text among the last `window` tokens, and the very last token: so is a prompt that comes in chunks."""
        rows = len(prompt.image)
        last = prompt.last([self.window] * rows)
        return ((last & ~prompt.image) | prompt.last([1] * rows)).float()

    def take(self, pairs: Pairs, left: Sequence[int], layers: int) -> Sequence[int]:
        """As many tokens as get more than the threshold of the most attended one, an even share of the rest at most."""
        dense = pairs.scores >= self.threshold * pairs.scores.amax(-1, keepdim=True)
        return _at_most_even(_by_row(dense), left, layers)


@register_policy("prefixkv")
@dataclass(frozen=True)
class PrefixKV(Policy):
    """Layers share the budget by a profile that was made once (PrefixKV, arXiv 2412.03409); evenly without one.

    profile: a positive number for each compressed layer, in proportion to its share; see lookm.layer_profile.
    """

    profile: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        good = isinstance(self.profile, tuple) and all(is_number(part) and part > 0 for part in self.profile)
        if self.profile is not None and not good:
            raise ValueError(f"`profile` must be None or a tuple of positive numbers, got {self.profile!r}")

    def take(self, pairs: Pairs, left: Sequence[int], layers: int) -> Sequence[int]:
        """This layer's share of what is left. ValueError for a profile of another number of layers."""
        if self.profile is None:
            return super().take(pairs, left, layers)
        if len(self.profile) != pairs.layers:
            raise ValueError(f"`profile` must be of {pairs.layers} layers, got {len(self.profile)}")
        rest = self.profile[-layers:]
        return [int(own * rest[0] / sum(rest)) for own in left]


@register_policy("flowmm", text_prior=True, rule="pivotal", group="medium")
@dataclass(frozen=True)
class FlowMM(Policy):
    """Layers merge across modalities only where much attention crosses them (FlowMM, arXiv 2511.05534).

    crossing: share of the attention between text and images above which text and images merge into each other.
    """

    crossing: float = 0.25
    by_head: ClassVar[bool] = False

    def score(self, attention: Attention) -> Tensor:
        """Attention received from text and from images, side by side."""
        image = attention.prompt.image.float()
        return attention.column_sums(torch.stack([1 - image, image], 1)).flatten(1, 2)

    def finish(self, pairs: Pairs) -> Tensor:
        """Their sum."""
        return sum(pairs.sums.chunk(2, dim=1))  # type: ignore[return-value]

    def merging(self, pairs: Pairs) -> Merging:
        """Within the medium, unless this layer's attention crosses over."""
        text, image = pairs.sums.chunk(2, dim=1)
        kind = pairs.prompt.image[:, None]
        crossed = (text * kind + image * ~kind).sum((1, 2)) / (text + image).sum((1, 2)).clamp(min=1e-9)
        group = torch.where((crossed > self.crossing)[:, None], 0, pairs.prompt.image.int()).int()
        return replace(super().merging(pairs), group=group)
