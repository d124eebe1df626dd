"""merge_: evicted keys and values fold into their pivots."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm_kernels._checks import (
    accumulation_dtype,
    check_ascending,
    check_call,
    check_device,
    check_in_place,
    check_indices,
    check_rows,
    check_shape,
    check_tensor,
    check_unit_stride,
    overlap,
    require,
)
from lookm_kernels._dispatch import implementation, register_in_place
from lookm_kernels.nearest import check_lists
from lookm_kernels.rules import check_votes


def merge_(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    evicted: Tensor,
    pivot: Tensor,
    evicted_weight: Tensor,
    kept_weight: Tensor,
    *,
    votes: Tensor | None = None,
    out_votes: Tensor | None = None,
    out_key: Tensor | None = None,
    out_value: Tensor | None = None,
) -> None:
    """Merge evicted tokens into kept ones, in place, keys and values alike (LOOK-M, section 3.3).

        x_c <- kept_weight[c] * x_c + sum over the e with pivot c of evicted_weight[e] * x_e

    Accumulated in float32 (float64 for a float64 tensor) in the order of the evicted list and rounded once, to the
    tensor's own dtype. Only the rows of kept tokens are written, and of those only the ones that change; a token of
    weight 0 is not read.

    With out_key and out_value, key and value are only read: row c of an out is what the row of kept[c] would become, 0
    where kept[c] is -1, bit for bit what merge_ and compact_ leave in place.

    Args:
        key, value: [B, H, N, D] and [B, H, N, Dv] float16, bfloat16, float32 or float64, modified without outs; they
            may differ in dtype, as under torch.autocast.
        kept, evicted: [B, H, K] and [B, H, E] int32 as select_tokens gives them; -1 marks an empty place.
        pivot: [B, H, E] int32, places in `kept` as nearest_kept gives them; -1 merges nowhere.
        evicted_weight, kept_weight: [B, H, E] and [B, H, K] float32 (float64 for float64 keys); see
            rules.merge_weights.
        votes: [B, H, N] float32, how many tokens each pair stands for, 0 or more; None: one each. The weights should be
            made with them.
        out_votes: [B, H, K] float32 contiguous, written where it is given: votes[kept[c]] + the sum of votes[e] over
            the e with pivot c and a weight other than 0; 0 where kept[c] is -1. In attention over the merged pairs the
            logarithm of the votes belongs into the logits (proportional attention, ToMe, arXiv 2210.09461; KeepKV,
            arXiv 2504.09936): equal pairs that merged then weigh as they did apart.
        out_key, out_value: both or neither, [B, H, K, D] and [B, H, K, Dv] of the dtype of key and of value, unit last
            stride, written; their memory lies before or behind that of key and that of value.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes or devices that do not fit, indices out of range, an expanded tensor that would be modified,
            an out in the memory of key or value or without the other, an input that requires a gradient. Nothing is
            modified then.
    """
    check_call(key=key, value=value, kept=kept, evicted=evicted, pivot=pivot)
    check_call(evicted_weight=evicted_weight, kept_weight=kept_weight)
    check_call(votes=votes, out_votes=out_votes)
    outs = given_outs(out_key, out_value)
    op = torch.ops.lookm.merge_
    op(key, value, kept, evicted, pivot, evicted_weight, kept_weight, votes, out_votes, *outs)


def given_outs(out_key: Tensor | None, out_value: Tensor | None) -> tuple[Tensor, ...]:
    """The last arguments of an op, before torch's dispatcher: both outs, or nothing where it runs in place."""
    if out_key is None and out_value is None:
        return ()
    for argument, out, other in (("out_key", out_key, "out_value"), ("out_value", out_value, "out_key")):
        require(out is not None, argument, f"given where `{other}` is", out)
    check_call(out_key=out_key, out_value=out_value)
    return out_key, out_value  # type: ignore[return-value]


def check_apart(
    key: Tensor, value: Tensor, *outs: Tensor, votes: Tensor | None = None, out_votes: Tensor | None = None
) -> None:
    """What is written must lie apart: what is moved in one would move twice, or be read after it was written.

    It reads addresses, which a tensor that is being traced does not have.
    """
    first, second = ("out_key", "out_value") if outs else ("key", "value")
    left, right = outs or (key, value)
    same = left.numel() > 0 and left.data_ptr() == right.data_ptr()
    require(not same, second, f"in other memory than `{first}`, as both are modified", right)
    for argument, out in zip(("out_key", "out_value"), outs, strict=False):
        for name, tensor in (("key", key), ("value", value)):
            require(not overlap(out, tensor), argument, f"in other memory than `{name}`, which is only read", out)
    apart = votes is None or out_votes is None or not overlap(out_votes, votes)
    require(apart, "out_votes", "in other memory than `votes`, which is only read", out_votes)


def check_key_value(key: Tensor, value: Tensor, outs: tuple[Tensor, ...]) -> None:
    """A key and a value tensor of one cache layer, which are about to be modified where there are no outs."""
    check_rows("key", key, "B H N D")
    check_rows("value", value, "B H N Dv")
    require(value.shape[:3] == key.shape[:3], "value", f"[B, H, N] = {list(key.shape[:3])} like `key`", value)
    check_device("key", key, value=value)
    if not outs:
        check_in_place("key", key)
        check_in_place("value", value)


def check_outs(key: Tensor, value: Tensor, kept_size: int, outs: tuple[Tensor, ...]) -> None:
    """Where the kept rows of keys and values are to be written; no outs are right too."""
    for argument, out, tensor, dims in zip(
        ("out_key", "out_value"), outs, (key, value), ("B H K D", "B H K Dv"), strict=False
    ):
        check_tensor(argument, out, dims, (tensor.dtype,))
        check_shape(argument, out, (*tensor.shape[:2], kept_size, tensor.shape[3]), dims)
        check_unit_stride(argument, out)
        check_device("key", key, **{argument: out})
        check_in_place(argument, out)


def check_vote_tensors(key: Tensor, kept_size: int, votes: Tensor | None, out_votes: Tensor | None) -> None:
    """Votes of the tokens of `key` and where those of the kept ones are to be written; None is right too."""
    if votes is not None:
        check_votes(votes, key.shape[:3])
        check_device("key", key, votes=votes)
    if out_votes is not None:
        check_tensor("out_votes", out_votes, "B H K", (torch.float32,))
        check_shape("out_votes", out_votes, (*key.shape[:2], kept_size), "B H K")
        require(out_votes.is_contiguous(), "out_votes", "contiguous", out_votes)
        check_device("key", key, out_votes=out_votes)


def _check(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    evicted: Tensor,
    pivot: Tensor,
    evicted_weight: Tensor,
    kept_weight: Tensor,
    votes: Tensor | None,
    out_votes: Tensor | None,
    *outs: Tensor,
) -> None:
    check_key_value(key, value, outs)
    check_lists(key, kept=kept, evicted=evicted, pivot=pivot)
    check_shape("pivot", pivot, evicted.shape, "B H E")
    for argument, weight, dims, shape in (
        ("evicted_weight", evicted_weight, "B H E", evicted.shape),
        ("kept_weight", kept_weight, "B H K", kept.shape),
    ):
        check_tensor(argument, weight, dims, (accumulation_dtype(key.dtype),))
        check_shape(argument, weight, shape, dims)
    check_device("key", key, evicted_weight=evicted_weight, kept_weight=kept_weight)
    check_vote_tensors(key, kept.shape[2], votes, out_votes)
    check_outs(key, value, kept.shape[2], outs)


def _run(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    evicted: Tensor,
    pivot: Tensor,
    evicted_weight: Tensor,
    kept_weight: Tensor,
    votes: Tensor | None,
    out_votes: Tensor | None,
    *outs: Tensor,
) -> None:
    lists = kept, evicted, pivot, evicted_weight, kept_weight
    _check(key, value, *lists, votes, out_votes, *outs)
    check_apart(key, value, *outs, votes=votes, out_votes=out_votes)
    check_indices("kept", kept, key.shape[2])
    check_ascending("kept", kept)
    check_indices("evicted", evicted, key.shape[2])
    check_indices("pivot", pivot, kept.shape[2])
    implementation("merge_", "merge", key, value)(key, value, *lists, votes, out_votes, *outs)


register_in_place(
    "merge_",
    "Tensor kept, Tensor evicted, Tensor pivot, Tensor evicted_weight, Tensor kept_weight, Tensor? votes, "
    "Tensor(c!)? out_votes",
    "()",
    _run,
    _check,
)
