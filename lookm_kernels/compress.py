"""compress_: selection, nearest pivot, merge and compaction of one layer's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lookm_kernels._checks import check_call, check_device, check_shape, require
from lookm_kernels._dispatch import implementation, register_in_place
from lookm_kernels.merge import (
    check_apart,
    check_key_value,
    check_outs,
    check_vote_tensors,
    given_outs,
)
from lookm_kernels.nearest import as_heads, check_group
from lookm_kernels.rules import check_rule, merge_weights
from lookm_kernels.select import check_selection, check_tier_values, per_row

SIMILARITIES = ("key", "key_value")


def compress_(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    tier: Tensor,
    keep: int | Sequence[int],
    rule: str = "pivotal",
    gate: str | None = None,
    *,
    similarity: str = "key",
    group: Tensor | None = None,
    min_similarity: float | Tensor | None = None,
    refine: int = 0,
    votes: Tensor | None = None,
    out_votes: Tensor | None = None,
    out_key: Tensor | None = None,
    out_value: Tensor | None = None,
) -> Tensor:
    """Compress one layer's cache in place (LOOK-M, section 3): select, merge the rest into what stays, compact.

    Equal to select_tokens, nearest_kept, rules.merge_weights, merge_ and compact_, one after the other. Afterwards rows
    0 to K - 1 of key and value, K = max(keep), hold the compressed cache; the rows behind them hold nothing of use.

    With out_key and out_value, key and value are only read, and those hold the compressed cache, bit for bit the same.

    Args:
        key, value: [B, H, N, D] and [B, H, N, Dv] float16, bfloat16, float32 or float64, keys after rotary embedding,
            modified without outs; they may differ in dtype, as under torch.autocast.
        scores: [B, H, N] float32 (or float64), from attention_scores.
        tier: [B, N] int32, selection classes (see select_tokens).
        keep: tokens to keep, one number or one per row.
        rule: name of a merge rule in rules.RULES ("none" evicts only).
        gate: None, or "mean_similarity" (see rules.merge_weights).
        similarity: "key", cosine of the keys, or "key_value", the mean of that and of the cosine of the values.
        group, min_similarity: which pivots a token may have; see nearest_kept. One that has none is evicted.
        refine: rounds after the first in which pivots are found among the merged pairs instead of the kept ones, and
            the original pairs merged anew; as in k-means the merged pairs move towards the middle of their tokens.
        votes, out_votes: see merge_; votes go into the weights too.
        out_key, out_value: see merge_.

    Returns:
        kept [B, H, K] int32: the original index of each row, -1 for the empty places of a shorter row.

    Raises:
        TypeError, ValueError: as the ops above, and for an unknown rule or gate. Nothing is modified then.
    """
    check_call(key=key, value=value, scores=scores, tier=tier)
    check_call(group=group, votes=votes, out_votes=out_votes)
    _check_refine(refine)
    how = similarity, group, as_heads(key, min_similarity), refine, votes, out_votes
    rest = scores, tier, per_row(keep), rule, gate, *how, *given_outs(out_key, out_value)
    return torch.ops.lookm.compress_(key, value, *rest)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _How:
    """How pairs merge: arguments of compress_ behind keep, in its order."""

    rule: str
    gate: str | None
    similarity: str
    group: Tensor | None
    min_similarity: Tensor | None
    refine: int
    votes: Tensor | None
    out_votes: Tensor | None


def _check_refine(refine: int) -> None:
    """Before torch's dispatcher too, which takes True for 1 and names no argument of another type."""
    whole = isinstance(refine, int) and not isinstance(refine, bool) and refine >= 0
    require(whole, "refine", "a number of rounds, 0 or more", refine)


def _check(
    key: Tensor, value: Tensor, scores: Tensor, tier: Tensor, keep: list[int], how: _How, outs: tuple[Tensor, ...]
) -> None:
    check_key_value(key, value, outs)
    check_device("key", key, scores=scores, tier=tier)
    check_selection(scores, tier, keep)
    check_shape("scores", scores, key.shape[:3], "B H N")
    check_rule(how.rule, how.gate)
    require(how.similarity in SIMILARITIES, "similarity", f"one of {list(SIMILARITIES)}", how.similarity)
    _check_refine(how.refine)
    check_group(key, how.group, how.min_similarity)
    check_vote_tensors(key, max(keep), how.votes, how.out_votes)
    check_outs(key, value, max(keep), outs)


def _run(key: Tensor, value: Tensor, scores: Tensor, tier: Tensor, keep: list[int], *rest: Any) -> Tensor:
    how, outs = _How(*rest[:8]), rest[8:]
    _check(key, value, scores, tier, keep, how, outs)
    check_apart(key, value, *outs, votes=how.votes, out_votes=how.out_votes)
    check_tier_values(tier)
    lists: tuple[Tensor, Tensor] = implementation("select_tokens", "select", scores)(scores, tier, keep)
    kept, evicted = lists
    if how.rule != "none":
        _merge(key, value, kept, evicted, how, outs)
    elif how.out_votes is not None:
        # it changes no kept row, and its pivots need not be found
        own = torch.ones_like(how.out_votes) if how.votes is None else how.votes.gather(2, kept.clamp(min=0).long())
        how.out_votes.copy_(own.masked_fill(kept < 0, 0.0))
    # outs were written by the merge, row for row
    if how.rule == "none" or not outs:
        implementation("compact_", "compact", key, value)(key, value, kept, *outs)
    return kept


def _merge(key: Tensor, value: Tensor, kept: Tensor, evicted: Tensor, how: _How, outs: tuple[Tensor, ...]) -> None:
    values = value if how.similarity == "key_value" else None
    nearest = implementation("nearest_kept", "nearest", key, values)
    merge = implementation("merge_", "merge", key, value)
    # the originals are needed again: a round that is not the last writes elsewhere
    merged = outs or (tuple(x.new_empty((*kept.shape, x.shape[3])) for x in (key, value)) if how.refine else ())
    for round in range(how.refine + 1):
        last = round == how.refine
        compared = (None, None) if round == 0 else (merged[0], None if values is None else merged[1])
        pivot, similarity = nearest(key, kept, evicted, values, how.group, how.min_similarity, *compared)
        weights = merge_weights(how.rule, similarity, pivot, kept, how.gate, evicted=evicted, votes=how.votes)
        del similarity
        into, counted = (outs, how.out_votes) if last else (merged, None)
        merge(key, value, kept, evicted, pivot, *weights, how.votes, counted, *into)


def _fake(key: Tensor, value: Tensor, scores: Tensor, tier: Tensor, keep: list[int], *rest: Any) -> Tensor:
    _check(key, value, scores, tier, keep, _How(*rest[:8]), rest[8:])
    return scores.new_empty((*scores.shape[:2], max(keep)), dtype=torch.int32)


register_in_place(
    "compress_",
    "Tensor scores, Tensor tier, SymInt[] keep, str rule, str? gate, str similarity, Tensor? group, "
    "Tensor? min_similarity, int refine, Tensor? votes, Tensor(c!)? out_votes",
    "Tensor",
    _run,
    _fake,
)
