"""Caches in few bits against the same cache with what its codes stand for, and against whole ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE, TALL, Family
from loops import attend
from test_later_turns import prompts, read
from transformers import DynamicCache

from lookm import LookMCache
from lookm.layer import LookMLayer
from lookm.modality import cache_keyword
from lookm.options import FORMATS
from lookm.store.quantized import WHOLE

LLAVA, QWEN = FAMILIES["llava"], FAMILIES["qwen3"]
LAYOUTS = [(36, IMAGE, 19, TALL, 22), (4, IMAGE, 35)]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
# of logits of a tiny model, relative to the whole cache's, with every pair of the prompt in so many bits
ERROR = {"int8": 0.02, "fp8": 0.1, "int4": 0.4}


def generate(family: Family, cache: Any, new: int = 9, **options: Any) -> Any:
    model = family.model()
    inputs = family.inputs([family.prompt(layout, row) for row, layout in enumerate(LAYOUTS)])
    options = {"do_sample": False, **options}
    return model.generate(**inputs, **{cache_keyword(model): cache}, max_new_tokens=new, **options)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3_5", "qwen3"])
def test_no_compression_but_few_bits_is_near_dynamic_cache(name: str, format: str):
    """The first logits are the prompt's own; those of the step after it know only what the codes stand for."""
    family = FAMILIES[name]
    options = {"return_dict_in_generate": True, "output_logits": True}
    try:
        cache = LookMCache(family.model(), 1.0, "auto", quantize=format)
    except NotImplementedError as error:
        pytest.skip(str(error))
    whole = generate(family, DynamicCache(config=family.model().config), 2, **options).logits
    coded = generate(family, cache, 2, **options).logits
    assert torch.equal(whole[0], coded[0])
    error = float((coded[1] - whole[1]).norm() / whole[1].norm())
    assert 0 < error < ERROR[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("policy", ["lookm", "auto", "madakv"])
def test_attention_is_over_what_the_codes_stand_for(policy: str, format: str, monkeypatch: pytest.MonkeyPatch):
    """Every step of a padded batch, by loops in float64 over the dequantised keys and values, votes as log m."""
    steps = []
    follow = LookMLayer.follow

    def spy(self, inner, implementation, module, query, key, value, mask, *args, **kwargs):
        output = follow(self, inner, implementation, module, query, key, value, mask, *args, **kwargs)
        votes = torch.ones(query.shape[0], 2, self.stored) if self.votes is None else self.votes
        votes = torch.nn.functional.pad(votes, (0, self.stored - votes.shape[2]), value=1.0)
        steps.append((query, self.keys, self.values, self.kept_positions() >= 0, votes, output[0]))
        return output

    monkeypatch.setattr(LookMLayer, "follow", spy)
    generate(LLAVA, LookMCache(LLAVA.model(), 0.8, policy, quantize=format), 4)
    assert len(steps) == 3 * len(LLAVA.model().model.language_model.layers)
    for query, keys, values, there, votes, output in steps:
        for row in range(len(query)):
            for head in range(2):
                held = there[row, head]
                own = slice(2 * head, 2 * head + 2)
                pairs = [x[row, head : head + 1, held] for x in (keys, values)]
                # one column more, whose product with 1 is log m / scale
                wide = torch.cat([pairs[0], 4 * votes[row, head, held].log()[None, :, None]], 2)
                asking = torch.cat([query[row, own], torch.ones(2, 1, 1)], 2)
                seen = torch.ones(1, int(held.sum()), dtype=torch.bool)
                expected = attend(asking, wide, pairs[1], 0.25, seen)
                torch.testing.assert_close(output[row, :, own].transpose(0, 1).double(), expected, **CLOSE)


@pytest.mark.parametrize(("format", "share"), [("int8", 0.30), ("fp8", 0.30), ("int4", 0.27)])
def test_bytes(format: str, share: float):
    """Of float32: a quarter or an eighth, and scales, and the whole window; the report counts what is held."""
    model = QWEN.model()
    cache = LookMCache(model, 1.0, quantize=format)
    with torch.no_grad():
        model(input_ids=(torch.arange(2048) % 90 + 3)[None], **{cache_keyword(model): cache})
    report = cache.report()
    held = sum(
        x.nbytes for layer in cache.layers for x in (*filter(None.__ne__, layer.store.pairs), *layer.store.whole)
    )
    assert report.bytes == held
    assert report.bytes_full == 2048 * len(cache.layers) * 2 * 2 * 16 * 4
    # heads of 16 have many scales: one of 4 bytes, or two of 8, for 16 numbers
    assert report.bytes / report.bytes_full < share + WHOLE / 2048 + 0.04
    assert all(layer.store.pairs.key.shape[2] == 2048 - WHOLE for layer in cache.layers)


def test_a_fifth_in_int4_is_six_hundredths():
    """The bytes of bfloat16 pairs of heads of 128."""
    from lookm_kernels import quantize_pairs

    key = torch.randn(1, 2, 1024, 128, dtype=torch.bfloat16)
    share = 0.2 * quantize_pairs(key, key, "int4").nbytes / (2 * key.nbytes)
    assert 0.055 < share < 0.06


@pytest.mark.parametrize("format", FORMATS)
def test_later_turns_and_rows(format: str):
    """Ragged turns: what one row says is what it says alone."""
    turns = [prompts(LAYOUTS), prompts([(4, IMAGE, 3), (6,)], 5), prompts([(3,), (1,)], 9)]
    together = LookMCache(LLAVA.model(), 0.8, "auto", later_turns="dense", quantize=format)
    logits = read(together, turns)
    for row in range(2):
        alone = LookMCache(LLAVA.model(), 0.8, "auto", later_turns="dense", quantize=format)
        for ours, theirs in zip(read(alone, [[turn[row]] for turn in turns]), logits, strict=True):
            torch.testing.assert_close(ours[0], theirs[row, -ours.shape[1] :], **CLOSE)


def test_short_prompts():
    """Fewer tokens than stay whole: the first is in few bits all the same."""
    model = QWEN.model()
    for tokens in (1, 2, WHOLE, WHOLE + 1):
        cache = LookMCache(model, 1.0, quantize="int8")
        whole = DynamicCache(config=model.config)
        with torch.no_grad():
            for given in (torch.arange(tokens)[None] + 3, torch.tensor([[7]])):
                logits = [model(input_ids=given, **{cache_keyword(model): each}).logits for each in (cache, whole)]
        assert cache.layers[0].store.pairs.key.shape[2] == max(1, tokens - WHOLE)
        torch.testing.assert_close(*logits, atol=0.1, rtol=0.1)


def test_rows_move_and_copies_part():
    """Beams, a crop and a deep copy."""
    cache = LookMCache(LLAVA.model(), 0.5, "auto", quantize="int4")
    generate(LLAVA, cache, num_beams=3)
    twin = copy.deepcopy(cache)
    before = cache.layers[0].keys
    cache.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
    assert torch.equal(cache.layers[0].keys, before.flip(0))
    assert torch.equal(twin.layers[0].keys, before)
    cache.crop(-2)
    assert torch.equal(cache.layers[0].keys, before.flip(0)[:, :, :-2])


def masked(cache: LookMCache, hide: Tensor) -> Tensor:
    model = QWEN.model()
    with torch.no_grad():
        model(input_ids=(torch.arange(90) + 3)[None], **{cache_keyword(model): cache})
        mask = torch.ones(1, 91, dtype=torch.long)
        mask[0, hide] = 0
        logits: Tensor = model(
            input_ids=torch.tensor([[5]]), attention_mask=mask, **{cache_keyword(model): cache}
        ).logits
    return logits


def test_a_mask_that_hides_tokens_of_the_prompt():
    """In few bits and whole: near what a whole cache says, and not what it says of all tokens."""
    hide = torch.arange(20, 80)
    coded, whole, all_seen = (
        masked(LookMCache(QWEN.model(), 0.9, "text_prior_h2o", **options), hidden)
        for options, hidden in (({"quantize": "int8"}, hide), ({}, hide), ({}, hide[:0]))
    )
    assert (coded - whole).norm() < 0.02 * whole.norm()
    assert (whole - all_seen).norm() > 0.1 * whole.norm()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"quantize": "int2"}, r"`quantize` must be one of \('int8', 'fp8', 'int4'\), got 'int2'"),
        ({"quantize": "int8", "max_new_tokens": 4}, "`quantize` must not be given with `max_new_tokens`"),
        ({"quantize": "int8", "later_turns": "segment"}, "`later_turns` must be 'dense' with `quantize`"),
        ({"quantize": "int8", "generated": "window"}, "`quantize` must not be given with"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        LookMCache(QWEN.model(), 0.2, **arguments)
