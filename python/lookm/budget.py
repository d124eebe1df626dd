"""Budgets: how many tokens of a prompt stay."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lookm.policy import Policy, is_number

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
ACCEPTED = (
    "a fraction 0 < f <= 1.0 (0.2 or '20%'), a number of tokens >= 1 (500 or '500 tokens') "
    "or bytes for the whole cache ('512MiB')"
)


@dataclass(frozen=True)
class Budget:
    """One of: fraction of each row's prompt, tokens a row, bytes for the whole cache, or two fractions.

    With n valid tokens in a row: fraction f keeps max(1, floor(f n)); tokens keeps min(n, tokens); bytes are split
    evenly over the compressed layers and rows. `important` and `recent` are fractions, each rounded down, as the
    authors do.
    """

    fraction: float | None = None
    tokens: int | None = None
    bytes: int | None = None
    important: float | None = None
    recent: float | None = None

    def split(self, length: int, policy: Policy, bytes_per_token: int) -> tuple[int, int, int]:
        """(keep, recent, sinks) tokens of a row of `length` valid tokens.

        bytes_per_token: bytes of one token column of the cache, over all rows and compressed layers. ValueError where a
        budget in bytes does not hold one token.
        """
        if self.important is not None and self.recent is not None:
            recent = _share(self.recent, length)
            keep = min(length, max(1, _share(self.important, length) + recent))
            return keep, recent, min(policy.sinks, keep // 2, keep - recent)
        if self.bytes is not None and self.bytes < bytes_per_token:
            raise ValueError(
                f"`budget` of {self.bytes} bytes is less than one token in every row and layer: {bytes_per_token} bytes"
            )
        if self.fraction is not None:
            keep = max(1, _share(self.fraction, length))
        else:
            keep = self.tokens if self.tokens is not None else (self.bytes or 0) // bytes_per_token
        keep = min(length, keep)
        sinks = min(policy.sinks, keep // 2)
        return keep, min(_share(policy.recent_share, keep), keep - sinks), sinks

    def limit(self, keep: int, bytes_per_token: int) -> int:
        """What a row may hold in all, however long it gets, where `keep` tokens of its prompt stayed."""
        if self.bytes is not None:
            return self.bytes // bytes_per_token
        return max(keep, self.tokens or 0)


def _share(fraction: float, of: int) -> int:
    # through the decimal digits: 0.29 of 100 is 29, though 0.29 * 100 is 28.999...
    return math.floor(Fraction(repr(float(fraction))) * of)


def parse_budget(
    budget: float | int | str | None, important: float | None = None, recent: float | None = None
) -> Budget:
    """The budget a user wrote, None beside two fractions. ValueError that says what is accepted for anything else."""
    if (important is None) != (recent is None):
        raise ValueError(f"`important` and `recent` go together, got important={important!r}, recent={recent!r}")
    if important is not None and recent is not None:
        if budget is not None:
            raise ValueError(f"`budget` must not be given beside `important` and `recent`, got {budget!r}")
        fractions = all(is_number(share) and share >= 0 for share in (important, recent))
        if not (fractions and 0 < important + recent <= 1):
            raise ValueError(
                f"`important` and `recent` must be fractions, 0 or more, 0 < sum <= 1, got {important!r} and {recent!r}"
            )
        return Budget(important=float(important), recent=float(recent))
    if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1:
        return Budget(tokens=budget)
    if isinstance(budget, float) and 0 < budget <= 1:
        return Budget(fraction=budget)
    written = _from_text(budget) if isinstance(budget, str) else None
    if written is None:
        raise ValueError(f"`budget` must be {ACCEPTED}, got {budget!r}")
    return written


def _from_text(budget: str) -> Budget | None:
    """A number and what it counts, in any case: percent, tokens or a unit of bytes. None for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|tokens?|[kmg]i?b|b)", budget.strip().lower(), re.ASCII)
    if match is None:
        return None
    number, unit = Fraction(match[1]), match[2]
    if unit == "%":
        return Budget(fraction=float(number / 100)) if 0 < number <= 100 else None
    if unit in UNITS:
        size = math.floor(number * UNITS[unit])
        return Budget(bytes=size) if size > 0 else None
    return Budget(tokens=int(number)) if number >= 1 and number.denominator == 1 else None


def extend_for_text(keep: Sequence[int], recent: Sequence[int], text_before_recent: Sequence[int]) -> list[int]:
    """`keep` of every row when no text may be evicted: recent + max(important, text outside of the recent window)."""
    return [r + max(k - r, text) for k, r, text in zip(keep, recent, text_before_recent, strict=True)]
