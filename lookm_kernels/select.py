"""select_tokens: which tokens stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lookm_kernels._checks import SCORE_DTYPES, check_call, check_device, check_shape, check_tensor, require
from lookm_kernels._dispatch import implementation, register


def select_tokens(scores: Tensor, tier: Tensor, keep: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """The `keep` first tokens of every (row, head) by (tier, score), ties to the lower index (LOOK-M, section 3.2).

    Args:
        scores: [B, H, N] float32 (or float64). NaN and infinities order below every finite score of the same tier.
        tier: [B, N] int32: 3 protected, 2 text, 1 image or video, 0 padding. A higher tier goes first.
        keep: tokens to keep, 0 <= keep <= N; one number, or one per row.

    Returns:
        (kept [B, H, K], evicted [B, H, E]) int32 with K = max(keep) and E = N - min(keep). Both are ascending and
        right-aligned: the empty places of a row that keeps or evicts fewer hold -1 and come first. Padding is in
        neither list.

    Raises:
        TypeError: not a tensor, a dtype that is not accepted, keep not an integer.
        ValueError: shapes or devices that do not fit, an empty tensor, keep out of range, tier out of range, or an
            input that requires a gradient.
    """
    check_call(scores=scores, tier=tier)
    return torch.ops.lookm.select_tokens(scores, tier, per_row(keep))  # type: ignore[no-any-return]


def per_row(keep: int | Sequence[int]) -> list[int]:
    """`keep` as the ops take it: a list with one number, or one per row."""
    numbers = list(keep) if isinstance(keep, Sequence) else [keep]
    if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise TypeError(f"`keep` must be an int or a sequence of ints, got {keep!r}")
    return numbers


def check_selection(scores: Tensor, tier: Tensor, keep: list[int]) -> None:
    """The checks of select_tokens, also made by compress_."""
    check_tensor("scores", scores, "B H N", SCORE_DTYPES)
    require(all(size > 0 for size in scores.shape), "scores", "without an empty dimension", scores)
    batch, _, tokens = scores.shape
    check_tensor("tier", tier, "B N", (torch.int32,))
    check_shape("tier", tier, (batch, tokens), "B N")
    check_device("scores", scores, tier=tier)
    require(len(keep) in (1, batch), "keep", f"one number or one per row ({batch})", keep)
    require(all(0 <= number <= tokens for number in keep), "keep", f"from 0 to N = {tokens}", keep)


def check_tier_values(tier: Tensor) -> None:
    """Tiers are 0 to 3. Values of other devices than the CPU are not read: that would wait for them."""
    if tier.device.type == "cpu":
        low, high = int(tier.min()), int(tier.max())
        require(low >= 0 and high <= 3, "tier", "from 0 to 3", [low, high])


def _run(scores: Tensor, tier: Tensor, keep: list[int]) -> tuple[Tensor, Tensor]:
    check_selection(scores, tier, keep)
    check_tier_values(tier)
    run = implementation("select_tokens", "select", scores)
    return run(scores, tier, keep)  # type: ignore[no-any-return]


def _fake(scores: Tensor, tier: Tensor, keep: list[int]) -> tuple[Tensor, Tensor]:
    check_selection(scores, tier, keep)
    batch, heads, tokens = scores.shape
    kept = scores.new_empty((batch, heads, max(keep)), dtype=torch.int32)
    return kept, scores.new_empty((batch, heads, tokens - min(keep)), dtype=torch.int32)


register("select_tokens(Tensor scores, Tensor tier, SymInt[] keep) -> (Tensor, Tensor)", _run, _fake)
