"""What an op must do at least: operations, bytes of device memory (each input read once, each output written once)."""

from __future__ import annotations

from typing import NamedTuple

# assumed of an H200 until it is measured: a large copy counting bytes read and written, a large bf16 matrix product
H200_BYTES_PER_S = 4.3e12
H200_FLOPS_PER_S = 790e12
# exponentials: 16 a cycle on each of 132 multiprocessors at 1.98 GHz
H200_EXPONENTIALS_PER_S = 16 * 132 * 1.98e9
BF16, FLOAT32, INT32 = 2, 4, 4


class Work(NamedTuple):
    """Floating-point operations of the matrix products, bytes, and exponentials."""

    flops: float
    bytes: float
    exponentials: float = 0.0

    def seconds(self, flops_per_s: float = H200_FLOPS_PER_S, bytes_per_s: float = H200_BYTES_PER_S) -> dict[str, float]:
        """Time of each part alone; the largest is the floor. Exponentials always at the H200's rate."""
        return {
            "matrix": self.flops / flops_per_s,
            "bytes": self.bytes / bytes_per_s,
            "exponentials": self.exponentials / H200_EXPONENTIALS_PER_S,
        }


def causal_pairs(batch: int, heads: int, tokens: int) -> int:
    """Visible (query, key) pairs of all query heads."""
    return batch * heads * tokens * (tokens + 1) // 2


def scores(batch: int, heads: int, kv_heads: int, tokens: int, width: int, passes: int) -> Work:
    """Column sums in one pass over the pairs (LSE given) or two: 2 D operations and an exponential a pair and pass."""
    pairs = causal_pairs(batch, heads, tokens)
    read = batch * tokens * (heads + kv_heads) * width * BF16 + batch * heads * tokens * FLOAT32
    return Work(passes * 2 * width * pairs, read + batch * kv_heads * tokens * FLOAT32, passes * pairs)


def attention(batch: int, heads: int, kv_heads: int, tokens: int, width: int) -> Work:
    """An attention forward: two products and one exponential a pair."""
    pairs = causal_pairs(batch, heads, tokens)
    moved = 2 * batch * tokens * (heads + kv_heads) * width * BF16
    return Work(4 * width * pairs, moved, pairs)


def decode(batch: int, heads: int, kv_heads: int, tokens: int, width: int) -> Work:
    """One query over stored pairs: each pair and its bias read once."""
    moved = 2 * batch * (tokens * kv_heads + heads) * width * BF16 + batch * kv_heads * tokens * FLOAT32
    return Work(4 * width * batch * heads * tokens, moved, batch * heads * tokens)


def quantized_decode(batch: int, heads: int, kv_heads: int, tokens: int, width: int, bytes_of_pairs: int) -> Work:
    """One query over quantised pairs: codes and scales read once."""
    moved = bytes_of_pairs + 2 * batch * heads * width * BF16
    return Work(4 * width * batch * heads * tokens, moved, batch * heads * tokens)


def select(batch: int, heads: int, tokens: int) -> Work:
    """Scores and tiers in, two index lists out that hold every token once."""
    return Work(0, batch * tokens * (heads * FLOAT32 + INT32 + heads * INT32))


def nearest(batch: int, heads: int, tokens: int, keep: int, width: int) -> Work:
    """Every evicted key times every kept one: 2 D operations a pair."""
    lists = batch * heads * (tokens + 2 * (tokens - keep)) * INT32
    return Work(batch * heads * 2 * width * keep * (tokens - keep), batch * heads * tokens * width * BF16 + lists)


def merge(batch: int, heads: int, tokens: int, keep: int, width: int) -> Work:
    """All rows of keys and values in, the kept ones out; two operations a number."""
    rows = batch * heads * (tokens + keep)
    return Work(batch * heads * tokens * 2 * width * 2, 2 * rows * width * BF16)


def compact(batch: int, heads: int, tokens: int, keep: int, width: int) -> Work:
    """The kept rows of keys and values, in and out."""
    return Work(0, 4 * batch * heads * keep * width * BF16)


def merging(batch: int, heads: int, tokens: int, keep: int, width: int) -> Work:
    """Nearest, merge and compact as one: keys and values in once, the kept rows out."""
    flops = nearest(batch, heads, tokens, keep, width).flops + merge(batch, heads, tokens, keep, width).flops
    return Work(flops, merge(batch, heads, tokens, keep, width).bytes)
