"""What is not supported is refused with the reason, before it gives a wrong result."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from families import FAMILIES, MLLAMA
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.models.llama import modeling_llama

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
