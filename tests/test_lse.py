"""The log-sum-exp of the model's own attention: used where it is the one the scores need, and changing nothing."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE
from transformers import DynamicCache

import lookm_kernels
from lookm import LookMCache, plan
from lookm.lse import Call, LogSumExp

LLAVA, QWEN = FAMILIES["llava"], FAMILIES["qwen3"]
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ROW = (9, IMAGE, 12)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The lse of every call of attention_scores, which is run without it too: both must agree."""
    given, scores = [], lookm_kernels.attention_scores

    def spy(query: Tensor, key: Tensor, *, lse: Tensor | None, **arguments: Any) -> Tensor:
        given.append(lse)
        ours = scores(query, key, lse=lse, **arguments)
        close = 1e-5 if query.dtype in (torch.float32, torch.float64) else 1e-3
        torch.testing.assert_close(ours, scores(query, key, lse=None, **arguments), rtol=close, atol=close)
        return ours

    monkeypatch.setattr(lookm_kernels, "attention_scores", spy)
    return given


def generated(model: Any, inputs: dict[str, Tensor], cache: Any) -> Tensor:
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**inputs, past_key_values=cache, **options).logits, 1)


def heads(dtype: torch.dtype, queries: int = 40, kv_heads: int = 2, width: int = 16) -> list[Tensor]:
    """A query of 4 heads, a key and a value of 40 tokens."""
    generator, shapes = torch.Generator().manual_seed(0), ((4, queries), (kv_heads, 40), (kv_heads, 40))
    return [torch.randn(2, *shape, width, generator=generator).to(dtype) for shape in shapes]


def expected(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    logits = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    future = torch.full(logits.shape[-2:], -torch.inf, device=query.device).triu(1)
    return (logits + future if causal else logits).logsumexp(-1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "causal", "scale"), [(4, True, 0.25), (2, True, 0.1), (1, False, 0.25)])
def test_what_torch_computed(mode: str, dtype: torch.dtype, kv_heads: int, causal: bool, scale: float):
    query, key, value = heads(dtype, kv_heads=kv_heads)
    options = {"is_causal": causal, "scale": scale, "enable_gqa": True}
    with MODES[mode]():
        plain = scaled_dot_product_attention(query, key, value, **options)
        with LogSumExp() as observed:
            seen = scaled_dot_product_attention(query, key, value, **options)
    assert torch.equal(plain, seen)
    lse = observed.of(query, key, causal, scale)
    close = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(lse.double(), expected(query, key, causal, scale), rtol=close, atol=close)
    assert not lse.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
@pytest.mark.parametrize(("queries", "causal"), [(4000, True), (4001, True), (33, False)])
def test_every_backend_of_a_gpu_gives_it(backend: str, dtype: torch.dtype, queries: int, causal: bool):
    shape = (2, 4, queries, 128)
    query, key, value = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    with torch.no_grad(), sdpa_kernel(getattr(SDPBackend, backend)):
        plain = scaled_dot_product_attention(query, key, value, is_causal=causal)
        with LogSumExp() as observed:
            seen = scaled_dot_product_attention(query, key, value, is_causal=causal)
    assert torch.equal(plain, seen)
    lse = observed.of(query, key, causal, 128**-0.5)
    torch.testing.assert_close(lse.double(), expected(query, key, causal, 128**-0.5), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [LLAVA, QWEN], ids=lambda family: family.name)
def test_on_a_gpu_a_whole_budget_changes_no_bit(family, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "over_budget", lambda prompt, lengths: True)
    model = copy.deepcopy(family.model()).to("cuda", dtype)
    inputs = {name: x.to("cuda") for name, x in family.inputs([family.prompt(ROW)]).items()}
    with torch.no_grad():
        plain = generated(model, inputs, DynamicCache(config=model.config))
        ours = generated(model, inputs, LookMCache(model, budget=1.0))
    assert torch.equal(plain, ours)


def test_a_gradient_passes():
    tensors = [x.requires_grad_() for x in heads(torch.float32, kv_heads=4)]
    with LogSumExp() as observed:
        scaled_dot_product_attention(*tensors, is_causal=True).square().sum().backward()
    assert tensors[1].grad is not None
    assert not observed.of(*tensors[:2], True, 0.25).requires_grad


CALLS: dict[str, tuple[Callable[..., Any], bool, float]] = {
    "nothing ran": (lambda *_: None, True, 0.25),
    "two ran": (lambda *x: [scaled_dot_product_attention(*x, is_causal=True) for _ in range(2)], True, 0.25),
    "another scale": (lambda *x: scaled_dot_product_attention(*x, is_causal=True, scale=0.2), True, 0.25),
    "not causal": (lambda *x: scaled_dot_product_attention(*x), True, 0.25),
    "causal": (lambda *x: scaled_dot_product_attention(*x, is_causal=True), False, 0.25),
    "a mask": (lambda *x: scaled_dot_product_attention(*x, attn_mask=torch.ones(40, 40).tril().bool()), False, 0.25),
    "fewer keys": (lambda q, k, v: scaled_dot_product_attention(q, k[:, :, :9], v[:, :, :9]), False, 0.25),
    "fewer queries": (lambda q, k, v: scaled_dot_product_attention(q[:, :, :9], k, v), False, 0.25),
    "unfused": (lambda q, k, v: torch.softmax(q @ k.mT * 0.25, -1) @ v, False, 0.25),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_not_the_one_needed(call: str):
    attend, causal, scale = CALLS[call]
    tensors = heads(torch.float32, kv_heads=4)
    with torch.no_grad(), LogSumExp() as observed:
        attend(*tensors)
    assert observed.of(tensors[0], tensors[1], causal, scale) is None


def test_causal_of_fewer_queries_is_aligned_otherwise():
    query, key, value = heads(torch.float32, queries=9, kv_heads=4)
    with torch.no_grad(), LogSumExp() as observed:
        scaled_dot_product_attention(query, key, value, is_causal=True)
    assert len(observed.calls) == 1
    assert observed.of(query, key, True, 0.25) is None


@pytest.mark.parametrize("shape", [(2, 4, 64), (2, 4, 40, 1)], ids=["padded", "a last dimension"])
def test_the_shapes_of_other_ops(shape: tuple[int, ...]):
    """The efficient op pads the queries to a multiple of 32, cuDNN's adds a dimension."""
    query, key, _ = heads(torch.float32)
    stored, observed = torch.arange(float(torch.tensor(shape).prod())).view(shape), LogSumExp()
    call = Call(query.shape[:3], 40, True, 0.25, plain=True, lse=stored)
    observed.calls = [call]
    assert torch.equal(observed.of(query, key, True, 0.25), stored[:, :, :40].reshape(2, 4, 40))
    observed.calls = [replace(call, plain=False)]
    assert observed.of(query, key, True, 0.25) is None


def test_nothing_large_is_held():
    query, key, value = heads(torch.float32, kv_heads=4)
    alive = weakref.ref(key)
    with torch.no_grad(), LogSumExp() as observed:
        scaled_dot_product_attention(query, key, value, is_causal=True)
    del key
    assert alive() is None
    assert len(observed.calls) == 1


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("family", [LLAVA, QWEN], ids=lambda family: family.name)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_whole_budget_changes_no_bit(mode: str, family, dtype, given: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "over_budget", lambda prompt, lengths: True)
    model, inputs = copy.deepcopy(family.model()).to(dtype), family.inputs([family.prompt(ROW)])
    with MODES[mode]():
        plain = generated(model, inputs, DynamicCache(config=model.config))
        ours = generated(model, inputs, LookMCache(model, budget=1.0))
    assert torch.equal(plain, ours)
    assert [lse.shape for lse in given] == [(1, 4, inputs["input_ids"].shape[1])] * 3


def test_a_budget_evicts_what_the_pass_of_its_own_evicts(monkeypatch: pytest.MonkeyPatch):
    model, inputs, caches = LLAVA.model(), LLAVA.inputs([LLAVA.prompt(ROW)]), []
    for free in (True, False):
        if not free:
            monkeypatch.setattr(LogSumExp, "of", lambda *_: None)
        caches.append(LookMCache(model, budget=0.3, policy="h2o"))
        with torch.no_grad():
            model(**inputs, past_key_values=caches[-1])
    for index in range(3):
        assert torch.equal(caches[0].kept_positions(index), caches[1].kept_positions(index))


NOT_FREE = {
    "a padded batch": ("sdpa", [ROW, (5, IMAGE, 4)], {}),
    "eager": ("eager", [ROW], {}),
    "the second of two chunks": ("sdpa", [(39,)], {"prompt_length": 39}),
}


@pytest.mark.parametrize("case", NOT_FREE)
def test_a_pass_of_its_own_where_none_is_free(case: str, given: list):
    attention, layouts, options = NOT_FREE[case]
    model = LLAVA.model(attention)
    inputs = LLAVA.inputs([LLAVA.prompt(layout, seed) for seed, layout in enumerate(layouts)])
    parts = [inputs]
    if options:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        parts = [{"input_ids": ids[:, :20], "attention_mask": mask[:, :20]}, {"input_ids": ids[:, 20:]}]
        parts[1]["attention_mask"] = mask
    cache = LookMCache(model, budget=0.3, **options)
    with torch.no_grad():
        for part in parts:
            model(**part, past_key_values=cache)
    assert [lse is not None for lse in given] == [True] * 3 * (len(parts) - 1) + [False] * 3


@pytest.mark.parametrize("policy", ["full", "streaming"])
def test_a_policy_that_does_not_look(policy: str, given: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LogSumExp, "__enter__", lambda self: pytest.fail("nobody looks"))
    model = LLAVA.model()
    with torch.no_grad():
        model(**LLAVA.inputs([LLAVA.prompt(ROW)]), past_key_values=LookMCache(model, budget=0.3, policy=policy))
    assert not given
