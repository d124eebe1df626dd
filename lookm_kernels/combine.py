"""combine_attention: attentions over keys in several places as the one over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lookm_kernels._checks import (
    FLOAT_DTYPES,
    SCORE_DTYPES,
    check_call,
    check_device,
    check_shape,
    check_tensor,
    require,
)


def combine_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over all keys from those over disjoint parts of them.

        lse = log sum over parts of exp(lse_p),  out = sum over parts of exp(lse_p - lse) * out_p

    Args:
        outs: [B, Hq, M, Dv] each, float16, bfloat16, float32 or float64, as kept_attention and quantized_attention give
            them.
        lses: [B, Hq, M] float32 or float64 each, in the same order; -inf where a query sees nothing of a part.

    Returns:
        out in the dtype of the first, 0 where a query sees nothing at all, and lse, -inf there.

    Raises:
        TypeError: not tensors, or dtypes that are not accepted.
        ValueError: no part, not as many of one as of the other, shapes or devices that do not fit, a tensor that
            requires a gradient.
    """
    require(len(outs) > 0, "outs", "one part or more", [])
    require(len(lses) == len(outs), "lses", f"{len(outs)}, one for each of `outs`", len(lses))
    for place, (part, lse) in enumerate(zip(outs, lses, strict=True)):
        check_call(**{f"outs[{place}]": part, f"lses[{place}]": lse})
        check_tensor(f"outs[{place}]", part, "B Hq M Dv", FLOAT_DTYPES)
        check_tensor(f"lses[{place}]", lse, "B Hq M", SCORE_DTYPES)
        check_shape(f"outs[{place}]", part, outs[0].shape, "B Hq M Dv")
        check_shape(f"lses[{place}]", lse, outs[0].shape[:3], "B Hq M")
        check_device("outs[0]", outs[0], **{f"outs[{place}]": part, f"lses[{place}]": lse})
    every = torch.stack([*lses])
    top = every.amax(0)
    # a query that sees nothing has no maximum: 0 keeps its weights 0 rather than NaN
    weights = (every - top.masked_fill(top == float("-inf"), 0.0)).exp()
    total = weights.sum(0)
    shares = weights / total.masked_fill(total == 0, 1.0)
    out = torch.zeros_like(outs[0], dtype=every.dtype)
    for part, share in zip(outs, shares.unbind(), strict=True):
        # what a part that is not seen holds, NaN too, does not count
        out = out + (part * share[..., None]).masked_fill(share[..., None] == 0, 0.0)
    return out.to(outs[0].dtype), top + total.log()
