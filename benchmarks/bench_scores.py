"""attention_scores under a causal mask: LSE given and without, beside the attention forward and flash-colreduce.

SDPA's flash forward is the yardstick: it has two matrix products and an exponential for every pair of query and key,
the scores with LSE given one product and one exponential. flash-colreduce knows neither grouped heads nor a given LSE:
its keys are expanded to the query heads beforehand, and the sums of a group are added up. Scores in float8 include the
rounding of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import timing
import torch
import work
from pytest_benchmark.fixture import BenchmarkFixture
from targets import OURS
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import lookm_kernels
from lookm_kernels._dispatch import why_no_float8

HEADS, WIDTH = (4, 32) if timing.SMALL else (32, 128)
# batch, KV heads, tokens
SHAPES = [
    *((1, 8, tokens << 10) for tokens in (4, 16, 32, 64, 128)),
    *((1, 32, tokens << 10) for tokens in (4, 32, 128)),
    *((8, heads, tokens << 10) for heads in (8, 32) for tokens in (4, 32)),
]
SMALL_SHAPES = [(1, 2, 160), (2, 4, 96)]
TARGET = SMALL_SHAPES[0] if timing.SMALL else (1, 8, 32 << 10)
LSE_GIVEN, WITHOUT_LSE, FORWARD = "scores, LSE given", "scores, without LSE", "attention forward"
FLOAT8 = "scores in float8, LSE given"
SDPA, COLREDUCE = "SDPA flash", "flash-colreduce"


class Inputs(NamedTuple):
    """query [B, Hq, N, D]; key and value [B, H, N, D]; expanded [B, Hq, N, D]; lse [B, Hq, N]."""

    query: Tensor
    key: Tensor
    value: Tensor
    expanded: Tensor
    lse: Tensor


def random_inputs(batch: int, kv_heads: int, tokens: int) -> Inputs:
    query = torch.randn(batch, HEADS, tokens, WIDTH, device=timing.DEVICE, dtype=timing.DTYPE)
    key, value = torch.randn(2, batch, kv_heads, tokens, WIDTH, device=timing.DEVICE, dtype=timing.DTYPE).unbind()
    expanded = key.repeat_interleave(HEADS // kv_heads, 1)
    name = "_scaled_dot_product_flash_attention" + ("" if timing.ON_GPU else "_for_cpu")
    lse = getattr(torch.ops.aten, name)(query, expanded, expanded, 0.0, True)[1]
    return Inputs(query, key, value, expanded, lse)


def with_lse(inputs: Inputs) -> Tensor:
    return lookm_kernels.attention_scores(inputs.query, inputs.key, lse=inputs.lse)


def without_lse(inputs: Inputs) -> Tensor:
    return lookm_kernels.attention_scores(inputs.query, inputs.key)


def in_float8(inputs: Inputs) -> Tensor:
    (query, query_scale), (key, key_scale) = (lookm_kernels.quantize_heads(x) for x in (inputs.query, inputs.key))
    scale = query_scale * key_scale.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return lookm_kernels.attention_scores(query, key, lse=inputs.lse, head_scale=scale)


def sdpa_forward(inputs: Inputs) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=True, enable_gqa=True)


def colreduce(inputs: Inputs) -> Tensor:
    from flash_colreduce import flash_colreduce

    sums = flash_colreduce(inputs.query, inputs.expanded, reduction="sum", is_causal=True)
    return sums.unflatten(1, (inputs.key.shape[1], -1)).sum(2)


VARIANTS: dict[str, tuple[str, str, Callable[[Inputs], Tensor]]] = {
    "lse_given": (LSE_GIVEN, OURS, with_lse),
    "without_lse": (WITHOUT_LSE, OURS, without_lse),
    "float8": (FLOAT8, OURS, in_float8),
    "sdpa": (FORWARD, SDPA, sdpa_forward),
    "colreduce": (WITHOUT_LSE, COLREDUCE, colreduce),
}


def expected_result(inputs: Inputs, what: str) -> Tensor:
    """From inputs in float32: the reference's scores, or attention from the whole matrix."""
    query, key = inputs.query.float(), inputs.key.float()
    if what != FORWARD:
        with lookm_kernels.use_backend("reference"):
            return lookm_kernels.attention_scores(query, key)
    logits = query @ inputs.expanded.float().mT * WIDTH**-0.5
    logits.masked_fill_(torch.ones_like(logits, dtype=torch.bool).triu_(1), float("-inf"))
    return logits.softmax(-1) @ inputs.value.float().repeat_interleave(HEADS // key.shape[1], 1)


def sizes(shape: tuple[int, int, int]) -> dict[str, int]:
    batch, kv_heads, tokens = shape
    return {"batch": batch, "heads": HEADS, "kv_heads": kv_heads, "tokens": tokens, "width": WIDTH}


def work_of(what: str, shape: tuple[int, int, int]) -> work.Work:
    if what == FORWARD:
        return work.attention(**sizes(shape))
    return work.scores(**sizes(shape), passes=2 if what == WITHOUT_LSE else 1)


def missing(what: str, by: str) -> str | None:
    """Why a variant cannot run here."""
    if what == FLOAT8:
        return why_no_float8(timing.DEVICE)
    if by != COLREDUCE:
        return None
    if not timing.ON_GPU:
        return "flash-colreduce runs on a GPU only"
    return None if timing.version(COLREDUCE) else "flash-colreduce is not installed"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SMALL_SHAPES if timing.SMALL else SHAPES, ids=str)
@pytest.mark.benchmark(timer=timing.device_clock)
def test_scores(benchmark: BenchmarkFixture, record: timing.Record, shape: tuple[int, int, int], variant: str) -> None:
    what, by, run = VARIANTS[variant]
    reason = missing(what, by)
    if reason is not None:
        record.missing(what, by, sizes(shape), reason)
        pytest.skip(reason)
    check = random_inputs(2, shape[1], 200)
    assert timing.relative_error(run(check), expected_result(check, what)) < (0.1 if what == FLOAT8 else 1e-2)
    inputs = [random_inputs(*shape)]
    held = inputs[0].query.nbytes + inputs[0].key.nbytes
    inputs += [random_inputs(*shape) for _ in range(timing.input_sets(held) - 1)]
    measured = timing.measure(benchmark, [lambda given=given: run(given) for given in inputs])
    record.add(benchmark, what, by, sizes(shape), work_of(what, shape), measured)


def test_targets(record: timing.Record) -> None:
    shape = sizes(TARGET)
    given, without = (record.value(what, OURS, shape) for what in (LSE_GIVEN, WITHOUT_LSE))
    rate = record.value(LSE_GIVEN, OURS, shape, "flops_per_s")
    record.target("scores_rate", timing.ratio(rate, 1e12))
    record.target("scores_sdpa", timing.ratio(given, record.value(FORWARD, SDPA, shape)))
    record.target("scores_colreduce", timing.ratio(record.value(WITHOUT_LSE, COLREDUCE, shape), without))
    record.check_targets(*([] if missing(WITHOUT_LSE, COLREDUCE) is None else ["scores_colreduce"]))
