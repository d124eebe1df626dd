"""enable and disable: generate on a LookMCache without a word in the call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from families import FAMILIES, IMAGE
from transformers import DynamicCache, PreTrainedModel

import lookm
from lookm import LookMCache

LLAVA = FAMILIES["llava"]
INPUTS = LLAVA.inputs([LLAVA.prompt((9, IMAGE, 12)), LLAVA.prompt((5, IMAGE, 4), 1)])
MODES = {"greedy": {}, "beam": {"num_beams": 3}, "sampling": {"do_sample": True, "num_return_sequences": 2}}


@pytest.fixture
def model() -> PreTrainedModel:
    return copy.deepcopy(LLAVA.model())


def generate(model, **arguments) -> tuple[torch.Tensor, torch.Tensor, transformers.Cache]:
    torch.manual_seed(0)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    result = model.generate(**INPUTS, **options | arguments)
    return result.sequences, torch.stack(result.logits), result.past_key_values


def same(one: tuple, other: tuple) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("mode", MODES)
def test_generate_without_a_cache_is_generate_with_a_lookm_cache(model, mode: str):
    options = {"budget": 0.3, "policy": "h2o", "sinks": 2}
    passed = generate(model, past_key_values=LookMCache(model, **options), **MODES[mode])
    lookm.enable(model, **options)
    for _ in range(2):
        enabled = generate(model, **MODES[mode])
        assert type(enabled[2]) is LookMCache
        assert same(enabled, passed)
        assert enabled[2].report() == passed[2].report()


def test_disable_restores_every_bit(model):
    plain = generate(model)
    hooks = len(model._forward_pre_hooks)
    lookm.enable(model, budget=0.3)
    assert not same(generate(model), plain)
    lookm.disable(model)
    after = generate(model)
    assert type(after[2]) is DynamicCache
    assert same(after, plain)
    lookm.disable(model)
    assert len(model._forward_pre_hooks) <= hooks + 1  # the one that tells a LookMCache of its tokens stays


def test_enable_again_replaces_the_settings(model):
    lookm.enable(model, budget=0.3, policy="h2o")
    lookm.enable(model, budget=7)
    cache = generate(model)[2]
    assert cache.layers[0].settings.policy == lookm.POLICIES["text_prior_pivot_merge"]
    assert cache.kept_positions(0).shape[2] - 4 == 7
    lookm.disable(model)
    assert type(generate(model)[2]) is DynamicCache


@pytest.mark.parametrize("options", [{"budget": 0}, {"policy": "none"}, {"rule": "none", "gate": "all"}], ids=str)
def test_bad_settings_are_refused_at_once_and_change_nothing(model, options: dict):
    lookm.enable(model, budget=7)
    with pytest.raises(ValueError, match="must be"):
        lookm.enable(model, **options)
    assert generate(model)[2].kept_positions(0).shape[2] - 4 == 7


@torch.no_grad()
def test_caches_passed_by_the_caller(model):
    used, fresh = (DynamicCache(config=model.config) for _ in range(2))
    own = LookMCache(model, budget=9)
    model(**INPUTS, past_key_values=used)
    lookm.enable(model, budget=7)
    assert generate(model, past_key_values=own)[2] is own
    assert own.kept_positions(0).shape[2] - 4 == 9
    model(input_ids=torch.tensor([[5], [6]]), past_key_values=used)
    assert type(used) is DynamicCache
    assert used.layers[0].keys.shape[2] == 40
    model(**INPUTS, past_key_values=fresh)  # empty, as the one that generate makes
    assert type(fresh) is LookMCache


def test_a_forward_without_a_cache_is_not_touched(model):
    with torch.no_grad():
        plain = model(**INPUTS)
        lookm.enable(model, budget=7)
        after = model(**INPUTS)
    assert torch.equal(after.logits, plain.logits)
    assert type(after.past_key_values) is DynamicCache


@pytest.mark.parametrize(
    ("implementation", "name"),
    [("static", "StaticCache"), ("offloaded", "DynamicCache with offloading"), ("offloaded_static", "StaticCache")],
)
def test_other_caches_are_refused(model, monkeypatch: pytest.MonkeyPatch, implementation: str, name: str):
    # transformers opens one for a cache that offloads; a CUDA build of torch cannot where there is no GPU
    monkeypatch.setattr(torch, "Stream", object)
    lookm.enable(model, budget=7)
    with pytest.raises(NotImplementedError, match=rf"told to use a {name}.*lookm\.disable\(model\)"):
        generate(model, cache_implementation=implementation)


def test_quantized_caches_are_refused(model):
    class QuantizedCache(transformers.Cache):
        """As transformers': a Cache with layers of its own kind (theirs needs a package that is not here)."""

    lookm.enable(model, budget=7)
    layers = [transformers.cache_utils.DynamicLayer() for _ in range(3)]
    with pytest.raises(NotImplementedError, match="told to use a QuantizedCache"):
        generate(model, past_key_values=QuantizedCache(layers=layers))


def test_copies_of_an_enabled_model_are_their_own(model):
    lookm.enable(model, budget=7)
    twin = copy.deepcopy(model)
    lookm.disable(model)
    assert type(generate(model)[2]) is DynamicCache
    assert type(generate(twin)[2]) is LookMCache
    lookm.disable(twin)
    assert type(generate(twin)[2]) is DynamicCache


def test_hooks_can_be_pickled_with_their_model(model):
    lookm.enable(model, budget=0.3)
    assert pickle.loads(pickle.dumps(list(model._forward_pre_hooks.values())))
