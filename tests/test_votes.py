"""Votes in a cache: merged pairs draw the attention of all the tokens they stand for.

The truth is the full cache where the pairs repeat, and elsewhere the model's own eager attention over a DynamicCache
that holds the compressed pairs, with the logarithm of the votes in its additive mask.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lookm
from lookm import Attention, LookMCache, Pairs, Policy

LLAVA = FAMILIES["llava"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
VOTES = {"policy": "text_prior_avg_merge", "votes": True, "recent_share": 0.1}


@dataclass(frozen=True)
class FirstOfEach(Policy):
    """Keep the first tokens of the prompt."""

    rule: str = "average"
    recent_share: float = 0.0
    looks: ClassVar[bool] = False

    def score(self, attention: Attention) -> Tensor:
        tokens = attention.prompt.image.shape[1]
        falling = torch.arange(tokens, 0, -1, dtype=torch.float32)
        return falling.expand(*attention.key.shape[:2], -1).contiguous()


def llama(attention: str, heads: int = 4, kv_heads: int = 2, layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def repeated(model: LlamaForCausalLM, cache: DynamicCache, repeats: int, distinct: int = 7) -> Tensor:
    """Logits of two later turns after a prompt of `distinct` tokens, each `repeats` times with equal keys and values.

    Equal in every layer: all stand at position 0, and all see all.
    """
    torch.manual_seed(1)
    words = torch.randperm(64)[:distinct].repeat(repeats)[None]
    everything = torch.zeros(1, 1, words.shape[1], words.shape[1])
    model(words, attention_mask=everything, position_ids=torch.zeros_like(words), past_key_values=cache)
    logits = []
    for turn in (torch.tensor([[5]]), torch.tensor([[9, 3, 11, 2]])):
        logits.append(model(turn, position_ids=torch.zeros_like(turn), past_key_values=cache).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_repeated_pairs_with_votes_are_the_full_cache(attention: str, kv_heads: int):
    model, repeats = llama(attention, kv_heads=kv_heads), 5
    full = repeated(model, DynamicCache(config=model.config), repeats)
    cache = LookMCache(model, 7, FirstOfEach(votes=True), later_turns="dense")
    torch.testing.assert_close(repeated(model, cache, repeats), full, **CLOSE)
    assert all((layer.votes == repeats).all() and layer.votes.shape[2] == 7 for layer in cache.layers)
    quiet = repeated(model, LookMCache(model, 7, FirstOfEach(), later_turns="dense"), repeats)
    assert (quiet - full).abs().max() > 1e-2


@torch.no_grad()
def truth(model, cache: LookMCache, inputs: dict, padding: Tensor | None = None) -> Tensor:
    """What the model's eager attention makes of the pairs in the cache, log votes in the mask; sees no layer of ours.

    padding [B, stored]: places that are none. All layers must hold as many places.
    """
    plain = DynamicCache(config=model.config.get_text_config())
    biases = []
    for index, layer in enumerate(cache.layers):
        plain.update(layer.keys.clone(), layer.values.clone(), index)
        bias = torch.zeros(*layer.keys.shape[:3])
        if layer.votes is not None:
            bias[:, :, : layer.votes.shape[2]] = layer.votes.log()
        if padding is not None:
            bias = bias.masked_fill(padding[:, None], float("-inf"))
        biases.append(bias.repeat_interleave(model.config.get_text_config().num_attention_heads // bias.shape[1], 1))
    queries = inputs["input_ids"].shape[1]
    future = torch.full((queries, queries), float("-inf")).triu(1)
    masks = [
        torch.cat([b[:, :, None].expand(-1, -1, queries, -1), future.expand(*b.shape[:2], -1, -1)], -1) for b in biases
    ]
    attentions = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "k_proj")]
    attentions = [m for m in attentions if getattr(m, "layer_idx", None) is not None][-len(masks) :]
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
        )
        for module, mask in zip(attentions, masks, strict=True)
    ]
    try:
        return model(**inputs, past_key_values=plain).logits
    finally:
        for hook in hooks:
            hook.remove()


def later(length: int, seen: int, rows: int = 1, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (rows, length), generator=generator)
    return {"input_ids": ids, "position_ids": torch.arange(seen, seen + length).expand(rows, -1)}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [1, 5])
def test_later_tokens_attend_with_the_votes_of_every_head(attention: str, length: int):
    model, eager = LLAVA.model(attention), LLAVA.model("eager")
    prompt = LLAVA.inputs([LLAVA.prompt((9, IMAGE, 12), 0)])
    cache = LookMCache(model, 0.3, later_turns="dense", **VOTES)
    model(**prompt, past_key_values=cache)
    seen = prompt["input_ids"].shape[1]
    for layer in cache.layers:
        assert layer.votes.shape == layer.keys.shape[:3]
        assert (layer.votes >= 1).all()
        assert (layer.votes.sum(-1) == seen).all(), "every token is in the votes of one pair"
    for turn in range(2):
        inputs = later(length, seen + turn * length)
        expected = truth(eager, cache, inputs)
        torch.testing.assert_close(model(**inputs, past_key_values=cache).logits, expected, **CLOSE)
        silent = copy.deepcopy(cache)
        for layer in silent.layers:
            layer.crop(-length)
            layer.votes = layer.key_bias = None
        assert (model(**inputs, past_key_values=silent).logits - expected).abs().max() > 1e-3


@torch.no_grad()
def test_a_padded_row_is_as_alone():
    prompts = [LLAVA.prompt((9, IMAGE, 12), 0), LLAVA.prompt((5, IMAGE, 4), 1)]
    batch, model = LLAVA.inputs(prompts), LLAVA.model()
    mask = batch["attention_mask"]
    cache = LookMCache(model, 0.3, later_turns="dense", **VOTES)
    model(**batch, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    turn = later(4, 0, rows=2)["input_ids"]
    whole = torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], 1)
    positions = (whole.cumsum(1) - 1)[:, -4:]
    together = model(turn, attention_mask=whole, position_ids=positions, past_key_values=cache).logits
    for row, prompt in enumerate(prompts):
        alone = LookMCache(model, 0.3, later_turns="dense", **VOTES)
        model(**LLAVA.inputs([prompt]), past_key_values=alone)
        logits = model(turn[row : row + 1], position_ids=positions[row : row + 1], past_key_values=alone).logits
        torch.testing.assert_close(together[row : row + 1], logits, **CLOSE)
        for ours, theirs in zip(cache.layers, alone.layers, strict=True):
            kept = theirs.votes.shape[2]
            assert torch.equal(ours.votes[row : row + 1, :, ours.votes.shape[2] - kept :], theirs.votes)
            assert (ours.votes[row, :, : ours.votes.shape[2] - kept] == 0).all()


@torch.no_grad()
def test_segments_add_their_votes_and_are_scored_under_those_before():
    model, eager = LLAVA.model(), LLAVA.model("eager")
    cache = LookMCache(model, 0.3, later_turns="segment", **VOTES)
    model(**LLAVA.inputs([LLAVA.prompt((9, IMAGE, 12), 0)]), past_key_values=cache)
    before = [(layer.votes, layer.keys) for layer in cache.layers]
    turn = LLAVA.inputs([LLAVA.prompt((4, IMAGE, 3), 5)])
    seen, length = cache.get_seq_length(), turn["input_ids"].shape[1]
    inputs = {name: turn[name] for name in ("input_ids", "pixel_values")}
    inputs["position_ids"] = torch.arange(seen, seen + length)[None]
    expected = truth(eager, cache, inputs)
    torch.testing.assert_close(model(**inputs, past_key_values=cache).logits, expected, **CLOSE)
    for layer, (votes, keys) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, : keys.shape[2]], keys)
        assert torch.equal(layer.votes[:, :, : votes.shape[2]], votes)
        assert (layer.votes.sum(-1) == seen + length).all()
    inputs = later(3, seen + length)
    inputs["input_ids"] = inputs["input_ids"][:, :1]
    inputs["position_ids"] = inputs["position_ids"][:, :1]
    expected = truth(eager, cache, inputs)
    torch.testing.assert_close(model(**inputs, past_key_values=cache).logits, expected, **CLOSE)


@torch.no_grad()
def test_rows_crops_copies_and_resets_carry_the_votes():
    model, prompts = LLAVA.model(), [LLAVA.prompt((9, IMAGE, 12), row) for row in range(2)]
    cache = LookMCache(model, 0.3, later_turns="dense", **VOTES)
    model(**LLAVA.inputs(prompts), past_key_values=cache)
    votes = cache.layers[0].votes.clone()
    assert not torch.equal(votes[0], votes[1])
    copied = copy.deepcopy(cache)
    copied.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(copied.layers[0].votes, votes.flip(0))
    assert torch.equal(copied.layers[0].key_bias, votes.flip(0).log())
    copied.batch_repeat_interleave(2)
    assert torch.equal(copied.layers[0].votes, votes.flip(0).repeat_interleave(2, 0))
    copied.batch_select_indices(torch.tensor([3]))
    assert torch.equal(copied.layers[0].votes, votes[:1])
    first = model(**later(3, 60, rows=2), past_key_values=cache).logits
    cache.crop(-3)
    assert torch.equal(cache.layers[0].votes, votes)
    assert torch.equal(model(**later(3, 60, rows=2), past_key_values=cache).logits, first)
    report = cache.report().layers[0]
    assert report.merged == votes.sum().item() / votes.shape[1] - votes.shape[0] * votes.shape[2]
    assert report.bytes == sum(x.nbytes for x in (cache.layers[0].keys, cache.layers[0].values)) + 2 * votes.nbytes
    cache.reset()
    assert cache.layers[0].votes is None
    assert cache.layers[0].key_bias is None


@torch.no_grad()
def test_a_budget_in_bytes_holds_the_votes():
    model, prompt = LLAVA.model(), LLAVA.inputs([LLAVA.prompt((9, IMAGE, 12), 0)])
    cache = LookMCache(model, "12KiB", **VOTES)
    model(**prompt, past_key_values=cache)
    held = cache.report().bytes
    assert held <= 12 * 1024
    column = held // cache.layers[0].stored
    assert held + column > 12 * 1024


@torch.no_grad()
@pytest.mark.parametrize("budget", [1.0, 10_000])
def test_what_fits_is_bit_for_bit_the_dynamic_cache(budget: float):
    model, prompt = LLAVA.model(), LLAVA.inputs([LLAVA.prompt((9, IMAGE, 12), 0)])
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    generated = [
        model.generate(**prompt, past_key_values=cache, **options)
        for cache in (LookMCache(model, budget, **VOTES), DynamicCache(config=model.config.get_text_config()))
    ]
    assert torch.equal(generated[0].sequences, generated[1].sequences)
    assert all(map(torch.equal, generated[0].logits, generated[1].logits))


@torch.no_grad()
def test_beams_follow_the_votes():
    model, prompt = LLAVA.model(), LLAVA.inputs([LLAVA.prompt((9, IMAGE, 12), 0)])
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    sequences = []
    for _ in range(2):
        cache = LookMCache(model, 0.3, **VOTES)
        sequences.append(model.generate(**prompt, past_key_values=cache, **options))
    assert torch.equal(*sequences)
    assert (cache.layers[0].votes.sum(-1) == prompt["input_ids"].shape[1]).all()


def test_gradients_flow_through_later_tokens():
    model, prompt = LLAVA.model(), LLAVA.inputs([LLAVA.prompt((9, IMAGE, 12), 0)])
    cache = LookMCache(model, 0.3, later_turns="dense", **VOTES)
    with torch.no_grad():
        model(**prompt, past_key_values=cache)
    logits = model(**later(3, 60), past_key_values=cache).logits
    weight = model.get_output_embeddings().weight
    projection = next(
        p for n, p in model.named_parameters() if n.endswith("language_model.layers.0.self_attn.q_proj.weight")
    )
    grads = torch.autograd.grad(logits.square().sum(), [weight, projection])
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


@dataclass(frozen=True)
class Falling(Policy):
    """Twice as many tokens in the first layer as the rest would have."""

    rule: str = "average"

    def take(self, pairs: Pairs, left: Sequence[int], layers: int) -> Sequence[int]:
        return [2 * own // layers for own in left]


@torch.no_grad()
@pytest.mark.parametrize("votes", [False, True])
def test_layers_of_their_own_sizes_sum_to_the_budget_and_attend_to_what_they_hold(votes: bool):
    model = llama("sdpa")
    ids = torch.randint(0, 64, (1, 60), generator=torch.Generator().manual_seed(0))
    cache = LookMCache(model, 0.25, Falling(votes=votes), later_turns="dense")
    model(ids, past_key_values=cache)
    sizes = [layer.stored for layer in cache.layers]
    assert sum(sizes) == 3 * 15
    assert len(set(sizes)) > 1
    turn = torch.tensor([[7, 8, 9]])
    logits = model(turn, position_ids=torch.arange(60, 63)[None], past_key_values=copy.deepcopy(cache)).logits
    # one token at a time: sdpa needs no mask then, so a plain cache may hold layers of any size
    if not votes:
        plain = DynamicCache(config=model.config)
        for index, layer in enumerate(cache.layers):
            plain.update(layer.keys.clone(), layer.values.clone(), index)
        steps = [
            model(turn[:, i : i + 1], position_ids=torch.tensor([[60 + i]]), past_key_values=plain).logits
            for i in range(3)
        ]
        torch.testing.assert_close(logits, torch.cat(steps, 1), **CLOSE)


@torch.no_grad()
def test_layers_of_their_own_sizes_in_a_padded_batch():
    model = llama("sdpa")
    rows = [torch.randint(0, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in (60, 41)]
    ids, mask = torch.zeros(2, 60, dtype=torch.long), torch.zeros(2, 60, dtype=torch.long)
    for row, own in enumerate(rows):
        ids[row, 60 - len(own) :], mask[row, 60 - len(own) :] = own, 1
    cache = LookMCache(model, 0.25, Falling(votes=True), later_turns="dense")
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    turn, whole = torch.tensor([[7, 8, 9]] * 2), torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    positions = (whole.cumsum(1) - 1)[:, -3:]
    together = model(turn, attention_mask=whole, position_ids=positions, past_key_values=cache).logits
    for row, own in enumerate(rows):
        alone = LookMCache(model, 0.25, Falling(votes=True), later_turns="dense")
        model(own[None], past_key_values=alone)
        logits = model(turn[:1], position_ids=positions[row : row + 1], past_key_values=alone).logits
        torch.testing.assert_close(together[row : row + 1], logits, **CLOSE)


@torch.no_grad()
def test_a_prompt_hidden_later_is_refused_or_obeyed_head_by_head():
    model, prompt = llama("sdpa"), torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 43, dtype=torch.long)
    mask[:, 3:9] = 0
    turn = {"input_ids": torch.tensor([[7, 8, 9]]), "position_ids": torch.arange(40, 43)[None], "attention_mask": mask}
    merged = LookMCache(model, 0.5, FirstOfEach(votes=True), later_turns="dense")
    model(prompt, past_key_values=merged)
    with pytest.raises(ValueError, match="hides tokens of the compressed prompt"):
        model(**turn, past_key_values=merged)
    plain = LookMCache(model, 0.5, FirstOfEach(rule="none", votes=True), later_turns="dense")
    model(prompt, past_key_values=plain)
    hidden = (plain.layers[0].kept_positions() >= 3) & (plain.layers[0].kept_positions() < 9)
    expected = truth(llama("eager"), plain, {k: v for k, v in turn.items() if k != "attention_mask"}, hidden[:, 0])
    torch.testing.assert_close(model(**turn, past_key_values=plain).logits, expected, **CLOSE)


@torch.no_grad()
def test_a_profile_made_once_gives_layers_their_shares():
    model = llama("sdpa")
    ids = torch.randint(0, 64, (1, 60), generator=torch.Generator().manual_seed(0))
    profile = lookm.layer_profile(model, {"input_ids": ids})
    assert len(profile) == 3
    assert sum(profile) == pytest.approx(1)
    cache = LookMCache(model, 0.25, "prefixkv", profile=(3.0, 2.0, 1.0))
    model(ids, past_key_values=cache)
    assert [layer.stored for layer in cache.layers] == [22, 15, 8]
    with pytest.raises(ValueError, match="`profile` must be of 3 layers, got 2"):
        model(ids, past_key_values=LookMCache(model, 0.25, "prefixkv", profile=(3.0, 2.0)))
    with pytest.raises(ValueError, match="`cover` must be a share"):
        lookm.layer_profile(model, {"input_ids": ids}, cover=1.5)
