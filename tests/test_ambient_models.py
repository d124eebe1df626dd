"""Models under torch.autocast, another default dtype, and gradients: what DynamicCache does, a LookMCache does too."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE
from loops import column_sums
from transformers import DynamicCache, PreTrainedModel

from lookm import POLICIES, LookMCache, plan

LLAVA, QWEN = FAMILIES["llava"], FAMILIES["qwen3"]
PROMPTS = [LLAVA.prompt((9, IMAGE, 12)), LLAVA.prompt((5, IMAGE, 4), 1)]
LOW = [torch.bfloat16, torch.float16]


def generate(model: PreTrainedModel, cache, dtype: torch.dtype) -> torch.Tensor:
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.autocast("cpu", dtype=dtype):
        result = model.generate(**LLAVA.inputs(PROMPTS), past_key_values=cache, **options)
    return torch.stack(result.logits, 1)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float32_weights_under_autocast(attention: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Keys arrive in float32, values in the lower precision: each keeps what DynamicCache keeps it in."""
    model = LLAVA.model(attention)
    plain = DynamicCache(config=model.config)
    logits = generate(model, plain, dtype)
    dtypes = (plain.layers[0].keys.dtype, plain.layers[0].values.dtype)
    small = LookMCache(model, budget=0.3)
    assert generate(model, small, dtype).isfinite().all()
    assert (small.layers[0].keys.dtype, small.layers[0].values.dtype) == dtypes
    monkeypatch.setattr(plan, "over_budget", lambda prompt, lengths: True)
    assert torch.equal(generate(model, LookMCache(model, budget=1.0), dtype), logits)


def test_a_budget_in_bytes_counts_keys_and_values_each_in_its_own_dtype():
    model = LLAVA.model("sdpa")
    plain = DynamicCache(config=model.config)
    generate(model, plain, torch.bfloat16)
    size = sum(rows.element_size() for rows in (plain.layers[0].keys, plain.layers[0].values))
    cache = LookMCache(model, budget=f"{3 * 10 * 2 * 2 * 16 * size}B")  # 10 tokens: layers, rows, heads, D
    generate(model, cache, torch.bfloat16)
    assert cache.kept_positions(0).shape[2] - 3 == 10


@torch.no_grad()
def test_scores_under_autocast_are_those_of_its_queries_and_keys():
    """The ops compute in float32 whatever is ambient: against plain loops over what the attention got."""
    model, seen = QWEN.model("eager"), []
    cache = LookMCache(model, 0.5, "h2o", prompt_length=10**6)
    layer, attend = cache.layers[0], cache.layers[0].attend

    def spy(inner, implementation, module, query, key, *rest, **options):
        seen.append((query, key))
        return attend(inner, implementation, module, query, key, *rest, **options)

    layer.attend = spy
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**QWEN.inputs([QWEN.prompt((24,))]), past_key_values=cache)
    ((query, key),) = seen
    expected = column_sums(query[0], key[0], 16**-0.5)
    torch.testing.assert_close(layer.scores[0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_another_default_dtype(policy: str):
    model, logits = LLAVA.model(), []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            with torch.no_grad():
                cache = LookMCache(model, 0.3, policy)
                model(**LLAVA.inputs(PROMPTS), past_key_values=cache)
                step = {"input_ids": torch.tensor([[5], [6]]), "position_ids": torch.tensor([[39], [27]])}
                logits.append(model(**step, past_key_values=cache).logits)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", ""])
@pytest.mark.parametrize("name", ["llava", "qwen3"])
def test_a_prefill_can_be_trained_through(name: str, part: str):
    """Whichever projection has a gradient: the gradients of the ordinary cache, bit for bit."""
    family, gradients = FAMILIES[name], []
    inputs = family.inputs([family.prompt((9, IMAGE, 12))])
    for make in (lambda model: DynamicCache(config=model.config), lambda model: LookMCache(model, budget=0.3)):
        model = copy.deepcopy(family.model())
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(part in parameter_name)
        model(**inputs, labels=inputs["input_ids"], past_key_values=make(model)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(map(torch.equal, *gradients))
