"""What torch.compile makes of decoding in a cache of fixed size: one graph, and what must not be in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE
from test_fixed_size import CLOSE, LLAVA, NEW, QWEN, generate, inputs_of, step
from torch._dynamo.utils import counters
from transformers.cache_utils import StaticSlidingWindowLayer

from lookm import LookMCache
from lookm.modality import cache_keyword


@pytest.fixture
def graphs() -> Iterator[Any]:
    """Counts graphs that torch.compile has made since the test began, and since the last call; a break is an error."""
    torch._dynamo.reset()
    counters.clear()
    known = 0

    def new() -> int:
        nonlocal known
        assert not counters["graph_break"]
        before, known = known, counters["stats"]["unique_graphs"]
        return known - before

    yield new
    torch._dynamo.reset()


@pytest.mark.parametrize("policy", ["lookm", "auto"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "qwen3_5", "qwen3"])
def test_decoding_is_one_graph(name: str, policy: str, graphs):
    """No second one for a step, a reset, another cache, or another prompt that fits in the same buffers."""
    family = FAMILIES[name]
    model, inputs, others = family.model(), inputs_of(family), inputs_of(family, seed=7)
    try:
        cache = LookMCache(model, 0.4, policy, max_new_tokens=NEW)
    except NotImplementedError as error:
        pytest.skip(str(error))
    expected = [generate(model, own, LookMCache(model, 0.4, policy)) for own in (inputs, others)]
    assert torch.equal(generate(model, inputs, cache, compiled=True), expected[0])
    assert graphs() == 1
    cache.reset()
    assert torch.equal(generate(model, others, cache, compiled=True), expected[1])
    another = LookMCache(model, 0.4, policy, max_new_tokens=NEW)
    assert torch.equal(generate(model, inputs, another, compiled=True), expected[0])
    another.reset()
    shorter = inputs_of(family, [(4, IMAGE, 12), (4, IMAGE, 5)])
    assert torch.equal(
        generate(model, shorter, another, compiled=True), generate(model, shorter, cache_like(another, model))
    )
    assert graphs() == 0


def cache_like(cache: LookMCache, model) -> LookMCache:
    """One that grows."""
    return LookMCache(model, 0.4, cache.layers[-1].settings.policy)


def test_a_token_budget_fits_prompts_of_any_length(graphs):
    """Buffers of one size for prompts of 26, 39 and 48 tokens."""
    model = LLAVA.model()
    for text in (5, 12, 27):
        inputs = inputs_of(LLAVA, [(9, IMAGE, text)])
        cache, growing = LookMCache(model, 20, max_new_tokens=NEW), LookMCache(model, 20)
        assert torch.equal(generate(model, inputs, cache, compiled=True), generate(model, inputs, growing))
    assert graphs() == 1


def test_a_sliding_window_is_fixed_too(graphs):
    """Gemma 3: two graphs, as transformers makes for its own sliding layers while their window fills and when it is."""
    family = FAMILIES["gemma3"]
    model, inputs = family.model(), inputs_of(family)
    cache = LookMCache(model, 0.4, max_new_tokens=NEW)
    assert cache.is_compileable
    assert any(isinstance(layer, StaticSlidingWindowLayer) for layer in cache.layers)
    expected = generate(model, inputs, LookMCache(model, 0.4))
    assert torch.equal(generate(model, inputs, cache, compiled=True), expected)
    assert graphs() <= 2
    cache.reset()
    assert torch.equal(generate(model, inputs, cache, compiled=True), expected)
    assert graphs() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", ["lookm", "auto"])
def test_decoding_in_a_captured_graph(policy: str, graphs):
    """As generate compiles by default on a GPU: mode reduce-overhead, which captures; again for another prompt."""
    model = LLAVA.model()
    try:
        model.to("cuda")
        cache = LookMCache(model, 0.4, policy, max_new_tokens=NEW)
        for seed in (0, 7):
            inputs = {name: x.cuda() for name, x in inputs_of(LLAVA, seed=seed).items()}
            options = {"max_new_tokens": NEW, "do_sample": False}
            found = model.generate(**inputs, **{cache_keyword(model): cache}, **options)
            assert torch.equal(found, generate(model, inputs, LookMCache(model, 0.4, policy)))
            cache.reset()
        assert graphs() == 1
        assert not counters["inductor"]["cudagraph_skips"]
    finally:
        model.to("cpu")


def test_hidden_tokens_in_a_compiled_model(graphs):
    """A mask that hides something leaves the graph rather than be forgotten by it."""
    model = QWEN.model()
    mask = torch.ones(1, 33, dtype=torch.long)
    mask[0, 31] = 0
    logits = []
    for compiled in (False, True):
        cache = LookMCache(model, 10, max_new_tokens=20, later_turns="dense")
        step(model, cache, torch.arange(30)[None] + 3)
        step(model, cache, torch.tensor([[5, 6]]))
        call = torch.compile(model, backend="eager") if compiled else model
        with torch.no_grad():
            logits.append(
                call(input_ids=torch.tensor([[8]]), attention_mask=mask, **{cache_keyword(model): cache}).logits
            )
            logits.append(call(input_ids=torch.tensor([[9]]), **{cache_keyword(model): cache}).logits)
        assert cache.get_seq_length() == 34
    for eager, traced in zip(logits[:2], logits[2:], strict=True):
        torch.testing.assert_close(traced, eager, **CLOSE)


def test_another_conversation_is_refused_after_compiled_steps():
    """The ids that graphs have read are known too."""
    model, inputs = QWEN.model(), inputs_of(QWEN, [(30,)])
    cache = LookMCache(model, 0.4, max_new_tokens=40)
    sequences = generate(model, inputs, cache, compiled=True)
    ids = torch.cat([sequences, sequences[:, :2]], 1)
    ids[0, 33] = 3 + (ids[0, 33] - 2) % 90
    with pytest.raises(ValueError, match="row 0, column 33"):
        generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache)
