"""enable and disable: generate on a LookMCache without a word in the call."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from families import FAMILIES, IMAGE
from transformers import DynamicCache, PreTrainedModel
from unusual import known, prompt, subject

import lookm
from lookm import LookMCache
from lookm.cache import _around_generate

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


def test_generate_takes_the_cache_under_its_new_name(model):
    """`cache` where transformers has it (from 5.24 on), `past_key_values` everywhere."""
    if "cache" not in inspect.signature(model.forward).parameters:
        pytest.skip(f"transformers {transformers.__version__} knows past_key_values only")
    old = generate(model, past_key_values=LookMCache(model, 0.3))
    own = LookMCache(model, 0.3)
    new = generate(model, cache=own)
    assert new[2] is own
    assert same(new, old)
    with torch.no_grad():
        logits = [model(**INPUTS, **{name: LookMCache(model, 0.3)}).logits for name in ("cache", "past_key_values")]
    assert torch.equal(*logits)


@torch.no_grad()
def test_generate_that_ran_without_it_is_an_error(model):
    used = DynamicCache(config=model.config)
    model(**INPUTS, past_key_values=used)
    lookm.enable(model, budget=7)
    with pytest.raises(RuntimeError, match=r"without a LookMCache \(it was called with use_cache=False\).*disable"):
        generate(model, use_cache=False)
    more = torch.cat([INPUTS["input_ids"], torch.tensor([[5], [6]])], 1)
    mask = torch.nn.functional.pad(INPUTS["attention_mask"], (0, 1), value=1)
    with pytest.raises(RuntimeError, match=r"it was given a DynamicCache that holds tokens already"):
        model.generate(input_ids=more, attention_mask=mask, past_key_values=used, max_new_tokens=2)
    lookm.disable(model)
    assert generate(model, use_cache=False)[2] is None


def test_a_model_that_keeps_a_state_of_its_own_is_found_out():
    """RWKV's generate drops the cache without a word."""
    model, given = prompt("rwkv")
    lookm.enable(model, budget=0.3)
    try:
        with pytest.raises(RuntimeError, match=r"without a LookMCache \(RwkvForCausalLM makes one of its own\)"):
            model.generate(**given, max_new_tokens=2)
    finally:
        lookm.disable(model)


def test_a_generate_of_ones_own_stays(model):
    def own(**arguments):
        return "mine"

    model.generate = own
    lookm.enable(model, budget=0.3)
    assert model.generate is own
    lookm.disable(model)
    assert model.generate is own


@pytest.mark.parametrize("enabled", [False, True])
def test_a_model_is_freed_when_it_is_dropped(enabled: bool):
    """Nothing that watches it keeps it in a circle."""
    model = copy.deepcopy(LLAVA.model())
    LookMCache(model)
    if enabled:
        lookm.enable(model, budget=0.3)
        generate(model)
    dropped = weakref.ref(model.get_input_embeddings().weight)
    gc.disable()
    try:
        del model
        assert dropped() is None
    finally:
        gc.enable()


DELEGATING = {"greedy": {}, "beam": {"num_beams": 3}, "sampling": {"do_sample": True, "num_return_sequences": 2}}


def answered(model, given: dict, **mode) -> tuple[torch.Tensor, transformers.Cache]:
    torch.manual_seed(0)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    result = model.generate(**given, **options | mode)
    return torch.stack(result.logits), result.past_key_values


@pytest.mark.parametrize("mode", DELEGATING)
@pytest.mark.parametrize("name", ["blip-2", "instructblip", "instructblipvideo"])
def test_generate_that_hands_embeddings_to_a_part_of_the_model(name: str, mode: str):
    """The part is enabled, and told which of the embeddings are images."""
    found = subject(name)
    model, given = copy.deepcopy(found.model), found.arguments(found.rows)
    plain, _ = answered(model, given, **DELEGATING[mode])
    lookm.enable(model, budget=1.0)
    whole, cache = answered(model, given, **DELEGATING[mode])
    assert type(cache) is LookMCache
    assert torch.equal(whole, plain)
    lookm.enable(model, budget=0.25)
    logits, cache = answered(model, given, **DELEGATING[mode])
    report, rows = cache.report().layers[0], len(plain[0]) // len(found.rows)
    assert report.seen_image == rows * sum(sum(row.image) for row in found.rows)
    assert not torch.equal(logits, plain)
    lookm.disable(model)
    after, cache = answered(model, given, **DELEGATING[mode])
    assert type(cache) is DynamicCache
    assert torch.equal(after, plain)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_watched_model_can_be_pickled(enabled: bool):
    # a new one: transformers' hooks for output_attentions, once installed, cannot be pickled
    model = transformers.LlavaForConditionalGeneration(LLAVA.config()).eval()
    cache = LookMCache(model, budget=0.3)
    if enabled:
        lookm.enable(model, budget=0.3)
    loaded = pickle.loads(pickle.dumps(model))
    expected = generate(model, past_key_values=cache)
    passed = {} if enabled else {"past_key_values": LookMCache(loaded, budget=0.3)}
    found = generate(loaded, **passed)
    assert type(found[2]) is LookMCache
    assert same(found, expected)


def test_pixels_first_and_no_ids():
    """BLIP-2 writes the placeholders itself; the part then cannot tell, and says so."""
    found = subject("blip-2")
    model = copy.deepcopy(found.model)
    model.config.text_config.bos_token_id = 3
    lookm.enable(model, budget=0.3)
    with pytest.raises(ValueError, match=r"no image placeholder is recognisable.*image_mask="):
        model.generate(found.arguments(found.rows[:1])["pixel_values"], max_new_tokens=2)


def test_a_cache_passed_to_such_a_model():
    """It is told too, of this prompt alone; called directly, the part asks for the mask."""
    found = subject("blip-2")
    model, given = found.model, found.arguments(found.rows)
    image, cache = given["input_ids"] == 120, LookMCache(found.model, 0.25)
    first, _ = answered(model, given, past_key_values=cache)
    assert cache.report().layers[0].seen_image == int(image.sum())
    cache.reset()
    alone = found.arguments(found.rows[1:])
    answered(model, alone, past_key_values=cache)
    assert cache.report().layers[0].seen_image == int((alone["input_ids"] == 120).sum())
    own, _ = answered(model, given, past_key_values=LookMCache(model, 0.25, image_mask=image))
    assert torch.equal(own, first)
    embeddings = {"inputs_embeds": model.get_input_embeddings()(given["input_ids"])}
    with pytest.raises(ValueError, match="image_mask="):
        model.language_model(**embeddings, past_key_values=LookMCache(model, 0.25))


@pytest.mark.parametrize("name", ["Qwen2_5Omni", "Qwen3OmniMoe"])
def test_a_full_omni_model_whose_thinker_reads_the_prompt(name: str):
    kind = {"Qwen2_5Omni": "qwen2_5_omni_thinker", "Qwen3OmniMoe": "qwen3_omni_moe_thinker"}[name]
    if not known(kind):
        pytest.skip(f"transformers {transformers.__version__} lists no {kind} among its models")
    thinker = subject(kind)
    config = getattr(transformers, f"{name}Config")(
        thinker_config=thinker.model.config.to_dict(), enable_audio_output=False
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")._from_config(config).eval()
    # what generate asks for though it shall not speak
    model.speaker_map, model.talker = {"Chelsie": {}, "Ethan": {}}, SimpleNamespace(codec_pad_token=0)
    given = thinker.arguments(thinker.rows[:1])
    options = {"generation_mode": "text", "thinker_max_new_tokens": 4, "return_dict_in_generate": True}
    plain = model.generate(**given, **options)
    lookm.enable(model, budget=1.0)
    whole = model.generate(**given, **options)
    assert type(whole.past_key_values) is LookMCache
    assert torch.equal(whole.sequences, plain.sequences)
    lookm.enable(model, budget=0.25)
    report = model.generate(**given, **options).past_key_values.report().layers[0]
    assert report.seen_image == sum(thinker.rows[0].image)
    assert report.kept - report.later == len(thinker.rows[0]) // 4


def test_a_generate_that_returns_more_than_sequences():
    """The full Omni models return what they wrote and what they said."""
    model = FAMILIES["qwen3"].model()
    arguments = {"input_ids": torch.ones(1, 3, dtype=torch.long), "past_key_values": LookMCache(model)}
    said = torch.ones(1, 4, dtype=torch.long), torch.zeros(9)
    assert _around_generate(lambda **_: said, model, (), arguments) is said
