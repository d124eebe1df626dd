"""Budgets: what is accepted, how many tokens each row keeps, and what a whole budget leaves alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from families import FAMILIES, HEAD_DIM, IMAGE, KV_HEADS
from transformers import DynamicCache

from lookm import POLICIES, LookMCache
from lookm.budget import Budget, parse_budget

FAMILY = FAMILIES["llava"]
LAYERS = 3
ROWS = [(9, IMAGE, 12), (5, IMAGE, 4), (21,)]
LENGTHS = [39, 27, 21]
TOKEN_BYTES = 2 * KV_HEADS * HEAD_DIM * 4 * LAYERS  # keys and values of one token of one row, float32

NOT_A_BUDGET = [0, 0.0, -0.0, -1, -0.5, 1.5, 1.0000001, True, False, float("nan"), float("inf"), [1], (0.2,)]
NOT_BYTES = ["", "0.2", "1GiBB", "GiB", "-1MiB", "0MiB", "0.4B", "1e3B", "1 TiB", "1.MiB", "lots"]
NOT_COUNTS = ["0%", "101%", "-5%", "20%%", "0 tokens", "1.5 tokens", "tokens"]
NOT_FRACTIONS = [(-0.1, 0.2), (0.0, 0.0), (0.9, 0.2), (float("nan"), 0.1), ("0.1", 0.1), (0.1, [0.1]), (True, 0.0)]


def policy(**fields):
    return type(POLICIES["h2o"])(**fields)


def prefill(budget, rows=ROWS, **options) -> LookMCache:
    model = FAMILY.model()
    cache = LookMCache(model, budget, **options)
    with torch.no_grad():
        model(**FAMILY.inputs([FAMILY.prompt(layout, seed) for seed, layout in enumerate(rows)]), past_key_values=cache)
    return cache


def kept(cache: LookMCache) -> list[int]:
    """Tokens of each row that are in the cache, the same in every head and layer."""
    counts = torch.stack([(cache.kept_positions(layer) >= 0).sum(-1) for layer in range(LAYERS)])
    assert (counts == counts[:1, :, :1]).all()
    return counts[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * 2**20),
        (" 2 GB ", 2 * 10**9),
        ("1.5KiB", 1536),
        ("0.57KB", 570),
        ("100B", 100),
        ("1GiB", 2**30),
        ("512mib", 512 * 2**20),
        ("512mb", 512 * 10**6),
        ("7b", 7),
    ],
)
def test_bytes_are_read_exactly(text: str, size: int):
    assert parse_budget(text) == Budget(bytes=size)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("20%", Budget(fraction=0.2)),
        (" 12.3 % ", Budget(fraction=0.123)),
        ("100%", Budget(fraction=1.0)),
        ("500 tokens", Budget(tokens=500)),
        ("1 token", Budget(tokens=1)),
    ],
)
def test_percent_and_tokens_in_words(text: str, budget: Budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("budget", [*NOT_A_BUDGET, *NOT_BYTES, *NOT_COUNTS, "9" * 400], ids=repr)
def test_anything_else_says_what_is_accepted(budget):
    with pytest.raises(ValueError, match=r"`budget` must be a fraction .*, a number of tokens .* or bytes .*'512MiB'"):
        LookMCache(FAMILY.model(), budget)


@pytest.mark.parametrize("fractions", NOT_FRACTIONS, ids=repr)
def test_fractions_that_are_none(fractions):
    with pytest.raises(ValueError, match="`important` and `recent` must be fractions"):
        LookMCache(FAMILY.model(), important=fractions[0], recent=fractions[1])


@pytest.mark.parametrize("alone", ["important", "recent"])
def test_important_and_recent_go_together(alone: str):
    with pytest.raises(ValueError, match="go together"):
        LookMCache(FAMILY.model(), **{alone: 0.1})


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"budget": 0.9, "important": 0.1, "recent": 0.1}, "budget"),
        ({"important": 0.1, "recent": 0.1, "recent_share": 0.9}, "recent_share"),
        ({"budget": "1MiB", "later_turns": "segment"}, "budget"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other(settings: dict, argument: str):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        LookMCache(FAMILY.model(), **settings)


def test_a_fifth_stays_by_default():
    assert kept(prefill(None)) == kept(prefill(0.2))


@example(290, 100)  # 0.29 * 100 is 28.999... in binary
@example(570, 100)
@given(thousandths=st.integers(1, 1000), length=st.integers(1, 5000))
def test_fractions_round_down_in_decimals(thousandths: int, length: int):
    expected = max(1, thousandths * length // 1000)
    assert parse_budget(thousandths / 1000).split(length, policy(), 1) == (expected, expected // 2, 0)


@example(290, 570, 100)
@given(important=st.integers(0, 500), recent=st.integers(1, 500), length=st.integers(1, 5000))
def test_important_and_recent_round_down_separately(important: int, recent: int, length: int):
    budget = parse_budget(None, important / 1000, recent / 1000)
    last = recent * length // 1000
    assert budget.split(length, policy(), 1) == (max(1, important * length // 1000 + last), last, 0)


@given(
    st.sampled_from([0.01, 0.29, 1.0, 1, 3, 40]),
    st.integers(1, 100),
    st.sampled_from([0.0, 0.29, 0.5, 1.0]),
    st.integers(0, 9),
)
def test_sinks_and_recent_tokens_fit_into_what_is_kept(budget, length: int, share: float, sinks: int):
    keep, recent, first = parse_budget(budget).split(length, policy(recent_share=share, sinks=sinks), 1)
    assert 1 <= keep <= length
    assert first == min(sinks, keep // 2)
    assert recent == min(keep * round(100 * share) // 100, keep - first)


def test_the_share_of_recent_tokens_rounds_down_in_decimals():
    assert parse_budget(100).split(500, policy(recent_share=0.29), 1) == (100, 29, 0)


def test_sinks_leave_the_recent_fraction_alone():
    assert parse_budget(None, 0.02, 0.1).split(100, policy(sinks=4), 1) == (12, 10, 2)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0.29, [11, 7, 6]),
        (0.001, [1, 1, 1]),
        (25, [25, 25, 21]),
        (1, [1, 1, 1]),
        (f"{TOKEN_BYTES * 3 * 10}B", [10, 10, 10]),
        (f"{TOKEN_BYTES * 3 * 10 + TOKEN_BYTES * 3 - 1}B", [10, 10, 10]),
        (f"{TOKEN_BYTES * 3 * 25}B", [25, 25, 21]),
    ],
)
def test_every_row_has_its_own_budget(budget, expected: list[int]):
    cache = prefill(budget)
    assert kept(cache) == expected
    assert cache.report().bytes == max(expected) * 3 * TOKEN_BYTES


def test_important_and_recent_replace_the_budget():
    assert kept(prefill(None, important=0.13, recent=0.1)) == [5 + 3, 3 + 2, 2 + 2]


def test_bytes_are_split_over_the_compressed_layers_only():
    family = FAMILIES["gemma3"]
    model, prompt = family.model(), family.prompt((30,))
    cache = LookMCache(model, f"{2 * TOKEN_BYTES // LAYERS * 7}B")  # two of four layers are compressed
    with torch.no_grad():
        model(**family.inputs([prompt]), past_key_values=cache)
    assert [cache.layers[layer].keys.shape[2] for layer in (1, 3)] == [7, 7]


def test_bytes_too_small_for_one_token():
    with pytest.raises(ValueError, match=f"{TOKEN_BYTES * 3 - 1} bytes is less than one token.*{TOKEN_BYTES * 3}"):
        prefill(f"{TOKEN_BYTES * 3 - 1}B")


@pytest.mark.parametrize("budget", [1.0, 39, 10**9, "1GiB"], ids=repr)
@pytest.mark.parametrize("more_padding", [0, 3])
def test_a_budget_as_large_as_the_prompt_changes_no_bit(budget, more_padding: int):
    model = FAMILY.model()
    inputs = FAMILY.inputs([FAMILY.prompt(layout, seed) for seed, layout in enumerate(ROWS)])
    for name in ("input_ids", "attention_mask"):  # every row has padding: that alone is no reason to evict
        inputs[name] = torch.nn.functional.pad(inputs[name], (more_padding, 0))
    results = []
    for cache in (LookMCache(model, budget), DynamicCache(config=model.config)):
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        results.append(torch.stack(model.generate(**inputs, past_key_values=cache, **options).logits))
        if isinstance(cache, LookMCache):
            assert cache.report().mean()["evicted"] == 0
    assert torch.equal(*results)
