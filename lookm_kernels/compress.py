"""compress_: selection, nearest pivot, merge and compaction of one layer's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lookm_kernels._checks import check_call, check_device, check_shape
from lookm_kernels._dispatch import implementation, register_in_place
from lookm_kernels.merge import check_apart, check_key_value, check_outs, given_outs
from lookm_kernels.rules import check_rule, merge_weights
from lookm_kernels.select import check_selection, check_tier_values, per_row


def compress_(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    tier: Tensor,
    keep: int | Sequence[int],
    rule: str = "pivotal",
    gate: str | None = None,
    *,
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
        out_key, out_value: see merge_.

    Returns:
        kept [B, H, K] int32: the original index of each row, -1 for the empty places of a shorter row.

    Raises:
        TypeError, ValueError: as the ops above, and for an unknown rule or gate. Nothing is modified then.
    """
    check_call(key=key, value=value, scores=scores, tier=tier)
    rest = scores, tier, per_row(keep), rule, gate, *given_outs(out_key, out_value)
    return torch.ops.lookm.compress_(key, value, *rest)  # type: ignore[no-any-return]


def _check(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    tier: Tensor,
    keep: list[int],
    rule: str,
    gate: str | None,
    *outs: Tensor,
) -> None:
    check_key_value(key, value, outs)
    check_device("key", key, scores=scores, tier=tier)
    check_selection(scores, tier, keep)
    check_shape("scores", scores, key.shape[:3], "B H N")
    check_rule(rule, gate)
    check_outs(key, value, max(keep), outs)


def _run(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    tier: Tensor,
    keep: list[int],
    rule: str,
    gate: str | None,
    *outs: Tensor,
) -> Tensor:
    _check(key, value, scores, tier, keep, rule, gate, *outs)
    check_apart(key, value, *outs)
    check_tier_values(tier)
    lists: tuple[Tensor, Tensor] = implementation("select_tokens", "select", scores)(scores, tier, keep)
    kept, evicted = lists
    # "none" changes no kept row: its pivots need not be found
    if rule != "none":
        pivot, similarity = implementation("nearest_kept", "nearest", key)(key, kept, evicted)
        weights = merge_weights(rule, similarity, pivot, kept, gate)
        del similarity
        implementation("merge_", "merge", key, value)(key, value, kept, evicted, pivot, *weights, *outs)
    # outs were written by the merge, row for row
    if rule == "none" or not outs:
        implementation("compact_", "compact", key, value)(key, value, kept, *outs)
    return kept


def _fake(key: Tensor, value: Tensor, scores: Tensor, tier: Tensor, keep: list[int], *rest: Any) -> Tensor:
    _check(key, value, scores, tier, keep, *rest)
    return scores.new_empty((*scores.shape[:2], max(keep)), dtype=torch.int32)


register_in_place("compress_", "Tensor scores, Tensor tier, SymInt[] keep, str rule, str? gate", "Tensor", _run, _fake)
