"""A declared prompt that comes in chunks is compressed as if it had come at once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from families import FAMILIES, IMAGE, Family, Prompt
from transformers import DynamicCache

from lookm import POLICIES, LookMCache

LLAVA, QWEN = FAMILIES["llava"], FAMILIES["qwen3"]
# the image ends up in a chunk of its own, which Llava needs, and the recent tokens in two
LAYOUTS, CHUNKS = [(9, IMAGE, 12), (6, IMAGE, 12)], (9, 18, 8, 4)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def chunks(family: Family, prompts: list[Prompt], sizes=CHUNKS) -> list[dict[str, Tensor]]:
    """The forwards of a chunked prefill; the mask grows with the tokens."""
    whole, start, parts = family.inputs(prompts), 0, []
    positions = family.positions(family.model(), whole)
    for size in sizes:
        part = {"input_ids": whole["input_ids"][:, start : start + size]}
        part["attention_mask"] = whole["attention_mask"][:, : start + size]
        part["position_ids"] = positions[..., start : start + size]
        if bool((part["input_ids"] == 120).any()):
            part["pixel_values"] = whole["pixel_values"]
        parts.append(part)
        start += size
    return parts


@torch.no_grad()
def read(model, cache, parts: list[dict[str, Tensor]]) -> Tensor:
    """Logits of the last token, and of three tokens fed after it."""
    for part in parts:
        logits = model(**part, past_key_values=cache).logits
    results, mask = [logits[:, -1]], parts[-1]["attention_mask"]
    for token in (5, 50, 7):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = {"input_ids": torch.full((len(mask), 1), token), "attention_mask": mask}
        step["position_ids"] = mask.cumsum(1)[:, -1:] - 1
        results.append(model(**step, past_key_values=cache).logits[:, -1])
    return torch.stack(results, 1)


def assert_same(cache: LookMCache, other: LookMCache) -> None:
    for layer in range(len(cache.layers)):
        assert torch.equal(cache.kept_positions(layer), other.kept_positions(layer))
    assert cache.report() == other.report()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [1, 2])
def test_chunks_are_the_whole(policy: str, rows: int):
    model, prompts = LLAVA.model(), [LLAVA.prompt(layout, seed) for seed, layout in enumerate(LAYOUTS[:rows])]
    caches = [LookMCache(model, budget=0.4, policy=policy, prompt_length=length) for length in (None, 39)]
    once = read(model, caches[0], chunks(LLAVA, prompts, (39,)))
    in_parts = read(model, caches[1], chunks(LLAVA, prompts))
    assert_same(*caches)
    torch.testing.assert_close(in_parts, once, **CLOSE)


@pytest.mark.parametrize("policy", ["lookm", "mean_h2o", "snapkv"])
@pytest.mark.parametrize("options", [{"queries": "text"}, {"queries": "sampled", "stride": 3}], ids=str)
def test_chosen_queries_in_chunks(policy: str, options: dict):
    """Image tokens are counted over all chunks."""
    model, prompts = LLAVA.model(), [LLAVA.prompt(layout, seed) for seed, layout in enumerate(LAYOUTS)]
    caches = [LookMCache(model, 0.4, policy, prompt_length=length, **options) for length in (None, 39)]
    once = read(model, caches[0], chunks(LLAVA, prompts, (39,)))
    torch.testing.assert_close(read(model, caches[1], chunks(LLAVA, prompts)), once, **CLOSE)
    assert_same(*caches)


def test_attention_with_options_and_protected_text_in_chunks():
    model, prompts = QWEN.model("eager"), [QWEN.prompt((30,))]
    image = torch.zeros(1, 30, dtype=torch.bool)
    image[:, 3:24] = True
    options = {"budget": 0.3, "protect_text": True, "gate": "mean_similarity", "image_mask": image}
    caches = [LookMCache(model, prompt_length=length, **options) for length in (None, 30)]
    once = read(model, caches[0], chunks(QWEN, prompts, (30,)))
    torch.testing.assert_close(read(model, caches[1], chunks(QWEN, prompts, (1, 2, 20, 6, 1))), once, **CLOSE)
    assert_same(*caches)


def test_padding_on_the_right_arrives_late():
    """A row may turn out shorter than it could have been, here shorter than its budget."""
    model, ids = QWEN.model(), QWEN.inputs([QWEN.prompt((30,), seed) for seed in range(2)])["input_ids"]
    mask = (torch.arange(30) < torch.tensor([25, 22])[:, None]).long()
    for budget in (0.4, 20, 24, 28):
        caches = [LookMCache(model, budget, prompt_length=length) for length in (None, 30)]
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, past_key_values=caches[0])
            for start, end in ((0, 20), (20, 30)):
                model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=caches[1])
        assert_same(*caches)


def generated(model, inputs: dict[str, Tensor], cache, chunk: int | None) -> Tensor:
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    result = model.generate(**inputs, past_key_values=cache, prefill_chunk_size=chunk, **options)
    return torch.stack(result.logits, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [LLAVA, QWEN], ids=lambda family: family.name)
def test_through_generate(family: Family, attention: str):
    model, inputs = family.model(attention), family.inputs([family.prompt(layout, 3) for layout in LAYOUTS])
    plain = [generated(model, inputs, DynamicCache(config=model.config), chunk) for chunk in (None, 12)]
    if not torch.allclose(*plain, **CLOSE):
        pytest.skip(f"transformers {transformers.__version__} loses the images of a chunked prefill in generate")
    length = inputs["input_ids"].shape[1]
    caches = [LookMCache(model, budget=0.3, prompt_length=length) for _ in range(2)]
    once, in_parts = (generated(model, inputs, cache, chunk) for cache, chunk in zip(caches, (None, 12), strict=True))
    torch.testing.assert_close(in_parts, once, **CLOSE)
    assert_same(*caches)


@pytest.mark.parametrize("prompt_length", [30, 100])
def test_nothing_goes_before_the_prompt_is_complete(prompt_length: int):
    model, parts = QWEN.model(), chunks(QWEN, [QWEN.prompt((30,))], (20, 5))
    cache, full = LookMCache(model, budget=4, prompt_length=prompt_length), DynamicCache(config=model.config)
    with torch.no_grad():
        for part in parts:
            logits = [model(**part, past_key_values=state).logits for state in (cache, full)]
            assert torch.equal(*logits)
    assert cache.layers[0].keys.shape[2] == 25


def test_undeclared_chunks_warn_once():
    model, parts = QWEN.model(), chunks(QWEN, [QWEN.prompt((30,))], (10, 10, 10))
    cache = LookMCache(model, budget=0.3)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for part in parts:
            model(**part, past_key_values=cache)
        cache.crop(-20)
        model(**parts[1], past_key_values=cache)
    messages = [str(warning.message) for warning in caught if "lookm" in str(warning.message)]
    assert len(messages) == 1
    assert "the first 10 tokens were compressed as the whole prompt, and 10 more follow" in messages[0]
    assert "prompt_length=" in messages[0]


@pytest.mark.parametrize("options", [{"later_turns": "dense"}, {"later_turns": "segment"}, {"prompt_length": 10}])
def test_a_declaration_silences_the_warning(options: dict):
    model, cache = QWEN.model(), LookMCache(QWEN.model(), budget=0.3, **options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="lookm")
        for part in chunks(QWEN, [QWEN.prompt((30,))], (10, 10, 10)):
            model(**part, past_key_values=cache)


@pytest.mark.parametrize("sizes", [(30,), (15, 15)])
def test_more_than_was_declared(sizes: tuple):
    model, cache = QWEN.model(), LookMCache(QWEN.model(), budget=0.3, prompt_length=20)
    with pytest.raises(ValueError, match="`prompt_length` is 20, but the prompt has 30 tokens"):
        read(model, cache, chunks(QWEN, [QWEN.prompt((30,))], sizes))


@pytest.mark.parametrize("length", [0, -1, 1.5, "12", True])
def test_a_length_that_is_none(length):
    with pytest.raises(ValueError, match="`prompt_length` must be a number of tokens, 1 or more"):
        LookMCache(QWEN.model(), prompt_length=length)
