"""The log-sum-exp that a fused attention op computed anyway, for the scores to use."""

from __future__ import annotations

import math
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


class LogSumExp(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees which fused attention ops run inside; the ops themselves, and so what they return, stay what they are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[dict[str, Any], Tensor]] = []

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
        self.calls.append((given, output[1].detach()))
        return output

    def of(self, query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor | None:
        """[B, Hq, M] float32 (float64 for float64 inputs): natural logarithm, without a mask, of each query's sum.

        query [B, Hq, M, D] and key [B, H, N, D] as the scores use them. None where not exactly one op ran, or where it
        did not compute that.
        """
        if len(self.calls) != 1:
            return None
        given, lse = self.calls[0]
        shape, keys = query.shape[:3], key.shape[2]
        used = query.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
        same = (
            given["query"].shape[:3] == shape
            and given["key"].shape[2] == keys
            and given["is_causal"] == causal
            # causal of fewer queries than keys is aligned to the first key there, to the last one here
            and (not causal or shape[2] == keys)
            and math.isclose(used, scale, rel_tol=1e-6)
            and given.get("attn_bias") is None
            and given.get("attn_mask") is None
            and given["dropout_p"] == 0
        )
        # some pad the queries, some add a last dimension of one
        lse = lse.squeeze(-1)[:, :, : shape[2]] if lse.ndim == 4 else lse[:, :, : shape[2]]
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return lse if same and lse.shape == shape and lse.dtype == dtype else None
