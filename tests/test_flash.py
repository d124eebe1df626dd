"""The path of flash attention, whose mask is 2D or absent, with its variable-length kernel written out in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE, full_layers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import flash_attention_mask

from lookm import LookMCache

NAME = "flash_written_out"
BATCHES = {"padded": [(9, IMAGE, 12), (5, IMAGE, 4), (21,)], "unpadded": [(9, IMAGE, 12), (9, IMAGE, 12)]}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
masks: list = []


def flash(module, query, key, value, attention_mask, scaling=None, is_causal=None, **_) -> tuple[Tensor, None]:
    """Every row over its own tokens, packed without pads; causal, aligned to the last key."""
    masks.append(attention_mask)
    batch, heads, queries, _ = query.shape
    group, scale = heads // key.shape[1], query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.zeros_like(query)
    for row in range(batch):
        there = torch.ones(key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
        asking = there[-queries:]
        k, v = (x[row][:, there].repeat_interleave(group, 0) for x in (key, value))
        logits = query[row][:, asking] @ k.transpose(1, 2) * scale
        if is_causal if is_causal is not None else module.is_causal:
            seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(k.shape[1] - logits.shape[1])
            logits = logits.masked_fill(~seen, float("-inf"))
        out[row, :, asking] = logits.softmax(-1) @ v
    return out.transpose(1, 2), None


@pytest.fixture(autouse=True)
def registered():
    AttentionInterface.register(NAME, flash)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    masks.clear()
    yield
    for registry in (AttentionInterface, AttentionMaskInterface):
        del registry._global_mapping[NAME]


def model_with(attention: str, name: str):
    """The tower's attention stays sdpa: it has no mask of this kind."""
    model = FAMILIES[name].model()
    model.config.get_text_config()._attn_implementation = attention
    return model


@torch.no_grad()
def run(name: str, attention: str, batch: str, later_turns: str, budget: float = 0.3):
    """Logits of a prompt, two tokens, a ragged second turn and two tokens more; the cache."""
    family, model = FAMILIES[name], model_with(attention, name)
    cache = DynamicCache(config=model.config)
    try:
        if budget < 1:
            cache = LookMCache(model, budget=budget, later_turns=later_turns)
        inputs = family.inputs([family.prompt(layout, seed) for seed, layout in enumerate(BATCHES[batch])])
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = [model(**inputs, past_key_values=cache).logits]
        rows, mask = len(inputs["input_ids"]), inputs["attention_mask"]
        second = torch.ones(rows, 8, dtype=torch.long)
        second[0, :3] = 0 if batch == "padded" else 1
        for new in (torch.ones(rows, 1, dtype=torch.long),) * 2 + (second,) + (torch.ones(rows, 1, dtype=torch.long),):
            mask = torch.cat([mask, new], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            ids = torch.arange(3, 3 + new.numel()).view(new.shape)
            step = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            logits.append(step.logits.masked_fill((new == 0)[..., None], 0))
        logits[0] = logits[0].masked_fill((inputs["attention_mask"] == 0)[..., None], 0)
        return torch.cat(logits, 1), cache
    finally:
        model_with("sdpa", name)


@pytest.mark.parametrize("later_turns", ["dense", "segment"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["llava", "qwen3"])
def test_flash_gives_what_sdpa_gives(name: str, batch: str, later_turns: str):
    expected, reference = run(name, "sdpa", batch, later_turns)
    logits, cache = run(name, NAME, batch, later_turns)
    torch.testing.assert_close(logits, expected, **CLOSE)
    for layer in full_layers(FAMILIES[name].model()):
        assert torch.equal(cache.kept_positions(layer), reference.kept_positions(layer))
    assert all(mask is None or mask.ndim == 2 for mask in masks)
    # without padding flash gets no mask at all, also while the cache is compressed
    assert all(mask is None for mask in masks) == (batch == "unpadded")


def test_the_written_out_kernel_is_attention():
    """With transformers' own cache the stand-in agrees with sdpa: what differs above would be ours."""
    for batch in BATCHES:
        expected, _ = run("qwen3", "sdpa", batch, "dense", budget=1.0)
        logits, _ = run("qwen3", NAME, batch, "dense", budget=1.0)
        torch.testing.assert_close(logits, expected, **CLOSE)


def test_masks_are_as_long_as_what_is_stored():
    _, cache = run("llava", NAME, "padded", "dense")
    lengths = [mask.shape[1] for mask in masks if mask is not None]
    # 39 tokens; then the 11 of the longest row's budget, and what came after
    assert sorted(set(lengths)) == [12, 13, 21, 22, 39]
    assert cache.layers[0].keys.shape[2] == 22
