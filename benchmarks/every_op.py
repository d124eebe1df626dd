"""Every op of a backend once on tiny inputs, for compute-sanitizer: python benchmarks/every_op.py triton|cuda

Rows of different valid length, grouped heads, a mask and odd sizes, so that every branch of a kernel runs; results are
compared with the reference on the host, where the inputs are drawn too: what a kernel reads was written by a copy.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import lookm_kernels
from lookm_kernels._dispatch import why_no_float8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, HEADS, KV_HEADS, TOKENS, WIDTH = 2, 4, 2, 300, 64
KEEP = [60, 50]
LIMITS = {torch.float16: 1e-2, torch.float32: 1e-3}


def scores(dtype: torch.dtype, device: str) -> list[Tensor]:
    """All options, and none; 8-bit floats where the GPU multiplies them."""
    query = torch.randn(BATCH, HEADS, 130, WIDTH).to(device, dtype)
    key = torch.randn(BATCH, KV_HEADS, TOKENS, WIDTH).to(device, dtype)
    start = torch.tensor([0, 200], dtype=torch.int32).to(device)
    weight = torch.rand(BATCH, 130).to(device)
    mask = (torch.rand(BATCH, 1, 130, TOKENS) < 0.9).to(device)
    lse = torch.full((BATCH, HEADS, 130), 6.0).to(device)
    picked = (torch.arange(130, dtype=torch.int32) * 2 + 1).expand(BATCH, -1).to(device)
    masked = {"query_weight": weight, "key_start": start, "mask": mask, "softcap": 20.0}
    several = torch.rand(BATCH, 3, 130).to(device)
    options = ({}, {"query_weight": several}, masked, {"lse": lse}, {"query_position": picked, "query_weight": weight})
    results = [lookm_kernels.attention_scores(query, key, **each) for each in options]
    if why_no_float8(query.device):
        return results
    (query, query_scale), (key, key_scale) = (lookm_kernels.quantize_heads(x) for x in (query, key))
    scale = query_scale * key_scale.repeat_interleave(HEADS // KV_HEADS, 1)
    return [*results, lookm_kernels.attention_scores(query, key, head_scale=scale)]


def kept(dtype: torch.dtype, device: str) -> list[Tensor]:
    """One query and many, with all options and none, over several splits; values wider than keys."""
    key, value = torch.randn(BATCH, KV_HEADS, 600, WIDTH), torch.randn(BATCH, KV_HEADS, 600, 70)
    pairs = key.to(device, dtype), value.to(device, dtype)
    start = torch.tensor([0, 555], dtype=torch.int32).to(device)
    bias = torch.rand(BATCH, KV_HEADS, 500).to(device)
    results = []
    for queries in (1, 50):
        query = torch.randn(BATCH, HEADS, queries, WIDTH).to(device, dtype)
        mask = (torch.rand(BATCH, 1, queries, 600) < 0.9).to(device)
        every = {"key_bias": bias, "key_start": start, "key_end": start + 45, "mask": mask, "softcap": 20.0}
        results += [lookm_kernels.kept_attention(query, *pairs, **each) for each in ({}, {"causal": False}, every)]
    return results


def quantized(dtype: torch.dtype, device: str) -> list[Tensor]:
    """Every format, one query and many, heads of several groups, over several splits."""
    start = torch.tensor([0, 555], dtype=torch.int32).to(device)
    bias, results = torch.rand(BATCH, KV_HEADS, 500).to(device), []
    for format in ("int8", "fp8", "int4"):
        for width, value_width in ((WIDTH, 70), (80, 132)):
            key, value = (torch.randn(BATCH, KV_HEADS, 600, each).to(device, dtype) for each in (width, value_width))
            pairs = lookm_kernels.quantize_pairs(key, value, format, key_start=start)
            results += [x.float() for x in pairs if x is not None]
            for queries in (1, 50):
                query = torch.randn(BATCH, HEADS, queries, width).to(device, dtype)
                every = {"key_bias": bias, "key_end": start + 45, "softcap": 20.0}
                results += [x for each in ({}, every) for x in lookm_kernels.quantized_attention(query, pairs, **each)]
    return results


def compression(dtype: torch.dtype, device: str) -> list[Tensor]:
    """compress_ by every rule, in place and into other memory: selection, pivots, merge and compaction."""
    tier = torch.randint(1, 4, (BATCH, TOKENS), dtype=torch.int32)
    tier[1, :40] = 0
    given = torch.rand(BATCH, KV_HEADS, TOKENS).to(device), tier.to(device)
    original = torch.randn(2, BATCH, KV_HEADS, TOKENS, WIDTH).to(dtype).unbind()
    results = []
    for rule in lookm_kernels.rules.RULES:
        key, value = (tensor.clone().to(device) for tensor in original)
        outs = [torch.empty_like(x[:, :, :60]) for x in (key, value)]
        lookm_kernels.compress_(key, value, *given, KEEP, rule, out_key=outs[0], out_value=outs[1])
        results += [lookm_kernels.compress_(key, value, *given, KEEP, rule), key[:, :, :60], value[:, :, :60], *outs]
    return results


def lists(dtype: torch.dtype, device: str) -> list[Tensor]:
    """Odd widths, rows too long for shared memory, and a pivot that attracts hundreds: selection, merge, compaction.

    The keys stay float32, as torch.autocast leaves them.
    """
    results = []
    for tokens in (301, 60001):
        attention, tier = torch.randn(1, 1, tokens), torch.randint(0, 4, (1, tokens), dtype=torch.int32)
        results += lookm_kernels.select_tokens(attention.to(device), tier.to(device), tokens // 5)
    key, value = torch.randn(1, 2, 601, 37).to(device), torch.randn(1, 2, 601, 70).to(device, dtype)
    tier = torch.ones(1, 601, dtype=torch.int32).to(device)
    kept, evicted = lookm_kernels.select_tokens(torch.randn(1, 2, 601).to(device), tier, 60)
    pivot = torch.randint(0, 60, evicted.shape, dtype=torch.int32).to(device)
    pivot[..., 20:500] = 7
    weights = torch.rand(evicted.shape).to(device), torch.rand(kept.shape).to(device)
    outs = {f"out_{name}": torch.empty_like(x[:, :, :60]) for name, x in (("key", key), ("value", value))}
    lookm_kernels.merge_(key, value, kept, evicted, pivot, *weights, **outs)
    results += [x.clone() for x in outs.values()]
    lookm_kernels.compact_(key, value, kept, **outs)
    lookm_kernels.merge_(key, value, kept, evicted, pivot, *weights)
    lookm_kernels.compact_(key, value, kept)
    return [*results, *outs.values(), key[:, :, :60], value[:, :, :60]]


def main() -> None:
    """The backend and the reference on the same inputs; an error where they differ."""
    for op in (scores, kept, quantized, compression, lists):
        for dtype in LIMITS:
            results = []
            for backend, device in ((sys.argv[1], DEVICE), ("reference", "cpu")):
                torch.manual_seed(0)
                with lookm_kernels.use_backend(backend):
                    results.append([result.cpu().double() for result in op(dtype, device)])
            # the reference multiplies 8-bit floats everywhere
            for ours, expected in zip(*results, strict=False):
                difference = float((ours - expected).norm() / expected.norm())
                if not difference < LIMITS[dtype]:
                    raise SystemExit(f"{op.__name__} {dtype}: {difference:.3g} away from the reference")
            print(f"{op.__name__} {dtype}: {len(results[0])} results as the reference's")


if __name__ == "__main__":
    main()
