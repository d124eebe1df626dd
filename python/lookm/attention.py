"""One layer's attention over a prompt, and its pairs once they are scored, as policies see them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import lookm_kernels
from lookm.prompt import Prompt


@dataclass(frozen=True)
class Attention:
    """One layer's attention over (a chunk of) the prompt, as a policy sees it.

    query [B, Hq, M, D], key [B, H, N, D] after rotary embedding, the queries being the last M of the N tokens.
    query_weight: [B, M] float32, how much each query counts (Policy.query_weight), 0 for padding; None: all 1.
    picked: [B, M'] int32, those of the M queries with a weight, ascending, -1 (first) for an empty place; None for all.
    fp8: score on 8-bit floats.
    votes [B, H, N] float32: tokens that each key stands for, which lse counts too; None: one each.
    The other fields are the arguments of lookm_kernels.attention_scores; a mask beside causal hides padding, nothing
    else. The prompt is the last prompt.image.shape[1] of the N tokens: earlier ones belong to turns that were
    compressed before.
    """

    query: Tensor
    key: Tensor
    prompt: Prompt
    scale: float
    softcap: float | None = None
    causal: bool = True
    key_start: Tensor | None = None
    mask: Tensor | None = None
    lse: Tensor | None = None
    query_weight: Tensor | None = None
    picked: Tensor | None = None
    fp8: bool = False
    votes: Tensor | None = None

    def column_sums(self, weights: Tensor | None = None) -> Tensor:
        """[B, H, prompt tokens] float32: attention received from this chunk's queries, each counting its weight.

        weights [B, W, prompt tokens] float: W weights of every query instead, in one pass: [B, W, H, prompt tokens];
        they are multiplied with query_weight. Prompts only: turns compressed before take their share of the softmax but
        no score.
        """
        tokens = self.prompt.image.shape[1]
        if weights is not None:
            own = weights[..., -self.query.shape[2] :].float()
            own = own if self.query_weight is None else own * self.query_weight[:, None]
            return replace(self, query_weight=own).column_sums()
        looking, position = self, None
        if self.picked is not None:
            if self.picked.shape[1] == 0:
                dtype = torch.float64 if torch.float64 in (self.query.dtype, self.key.dtype) else torch.float32
                several = () if self.query_weight is None else self.query_weight.shape[1:-1]
                return self.key.new_zeros((len(self.key), *several, self.key.shape[1], tokens), dtype=dtype)
            looking = self._only_picked(self.picked)
            position = torch.where(self.picked < 0, -1, self.picked + self.key.shape[2] - self.query.shape[2])
        query, key, head_scale = looking.query, looking.key, None
        if self.fp8:
            query, key, head_scale = looking._quantized()
        scores = lookm_kernels.attention_scores(
            query,
            key,
            scale=self.scale,
            causal=self.causal,
            lse=looking.lse,
            query_weight=looking.query_weight,
            key_start=self.key_start,
            mask=looking.mask,
            softcap=self.softcap,
            query_position=position,
            head_scale=head_scale,
        )
        if self.votes is not None:
            scores = scores * (self.votes if scores.ndim == 3 else self.votes[:, None])
        return scores[..., -tokens:]

    def visits(self) -> Tensor:
        """[B, H, prompt tokens] float32: how many of this chunk's queries can see each key, weighted alike.

        Query heads of one KV head share a column sum, so their counts add up too.
        """
        by_head, heads = self._visits(), self.key.shape[1]
        groups = self.query.shape[1] // heads
        by_head = by_head.expand(-1, heads * groups, -1)
        return by_head.reshape(len(by_head), heads, groups, -1).sum(2)

    def _visits(self) -> Tensor:
        """The same for each query head, [B, 1 or Hq, prompt tokens]."""
        queries, tokens = self.query.shape[2], self.prompt.image.shape[1]
        weight = self.query_weight
        if weight is None:
            weight = torch.ones(self.query.shape[0], queries, dtype=torch.float32, device=self.query.device)
        if not self.causal:
            if self.mask is None:
                return weight.sum(1)[:, None, None].expand(-1, 1, tokens)
            seen = self.mask[..., -tokens:] * weight[:, None, :, None]
            return seen.sum(2)
        # key j of the last M tokens is seen by the queries from j on, an earlier key by all of them
        own = weight.flip(1).cumsum(1).flip(1)
        earlier = own[:, :1].expand(-1, tokens - queries)
        return torch.cat([earlier, own], 1)[:, None]

    def _only_picked(self, picked: Tensor) -> Attention:
        """The same with the picked queries alone; an empty place holds the first query."""
        place = picked.clamp(min=0).long()
        mask, lse, weight = self.mask, self.lse, self.query_weight
        if mask is not None and mask.stride(2) == 0:
            mask = mask[:, :, : place.shape[1]]
        elif mask is not None:
            mask = mask.expand(len(place), -1, -1, -1).take_along_dim(place[:, None, :, None], 2)
        return replace(
            self,
            query=self.query.take_along_dim(place[:, None, :, None], 2),
            mask=mask,
            lse=None if lse is None else lse.take_along_dim(place[:, None], 2),
            query_weight=None if weight is None else weight.take_along_dim(_like(place, weight), -1),
        )

    def _quantized(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key as 8-bit floats, and the scale of each query head; padding sets none."""
        start = self.key_start
        if self.picked is not None:
            start = (self.picked < 0).sum(1).int()
        elif start is not None:
            start = (start - (self.key.shape[2] - self.query.shape[2])).clamp(min=0)
        query, query_scale = lookm_kernels.quantize_heads(self.query, start)
        key, key_scale = lookm_kernels.quantize_heads(self.key, self.key_start)
        return query, key, query_scale * key_scale.repeat_interleave(query.shape[1] // key.shape[1], 1)


def _like(place: Tensor, weight: Tensor) -> Tensor:
    """Places [B, M'] to take along the last axis of weight [B, M] or [B, W, M]."""
    return place if weight.ndim == 2 else place[:, None]


@dataclass(frozen=True)
class Pairs:
    """The key/value pairs of one layer's prompt, once all of it was read, as a policy sees them.

    key [B, H, N, D] after rotary embedding, value [B, H, N, Dv]; not to be modified.
    sums [B, any, N] float32: Policy.score, added up over the chunks of the prompt.
    scores [B, H, N] float32: what Policy.finish made of them; before that, the sums.
    layers: compressed layers of the cache.
    """

    prompt: Prompt
    key: Tensor
    value: Tensor
    sums: Tensor
    scores: Tensor
    layers: int = 1
