"""Prompts after the first one: kept whole, or compressed each on its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE, Prompt, image_mask
from loops import column_sums, select, tiers
from transformers import Cache, DynamicCache

from lookm import LookMCache
from lookm.layer import LookMLayer

LLAVA, QWEN = FAMILIES["llava"], FAMILIES["qwen3"]
FIRST = [(9, IMAGE, 12), (5, IMAGE, 4)]
SECOND = {"text": [(10,), (10,)], "image": [(4, IMAGE, 3), (4, IMAGE, 3)], "ragged": [(4, IMAGE, 3), (6,)]}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def prompts(layouts, seed: int = 0) -> list[Prompt]:
    return [LLAVA.prompt(layout, seed + row) for row, layout in enumerate(layouts)]


@torch.no_grad()
def read(cache: Cache, turns: list[list[Prompt]], seen: list[list[Prompt]] = ()) -> list[Tensor]:
    """Logits of the forwards over the turns, after those seen before, every one padded on the left."""
    masks = [LLAVA.inputs(turn)["attention_mask"] for turn in seen]
    mask, logits = torch.cat([torch.zeros(len(turns[0]), 0, dtype=torch.long), *masks], 1), []
    for turn in turns:
        inputs = LLAVA.inputs(turn)
        mask = torch.cat([mask, inputs["attention_mask"]], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]
        inputs |= {"attention_mask": mask, "position_ids": positions}
        logits.append(LLAVA.model()(**inputs, past_key_values=cache).logits)
    return logits


def cache_for(later_turns: str, budget: float = 0.3, **options) -> LookMCache:
    return LookMCache(LLAVA.model(), budget, later_turns=later_turns, **options)


@pytest.mark.parametrize("kind", SECOND)
def test_dense_keeps_them_whole(kind: str):
    first, turn, cache = prompts(FIRST), prompts(SECOND[kind], 5), cache_for("dense")
    read(cache, [first])
    before = [(layer.keys, layer.kept_positions()) for layer in cache.layers]
    read(cache, [turn], seen=[first])
    length = max(map(len, turn))
    for layer, (keys, kept) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, : keys.shape[2]], keys)
        positions = layer.kept_positions()
        assert torch.equal(positions[:, :, : keys.shape[2]], kept)
        for row, prompt in enumerate(turn):
            own = positions[row, :, keys.shape[2] :]
            assert (own[:, length - len(prompt) :] == torch.arange(39 + length - len(prompt), 39 + length)).all()
            assert (own[:, : length - len(prompt)] == -1).all()


@pytest.mark.parametrize("kind", SECOND)
@pytest.mark.parametrize("protect_text", [False, True])
def test_segment_compresses_each_with_its_own_budget(kind: str, protect_text: bool, monkeypatch: pytest.MonkeyPatch):
    """The second turn, of what the layers saw of it, by loops; the first stays as it is."""
    first, turn = prompts(FIRST), prompts(SECOND[kind], 5)
    cache, length = cache_for("segment", protect_text=protect_text), max(map(len, turn))
    read(cache, [first])
    before, seen = [(layer.keys, layer.kept_positions()) for layer in cache.layers], []
    attend = LookMLayer.attend

    def spy(self, inner, implementation, module, query, key, value, mask, **kwargs):
        seen.append((query, key.clone()))
        return attend(self, inner, implementation, module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(LookMLayer, "attend", spy)
    read(cache, [turn], seen=[first])
    for layer, (keys, kept), (query, key) in zip(cache.layers, before, seen, strict=True):
        stored = keys.shape[2]
        assert torch.equal(layer.keys[:, :, :stored], keys)
        assert torch.equal(layer.kept_positions()[:, :, :stored], kept)
        for row, prompt in enumerate(turn):
            there = kept[row, 0] >= 0
            own = slice(length - len(prompt), length)
            everything = torch.cat([key[row, :, :stored][:, there], key[row, :, stored:][:, own]], 1)
            scores = column_sums(query[row, :, own], everything, query.shape[-1] ** -0.5)[:, -len(prompt) :]
            image = image_mask(torch.tensor(prompt.ids)).tolist()
            keep = len(prompt) * 3 // 10
            tier = tiers(image, keep // 2, 0, True)
            keep = max(keep, sum(t > 1 for t in tier)) if protect_text else keep
            for head in range(2):
                positions = layer.kept_positions()[row, head, stored:]
                expected = torch.tensor(select(scores[head], tier, keep)[0]) + 39 + length - len(prompt)
                assert torch.equal(positions[positions >= 0], expected.int())


@pytest.mark.parametrize("later_turns", ["dense", "segment"])
@pytest.mark.parametrize("kind", SECOND)
def test_rows_do_not_see_each_other_or_the_padding_in_the_middle(later_turns: str, kind: str):
    turns = [prompts(FIRST), prompts(SECOND[kind], 5), prompts([(3,), (1,)], 9)]
    together = cache_for(later_turns)
    logits = read(together, turns)
    for row in range(2):
        alone = cache_for(later_turns)
        for ours, theirs in zip(read(alone, [[turn[row]] for turn in turns]), logits, strict=True):
            torch.testing.assert_close(ours[0], theirs[row, -ours.shape[1] :], **CLOSE)
        assert int((together.kept_positions(1)[row] >= 0).sum()) == int((alone.kept_positions(1) >= 0).sum())


@pytest.mark.parametrize("later_turns", ["dense", "segment"])
def test_a_whole_budget_changes_no_bit(later_turns: str):
    turns = [prompts(FIRST), prompts(SECOND["ragged"], 5), prompts([(3,), (1,)], 9)]
    full = read(DynamicCache(config=LLAVA.model().config), turns)
    assert all(map(torch.equal, read(cache_for(later_turns, 1.0), turns), full))


def test_the_budget_in_tokens_counts_for_every_segment():
    cache = cache_for("segment", 8)
    read(cache, [prompts(FIRST), prompts([(4, IMAGE), (6, IMAGE)], 5), prompts([(1,), (1,)], 9)])
    kept = cache.kept_positions(0)
    assert kept.shape[2] == 8 + 8 + 1
    assert ((kept >= 39).sum(-1) == 9).all()
    layer = cache.report().mean()
    assert layer["seen_image"] == 4 * 16
    assert layer["kept"] == 2 * 17


def test_crop_stops_at_the_last_segment():
    cache, turns = cache_for("segment", 8), [prompts(FIRST), prompts([(10,), (10,)], 5), prompts([(1,), (1,)], 9)]
    read(cache, turns)
    cache.crop(-1)
    with pytest.raises(RuntimeError, match="it ends at position 49 and the crop at 48"):
        cache.crop(-1)
    expected = cache_for("segment", 8)
    read(expected, turns[:2])
    assert cache.report() == expected.report()
    assert torch.equal(cache.layers[2].keys, expected.layers[2].keys)


def test_a_dense_turn_with_an_image_can_be_taken_back():
    first, turn, other = prompts(FIRST), prompts([(2, IMAGE), (2, IMAGE)], 5), prompts([(4,), (3,)], 9)
    cache, straight = cache_for("dense"), cache_for("dense")
    for state in (cache, straight):
        read(state, [first])
    read(cache, [turn], seen=[first])
    assert cache.report() != straight.report()
    cache.crop(-20)
    assert cache.report() == straight.report()
    assert torch.equal(*[read(state, [other], seen=[first])[0] for state in (cache, straight)])
    assert cache.report() == straight.report()


@pytest.mark.parametrize("later_turns", ["dense", "segment"])
def test_two_turns_of_generate(later_turns: str):
    model, cache = QWEN.model(), LookMCache(QWEN.model(), 0.3, later_turns=later_turns)
    options = {"max_new_tokens": 3, "do_sample": False}
    first = model.generate(**QWEN.inputs([QWEN.prompt((30,))]), past_key_values=cache, **options)
    assert cache.layers[0].keys.shape[2] == 9 + 2
    asked = torch.cat([first, torch.tensor([QWEN.prompt((9,), 1).ids])], 1)
    model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), past_key_values=cache, **options)
    # the last generated token of the first turn is read with the second
    assert cache.layers[0].keys.shape[2] == 11 + (10 if later_turns == "dense" else 3) + 2
    assert cache.get_seq_length() == 33 + 9 + 2


def generate(cache: LookMCache, prompts: list[Prompt], shown: list[Prompt], count: int = 3) -> Tensor:
    inputs = LLAVA.inputs(prompts, shown=shown)
    return LLAVA.model().generate(**inputs, past_key_values=cache, max_new_tokens=count, do_sample=False)


@pytest.mark.parametrize("later_turns", [None, "dense", "segment"])
@pytest.mark.parametrize("layout", [(9, IMAGE, 12), (4, IMAGE, 5), (20, IMAGE, 30), (60,)])
def test_another_prompt_without_a_reset(layout: tuple, later_turns: str | None):
    """transformers takes its first tokens for those in the cache, without a look."""
    cache = LookMCache(LLAVA.model(), 0.3, later_turns=later_turns)
    first, other = [LLAVA.prompt((9, IMAGE, 12))], [LLAVA.prompt(layout, 5)]
    generate(cache, first, first)
    with pytest.raises(ValueError, match=r"must begin with the 41 tokens that this cache has read.*cache.reset\(\)"):
        generate(cache, other, other)
    cache.reset()
    fresh = generate(LookMCache(LLAVA.model(), 0.3), other, other)
    assert torch.equal(generate(cache, other, other), fresh)


def test_another_prompt_by_the_name_inputs():
    cache, model = LookMCache(LLAVA.model(), 0.3), LLAVA.model()
    generate(cache, [LLAVA.prompt((20,))], [])
    other = torch.tensor([LLAVA.prompt((40,), 5).ids])
    with pytest.raises(ValueError, match="another one in row 0, column 0"):
        model.generate(inputs=other, past_key_values=cache, max_new_tokens=2)


def test_an_answer_that_is_padded_anew_is_the_same_conversation():
    """A row that ended early is filled with another token than it was generated with, under a mask that hides it."""
    cache, prompts_ = LookMCache(LLAVA.model(), 0.3), [LLAVA.prompt((9,)), LLAVA.prompt((9,), 1)]
    sequences = generate(cache, prompts_, [], 5)
    mask = torch.ones_like(sequences)
    mask[1, -3:] = 0
    asked = torch.cat([sequences.masked_fill(mask == 0, 77), torch.tensor([[7, 8], [7, 8]])], 1)
    mask = torch.nn.functional.pad(mask, (0, 2), value=1)
    options = {"max_new_tokens": 2, "do_sample": False}
    LLAVA.model().generate(input_ids=asked, attention_mask=mask, past_key_values=cache, **options)
    assert cache.get_seq_length() == asked.shape[1] + 1


@torch.no_grad()
def test_tokens_fed_through_one_buffer():
    """What was read is remembered as it was then."""
    cache, model = LookMCache(LLAVA.model(), 0.3), LLAVA.model()
    ids = torch.tensor([LLAVA.prompt((12,)).ids])
    model(input_ids=ids, past_key_values=cache)
    buffer, fed = torch.empty(1, 1, dtype=torch.long), [5, 50, 7]
    for token in fed:
        model(input_ids=buffer.fill_(token), past_key_values=cache)
    whole = torch.cat([ids, torch.tensor([[*fed, 9]])], 1)
    model.generate(input_ids=whole, past_key_values=cache, max_new_tokens=2)


def test_the_next_turn_is_no_other_prompt():
    """Whole, or its new tokens alone under a mask over all of them; after a crop too."""
    prompt, cache = LLAVA.prompt((9, IMAGE, 12)), cache_for("dense")
    answer = generate(cache, [prompt], [prompt])[0].tolist()
    whole = Prompt((*answer, 7, 8, 9))
    cache.crop(-1)
    expected = copy.deepcopy(cache)
    ids = generate(cache, [whole], [])
    mask = torch.ones(1, len(whole), dtype=torch.long)
    new = torch.tensor([whole.ids[expected.get_seq_length() :]])
    options = {"max_new_tokens": 3, "do_sample": False}
    alone = LLAVA.model().generate(input_ids=new, attention_mask=mask, past_key_values=expected, **options)
    assert torch.equal(ids[:, -3:], alone[:, -3:])
