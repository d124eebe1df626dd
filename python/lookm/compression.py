"""What becomes of one layer's scored pairs: which stay, and how the others merge into them."""

from __future__ import annotations

import torch
from torch import Tensor

import lookm_kernels
from lookm.attention import Pairs
from lookm.coverage import with_levels
from lookm.policy import Policy


def compress_pairs(
    policy: Policy, pairs: Pairs, tiers: Tensor, out_key: Tensor, out_value: Tensor, votes: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Keep prompt.keep pairs of each row, in out_key and out_value [B, H, K, D].

    pairs: with their final scores. tiers [B, N] int32: selection classes. votes [B, H, N] float32: tokens that each
    pair stands for, None: one each.

    Returns kept [B, H, K] int32, places of the pairs that stayed, -1 for an empty one; and the votes [B, H, K] float32
    of what is kept, None in a policy without.
    """
    levels, merging = policy.levels(pairs), policy.merging(pairs)
    scores = pairs.scores if levels is None else with_levels(pairs.scores, levels)
    key, value = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (pairs.key, pairs.value))
    out_votes = key.new_empty(out_key.shape[:3], dtype=torch.float32) if policy.votes else None
    # not in place: the model may still use its own, and a backward pass will
    kept = lookm_kernels.compress_(
        key, value, scores, tiers, pairs.prompt.keep, merging.rule, merging.gate, similarity=merging.similarity,
        group=merging.group, min_similarity=merging.min_similarity, refine=merging.refine, votes=votes,
        out_votes=out_votes, out_key=out_key, out_value=out_value,
    )  # fmt: skip
    return kept, out_votes
