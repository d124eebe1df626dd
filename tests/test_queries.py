"""Whose attention a policy sums: text queries, a sample of the image queries, 8-bit floats; against plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE, image_mask
from loops import column_sums, visible

import lookm_kernels
from lookm import POLICIES, Attention, LookMCache, Policy, Prompt
from lookm.lse import LogSumExp
from lookm.plan import pick_queries

TOKENS = 37
LLAVA, QWEN = FAMILIES["llava"], FAMILIES["qwen3"]
# of two rows: the first with images in two places, the second with other images, no image, or no text
LAST = torch.arange(TOKENS)
IMAGES = {
    "ragged": torch.stack([(LAST > 3) & (LAST < 20) | (LAST > 24) & (LAST < 34), (LAST > 9) & (LAST < 32)]),
    "no image": torch.stack([(LAST > 3) & (LAST < 34), LAST < 0]),
    "no text": torch.stack([(LAST > 3) & (LAST < 34), LAST >= 0]),
}
LEFT = torch.tensor([0, 14])[:, None] <= LAST
HOLES = (LAST % 5 != 3).expand(2, -1)
BLOCKS = ((LAST[:, None] // 4) >= (LAST // 4))[None, None]
# valid, the mask arguments, and what each query sees
MASKINGS: dict[str, tuple[Tensor | None, dict[str, Any], Tensor]] = {
    "causal": (None, {}, visible(TOKENS, TOKENS)[None]),
    "left padding": (
        LEFT, {"key_start": torch.tensor([0, 14], dtype=torch.int32)}, visible(TOKENS, TOKENS) & LEFT[:, None]
    ),
    "holes": (
        HOLES, {"mask": HOLES[:, None, None].expand(-1, 1, TOKENS, -1)}, visible(TOKENS, TOKENS) & HOLES[:, None]
    ),
    "4D": (None, {"causal": False, "mask": BLOCKS}, BLOCKS[0]),
}  # fmt: skip


def attention(policy: Policy, images: str, masking: str = "causal", queries: int = TOKENS) -> Attention:
    """Random attention in float64 of 4 query heads and 2 KV heads, over the last `queries` queries."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, TOKENS, 8, generator=generator).double() for heads in (4, 2))
    valid, arguments, _ = MASKINGS[masking]
    arguments = {name: x[:, :, -queries:] if name == "mask" else x for name, x in arguments.items()}
    prompt = Prompt(IMAGES[images], valid, [9, 9], [4, 4], [0, 0])
    weight, picked = pick_queries(policy, prompt, queries)
    return Attention(query[:, :, -queries:], key, prompt, 0.3, query_weight=weight, picked=picked, **arguments)


def by_loops(given: Attention, masking: str, weight: Tensor) -> Tensor:
    """Column sums [B, H, N] with a weight [B, N] for every query of the prompt."""
    queries, seen = given.query.shape[2], MASKINGS[masking][2].expand(2, -1, -1)
    rows = [
        column_sums(
            given.query[r], given.key[r], 0.3, False, seen[r, -queries:].expand(4, -1, -1), weight[r, -queries:]
        )
        for r in range(2)
    ]
    return torch.stack(rows)


def weights(policy: Policy, images: str, masking: str) -> Tensor:
    """What each query counts, said in other words than the policy's."""
    valid, weight = MASKINGS[masking][0], torch.zeros(2, TOKENS, dtype=torch.float64)
    for row, image in enumerate(IMAGES[images].tolist()):
        met = 0
        for token, is_image in enumerate(image):
            if valid is not None and not valid[row, token]:
                continue
            if not is_image:
                weight[row, token] = 1
            elif policy.queries == "sampled" and met % policy.stride == policy.phase:
                weight[row, token] = policy.stride
            met += is_image
    return weight


OPTIONS = [{"queries": "text"}, {"queries": "sampled", "stride": 4}, {"queries": "sampled", "stride": 6, "phase": 5}]


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("queries", [TOKENS, 11, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_query_counts_its_weight(options: dict, queries: int, images: str, masking: str):
    policy = Policy(**options)
    given = attention(policy, images, masking, queries)
    expected = by_loops(given, masking, weights(policy, images, masking))
    torch.testing.assert_close(policy.score(given), expected, rtol=1e-9, atol=1e-9)
    # without picking, the same
    torch.testing.assert_close(policy.score(replace(given, picked=None)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("name", ["h2o", "mean_h2o", "snapkv"])
def test_a_sample_is_unbiased(name: str, images: str, stride: int, masking: str):
    """The mean over all phases is the sum over all queries, of the attention and of the visits."""
    policy, every = POLICIES[name], []
    for phase in range(stride):
        sampled = replace(policy, queries="sampled", stride=stride, phase=phase)
        every.append(sampled.score(attention(sampled, images, masking)))
    exact = policy.score(attention(policy, images, masking))
    torch.testing.assert_close(torch.stack(every).mean(0), exact, rtol=1e-9, atol=1e-9)
    assert stride == 1 or images == "no image" or not torch.allclose(every[0], exact)


@pytest.mark.parametrize("queries", ["text", "sampled"])
def test_a_window_of_chosen_queries(queries: str):
    policy = replace(POLICIES["snapkv"], queries=queries, stride=3, window=9)
    given = attention(policy, "ragged", "left padding")
    weight = weights(policy, "ragged", "left padding") * (LAST >= TOKENS - 9)
    expected = by_loops(given, "left padding", weight)
    torch.testing.assert_close(policy.score(given), expected, rtol=1e-9, atol=1e-9)


def test_a_policy_with_weights_picks():
    """However many of a row: were it left to their share, the other rows of a batch would decide."""
    image = IMAGES["ragged"][:1]
    prompt = Prompt(image, None, [9], [4], [0])
    text = int((~image).sum())
    assert pick_queries(Policy(), prompt, TOKENS) == (None, None)
    weight, picked = pick_queries(Policy(queries="text"), prompt, TOKENS)
    assert picked.tolist() == [[token for token in range(TOKENS) if not image[0, token]]]
    assert weight.sum() == text
    weight, picked = pick_queries(Policy(queries="text"), replace(prompt, image=~image), TOKENS)
    assert picked.shape == (1, TOKENS - text)
    both = Prompt(IMAGES["no text"], None, [9, 9], [4, 4], [0, 0])
    assert pick_queries(Policy(queries="text"), both, TOKENS)[1].tolist()[1] == [-1] * 7
    none = pick_queries(Policy(queries="text"), Prompt(IMAGES["no text"][1:], None, [9], [4], [0]), TOKENS)[1]
    assert none.shape == (1, 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of attention_scores."""
    calls, scores = [], lookm_kernels.attention_scores

    def spy(query: Tensor, key: Tensor, **arguments: Any) -> Tensor:
        calls.append({"query": query, "key": key, **arguments})
        return scores(query, key, **arguments)

    monkeypatch.setattr(lookm_kernels, "attention_scores", spy)
    return calls


def read(rows: list[tuple], seed: int = 0, **options: Any) -> LookMCache:
    model, inputs = LLAVA.model(), LLAVA.inputs([LLAVA.prompt(layout, seed + row) for row, layout in enumerate(rows)])
    cache = LookMCache(model, budget=0.4, **options)
    with torch.no_grad():
        # the positions of a row alone: rotated by another angle, its keys round to other 8-bit floats
        model(**inputs, position_ids=LLAVA.positions(model, inputs), past_key_values=cache)
    return cache


def test_fewer_queries_are_scored(calls: list):
    read([(4, IMAGE, 2), (3, IMAGE, IMAGE)], queries="text")
    assert [call["query"].shape for call in calls] == [(2, 4, 8, 16)] * 3
    assert all(call["lse"] is None for call in calls)
    calls.clear()
    read([(4, IMAGE, 2)], queries="sampled", stride=8)
    assert [call["query"].shape for call in calls] == [(1, 4, 10, 16)] * 3
    assert [call["lse"].shape for call in calls] == [(1, 4, 10)] * 3


def test_nobody_looks(calls: list):
    model, image = QWEN.model(), torch.ones(1, 30, dtype=torch.bool)
    cache = LookMCache(model, budget=0.3, image_mask=image, queries="text")
    with torch.no_grad():
        model(**QWEN.inputs([QWEN.prompt((30,))]), past_key_values=cache)
    assert not calls
    # of equal scores the first stay
    assert (cache.kept_positions(1) == torch.tensor([0, 1, 2, 3, 4, 26, 27, 28, 29])).all()


ROWS = [(9, IMAGE, 12), (5, IMAGE, 4), (21,), (IMAGE, 3)]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
@pytest.mark.parametrize("policy", ["lookm", "mean_h2o"])
def test_a_padded_row_keeps_what_it_keeps_alone(policy: str, options: dict, fp8: bool, monkeypatch: pytest.MonkeyPatch):
    if fp8:
        # a row alone has the log-sum-exp of the model's attention, which is not that of 8-bit floats
        monkeypatch.setattr(LogSumExp, "of", lambda *_: None)
    together = read(ROWS, policy=policy, fp8=fp8, **options)
    for row, layout in enumerate(ROWS):
        alone = read([layout], row, policy=policy, fp8=fp8, **options)
        padding = together.get_seq_length() - alone.get_seq_length()
        for layer in range(3):
            kept = together.kept_positions(layer)[row]
            expected = alone.kept_positions(layer)[0] + padding
            assert torch.equal(kept[kept >= 0].view(2, -1), expected)


@pytest.mark.parametrize("options", [{}, {"queries": "text"}], ids=str)
@pytest.mark.parametrize("masking", ["causal", "left padding"])
def test_8_bit_floats_are_close(options: dict, masking: str, calls: list):
    policy = Policy(fp8=True, **options)
    exact = attention(policy, "ragged", masking)
    exact = replace(exact, query=3 * exact.query.float(), key=exact.key.float())
    ours, theirs = policy.score(replace(exact, fp8=True)), policy.score(exact)
    assert calls[0]["query"].dtype == calls[0]["key"].dtype == torch.float8_e4m3fn
    assert calls[1]["query"].dtype == torch.float32
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours.sum(-1), theirs.sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=0.2, atol=0.05)


def test_8_bit_floats_use_the_log_sum_exp_of_the_model(calls: list):
    read([(9, IMAGE, 12)], fp8=True)
    assert all(call["query"].dtype == torch.float8_e4m3fn and call["lse"] is not None for call in calls)
    assert len(calls) == 3


def test_text_is_what_the_model_says_is_text(calls: list):
    read([(9, IMAGE, 12)], queries="text")
    ids = LLAVA.inputs([LLAVA.prompt((9, IMAGE, 12))])["input_ids"]
    text = (~image_mask(ids)).nonzero()[:, 1]
    assert len(text) == 23
    for call in calls:
        assert torch.equal(call["query_position"][0].long(), text)
        assert torch.equal(call["query_weight"], torch.ones(1, 23))
