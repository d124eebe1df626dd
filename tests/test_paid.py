"""Scores describe the attention that was paid: against the weights that transformers' eager attention returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE
from transformers import PreTrainedModel
from unusual import paid, prompt, read, scored

from lookm import LookMCache

QWEN = FAMILIES["qwen3"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
TOKENS = 24
LOW = torch.finfo(torch.float32).min


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Flex attention runs as it is written: on a processor, its compiled form needs a compiler that may be missing."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def assert_paid(model: PreTrainedModel, given: dict[str, Tensor], eager: PreTrainedModel | None = None) -> None:
    expected = paid(eager or model, given)
    found = scored(model, given)
    assert found
    for layer, scores in found.items():
        torch.testing.assert_close(scores, expected[layer], **CLOSE)


def text() -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_causal_mask_beside_a_module_that_is_not_causal():
    """PaliGemma without token types: its attention says is_causal=False, the mask it gets in eager is causal."""
    model, given = prompt("paligemma", "eager")
    assert model.model.language_model.layers[0].self_attn.is_causal is False
    assert_paid(model, given)


def test_no_mask_and_a_module_that_is_not_causal():
    """Under sdpa transformers leaves that mask out, and the module's word counts: every query sees every key."""
    model, given = prompt("paligemma", "sdpa")
    for scores in scored(model, given).values():
        assert (scores[:, :, -1] > 1).all()  # in causal attention only one query sees the last key


def test_blocks_of_an_image_that_see_each_other():
    for name in ("gemma3", "paligemma"):
        model, given = prompt(name, "eager")
        if name == "paligemma":
            given["token_type_ids"] = (given["input_ids"] != 120).long()
        assert_paid(model, given)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_flex_attention(name: str, uncompiled: None):
    """Gemma 3's BlockMask is read through its mask_mod, Llava's plain one need not be read."""
    family = FAMILIES[name]
    given = family.inputs([family.prompt((6, IMAGE, 9, IMAGE, 7)), family.prompt((5, IMAGE, 4), 1)])
    assert_paid(family.model("flex_attention"), given, family.model("eager"))


def test_flex_attention_of_a_prefix(uncompiled: None):
    model, given = prompt("paligemma", "flex_attention")
    given["token_type_ids"] = (given["input_ids"] != 120).long()
    assert_paid(model, given, prompt("paligemma", "eager")[0])


@contextmanager
def masks(model: PreTrainedModel, change: Callable[[Any], Any]) -> Iterator[None]:
    """Every attention of the model gets change(its mask)."""
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"attention_mask": change(kwargs["attention_mask"])}),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("attention", ["flex_attention", "eager"])
def test_no_mask_at_all_hides_nothing(attention: str, uncompiled: None):
    """These two do nothing about causality by themselves."""
    model, eager, given = QWEN.model(attention), QWEN.model("eager"), text()
    with masks(model, lambda mask: None):
        found = scored(model, given)
    with masks(eager, lambda mask: None):
        expected = paid(eager, given)
    assert all(sum(layer[0, :, -1]) > 0 for layer in expected)
    for layer, scores in found.items():
        torch.testing.assert_close(scores, expected[layer], **CLOSE)


def causal() -> Tensor:
    return torch.zeros(1, 1, TOKENS, TOKENS).masked_fill_(torch.ones(TOKENS, TOKENS).triu(1).bool(), LOW)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_finite_bias_in_a_mask_is_refused(attention: str):
    model, given = QWEN.model(attention), text()
    mask = causal()
    mask[..., 5:15] += 4.0
    with pytest.raises(NotImplementedError, match="adds a bias to its logits"):
        read(model, given | {"attention_mask": mask.clamp(min=LOW)}, LookMCache(model, 0.5))


@pytest.mark.parametrize("low", [LOW, float("-inf"), -1e9, -1e4])
def test_an_additive_mask_of_ones_own(low: float):
    model, given = QWEN.model("eager"), text()
    hidden = torch.rand(1, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) > 0.6
    hidden &= ~torch.eye(TOKENS, dtype=torch.bool)
    hidden[..., -1, :] = False  # the last query sees every token that is not padding
    mask = causal().masked_fill(hidden, LOW)
    assert_paid(model, given | {"attention_mask": mask.masked_fill(mask == LOW, low)})


def test_a_mask_that_was_changed_after_the_overlay_made_it_is_read():
    """Plain is only the very object that the overlay returned."""
    model = QWEN.model("eager")
    with masks(model, windowed):
        assert_paid(model, text())


def windowed(mask: Tensor, window: int = 5) -> Tensor:
    queries, keys = mask.shape[-2:]
    far = torch.arange(keys) <= torch.arange(queries)[:, None] - window
    return mask.masked_fill(far, LOW)


def test_a_bias_that_a_model_folds_into_its_mask_is_refused():
    model, given = prompt("doge")
    with pytest.raises(NotImplementedError, match="adds a bias to its logits"):
        read(model, given, LookMCache(model, 0.5))


def test_a_model_whose_module_is_not_causal_among_causal_language_models():
    model, given = prompt("bigbird_pegasus", "eager")
    assert_paid(model, given)


def test_a_window_that_only_the_kernel_knows_is_refused():
    layer = LookMCache(QWEN.model(), 0.5).layers[0]
    layer.forward.begin(0, TOKENS, None)
    layer.forward.mask(0, TOKENS, None)
    rows = torch.randn(1, 2, TOKENS, 16)
    key, value = layer.update(rows, rows.clone())
    query = torch.randn(1, 4, TOKENS, 16)
    with pytest.raises(NotImplementedError, match=r"flash_attention_2 attention in a window of 8 tokens"):
        layer.attend(lambda *_, **__: None, "flash_attention_2", None, query, key, value, None, sliding_window=8)
