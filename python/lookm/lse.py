"""The log-sum-exp that a fused attention op computed anyway, for the scores to use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WHOLE = torch.ops.aten.scaled_dot_product_attention.default
# what it chooses from; each returns its output first and the log-sum-exp of every query second
FUSED = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
}


@dataclass(frozen=True)
class Call:
    """What one op computed: lse of queries of shape [B, Hq, M] over `keys` tokens; plain: no mask, no dropout.

    The tensors it was given are not held: they may be copies as large as the prompt.
    """

    shape: torch.Size
    keys: int
    causal: bool
    scale: float
    plain: bool
    lse: Tensor


class LogSumExp(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees which fused attention ops run inside; the ops themselves, and so what they return, stay what they are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is WHOLE:
            # inference mode hands it over as it is: what it chooses is inside
            with self:
                return func.decompose(*args, **kwargs)
        if func not in FUSED:
            return func(*args, **kwargs)
        schema = func._schema.arguments
        given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        given |= dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
        if "compute_log_sumexp" in given:
            given["compute_log_sumexp"] = True
        output = func(**given)
        self.calls.append(
            Call(
                shape=given["query"].shape[:3],
                keys=given["key"].shape[2],
                causal=given["is_causal"],
                scale=given["query"].shape[-1] ** -0.5 if given["scale"] is None else given["scale"],
                plain=given.get("attn_bias") is None and given.get("attn_mask") is None and given["dropout_p"] == 0,
                lse=output[1].detach(),
            )
        )
        return output

    def of(self, query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor | None:
        """[B, Hq, M] float32 (float64 for float64 inputs): natural logarithm, without a mask, of each query's sum.

        query [B, Hq, M, D] and key [B, H, N, D] as the scores use them. None where not exactly one op ran, or where it
        did not compute that.
        """
        if len(self.calls) != 1:
            return None
        (call,), queries = self.calls, query.shape[2]
        same = (
            call.shape == query.shape[:3]
            and call.keys == key.shape[2]
            and call.causal == causal
            # causal of fewer queries than keys is aligned to the first key there, to the last one here
            and (not causal or queries == call.keys)
            and math.isclose(call.scale, scale, rel_tol=1e-6)
            and call.plain
        )
        # some pad the queries, some add a last dimension of one
        lse = (call.lse.squeeze(-1) if call.lse.ndim == 4 else call.lse)[:, :, :queries]
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return lse if same and lse.shape == call.shape and lse.dtype == dtype else None
