"""The policies that come with the package (LOOK-M, sections 3 and 4.2, and the baselines it compares with)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lookm.attention import Attention, Pairs
from lookm.policy import Merging, Policy, is_count, is_number, register_policy
from lookm.prompt import Prompt

SINKS = 4


@register_policy("full")
@dataclass(frozen=True)
class Full(Policy):
    """Evict nothing, whatever the budget: the ordinary cache, with a report."""

    evicts: ClassVar[bool] = False


@register_policy("h2o")
@dataclass(frozen=True)
class H2O(Policy):
    """Recent tokens and those with the most accumulated attention (H2O, arXiv 2306.14048)."""


@register_policy("mean_h2o", visit_power=1.0)
@dataclass(frozen=True)
class MeanH2O(Policy):
    """As h2o, with the attention averaged over the queries that can see the token (RoCo, arXiv 2402.06262)."""


@register_policy("snapkv")
@dataclass(frozen=True)
class SnapKV(Policy):
    """Attention of the last queries only, smoothed along the prompt (SnapKV, arXiv 2404.14469).

    window: how many last queries look; None: as many as the budget keeps recent tokens (the authors of LOOK-M).
    kernel_size, pooling: width (odd) and kind ("average" or "max") of the smoothing; ValueError for another.
    """

    window: int | None = None
    kernel_size: int = 5
    pooling: str = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and not (is_count(self.window) and self.window >= 1):
            raise ValueError(f"`window` must be None or a number of queries, 1 or more, got {self.window!r}")
        if not is_count(self.kernel_size) or self.kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd and positive, got {self.kernel_size!r}")
        if self.pooling not in ("average", "max"):
            raise ValueError(f"`pooling` must be 'average' or 'max', got {self.pooling!r}")

    def _window(self, prompt: Prompt) -> Tensor:
        return prompt.last([max(1, recent) if self.window is None else self.window for recent in prompt.recent])

    def query_weight(self, prompt: Prompt) -> Tensor:
        """Only the window's queries count."""
        weight, window = super().query_weight(prompt), self._window(prompt).float()
        return window if weight is None else window * weight

    def finish(self, pairs: Pairs) -> Tensor:
        """Pooled over neighbours; the window itself lends nothing to them."""
        before = super().finish(pairs).masked_fill(self._window(pairs.prompt)[:, None], 0.0)
        half = self.kernel_size // 2
        if self.pooling == "max":
            return torch.nn.functional.max_pool1d(before, self.kernel_size, stride=1, padding=half)
        return torch.nn.functional.avg_pool1d(before, self.kernel_size, stride=1, padding=half)


@register_policy("streaming", sinks=SINKS, recent_share=1.0)
@dataclass(frozen=True)
class Streaming(Policy):
    """The first 4 tokens and the most recent ones (StreamingLLM, arXiv 2309.17453)."""

    looks: ClassVar[bool] = False

    def score(self, attention: Attention) -> Tensor:
        """Position alone decides."""
        shape = (*attention.key.shape[:2], attention.prompt.image.shape[1])
        return torch.zeros(shape, dtype=torch.float32, device=attention.key.device)


@register_policy("avg_merge", rule="average", sinks=SINKS)
@dataclass(frozen=True)
class AverageMerge(Policy):
    """As h2o with 4 sinks; evicted tokens are averaged into the nearest kept one."""


@register_policy("weighted_merge", rule="weighted", sinks=SINKS)
@dataclass(frozen=True)
class WeightedMerge(Policy):
    """As avg_merge, each evicted token weighted by its cosine similarity."""


@register_policy("pivot_merge", rule="pivotal", sinks=SINKS)
@dataclass(frozen=True)
class PivotMerge(Policy):
    """As avg_merge, each evicted token first averaged with its pivot."""


@register_policy("text_prior_h2o", text_prior=True)
@dataclass(frozen=True)
class TextPriorH2O(Policy):
    """Text before images, then as h2o (LOOK-M without merging)."""


@register_policy("text_prior_avg_merge", text_prior=True, rule="average")
@dataclass(frozen=True)
class TextPriorAverageMerge(Policy):
    """Text before images, averaged merging (LOOK-M, section 3.3)."""


@register_policy("text_prior_weighted_merge", text_prior=True, rule="weighted")
@dataclass(frozen=True)
class TextPriorWeightedMerge(Policy):
    """Text before images, weighted merging (LOOK-M, section 3.3)."""


@register_policy("text_prior_pivot_merge", text_prior=True, rule="pivotal")
@dataclass(frozen=True)
class TextPriorPivotMerge(Policy):
    """Text before images, pivotal merging (LOOK-M, section 3.3): the paper's method."""


@register_policy(
    "auto", text_prior=True, rule="average", votes=True, similarity="key_value", group="medium", min_similarity=0.8,
    refine=1, floor=2, recent_share=0.2, visit_power=0.25,
)  # fmt: skip
@dataclass(frozen=True)
class Auto(Policy):
    """Merging with votes, freely where attention is spread, else only what is alike; the default.

    Every image keeps its two best tokens. Evicted tokens are averaged into the kept pair of their medium that is most
    like them in key and value, found once more among the merged pairs, and the pair draws the attention of all of them.
    In heads whose attention is concentrated, as it is on text, only tokens above min_similarity merge.

    spread: below which a head counts as concentrated: the number of tokens that would get its attention in equal parts
        (the exponential of the entropy of the scores), as a share of the prompt.
    """

    spread: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.spread) and 0 <= self.spread <= 1):
            raise ValueError(f"`spread` must be a share from 0 to 1, got {self.spread!r}")

    def merging(self, pairs: Pairs) -> Merging:
        """Each head with its own least similarity."""
        merging = super().merging(pairs)
        if self.min_similarity is None:
            return merging
        scores = pairs.scores.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        share = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        tokens = torch.special.entr(share).sum(-1).exp()
        length = pairs.prompt.there.sum(1, keepdim=True)
        dtype = torch.float64 if pairs.key.dtype == torch.float64 else torch.float32
        concentrated = tokens < self.spread * length
        return replace(merging, min_similarity=torch.where(concentrated, self.min_similarity, -1.0).to(dtype))
