"""The whole compression: compress_ by merge rule, and its share of a prefill shaped like Qwen2.5-VL-7B's.

The prefill runs the real model class with random weights and image placeholders as tokens: 960 of every 1024 tokens are
image tokens. It is timed with DynamicCache and with LookMCache, exact and with the cheaper ways to score; what
compression adds is the difference, and its share is that difference over the prefill with DynamicCache.
"""

from __future__ import annotations

from typing import Any

import pytest
import timing
import torch
import transformers
import work
from pytest_benchmark.fixture import BenchmarkFixture
from targets import OURS
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import lookm_kernels
from lookm import LookMCache
from lookm_kernels._dispatch import why_no_float8

WIDTH = 32 if timing.SMALL else 128
# batch, heads, tokens
SHAPES = [(1, 8, 32 << 10), (1, 32, 32 << 10), (1, 8, 128 << 10), (8, 8, 32 << 10)]
SMALL_SHAPES = [(2, 4, 300)]
DYNAMIC = "DynamicCache"
COMPRESS, PREFILL = "compress_", "prefill"

TOKENS, PERIOD, TEXT = (256, 64, 4) if timing.SMALL else (32 << 10, 1 << 10, 64)
IMAGE_TOKEN = 5
SECTIONS = [2, 3, 3] if timing.SMALL else [16, 24, 24]
FULL_TEXT_CONFIG = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 128000,
}
SMALL_TEXT_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 1024,
}
TEXT_CONFIG = SMALL_TEXT_CONFIG if timing.SMALL else FULL_TEXT_CONFIG
# the merge rule is the same in all, so that only scoring differs
CACHES: dict[str, dict[str, Any]] = {
    "exact": {},
    "text queries": {"queries": "text"},
    "sampled queries": {"queries": "sampled"},
    "exact in float8": {"fp8": True},
    "window of 32": {"policy": "snapkv", "window": 32, "rule": "pivotal"},
}


def random_layer(batch: int, heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """key, value, scores, tier; two in a hundred tokens are text, the last tenth is protected."""
    key, value = torch.randn(2, batch, heads, tokens, WIDTH, device=timing.DEVICE, dtype=timing.DTYPE).unbind()
    tier = 1 + (torch.rand(batch, tokens, device=timing.DEVICE) < 0.02).int()
    tier[:, tokens - tokens // 10 :] = 3
    return key, value, torch.rand(batch, heads, tokens, device=timing.DEVICE), tier


def check(rule: str) -> None:
    """Against the reference on the same numbers in float32."""
    key, value, scores, tier = random_layer(2, 3, 500)
    exact = key.float(), value.float()
    kept = lookm_kernels.compress_(key, value, scores, tier, 100, rule)
    with lookm_kernels.use_backend("reference"):
        expected = lookm_kernels.compress_(*exact, scores, tier, 100, rule)
    assert torch.equal(kept, expected)
    for result, rows in ((key, exact[0]), (value, exact[1])):
        near = torch.isclose(result[:, :, :100].float(), rows[:, :, :100], rtol=2e-2, atol=2e-2).all(-1)
        # a token between two pivots may go to either
        assert near.float().mean() > 0.97


def sizes(shape: tuple[int, int, int]) -> dict[str, int]:
    batch, heads, tokens = shape
    return {"batch": batch, "heads": heads, "tokens": tokens, "keep": tokens // 5, "width": WIDTH}


@pytest.mark.parametrize("rule", lookm_kernels.rules.RULES)
@pytest.mark.parametrize("shape", SMALL_SHAPES if timing.SMALL else SHAPES, ids=str)
@pytest.mark.benchmark(timer=timing.device_clock)
def test_compress(benchmark: BenchmarkFixture, record: timing.Record, shape: tuple[int, int, int], rule: str) -> None:
    check(rule)
    first = random_layer(*shape)
    held = first[0].nbytes + first[1].nbytes
    originals = [first, *(random_layer(*shape) for _ in range(timing.input_sets(held) - 1))]
    used = [(key.clone(), value.clone(), scores, tier) for key, value, scores, tier in originals]

    def restore() -> None:
        for original, layer in zip(originals, used, strict=True):
            layer[0].copy_(original[0])
            layer[1].copy_(original[1])

    calls = [lambda layer=layer: lookm_kernels.compress_(*layer, shape[2] // 5, rule) for layer in used]
    calls[0]()
    extra = timing.peak_extra_bytes(calls[0])
    share = None if extra is None else extra / held
    measured = timing.measure(benchmark, calls, restore)
    merging, selecting = work.merging(**sizes(shape)), work.select(*shape)
    merging = work.compact(**sizes(shape)) if rule == "none" else merging
    done = work.Work(merging.flops, merging.bytes + selecting.bytes)
    what = f"{COMPRESS} {rule}"
    record.add(benchmark, what, OURS, sizes(shape), done, measured, peak_extra_bytes=extra, peak_extra_share=share)


@pytest.fixture(scope="module")
def model(record: timing.Record) -> PreTrainedModel:
    """The language model in its real class; the vision tower is there, one layer of it, and never runs."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": SECTIONS}
    text = transformers.Qwen2_5_VLTextConfig(**TEXT_CONFIG, rope_parameters=rope, tie_word_embeddings=False)
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 64}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text.to_dict(), vision_config=vision, image_token_id=IMAGE_TOKEN, video_token_id=6
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(timing.DTYPE)
    try:
        with torch.device(timing.DEVICE):
            built = transformers.Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return built.eval()


@pytest.fixture(scope="module")
def prompt(model: PreTrainedModel) -> Tensor:
    """[1, N] token ids: text, then image placeholders, in turn."""
    ids = torch.randint(7, TEXT_CONFIG["vocab_size"], (1, TOKENS), device=timing.DEVICE)
    ids[:, torch.arange(TOKENS, device=timing.DEVICE) % PERIOD >= TEXT] = IMAGE_TOKEN
    return ids


def prefill_shape() -> dict[str, int]:
    layers = TEXT_CONFIG["num_hidden_layers"]
    heads, kv_heads = TEXT_CONFIG["num_attention_heads"], TEXT_CONFIG["num_key_value_heads"]
    return {"batch": 1, "layers": layers, "heads": heads, "kv_heads": kv_heads, "tokens": TOKENS}


def prefill_work(model: PreTrainedModel) -> work.Work:
    """Every layer's weights times every token, and its attention; what compression adds is not counted."""
    shape = prefill_shape()
    layers = shape.pop("layers")
    width = TEXT_CONFIG["hidden_size"] // shape["heads"]
    attention = work.attention(**shape, width=width)
    weights = [parameter for name, parameter in model.named_parameters() if ".layers." in name and "visual" not in name]
    flops = 2 * TOKENS * sum(weight.numel() for weight in weights) + layers * attention.flops
    return work.Work(flops, sum(weight.nbytes for weight in weights) + layers * attention.bytes)


def run(model: PreTrainedModel, prompt: Tensor, cache: DynamicCache) -> Tensor:
    """Logits of the first new token."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits
    return logits


@pytest.fixture(scope="module")
def full_logits(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """What every cache must give: compression acts after the prefill."""
    return run(model, prompt, DynamicCache(config=model.config.get_text_config()))


@pytest.mark.parametrize("name", [DYNAMIC, *CACHES])
@pytest.mark.benchmark(timer=timing.device_clock)
def test_prefill(
    benchmark: BenchmarkFixture, record: timing.Record, model: PreTrainedModel, prompt: Tensor, full_logits: Tensor,
    name: str,
) -> None:  # fmt: skip
    what = f"{PREFILL}, {name}"
    reason = why_no_float8(timing.DEVICE) if "fp8" in CACHES.get(name, {}) else None
    if reason is not None:
        record.missing(what, OURS, prefill_shape(), reason)
        pytest.skip(reason)

    def fresh() -> DynamicCache:
        if name == DYNAMIC:
            return DynamicCache(config=model.config.get_text_config())
        return LookMCache(model, budget=0.2, **CACHES[name])

    caches = [fresh()]
    # this run also warms up
    assert timing.relative_error(run(model, prompt, caches[0]), full_logits) < 1e-2
    stored = caches[0].layers[0].keys.shape[2]
    assert stored == (TOKENS if name == DYNAMIC else TOKENS // 5)

    def restore() -> None:
        caches[0] = fresh()

    measured = timing.measure(benchmark, [lambda: run(model, prompt, caches[0])], restore, warm=True)
    before = record.value(f"{PREFILL}, {DYNAMIC}", OURS, prefill_shape())
    added = None if before is None else measured["seconds"] / before - 1
    record.add(benchmark, what, OURS, prefill_shape(), prefill_work(model), measured, added_share=added)


def test_targets(record: timing.Record) -> None:
    for target, name in (("exact", "exact"), ("text", "text queries"), ("window", "window of 32")):
        added = record.value(f"{PREFILL}, {name}", OURS, prefill_shape(), "added_share")
        record.target(f"prefill_{target}", timing.ratio(added, 0.01))
    record.check_targets()
