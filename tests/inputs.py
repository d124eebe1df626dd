"""Valid random arguments for every op, memory layouts, and bitwise comparison."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lookm_kernels

IN_PLACE = ("merge_", "compact_", "compress_")
# with ".out" into tensors of their own
OPS = (
    *("attention_scores", "kept_attention", "select_tokens", "nearest_kept", "quantize_pairs", "quantized_attention"),
    *IN_PLACE,
    *(f"{op}.out" for op in IN_PLACE),
)
LAYOUTS = ("contiguous", "heads_last", "window")
# whether the kernels of this process run in Triton's interpreter, and `device` stands for them
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLACE_MATTERS = "numpy, which the interpreter multiplies with, rounds a product by its place; a GPU does not"
# float64 is the reference's alone
EXACT = (torch.float32,) if INTERPRETED else (torch.float32, torch.float64)
# bfloat16 is refused in Triton's interpreter: test_dispatch
LOW_PRECISION = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
# of keys and values, as a model has them under torch.autocast, and the other way round
MIXED = [pair for dtype in LOW_PRECISION for pair in ((torch.float32, dtype), (dtype, torch.float32))]


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def tiers(seed: int, batch: int, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """[B, N] int32, row b with b tokens of left padding."""
    tier = torch.randint(1, 4, (batch, tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    for row in range(batch):
        tier[row, :row] = 0
    return tier.to(device)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same [B, H, N, D] values: contiguous, as [B, N, H, D] in memory, or as a window of a larger buffer of NaN."""
    if layout == "heads_last":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "window":
        batch, heads, tokens, width = tensor.shape
        buffer = tensor.new_full((batch + 2, heads + 1, tokens + 5, width + 3), float("nan"))
        view = buffer[1:-1, 1:, 2:-3, 1:-2]
        return view.copy_(tensor)
    return tensor.contiguous()


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def memory(view: Tensor) -> Tensor:
    """Everything in the storage of a tensor, as a flat tensor that shares it."""
    return torch.as_strided(view, (view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)


def moved(view: Tensor, device: torch.device) -> Tensor:
    """The same tensor on a device, the memory around it and its strides included."""
    return torch.as_strided(memory(view).to(device), view.shape, view.stride(), view.storage_offset())


def only_written(view: Tensor, before: Tensor, written: Tensor) -> bool:
    """Whether of the `memory` of `view`, as it was `before`, only places marked in `written` (like view) changed."""
    marks = torch.zeros_like(before, dtype=torch.bool)
    torch.as_strided(marks, view.shape, view.stride(), view.storage_offset()).copy_(written)
    return same_bits(memory(view)[~marks], before[~marks])


def quantize_pairs(**given: Any) -> tuple[Tensor | None, ...]:
    """The public function, with the results of the op."""
    return lookm_kernels.quantize_pairs(**given)[:6]


def quantized_attention(query: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """The public function, with the arguments of the op: each tensor of the pairs."""
    pairs = lookm_kernels.QuantizedPairs(**{name: given.pop(name) for name in lookm_kernels.QuantizedPairs._fields})
    return lookm_kernels.quantized_attention(query, pairs, **given)


def public(op: str) -> Callable[..., Any]:
    """The public function of an op, with the arguments of the op."""
    if op in ("quantize_pairs", "quantized_attention"):
        return globals()[op]
    function: Callable[..., Any] = getattr(lookm_kernels, op.partition(".")[0])
    return function


def overload(op: str) -> Any:
    """What torch's dispatcher knows of an op."""
    name, _, which = op.partition(".")
    return getattr(getattr(torch.ops.lookm, name), which or "default")


def new_outs(given: dict[str, Any], kept_size: int, layout: str = "contiguous") -> dict[str, Tensor]:
    """out_key and out_value for the key and value among the arguments, full of NaN."""
    return {
        f"out_{name}": laid_out(torch.full_like(given[name][:, :, :1], float("nan")).repeat(1, 1, kept_size, 1), layout)
        for name in ("key", "value")
    }


def tensors_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments."""
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def arguments(op: str, device: torch.device | str = "cpu", batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of one call in the order of the op's schema: 6 query heads, 3 KV heads, 9 queries, 13 tokens."""
    if op.endswith(".out"):
        given = arguments(op.removesuffix(".out"), device, batch, seed)
        return given | new_outs(given, max(given["keep"]) if "keep" in given else given["kept"].shape[2])
    heads, queries, tokens, width = 3, 9, 13, 8
    key = random(seed, batch, heads, tokens, width, device=device)
    value = random(seed + 1, batch, heads, tokens, 5, device=device)
    scores, tier = random(seed + 2, batch, heads, tokens, device=device), tiers(seed, batch, tokens, device)
    keep = [5 + row for row in range(batch)]
    group = torch.arange(tokens, dtype=torch.int32, device=device).remainder(2).repeat(batch, 1)
    least = random(seed + 6, batch, heads, device=device) / 10
    votes = random(seed + 7, batch, heads, tokens, device=device).abs().mul(9).ceil()
    out_votes = torch.full((batch, heads, max(keep)), float("nan"), device=device)
    counts = {"votes": votes, "out_votes": out_votes}
    if op == "attention_scores":
        chance = random(seed + 3, batch, 1, queries, tokens, device=device)
        return {
            "query": random(seed + 4, batch, 2 * heads, queries, width, device=device),
            "key": key,
            "scale": 0.3,
            "causal": True,
            "lse": None,
            "query_weight": random(seed + 5, batch, queries, device=device).abs(),
            "key_start": torch.arange(batch, dtype=torch.int32, device=device),
            "mask": chance > -1,
            "softcap": 20.0,
            "query_position": torch.tensor(batch * [[-1, 0, 2, 3, 5, 7, 8, 10, 12]], dtype=torch.int32, device=device),
            "head_scale": 1 + random(seed + 6, batch, 2 * heads, device=device).abs(),
        }
    if op == "kept_attention":
        return {
            "query": random(seed + 4, batch, 2 * heads, queries, width, device=device),
            "key": key,
            "value": value,
            "key_bias": random(seed + 5, batch, heads, tokens - 3, device=device),
            "key_start": torch.arange(batch, dtype=torch.int32, device=device),
            "key_end": tokens - torch.arange(batch, dtype=torch.int32, device=device),
            "mask": random(seed + 3, batch, 1, queries, tokens, device=device) > -1,
            "causal": True,
            "scale": 0.3,
            "softcap": 20.0,
        }
    if op == "quantize_pairs":
        start = torch.arange(batch, dtype=torch.int32, device=device)
        return {"key": key, "value": value[..., :4].contiguous(), "format": "int4", "key_start": start}
    if op == "quantized_attention":
        pairs = lookm_kernels.quantize_pairs(**arguments("quantize_pairs", device, batch, seed))._asdict()
        start = pairs.pop("key_start")
        return {
            "query": random(seed + 4, batch, 2 * heads, queries, width, device=device),
            **pairs,
            "key_bias": random(seed + 5, batch, heads, tokens - 3, device=device),
            "key_start": start,
            "key_end": tokens - start,
            "scale": 0.3,
            "softcap": 20.0,
        }
    if op == "select_tokens":
        return {"scores": scores, "tier": tier, "keep": keep}
    if op == "compress_":
        given = {"key": key, "value": value, "scores": scores, "tier": tier, "keep": keep}
        given |= {"rule": "weighted", "gate": "mean_similarity", "similarity": "key_value", "group": group}
        return given | {"min_similarity": least, "refine": 1} | counts
    kept, evicted = lookm_kernels.select_tokens(scores, tier, keep)
    if op == "nearest_kept":
        merged = [random(seed + 8, *kept.shape, x.shape[3], device=device) for x in (key, value)]
        lists = {"key": key, "kept": kept, "evicted": evicted, "value": value, "group": group}
        return lists | {"min_similarity": least, "kept_key": merged[0], "kept_value": merged[1]}
    if op == "compact_":
        return {"key": key, "value": value, "kept": kept}
    pivot, similarity = lookm_kernels.nearest_kept(key, kept, evicted)
    evicted_weight, kept_weight = lookm_kernels.merge_weights("weighted", similarity, pivot, kept)
    lists = {"kept": kept, "evicted": evicted, "pivot": pivot}
    weights = {"evicted_weight": evicted_weight, "kept_weight": kept_weight}
    return {"key": key, "value": value} | lists | weights | counts


def copied(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with tensors of their own memory, strides kept."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}


def call(op: str, given: dict[str, Any], function: Callable[..., Any] | None = None) -> list[Tensor]:
    """Runs the op on copies of its arguments: what it returns, then what it leaves in key and value, or in the outs,
    and the votes if it is given a place for them."""
    own = copied(given)
    result = (function or public(op))(**own)
    returned = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    counted = [own["out_votes"]] if "out_votes" in own else []
    if op.endswith(".out"):
        return [*returned, own["out_key"], own["out_value"], *counted]
    if op == "compress_":
        return [result, *(own[name][:, :, : result.shape[2]] for name in ("key", "value")), *counted]
    return [*returned, *([own["key"], own["value"]] if op.endswith("_") else []), *counted]


def check_outs(run: Callable[..., object], key: Tensor, value: Tensor, kept_size: int) -> None:
    """run(key, value, out_key=..., out_value=...) writes what run(key, value) leaves in the first rows, and only that.

    Outs full of NaN, in every layout (interpreted, which is slow, in the oddest); key and value keep their bits.
    """
    goal = key.clone(), value.clone()
    run(*goal)
    before = [memory(x).clone() for x in (key, value)]
    for layout in LAYOUTS[2:] if INTERPRETED else LAYOUTS:
        outs = new_outs({"key": key, "value": value}, kept_size, layout)
        around = [memory(out).clone() for out in outs.values()]
        run(key, value, **outs)
        for x, was in zip((key, value), before, strict=True):
            assert same_bits(memory(x), was)
        for x, out, was in zip(goal, outs.values(), around, strict=True):
            assert same_bits(out, x[:, :, :kept_size])
            assert only_written(out, was, torch.ones_like(out, dtype=torch.bool))
