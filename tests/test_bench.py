"""lookm.bench: what it counts against counts by hand, and what it times in which order."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lookm import bench
from lookm.bench import FIXED, FULL, STATIC, Variant, compressed, dynamic_cache, measure, random_prompt, variants
from lookm.modality import media_token_ids
from lookm.speed import Result, Row, pairwise

BUFFER = 1 << 20
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def model() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()


@pytest.fixture(scope="module")
def result(model: Any) -> Result:
    return measure(model, random_prompt(model, 2, 120, 6), variants([0.25, 10]), BUFFER)


def test_every_cache_has_a_row_with_all_that_can_be_told_on_a_processor(result: Result) -> None:
    assert [row.variant for row in result.rows] == [variant.name for variant in variants([0.25, 10])]
    assert {FULL, STATIC, "LookMCache 25 %", "LookMCache 10"} <= {row.variant for row in result.rows}
    for row in result.rows:
        assert row.missing is None
        assert len(row.steps) == result.new_tokens == 6
        assert (row.step_s, row.fastest_s) == (median(row.steps), min(row.steps))
        assert row.tokens_per_s == pytest.approx(2 / median(row.steps))
        assert row.peak_bytes is None
        assert row.prefill_s == median(row.prefills)


def test_bytes_are_those_counted_by_hand(result: Result, model: Any) -> None:
    pair = 2 * 4 * 16 * 2 * 3 * 2  # keys and values, float32, a head's width, KV heads, layers, rows
    held = {row.variant: row.cache_bytes for row in result.rows}
    assert held[FULL] == 120 * pair
    assert held[STATIC] >= (120 + bench.WARM_STEPS + 6) * pair
    assert held["LookMCache 25 %"] >= 30 * pair
    assert held["LookMCache 10"] < held["LookMCache 25 %"] < 0.3 * held[FULL]
    attention, mlp = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 80
    assert result.weight_bytes == 4 * (3 * (attention + mlp + 2 * 64) + 64 + 96 * 64)
    assert sum(weight.nbytes for weight in model.parameters()) == result.weight_bytes + 4 * 96 * 64, "no embeddings"


def test_floors_and_ratios_follow_from_the_steps(result: Result) -> None:
    full, small = result.row(FULL), result.row("LookMCache 10")
    assert result.weight_bytes is not None
    for row in result.rows:
        assert row.cache_bytes is not None
        assert row.floor_s == pytest.approx((result.weight_bytes + row.cache_bytes) / result.bytes_per_s)
    assert small.faster == pytest.approx(median(a / b for a, b in zip(full.steps, small.steps, strict=True)))
    assert pairwise(full, small) == pytest.approx(small.faster)
    assert full.faster is None
    assert full.compression_s is None
    assert result.row(STATIC).compression_s is None, "nothing is compressed"
    added = median(a - b for a, b in zip(small.prefills, full.prefills, strict=True))
    assert small.compression_s == pytest.approx(added)


def test_every_cache_reads_the_same_tokens(result: Result) -> None:
    for row in result.rows:
        if row.variant != FULL:
            assert row.prompt_error is not None
            assert row.prompt_error < 1e-5, "compression acts after the prompt"
    static, small = result.row(STATIC).last_error, result.row("LookMCache 10").last_error
    assert static is not None
    assert small is not None
    assert static < 1e-5 < small


def test_logits_of_the_last_step_are_those_of_one_forward(model: Any) -> None:
    prompt = random_prompt(model, 1, 40, 3)
    run = bench.Run(model, Variant(FULL, dynamic_cache), prompt)
    with torch.no_grad():
        run.read()
        for _ in range(prompt.later.shape[1]):
            run.step()
        whole = model(torch.cat([prompt.ids, prompt.later], 1)).logits
    assert run.first is not None
    assert run.logits is not None
    torch.testing.assert_close(run.first, whole[:, 39])
    torch.testing.assert_close(run.logits, whole[:, -1])


def test_caches_take_turns_and_the_first_changes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    step = bench.Run.step
    monkeypatch.setattr(bench.Run, "step", lambda run: (turns.append(run.variant.name), step(run))[1])
    chosen = [Variant(name, dynamic_cache) for name in (FULL, "b", "c")]
    measure(model, random_prompt(model, 1, 20, 2), chosen, BUFFER)
    rounds = [turns[begin : begin + 3] for begin in range(1, len(turns), 3)]  # the very first counts the weights
    assert len(rounds) == bench.WARM_STEPS + 2
    assert all(sorted(names) == [FULL, "b", "c"] for names in rounds)
    assert {names[0] for names in rounds} == {FULL, "b", "c"}


def test_compiled_caches_decode_by_the_call_of_generate(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = variants([0.25], compiled=True)
    fixed = [variant for variant in variants([0.25]) if variant.name.startswith(STATIC) or FIXED in variant.name]
    assert [variant.name for variant in chosen if variant.compiled] == [f"{each.name}, compiled" for each in fixed]
    asked = []
    monkeypatch.setattr(model, "get_compiled_call", lambda config: (asked.append(config.mode), model)[1])
    found = measure(model, random_prompt(model, 1, 30, 2), chosen, BUFFER)
    assert all(len(row.steps) == 2 for row in found.rows)
    # without CUDA graphs on a processor
    assert asked == ["default"] * len(fixed) * (bench.WARM_STEPS + 2)


def out_of_memory(fails: Callable[[int], bool]) -> Callable[[Any, bench.Prompt], DynamicCache]:
    """A cache that does not fit at some of its calls, counted from 1."""
    calls = []

    def make(model: Any, prompt: bench.Prompt) -> DynamicCache:
        calls.append(prompt)
        if fails(len(calls)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dynamic_cache(model, prompt)

    return make


def test_what_does_not_fit_beside_the_others_is_timed_alone(model: Any) -> None:
    chosen = [
        Variant(FULL, dynamic_cache),
        Variant("large", out_of_memory(lambda call: call == 2)),
        Variant("too large", out_of_memory(lambda call: call > 1)),
    ]
    found = measure(model, random_prompt(model, 1, 20, 2), chosen, BUFFER)
    full, large, too_large = found.rows
    assert (full.together, large.together) == (0, 1)
    assert len(large.steps) == 2
    assert large.faster is None, "it did not stand beside the full cache"
    assert pairwise(full, large) is None
    assert too_large == Row(variant="too large", missing="out of memory")
    assert "out of memory" in str(found)


def test_weights_of_experts_are_not_known() -> None:
    experts = MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4)).eval()
    found = measure(experts, random_prompt(experts, 1, 20, 2), [Variant(FULL, dynamic_cache)], BUFFER)
    assert found.weight_bytes is None
    assert found.rows[0].floor_s is None
    assert "over floor" not in str(found), "a column of which nothing is known is left out"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_prompt_has_no_placeholders_and_images_in_its_middle(name: str) -> None:
    vlm = FAMILIES[name].model()
    prompt = random_prompt(vlm, 2, 64, 3)
    assert not set(torch.cat([prompt.ids, prompt.later], 1).flatten().tolist()) & set(media_token_ids(vlm.config))
    assert prompt.image_mask is not None
    assert prompt.image_mask.sum(1).tolist() == [56, 56]
    assert not prompt.image_mask[:, :4].any()
    assert not prompt.image_mask[:, 60:].any()
    found = measure(vlm, prompt, variants([0.25]), BUFFER)
    assert all(row.missing is None for row in found.rows)
    error = found.row(compressed(0.25)).prompt_error
    assert error is not None
    assert error < 1e-5
