"""Answers and conversations longer than the budget: what stays, by loops; bounded, and exact where all fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE, TALL, image_mask
from loops import column_sums, select, softmax_row
from test_later_turns import prompts, read
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lookm import LookMCache
from lookm.layer import LookMLayer
from lookm.modality import cache_keyword
from lookm.policies import AverageMerge
from lookm.policy import POLICIES, Policy

LLAVA, QWEN = FAMILIES["llava"], FAMILIES["qwen3"]
LAYOUTS = [(6, IMAGE, 9, TALL, 12), (4, IMAGE, 5)]
BY_HEAD = [name for name, policy in POLICIES.items() if policy.by_head and not policy.uneven]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def inputs_of(family, layouts=LAYOUTS) -> dict[str, Tensor]:
    return family.inputs([family.prompt(layout, row) for row, layout in enumerate(layouts)])


def generate(family, cache: Any, new: int, layouts=LAYOUTS, **options: Any) -> Tensor:
    model = family.model()
    options = {"do_sample": False, **options}
    return model.generate(**inputs_of(family, layouts), **{cache_keyword(model): cache}, max_new_tokens=new, **options)


@pytest.mark.parametrize("policy", BY_HEAD)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3"])
def test_a_window_that_is_never_full_changes_nothing(name: str, policy: str):
    """An answer that fits is DynamicCache's, whatever the policy; the longer row's prompt is over no budget either."""
    family = FAMILIES[name]
    window = LookMCache(family.model(), 200, policy, generated="window", compress_every=4)
    assert torch.equal(generate(family, window, 12), generate(family, DynamicCache(config=family.model().config), 12))


@pytest.mark.parametrize("every", [1, 8])
def test_what_stays_is_what_was_attended_to(every: int, monkeypatch: pytest.MonkeyPatch):
    """Every step's attention in float64, added up by position; text of the prompt first, then images and the answer."""
    seen: list[tuple[LookMLayer, Tensor, Tensor, Tensor]] = []
    for method in ("attend", "follow"):
        original = getattr(LookMLayer, method)

        def spy(self, inner, implementation, module, query, key, value, mask, *args, original=original, **kwargs):
            seen.append((self, query.clone(), key.clone(), self.kept_positions().clone()))
            return original(self, inner, implementation, module, query, key, value, mask, *args, **kwargs)

        monkeypatch.setattr(LookMLayer, method, spy)
    keep, new = 20, 30
    cache = LookMCache(LLAVA.model(), keep, "text_prior_h2o", generated="window", compress_every=every)
    generate(LLAVA, cache, new)
    inputs = inputs_of(LLAVA)
    length = inputs["input_ids"].shape[1]
    compressions = 0
    for layer in cache.layers:
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            start = int((~mask).sum())
            image = image_mask(inputs["input_ids"][row]).tolist() + [False] * new
            for head in range(2):
                sums = torch.zeros(length + new, dtype=torch.float64)
                held: list[int] = []
                for call, (which, query, key, positions) in enumerate(step for step in seen if step[0] is layer):
                    assert which is layer
                    own = slice(2 * head, 2 * head + 2)
                    if call == 0:
                        paid = column_sums(query[row, own, start:], key[row, head : head + 1, start:], 0.25)[0]
                        held, total = list(range(start, length)), length
                    else:
                        assert [int(p) for p in positions[row, head] if p >= 0] == [*held, total]
                        held, total = [*held, total], total + 1
                        keys = key[row, head][positions[row, head] >= 0].double()
                        everything = torch.ones(len(keys), dtype=torch.bool)
                        paid = sum(softmax_row(q[0].double(), keys, 0.25, everything) for q in query[row, own])
                    sums[held] += paid
                    if call == 0 or key.shape[2] == keep + every:
                        compressions += call > 0
                        recent = held[-(keep // 2) :]
                        tier = [3 if p in recent else 1 if image[p] or p >= length else 2 for p in held]
                        held = [held[i] for i in select(sums[held], tier, keep)[0]]
                left = layer.kept_positions()[row, head]
                assert [int(p) for p in left if p >= 0] == held
    assert compressions == 2 * 2 * len(cache.layers) * ((new - 1) // every)


@pytest.mark.parametrize("policy", ["lookm", "auto"])
def test_an_answer_of_four_thousand_tokens_stays_within_bounds(policy: str):
    """Never more than budget + compress_every pairs, and votes for no more tokens than were read."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    model, new, largest = LlamaForCausalLM(config).eval(), 4000, 0
    cache = LookMCache(model, 200, policy, generated="window", compress_every=64)
    with torch.no_grad():
        token = (
            model(input_ids=torch.randint(0, 64, (1, 50)), **{cache_keyword(model): cache}).logits[:, -1:].argmax(-1)
        )
        for _ in range(new):
            logits = model(input_ids=token, **{cache_keyword(model): cache}).logits
            token = torch.multinomial(logits[:, -1].softmax(-1), 1)
            largest = max(largest, *(layer.stored for layer in cache.layers))
    assert logits.isfinite().all()
    assert cache.get_seq_length() == 50 + new
    assert largest == 200 + 63
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() <= 264 * 2 * 8 * 4
        assert (layer.kept_positions().diff(dim=2) > 0).all()
        if layer.votes is not None:
            votes = layer.votes.sum(-1) + (layer.stored - layer.votes.shape[2])
            assert (votes <= 50 + new + 1e-3).all()
            assert votes.max() > layer.stored


def test_nothing_is_lost_where_all_merge():
    """Every token of the conversation has its vote in some pair."""
    policy = AverageMerge(rule="average", votes=True, sinks=2)
    cache = LookMCache(LLAVA.model(), 12, policy, generated="window", compress_every=5)
    sequences = generate(LLAVA, cache, 40, [LAYOUTS[0]])
    for layer in cache.layers:
        votes = layer.votes.sum(-1) + (layer.stored - layer.votes.shape[2])
        torch.testing.assert_close(votes, torch.full_like(votes, sequences.shape[1] - 1))


@pytest.mark.parametrize("policy", ["lookm", "auto", "text_prior_h2o", "snapkv"])
def test_a_row_is_alone(policy: str):
    """A padded row of a batch keeps and says what it does alone, compression after compression."""
    together = LookMCache(LLAVA.model(), 0.5, policy, generated="window", compress_every=6)
    tokens = generate(LLAVA, together, 30)[1, -30:]
    alone = LookMCache(LLAVA.model(), 0.5, policy, generated="window", compress_every=6)
    assert torch.equal(LLAVA.model().generate(
        **LLAVA.inputs([LLAVA.prompt(LAYOUTS[1], 1)]), **{cache_keyword(LLAVA.model()): alone}, max_new_tokens=30,
        do_sample=False,
    )[0, -30:], tokens)  # fmt: skip
    padding = together.get_seq_length() - alone.get_seq_length()
    for ours, single in zip(together.layers, alone.layers, strict=True):
        own = ours.kept_positions()[1]
        for head in range(2):
            held = own[head][own[head] >= 0] - padding
            assert set(single.kept_positions()[0, head].tolist()) - set(held.tolist()) == set()


@pytest.mark.parametrize("policy", ["lookm", "auto", "text_prior_h2o"])
def test_a_video_in_turns_has_one_budget(policy: str):
    """A picture a turn, in rows of several lengths: the cache ends every turn within its budget, the question stays."""
    turns = [prompts([(5, IMAGE), (3, IMAGE)])] + [prompts([(1, IMAGE), (2, IMAGE)], 5 * turn) for turn in range(1, 6)]
    cache, seen = LookMCache(LLAVA.model(), 60, policy, later_turns="segment", generated="window"), []
    for turn in turns:
        logits = read(cache, [turn], seen=seen)[0]
        seen.append(turn)
        assert logits.isfinite().all()
        for layer in cache.layers:
            kept = layer.kept_positions()
            assert layer.stored == min(60, cache.get_seq_length())
            # the newest are protected
            assert (kept[..., -1] == cache.get_seq_length() - 1).all()
            ids = torch.cat([LLAVA.inputs(each)["input_ids"] for each in seen], 1)
            text = ~image_mask(ids) & torch.cat([LLAVA.inputs(each)["attention_mask"].bool() for each in seen], 1)
            for row in range(2):
                for head in range(2):
                    assert set(text[row].nonzero()[:, 0].tolist()) <= set(kept[row, head].tolist())


def test_turns_and_answers_with_a_budget_never_reached():
    """Right as DynamicCache is: nothing over the budget, three turns of two rows."""
    turns = [prompts(LAYOUTS), prompts([(4, IMAGE, 3), (6,)], 5), prompts([(1,), (1,)], 9), prompts([(3,), (1,)], 11)]
    expected = read(DynamicCache(config=LLAVA.model().config), turns)
    found = read(LookMCache(LLAVA.model(), 500, "auto", generated="window"), turns)
    for turn, ours, theirs in zip(turns, found, expected, strict=True):
        there = LLAVA.inputs(turn)["attention_mask"].bool()
        torch.testing.assert_close(ours[there], theirs[there], **CLOSE)


def test_beams():
    """Rows change places between the steps, and what they have paid goes with them."""
    options = {"num_beams": 3}
    expected = generate(LLAVA, DynamicCache(config=LLAVA.model().config), 12, **options)
    assert torch.equal(
        generate(LLAVA, LookMCache(LLAVA.model(), 500, "lookm", generated="window"), 12, **options), expected
    )
    cache = LookMCache(LLAVA.model(), 15, "lookm", generated="window", compress_every=4)
    generate(LLAVA, cache, 20, **options)
    assert all(layer.stored < 15 + 4 for layer in cache.layers)


def test_reset_forgets_what_was_paid():
    cache = LookMCache(LLAVA.model(), 15, "auto", generated="window", compress_every=4)
    first = generate(LLAVA, cache, 20)
    cache.reset()
    assert torch.equal(generate(LLAVA, cache, 20), first)


def test_sinks_are_a_number_of_tokens_whatever_the_prompt_was():
    """A prompt of 10 tokens on a budget of 100: 4 sinks, not 40 for being a tenth of it."""
    cache = LookMCache(QWEN.model(), 100, "pivot_merge", generated="window")
    with torch.no_grad():
        QWEN.model()(input_ids=torch.arange(10)[None] + 3, **{cache_keyword(QWEN.model()): cache})
    for layer in cache.layers:
        assert (layer.window.keep, layer.window.sinks, layer.window.recent) == ([100], [4], [50])


class Both(Policy):
    """Heads together."""

    by_head = False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"generated": "all"}, r"`generated` must be one of \('whole', 'window'\), got 'all'"),
        ({"compress_every": 0}, "`compress_every` must be a number of tokens, 1 or more, got 0"),
        ({"generated": "window", "later_turns": "dense"}, "`later_turns` must be 'segment'"),
        ({"generated": "window", "max_new_tokens": 9}, "`max_new_tokens` must not be given with generated='window'"),
        ({"generated": "window", "policy": "madakv"}, "policy MadaKV, which looks at all heads"),
        ({"generated": "window", "policy": Both()}, "policy Both, which looks at all heads"),
        ({"generated": "window", "policy": "lookm", "gate": "mean_similarity"}, "gate 'mean_similarity', which looks"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        LookMCache(QWEN.model(), 0.2, **arguments)


def test_masks_that_hide_more_are_refused():
    model = QWEN.model()
    cache = LookMCache(model, 10, "text_prior_h2o", generated="window")
    keyword = cache_keyword(model)
    with torch.no_grad():
        model(input_ids=torch.arange(30)[None] + 3, **{keyword: cache})
        mask = torch.ones(1, 31, dtype=torch.long)
        mask[0, 3] = 0
        with pytest.raises(NotImplementedError, match="generated='window'"):
            model(input_ids=torch.tensor([[5]]), attention_mask=mask, **{keyword: cache})
