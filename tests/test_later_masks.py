"""A later forward's mask hides tokens that were read before: obeyed as DynamicCache obeys it, or refused in words."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE
from transformers import Cache, DynamicCache

from lookm import LookMCache

LLAVA = FAMILIES["llava"]
PROMPTS = [LLAVA.prompt((5, IMAGE, 9)), LLAVA.prompt((2, IMAGE, 4), 1)]
WIDTH, ANSWER, QUESTION = max(map(len, PROMPTS)), 6, 5
# the second row ended after two tokens of its answer
ENDED_EARLY = torch.tensor([[1] * ANSWER, [1, 1, 0, 0, 0, 0]])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(3, 100, (2, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def begin(cache: Cache, attention: str = "sdpa") -> None:
    """Read the prompts, and answers of six tokens that all count when they are read."""
    model, inputs = LLAVA.model(attention), LLAVA.inputs(PROMPTS)
    model(**inputs, past_key_values=cache)
    answer = tokens(ANSWER, 2)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1)
    model(input_ids=answer, attention_mask=mask, position_ids=positions(mask, ANSWER), past_key_values=cache)


@torch.no_grad()
def ask(cache: Cache, mask: Tensor, attention: str = "sdpa") -> Tensor:
    """Logits of a question and two more tokens, under a mask [B, WIDTH + ANSWER] of what was read before."""
    logits = []
    for count, seed in ((QUESTION, 3), (1, 4), (1, 5)):
        mask = torch.nn.functional.pad(mask, (0, count), value=1)
        step = {"input_ids": tokens(count, seed), "attention_mask": mask, "position_ids": positions(mask, count)}
        logits.append(LLAVA.model(attention)(**step, past_key_values=cache).logits)
    return torch.cat(logits, 1)


def positions(mask: Tensor, count: int) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -count:]


def chat(cache: Cache, mask: Tensor, attention: str = "sdpa") -> Tensor:
    begin(cache, attention)
    return ask(cache, mask, attention)


def plain(attention: str = "sdpa") -> DynamicCache:
    return DynamicCache(config=LLAVA.model(attention).config)


def cache(budget: float, attention: str = "sdpa", **options) -> LookMCache:
    return LookMCache(LLAVA.model(attention), budget, **{"later_turns": "dense"} | options)


def shown(answer: Tensor = ENDED_EARLY, hidden: Sequence[int] = ()) -> Tensor:
    """What was read, without its padding, what `answer` [B, 6] hides, and some places of the first row."""
    mask = torch.cat([LLAVA.inputs(PROMPTS)["attention_mask"], answer], 1)
    mask[0, list(hidden)] = 0
    return mask


EVERYTHING = shown(torch.ones_like(ENDED_EARLY))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("hidden", [(), (0, 3, WIDTH - 2)], ids=["answer", "answer and prompt"])
def test_a_whole_budget_obeys_it_bit_for_bit(attention: str, hidden: Sequence[int]):
    mask = shown(hidden=hidden)
    expected = chat(plain(attention), mask, attention)
    assert torch.equal(chat(cache(1.0, attention), mask, attention), expected)
    assert not torch.allclose(expected, chat(plain(attention), EVERYTHING, attention), **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", ["lookm", "text_prior_h2o"])
@pytest.mark.parametrize("later_turns", ["dense", "segment"])
def test_an_answer_that_ended_early_in_a_compressed_chat(attention: str, policy: str, later_turns: str):
    """Hidden pairs count for nothing: with other values in them the row says the same, bit for bit."""
    held = cache(0.4, attention, policy=policy, later_turns="dense")
    begin(held, attention)
    for layer in held.layers:
        layer.settings = replace(layer.settings, later_turns=later_turns)
    spoiled, whole = copy.deepcopy(held), copy.deepcopy(held)
    for layer in spoiled.layers:
        layer.values[1, :, -4:] = 7.0
    logits = ask(held, shown(), attention)
    assert torch.equal(ask(spoiled, shown(), attention), logits)
    everything = ask(whole, EVERYTHING, attention)
    torch.testing.assert_close(logits[0], everything[0], **CLOSE)
    assert not torch.allclose(logits[1], everything[1], **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kept_tokens_of_the_prompt_are_hidden_in_every_head(attention: str):
    """Each head and layer keeps tokens of its own: pairs of hidden ones count for nothing in any of them."""
    hidden = range(0, WIDTH - 6, 3)
    held = cache(0.6, attention, policy="h2o", recent_share=0.2)
    begin(held, attention)
    spoiled, whole = copy.deepcopy(held), copy.deepcopy(held)
    for index, layer in enumerate(spoiled.layers):
        places = torch.isin(held.kept_positions(index)[0], torch.tensor(hidden))
        assert not (places == places[:1]).all()
        layer.values[0] = layer.values[0].masked_fill(places[..., None], 7.0)
    mask = shown(torch.ones_like(ENDED_EARLY), hidden)
    logits = ask(held, mask, attention)
    assert torch.equal(ask(spoiled, mask, attention), logits)
    everything = ask(whole, EVERYTHING, attention)
    torch.testing.assert_close(logits[1], everything[1], **CLOSE)
    assert not torch.allclose(logits[0], everything[0], **CLOSE)


def test_a_mask_that_shows_them_again():
    """Hidden for one forward is not forgotten."""
    held, other = cache(0.4), cache(0.4)
    for one in (held, other):
        begin(one)
    ask(held, shown())
    ask(other, EVERYTHING)
    for one in (held, other):
        one.crop(-(QUESTION + 2))
    assert torch.equal(ask(held, EVERYTHING), ask(other, EVERYTHING))


def test_hidden_for_one_step_of_decoding():
    """A step that is cropped, and then read again under another mask, forgets the first mask."""
    held = cache(0.6, policy="h2o")
    begin(held)
    other, step = copy.deepcopy(held), {"input_ids": tokens(1, 4), "past_key_values": held}
    model, everything = LLAVA.model("sdpa"), torch.nn.functional.pad(EVERYTHING, (0, 1), value=1)
    less = everything.clone()
    less[0, held.kept_positions(0)[0, 0, 0]] = 0
    with torch.no_grad():
        hidden = model(**step, attention_mask=less).logits
        held.crop(-1)
        again = model(**step, attention_mask=everything).logits
        fresh = model(**step | {"past_key_values": other}, attention_mask=everything).logits
    assert torch.equal(again, fresh)
    assert not torch.equal(hidden, fresh)


def test_what_was_merged_cannot_be_hidden():
    with pytest.raises(ValueError, match=r"`attention_mask` hides tokens of the compressed prompt.*rule='none'"):
        chat(cache(0.4), shown(hidden=[3]))


def test_padding_cannot_be_shown_later():
    for budget in (1.0, 0.4):
        with pytest.raises(ValueError, match="must not show tokens that it hid when they were read"):
            chat(cache(budget), torch.ones_like(EVERYTHING))


def test_a_later_chunk_cannot_hide_an_earlier_one():
    model, held = FAMILIES["qwen3"].model("sdpa"), LookMCache(FAMILIES["qwen3"].model("sdpa"), 0.4, prompt_length=20)
    mask = torch.ones(2, 20, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=tokens(10, 0), attention_mask=mask[:, :10], past_key_values=held)
        mask[0, 4] = 0
        with pytest.raises(ValueError, match="hide tokens that it showed in an earlier chunk"):
            model(input_ids=tokens(10, 1), attention_mask=mask, past_key_values=held)


def test_a_mask_over_the_new_tokens_alone():
    held = cache(0.4)
    with torch.no_grad():
        LLAVA.model("sdpa")(**LLAVA.inputs(PROMPTS), past_key_values=held)
        with pytest.raises(
            ValueError, match=rf"`attention_mask` must cover the {WIDTH} tokens read before and the 5 new"
        ):
            LLAVA.model("sdpa")(input_ids=tokens(5, 0), attention_mask=torch.ones(2, 5), past_key_values=held)


def test_a_mask_in_4d_over_a_compressed_cache():
    held = cache(0.4)
    with torch.no_grad():
        LLAVA.model("sdpa")(**LLAVA.inputs(PROMPTS), past_key_values=held)
        whole = torch.ones(2, 1, 5, WIDTH + 5, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"`attention_mask` in 4D must fit what the compressed cache holds"):
            LLAVA.model("sdpa")(input_ids=tokens(5, 0), attention_mask=whole, past_key_values=held)
        fitting = torch.ones(2, 1, 5, held.layers[0].stored + 5, dtype=torch.bool).tril(held.layers[0].stored)
        logits = LLAVA.model("sdpa")(input_ids=tokens(5, 0), attention_mask=fitting, past_key_values=held).logits
    assert logits.isfinite().all()
