"""What is not supported is refused with the reason, before it gives a wrong result."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from families import FAMILIES, MLLAMA
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3
from unusual import known, subject

import lookm
from lookm import LookMCache

QWEN, LLAVA = FAMILIES["qwen3"], FAMILIES["llava"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
UNSUPPORTED = {
    "t5": (
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2),
        "t5 is not supported: it attends to another sequence",
    ),
    "cross attention": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, add_cross_attention=True),
        "gpt2 is not supported: it attends to another sequence",
    ),
    "shared layers": (
        "Gemma3nForCausalLM",
        lambda: transformers.Gemma3nTextConfig(
            **SIZES | {"num_hidden_layers": 3}, layer_types=["sliding_attention", "full_attention", "full_attention"],
            num_kv_shared_layers=1, hidden_size_per_layer_input=8, vocab_size_per_layer_input=64, laurel_rank=4,
            activation_sparsity_pattern=[0.0, 0.0, 0.0],
        ),
        "gemma3n_text is not supported: its layers share keys and values",
    ),
    "no full attention": (
        "MistralForCausalLM",
        lambda: transformers.MistralConfig(**SIZES, sliding_window=8),
        "no full-attention layer",
    ),
}  # fmt: skip


def built(name: str, config, attention: str = "eager"):
    torch.manual_seed(0)
    return getattr(transformers, name)._from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("kind", UNSUPPORTED)
@pytest.mark.parametrize("use", [LookMCache, lookm.enable])
def test_models(kind: str, use):
    name, config, reason = UNSUPPORTED[kind]
    model = built(name, config())
    with pytest.raises(NotImplementedError, match=reason):
        use(model, budget=0.3)


def test_mllama():
    with pytest.raises(NotImplementedError, match="mllama is not supported: its image tokens live in cross-attention"):
        LookMCache(MLLAMA.model())


@pytest.mark.parametrize("thing", [None, "a/model", nn.Linear(2, 2), 5], ids=str)
def test_not_a_model(thing):
    with pytest.raises(TypeError, match="`model` must be a transformers PreTrainedModel, got"):
        LookMCache(thing)


def test_attention_sinks():
    model = built("GptOssForCausalLM", transformers.GptOssConfig(
        **SIZES, num_local_experts=2, num_experts_per_tok=1, layer_types=["sliding_attention", "full_attention"]
    ))  # fmt: skip
    cache = LookMCache(model, budget=0.3)
    with pytest.raises(NotImplementedError, match=r"attention sinks \(learned extra logits\).*'s_aux'"):
        model(input_ids=torch.arange(3, 20)[None], past_key_values=cache)


def test_a_position_bias():
    model = copy.deepcopy(QWEN.model("eager"))
    # as a model would that passes one on to its attention
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"position_bias": torch.zeros(1)}), with_kwargs=True
        )
    with pytest.raises(NotImplementedError, match=r"a position bias .*'position_bias'"):
        model(input_ids=torch.arange(3, 20)[None], past_key_values=LookMCache(model, budget=0.3))


ASSISTED = {"prompt lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {"assistant_model": None}}
REPEATING = {"input_ids": torch.tensor([[5, 6, 7, 8] * 8]), "attention_mask": torch.ones(1, 32, dtype=torch.long)}


@pytest.mark.parametrize("assisted", ASSISTED)
@pytest.mark.parametrize("enabled", [False, True])
def test_assisted_decoding(assisted: str, enabled: bool):
    """Every draft of the assistant, a copy of the model, is accepted: nothing is cropped that could tell."""
    model = copy.deepcopy(QWEN.model())
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1} | ASSISTED[assisted]
    if "assistant_model" in options:
        options["assistant_model"] = copy.deepcopy(model)
    if enabled:
        lookm.enable(model, budget=0.3)
    else:
        options["past_key_values"] = LookMCache(model, budget=0.3)
    with pytest.raises(NotImplementedError, match=r"assisted .* decoding is not supported: its draft tokens arrive"):
        model.generate(**REPEATING, **options)


def test_assisted_decoding_is_refused_before_it_drafts():
    cache = LookMCache(QWEN.model(), budget=0.3)
    with pytest.raises(NotImplementedError, match="assisted"):
        cache.layers[0].activate_past_recording()


def test_offloading():
    model, cache = QWEN.model(), LookMCache(QWEN.model(), budget=0.3)
    model(**REPEATING, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="offloading is not supported"):
        cache.layers[0].offload()
    with pytest.raises(ValueError, match="got 'offloading'"):
        LookMCache(model, budget=0.3, offloading=True)


def test_an_attention_implementation_without_masks():
    model = copy.deepcopy(QWEN.model())
    AttentionInterface.register("no_mask_here", AttentionInterface._global_mapping["sdpa"])
    try:
        model.set_attn_implementation("no_mask_here")
        with pytest.raises(NotImplementedError, match=r"'no_mask_here' is not registered .*; registered: .*sdpa"):
            LookMCache(model, budget=0.3)
    finally:
        del AttentionInterface._global_mapping["no_mask_here"]
    assert "no_mask_here" not in AttentionMaskInterface._global_mapping


def test_an_attention_call_that_is_not_intercepted(monkeypatch: pytest.MonkeyPatch):
    class Bypass:
        def get_interface(self, name, default):
            return AttentionInterface._global_mapping["sdpa"].__wrapped__

    model = LLAVA.model()
    cache = LookMCache(model, budget=0.3)
    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Bypass())
    with pytest.raises(RuntimeError, match="not intercepted, so the prompt could not be scored"):
        model.generate(**LLAVA.inputs([LLAVA.prompt((30,))]), past_key_values=cache, max_new_tokens=3)


def test_a_mask_made_for_the_whole_prompt_does_not_fit_what_is_stored():
    model, cache = QWEN.model(), LookMCache(QWEN.model(), budget=0.3)
    with torch.no_grad():
        model(**REPEATING, past_key_values=cache)
        mask = torch.ones(1, 1, 1, 33, dtype=torch.bool)
        with pytest.raises((RuntimeError, ValueError)):
            model(input_ids=torch.tensor([[5]]), attention_mask=mask, past_key_values=cache)


def test_layers_of_other_kinds_stay_what_they_are():
    model = FAMILIES["gemma3"].model()
    plain, ours = DynamicCache(config=model.config).layers, LookMCache(model, budget=0.3).layers
    assert [type(layer).__name__ for layer in ours] == ["DynamicSlidingWindowLayer", "LookMLayer"] * 2
    assert [type(layer).__name__ for layer in plain] == ["DynamicSlidingWindowLayer", "DynamicLayer"] * 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_v3", "git", "blip"])
def test_attention_of_ones_own_is_refused_by_the_forward_that_reads_the_prompt(name: str):
    """Multi-head latent attention, and models that never ask transformers for an attention function."""
    found = subject(name)
    given, plain = found.arguments(found.rows[:1]), found.plain()
    found.model(**given, past_key_values=plain)
    if name == "deepseek_v3" and plain.layers[0].keys.shape[1] > 1:
        pytest.skip(f"transformers {transformers.__version__} stores whole keys and values for {name}")
    image = {"image_mask": torch.zeros(1, 53 if name == "git" else 36).bool()}
    with pytest.raises(NotImplementedError, match="not intercepted"):
        found.model(**given, past_key_values=LookMCache(found.model, 0.25, **image))
    with pytest.raises(NotImplementedError, match="not intercepted"):
        found.model.generate(**given, past_key_values=LookMCache(found.model, 0.25, **image), max_new_tokens=1)


def test_a_layer_that_attends_twice():
    """Differential attention: two calls share keys, and no single column sum describes them."""
    found = subject("diffllama")
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"attended a second time|not intercepted"):
        found.model(**found.arguments(found.rows), past_key_values=LookMCache(found.model, 0.25))


@torch.no_grad()
def test_a_layer_that_stores_twice():
    """A model that loops over its layers, as Dory does."""
    model = copy.deepcopy(QWEN.model())
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(NotImplementedError, match="stored keys a second time in one forward"):
        model(**REPEATING, past_key_values=LookMCache(model, budget=0.3))


@torch.no_grad()
def test_masks_that_a_model_builds_by_itself():
    """BERT as an encoder sizes its mask by the tokens seen: a whole prompt fits, a compressed one does not."""
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model, ids = built("BertLMHeadModel", config, "sdpa"), torch.arange(3, 40)[None]
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    plain = model(ids, attention_mask=mask, past_key_values=DynamicCache(config=config)).logits
    assert torch.equal(model(ids, attention_mask=mask, past_key_values=LookMCache(model, 1.0)).logits, plain)
    with pytest.raises(NotImplementedError, match="makes its attention masks in a way of its own"):
        model(ids, attention_mask=mask, past_key_values=LookMCache(model, 0.25))


MIXED = {"minimax_m3_vl": {"text_config.layer_types": ["full_attention", "minimax_m3_sparse"] * 2}}


@pytest.mark.parametrize("name", MIXED)
def test_layers_that_would_share_a_mask_with_compressed_ones(name: str):
    if not known(name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = subject(name, changes=tuple(MIXED[name].items())).model
    with pytest.raises(NotImplementedError, match=rf"{name} is not supported: its \w+ layers stay whole and share one"):
        LookMCache(model, 0.25)


@torch.no_grad()
def test_a_mask_that_restricts_the_past_of_a_compressed_cache():
    model = copy.deepcopy(QWEN.model())
    cache, ids = LookMCache(model, 0.5, later_turns="dense"), torch.arange(3, 23)[None]
    model(ids, past_key_values=cache)
    original = modeling_qwen3.create_causal_mask

    def windowed(**arguments):
        return original(**arguments, and_mask_function=lambda b, h, q, k: k > q - 5)

    refused = pytest.raises(NotImplementedError, match="does not let every new token see every token before it")
    with patch.object(modeling_qwen3, "create_causal_mask", windowed), refused:
        model(torch.arange(3, 7)[None], past_key_values=cache)


@torch.no_grad()
def test_a_mask_that_no_layer_uses_is_none_of_our_business():
    """Qwen2-MoE makes a mask for sliding layers, which it has none of."""
    found = subject("qwen2_moe")
    given = found.arguments(found.rows)
    found.model.generate(**given, past_key_values=found.cache(found.rows, 0.25), max_new_tokens=4)


@torch.no_grad()
def test_a_prompt_length_that_is_never_reached():
    cache = LookMCache(QWEN.model(), budget=0.25, prompt_length=60)
    with pytest.raises(ValueError, match=r"`prompt_length` is 60, but decoding starts after 32 tokens"):
        QWEN.model().generate(**REPEATING, past_key_values=cache, max_new_tokens=3)


@torch.no_grad()
def assert_a_stop_asks_for_a_reset(model, inputs: dict, inside: nn.Module) -> None:
    """A forward that fails where `inside` begins; the next one says so, and after a reset all is as new."""
    cache = LookMCache(model, budget=0.3)

    def fail(*_):
        raise KeyError("half-way")

    handle = inside.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="half-way"):
        model(**inputs, past_key_values=cache)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"did not come to its end.*cache.reset\(\)"):
        model(**inputs, past_key_values=cache)
    cache.reset()
    expected = model(**inputs, past_key_values=LookMCache(model, budget=0.3)).logits
    assert torch.equal(model(**inputs, past_key_values=cache).logits, expected)


def test_a_forward_that_stops_half_way():
    model = copy.deepcopy(QWEN.model())
    assert_a_stop_asks_for_a_reset(model, REPEATING, model.model.layers[1])


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_a_forward_that_stops_before_the_first_full_layer(name: str):
    """Layers of other kinds have read it: sliding ones count their tokens, linear ones do not say."""
    family = FAMILIES[name]
    if not family.dynamic:
        pytest.skip(f"transformers {transformers.__version__} has no DynamicCache for {name}")
    model, inputs = copy.deepcopy(family.model()), family.inputs([family.prompt((20,))])
    assert_a_stop_asks_for_a_reset(model, inputs, model.model.language_model.layers[0].mlp)


@torch.no_grad()
def test_a_forward_that_fails_before_it_reads_leaves_the_cache_as_it_was():
    model = QWEN.model()
    cache = LookMCache(model, budget=0.3)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]), past_key_values=cache)
    model(**REPEATING, past_key_values=cache)
    assert cache.get_seq_length() == 32


@torch.no_grad()
def test_a_cache_for_the_inner_model_leaves_the_outer_one_alone():
    """Llava's decoder is watched too, once a cache was built for it: the outermost model's word counts."""
    model, inputs = copy.deepcopy(LLAVA.model()), LLAVA.inputs([LLAVA.prompt((9, "image", 12))])
    before = model(**inputs, past_key_values=LookMCache(model, budget=0.25))
    LookMCache(model.model.language_model, budget=0.25)
    after = model(**inputs, past_key_values=LookMCache(model, budget=0.25))
    assert torch.equal(after.logits, before.logits)
    reports = [output.past_key_values.report() for output in (before, after)]
    assert reports[0] == reports[1]
    assert reports[0].layers[0].seen_image == 16


@torch.no_grad()
def test_a_model_that_stores_nothing_in_the_cache():
    model = copy.deepcopy(QWEN.model())
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"cache": None, "past_key_values": None}), with_kwargs=True
        )
    with pytest.raises(NotImplementedError, match="read 32 tokens and stored none of them"):
        model(**REPEATING, past_key_values=LookMCache(model, budget=0.3))


def test_a_configuration_of_which_transformers_makes_no_cache():
    found = subject("pi0") if known("pi0") else pytest.skip("no pi0")
    with pytest.raises(NotImplementedError, match="transformers makes no DynamicCache for pi0"):
        LookMCache(found.model, 0.3)
