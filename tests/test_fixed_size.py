"""Caches of a fixed size against caches that grow and DynamicCache, decoding as it is and compiled."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE, TALL, Family, said
from test_flash import NAME, model_with, registered  # noqa: F401
from transformers import CompileConfig, DynamicCache

import lookm
from lookm import LookMCache
from lookm.masks import is_step_mask
from lookm.modality import cache_keyword
from lookm.observe import AttentionMaskInterface

LLAVA, QWEN = FAMILIES["llava"], FAMILIES["qwen3"]
LAYOUTS = [(6, IMAGE, 9, TALL, 12), (4, IMAGE, 5)]
NEW = 9
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def generate(model, inputs: dict[str, Tensor], cache: Any, compiled: bool = False, **options: Any) -> Tensor:
    """Greedy tokens; compiled: as generate does on a GPU, with a backend that runs the graph as it is."""
    if compiled:
        config = CompileConfig(backend="eager", mode="default", fullgraph=True)
        config._compile_all_devices = True
        options["compile_config"] = config
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, **{cache_keyword(model): cache}, **options)


def inputs_of(family: Family, layouts=LAYOUTS, seed: int = 0) -> dict[str, Tensor]:
    return family.inputs([family.prompt(layout, seed + row) for row, layout in enumerate(layouts)])


def same_numbers(left: LookMCache, right: LookMCache) -> None:
    """Both hold the same pairs of the same tokens."""
    assert left.get_seq_length() == right.get_seq_length()
    for one, other in zip(left.layers, right.layers, strict=True):
        if hasattr(one, "kept_positions"):
            assert torch.equal(one.kept_positions(), other.kept_positions())
            torch.testing.assert_close(one.keys, other.keys, **CLOSE)
            torch.testing.assert_close(one.values, other.values, **CLOSE)
            assert (one.votes is None) == (other.votes is None)


@pytest.mark.parametrize("policy", ["lookm", "auto", "madakv"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generates_what_a_growing_cache_does(name: str, policy: str):
    """A batch with left padding; budgets of their own for each layer in madakv."""
    family = FAMILIES[name]
    try:
        caches = [LookMCache(family.model(), 0.4, policy, **fixed) for fixed in ({}, {"max_new_tokens": NEW})]
    except NotImplementedError as error:
        pytest.skip(str(error))
    growing, fixed = (generate(family.model(), inputs_of(family), cache) for cache in caches)
    assert torch.equal(growing, fixed)
    same_numbers(*caches)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_whole_budget_is_dynamic_cache(attention: str):
    """Logits of a prompt and of the steps after it; nothing is evicted."""
    model, inputs = LLAVA.model(attention), inputs_of(LLAVA)
    options = {"return_dict_in_generate": True, "output_logits": True}
    whole = generate(model, inputs, DynamicCache(), **options)
    fixed = generate(model, inputs, LookMCache(model, 1.0, max_new_tokens=NEW), **options)
    assert torch.equal(whole.sequences, fixed.sequences)
    for expected, logits in zip(whole.logits, fixed.logits, strict=True):
        torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples(how: dict[str, Any], compiled: bool):
    model, inputs = LLAVA.model(), inputs_of(LLAVA)
    results = []
    for fixed in ({}, {"max_new_tokens": NEW}):
        torch.manual_seed(0)
        results.append(generate(model, inputs, LookMCache(model, 0.4, **fixed), compiled and bool(fixed), **how))
    assert torch.equal(*results)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("later_turns", ["dense", "segment"])
@pytest.mark.parametrize("policy", ["lookm", "auto"])
def test_later_turns(policy: str, later_turns: str, compiled: bool):
    """A second question with a picture and a third of text, in rows of several lengths."""
    family = FAMILIES["qwen2_5_vl"]
    model, first = family.model(), [family.prompt(layout, row) for row, layout in enumerate(LAYOUTS)]
    options = {"policy": policy, "later_turns": later_turns}
    growing, fixed = LookMCache(model, 0.4, **options), LookMCache(model, 0.4, max_new_tokens=80, **options)
    seen = first
    expected = found = inputs = None
    for turn, layouts in enumerate([None, [(4, IMAGE, 3), (4, IMAGE, 3)], [(7,), (7,)]]):
        if layouts is None:
            inputs = family.inputs(seen)
        else:
            seen = [*map(sum_of, zip(seen, said(expected[:, inputs["input_ids"].shape[1] :]), strict=True))]
            new = [family.prompt(layout, 10 * turn + row) for row, layout in enumerate(layouts)]
            inputs = continued(family, model, expected, seen, new)
            seen = [before + own for before, own in zip(seen, new, strict=True)]
        expected, found = generate(model, inputs, growing), generate(model, inputs, fixed, compiled)
        assert torch.equal(expected, found)
    same_numbers(growing, fixed)


def sum_of(parts: tuple[Any, Any]) -> Any:
    return parts[0] + parts[1]


def continued(family: Family, model, sequences: Tensor, seen: list, new: list) -> dict[str, Tensor]:
    """The whole conversation as generate wants it: what it returned, and a new turn of one length."""
    own = family.inputs(new)
    ids = torch.cat([sequences, own["input_ids"]], 1)
    padding = sequences.shape[1] - torch.tensor([len(prompt) for prompt in seen])
    mask = (torch.arange(ids.shape[1]) >= padding[:, None]).long()
    inputs = own | {"input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(types, (ids.shape[1] - types.shape[1], 0))
    whole = family.inputs([before + after for before, after in zip(seen, new, strict=True)])
    return inputs | {"position_ids": family.positions(model, whole)}


@torch.no_grad()
def step(model, cache: LookMCache, tokens: Tensor, **options: Any) -> Tensor:
    return model(input_ids=tokens, **{cache_keyword(model): cache}, **options).logits


def filled(when_full: str = "raise", slots: int = 2) -> tuple[Any, LookMCache]:
    """A text model and a cache that has read a prompt of 30 tokens."""
    model = QWEN.model()
    cache = LookMCache(model, 10, max_new_tokens=slots, when_full=when_full)
    step(model, cache, torch.arange(30)[None] + 3)
    return model, cache


def test_more_tokens_than_slots_change_nothing():
    model, cache = filled()
    step(model, cache, torch.tensor([[5]]))
    before = copy.deepcopy(cache)
    for tokens in ([[6, 7]], [[6, 7, 8]]):
        with pytest.raises(
            ValueError, match=r"1 of the cache's 2 slots .* are left, and \d more came; nothing was changed"
        ):
            step(model, cache, torch.tensor(tokens))
        cache.forward_state.complete, cache.forward_state.model = True, None
        same_numbers(before, cache)
    step(model, cache, torch.tensor([[6]]))
    with pytest.raises(ValueError, match="0 of the cache's 2 slots"):
        step(model, cache, torch.tensor([[7]]))


@pytest.mark.parametrize("compiled", [False, True])
def test_generate_with_too_few_slots(compiled: bool):
    model, inputs = LLAVA.model(), inputs_of(LLAVA)
    with pytest.raises(ValueError, match="0 of the cache's 4 slots"):
        generate(model, inputs, LookMCache(model, 0.4, max_new_tokens=4), compiled)


@pytest.mark.parametrize("policy", ["lookm", "auto"])
@pytest.mark.parametrize("compiled", [False, True])
def test_slots_double_where_asked_for(policy: str, compiled: bool):
    model, inputs = LLAVA.model(), inputs_of(LLAVA)
    growing, fixed = (
        LookMCache(model, 0.4, policy),
        LookMCache(model, 0.4, policy, max_new_tokens=2, when_full="double"),
    )
    assert torch.equal(generate(model, inputs, growing), generate(model, inputs, fixed, compiled))
    same_numbers(growing, fixed)
    assert fixed.layers[0].store.slots == 8


class NothingLarge(TorchDispatchMode):
    """No op makes a tensor of more bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.ops = limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **kwargs or {})
        self.ops += 1
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                assert x.nbytes <= self.limit, f"{func} made {list(x.shape)}"
        return result


def test_a_step_copies_nothing_and_makes_no_mask():
    """Buffers stay where they are; nothing as large as a quarter of a layer's keys is made, and no mask has columns."""
    model = QWEN.model()
    cache = LookMCache(model, 900, max_new_tokens=40)
    step(model, cache, (torch.arange(1000) % 90 + 3)[None])
    layer = cache.layers[0]
    places, masks = [buffer.data_ptr() for buffer in layer.store.buffers], []
    made = AttentionMaskInterface._global_mapping["sdpa"]

    def watched(*args: Any, **kwargs: Any) -> Any:
        masks.append(made(*args, **kwargs))
        return masks[-1]

    vocabulary = model.lm_head.weight.nbytes
    limit = max(layer.keys.nbytes // 4, vocabulary)
    assert limit < layer.keys.nbytes
    with patch.dict(AttentionMaskInterface._global_mapping, sdpa=watched), NothingLarge(limit) as mode:
        for token in range(3):
            step(
                model, cache, torch.tensor([[token + 3]]), attention_mask=torch.ones(1, 1001 + token, dtype=torch.long)
            )
    assert mode.ops > 100
    assert len(masks) == 3
    assert all(is_step_mask(mask) for mask in masks)
    assert places == [buffer.data_ptr() for buffer in layer.store.buffers]
    assert layer.stored == 903


def test_growing_copies():
    """The test above can fail."""
    model = QWEN.model()
    cache = LookMCache(model, 900)
    step(model, cache, (torch.arange(1000) % 90 + 3)[None])
    with pytest.raises(AssertionError, match="made"), NothingLarge(cache.layers[0].keys.nbytes // 2):
        step(model, cache, torch.tensor([[3]]))


@pytest.mark.parametrize("policy", ["lookm", "text_prior_h2o", "auto"])
def test_masks_of_the_user(policy: str):
    """A later token hidden by a 2D mask, as in a cache that grows; and a mask in 4D over what is stored."""
    logits = []
    for fixed in ({}, {"max_new_tokens": 20}):
        model, cache = QWEN.model(), LookMCache(QWEN.model(), 10, policy, later_turns="dense", **fixed)
        step(model, cache, torch.arange(30)[None] + 3)
        step(model, cache, torch.tensor([[5, 6, 7]]))
        mask = torch.ones(1, 34, dtype=torch.long)
        mask[0, 31] = 0
        logits.append([step(model, cache, torch.tensor([[8]]), attention_mask=mask)])
        own = torch.ones(1, 1, 2, cache.layers[0].stored + 2, dtype=torch.bool).tril(cache.layers[0].stored)
        if policy != "auto":
            own[..., 2] = False
        logits[-1].append(step(model, cache, torch.tensor([[9, 10]]), attention_mask=own))
        logits[-1].append(step(model, cache, torch.tensor([[11]])))
    for growing, fixed in zip(*logits, strict=True):
        torch.testing.assert_close(fixed, growing, **CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen3"])
def test_flash_attention_reads_no_free_slot(name: str):
    """Our own attention runs, whatever the implementation is called."""
    model = model_with(NAME, name)
    try:
        results = [
            generate(model, inputs_of(FAMILIES[name]), LookMCache(model, 0.4, **fixed))
            for fixed in ({}, {"max_new_tokens": NEW})
        ]
    finally:
        model_with("sdpa", name)
    assert torch.equal(*results)


def test_crop_and_go_on():
    model = QWEN.model()
    logits = []
    for fixed in ({}, {"max_new_tokens": 6}):
        cache = LookMCache(model, 10, later_turns="dense", **fixed)
        step(model, cache, torch.arange(30)[None] + 3)
        step(model, cache, torch.tensor([[5, 6, 7, 8, 9]]))
        cache.crop(-3)
        logits.append(step(model, cache, torch.tensor([[20, 21, 22]])))
        assert cache.get_seq_length() == 35
    torch.testing.assert_close(*logits, **CLOSE)


@pytest.mark.parametrize("compiled", [False, True])
def test_copies_go_their_own_way(compiled: bool):
    """A copy shares no buffer and no count with its original."""
    model, inputs = LLAVA.model(), inputs_of(LLAVA)
    cache = LookMCache(model, 0.4, "auto", max_new_tokens=40)
    sequences = generate(model, inputs, cache, compiled, max_new_tokens=4)
    twin = copy.deepcopy(cache)
    inputs = inputs | {"input_ids": torch.cat([sequences, sequences[:, -3:]], 1)}
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1)
    inputs.pop("pixel_values")
    first = generate(model, inputs, cache, compiled)
    assert torch.equal(first, generate(model, inputs, twin, compiled))
    same_numbers(cache, twin)


def test_enabled_models():
    model, inputs = LLAVA.model(), inputs_of(LLAVA)
    expected = generate(model, inputs, LookMCache(model, 0.4))
    lookm.enable(model, 0.4, max_new_tokens=NEW)
    try:
        found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    finally:
        lookm.disable(model)
    assert torch.equal(expected, found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a number of tokens, 1 or more, got 0"),
        ({"max_new_tokens": 2.5}, "`max_new_tokens` must be a number of tokens, 1 or more, got 2.5"),
        ({"when_full": "grow"}, r"`when_full` must be one of \('raise', 'double'\), got 'grow'"),
        ({"when_full": "double"}, "`when_full` is for a cache of fixed size: give `max_new_tokens` too"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        LookMCache(QWEN.model(), 0.2, **arguments)
