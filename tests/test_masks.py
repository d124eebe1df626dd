"""Masks of compressed caches: the functions against loops, and whole models against rows without padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers")

from families import FAMILIES
from transformers import DynamicCache

from lookm import POLICIES, LookMCache
from lookm.layer import LookMLayer
from lookm.masks import left_padding, padding_mask, stored_mask, visible

QWEN = FAMILIES["qwen3"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# which of 24 places are tokens: nothing missing, padding on the left, on the right, in the middle, all of it at once
PADDINGS = {
    "none": "1" * 24,
    "left": "0" * 7 + "1" * 17,
    "right": "1" * 16 + "0" * 8,
    "middle": "111001101111" * 2,
    "everywhere": "010110111010" * 2,
}


def bools(text: str) -> Tensor:
    return torch.tensor([[place == "1" for place in text]])


@given(st.integers(0, 5), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_mask_of_what_is_stored(offset: int, stored: int, queries: int, holes: bool, new: bool, seed: int):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(2, stored, generator=generator) > 0.4 if holes else None
    fresh = torch.rand(2, queries, generator=generator) > 0.4 if new else None
    mask = stored_mask(valid, fresh, offset, stored, 2, queries)
    for row in range(2):
        expected = [False] * offset
        expected += [True] * stored if valid is None else valid[row].tolist()
        expected += [True] * queries if fresh is None else fresh[row].tolist()
        assert mask[row].tolist() == expected


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_left_padding_is_found_and_nothing_else(rows: list[list[bool]]):
    firsts = []
    for row in rows:
        first = row.index(True) if True in row else 6
        firsts.append(first if all(row[first:]) else None)
    expected = None if None in firsts else firsts
    found = left_padding(torch.tensor(rows))
    assert (found if found is None else found.tolist()) == expected


def test_no_padding_has_no_start():
    assert left_padding(None) is None


def test_visible_reads_bool_and_additive_masks():
    seen = torch.tensor([[[[True, False, True]]]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for low in (torch.finfo(dtype).min, float("-inf"), -1e4):
            additive = torch.zeros(1, 1, 1, 3, dtype=dtype).masked_fill(~seen, low)
            for implementation in ("sdpa", "eager"):
                assert torch.equal(visible(additive, implementation, 1, 3), seen)
    assert torch.equal(visible(seen, "sdpa", 2, 2), seen[..., :2].expand(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("mask", "implementation"),
    [(torch.tensor([0.0, 0.5]), "sdpa"), (torch.tensor([0.0, -9e3]), "eager"), (torch.tensor([True, False]), "eager")],
)
def test_a_mask_that_biases_is_refused(mask: Tensor, implementation: str):
    """Eager attention adds a bool mask as 0 and 1."""
    with pytest.raises(NotImplementedError, match=r"adds a bias to its logits .*not supported"):
        visible(mask.expand(1, 1, 1, 2), implementation, 1, 2)


def test_padding_on_the_left_needs_no_mask():
    assert padding_mask(None, None, 4) == {"key_start": None, "mask": None}
    start = torch.tensor([2])
    assert padding_mask(bools("001111"), start, 4) == {"key_start": start, "mask": None}
    holes = padding_mask(bools("101111"), None, 4)
    assert holes["key_start"] is None
    assert torch.equal(holes["mask"], bools("101111")[:, None, None].expand(1, 1, 4, 6))


def spread(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The tokens ids [n] at the places of mask [1, N], other tokens elsewhere."""
    places = torch.full((1, mask.shape[1]), 77).masked_scatter(mask, ids)
    return {"input_ids": places, "attention_mask": mask.long(), "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def decoded(model, cache, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of three tokens after the prompt."""
    model(**inputs, past_key_values=cache)
    mask, logits = inputs["attention_mask"], []
    for token in (5, 50, 7):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = {"input_ids": torch.full((len(mask), 1), token), "attention_mask": mask}
        logits.append(model(**step, position_ids=mask.cumsum(1)[:, -1:] - 1, past_key_values=cache).logits[:, 0])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("policy", POLICIES)
def test_padding_anywhere_changes_nothing(padding: str, policy: str):
    """A row with pads, among others with pads elsewhere, decodes as the row alone without them."""
    if policy == "snapkv" and padding in ("middle", "everywhere"):
        pytest.skip("snapkv smooths along the places of a prompt: a pad between two tokens keeps them apart")
    model, masks = QWEN.model(), [bools(PADDINGS[padding]), bools("000" + "1" * 21)]
    rows = [torch.tensor(QWEN.prompt((int(mask.sum()),), seed).ids) for seed, mask in enumerate(masks)]
    parts = [spread(ids, mask) for ids, mask in zip(rows, masks, strict=True)]
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    cache = LookMCache(model, budget=0.4, policy=policy)
    together = decoded(model, cache, batch)
    for row, ids in enumerate(rows):
        alone = LookMCache(model, budget=0.4, policy=policy)
        expected = decoded(model, alone, spread(ids, torch.ones(1, len(ids), dtype=torch.bool)))
        torch.testing.assert_close(together[row], expected[0], **CLOSE)
        places = masks[row][0].nonzero()[:, 0]
        for layer in range(3):
            kept, expected = cache.kept_positions(layer)[row], alone.kept_positions(layer)[0]
            kept = kept[(kept >= 0) & (kept < 24)].view(2, -1)
            assert torch.equal(kept.long(), places[expected[expected < len(ids)].view(2, -1).long()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("policy", ["lookm", "mean_h2o"])
def test_a_causal_mask_in_4d_is_the_mask_in_2d(padding: str, policy: str, attention: str):
    model, valid = QWEN.model(attention), bools(PADDINGS[padding])
    if padding in ("right", "everywhere"):  # the last token has to be one: it says which others are
        valid[:, -1] = True
    inputs = spread(torch.tensor(QWEN.prompt((int(valid.sum()),)).ids), valid)
    seen = torch.ones(24, 24, dtype=torch.bool).tril() & valid[:, None, None]
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    results = []
    for mask in (inputs["attention_mask"], seen if attention == "sdpa" else additive, additive):
        cache = LookMCache(model, budget=0.4, policy=policy)
        with torch.no_grad():
            model(**inputs | {"attention_mask": mask}, past_key_values=cache)
            whole = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            step = {"input_ids": torch.tensor([[5]]), "position_ids": whole.sum(1, keepdim=True) - 1}
            logits = model(**step, attention_mask=whole, past_key_values=cache).logits
        results.append((logits, [cache.kept_positions(layer) for layer in range(3)]))
    for logits, kept in results[1:]:
        torch.testing.assert_close(logits, results[0][0], **CLOSE)
        assert all(map(torch.equal, kept, results[0][1]))


@pytest.mark.parametrize("policy", ["h2o", "mean_h2o"])
def test_a_4d_mask_of_ones_own_decides_who_is_scored(policy: str):
    model, generator = QWEN.model(), torch.Generator().manual_seed(0)
    seen = (torch.rand(1, 1, 24, 24, generator=generator) > 0.5).tril() | torch.eye(24, dtype=torch.bool)
    seen[..., -1, :] = True  # the last query sees everything: none of it is padding
    caches = [LookMCache(model, budget=4, policy=policy, recent_share=0.0) for _ in range(2)]
    with torch.no_grad():
        ids = torch.tensor([QWEN.prompt((24,)).ids])
        model(input_ids=ids, attention_mask=seen, past_key_values=caches[0])
        model(input_ids=ids, past_key_values=caches[1])
    scores = [score_of(model, ids, mask, policy) for mask in (seen, None)]
    for cache, score in zip(caches, scores, strict=True):
        expected = score.topk(4, dim=-1).indices.sort(dim=-1).values
        assert torch.equal(cache.kept_positions(0).long(), expected)
    assert not torch.equal(*[cache.kept_positions(0) for cache in caches])


def test_each_layer_may_have_a_4d_mask_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """What the first layer of a forward found out is not taken for another mask's."""
    model, cache = QWEN.model(), LookMCache(QWEN.model(), budget=0.5)
    masks = [bools("0" * pads + "1" * (24 - pads))[:, None, None].expand(1, 1, 24, -1) for pads in (0, 4, 8)]

    def with_own_mask(self, inner, implementation, module, query, key, value, mask, **arguments):
        return original(self, inner, implementation, module, query, key, value, masks[module.layer_idx], **arguments)

    original = LookMLayer.attend
    monkeypatch.setattr(LookMLayer, "attend", with_own_mask)
    with torch.no_grad():
        ids = torch.tensor([QWEN.prompt((24,)).ids])
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 24, 24, dtype=torch.bool), past_key_values=cache)
    assert [cache.kept_positions(layer).shape[2] for layer in range(3)] == [12, 10, 8]
    assert [int(cache.kept_positions(layer).min()) >= pads for layer, pads in enumerate((0, 4, 8))] == [True] * 3


@torch.no_grad()
def score_of(model, ids: Tensor, mask: Tensor | None, policy: str) -> Tensor:
    """Column sums [1, H, N] of the attention weights that transformers' eager attention gives for the first layer."""
    eager = QWEN.model("eager")
    additive = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    cache = DynamicCache(config=eager.config)
    weights = eager(input_ids=ids, attention_mask=additive, past_key_values=cache, output_attentions=True).attentions[0]
    sums = weights.sum(2).view(1, 2, 2, -1).sum(2)
    visits = (weights > 0).sum(2).view(1, 2, 2, -1).sum(2)
    return sums / visits if policy == "mean_h2o" else sums
