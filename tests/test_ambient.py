"""What is ambient in torch changes no bit: autocast, default dtype and device, inference mode, precision of matmul."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from inputs import OPS, arguments, copied, public, random, same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lookm import POLICIES, Attention, Pairs, Policy, Prompt
from lookm_kernels import attention_scores, merge_weights, nearest_kept, quantize_heads, register_rule, rules
from lookm_kernels._ambient import whole_products
from lookm_kernels.reference import nearest, scores

Ambient = Callable[[], AbstractContextManager[Any]]
FP32_PRECISION = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
REDUCED = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("fp16", "bf16")]
MATMUL = ("high", "medium")


@contextmanager
def autocast(device_type: str, dtype: torch.dtype) -> Iterator[None]:
    """As torch.autocast, which refuses the GPU where there is none."""
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    try:
        torch.set_autocast_enabled(device_type, True)
        torch.set_autocast_dtype(device_type, dtype)
        yield
    finally:
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    try:
        torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def precision(change: Callable[[], Any]) -> Iterator[None]:
    """How precisely float32 is multiplied, by one of the three ways to say so."""
    try:
        change()
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for module in FP32_PRECISION:
            module.fp32_precision = "none"


def allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def fp32_precision(name: str) -> None:
    torch.backends.fp32_precision = name


@contextmanager
def reduced_sums(allowed: bool) -> Iterator[None]:
    """What cuBLAS may add up in 16 bits."""
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in REDUCED}
    try:
        for name in REDUCED:
            setattr(matmul, name, allowed)
        yield
    finally:
        for name, was in before.items():
            setattr(matmul, name, was)


@contextmanager
def deterministic() -> Iterator[None]:
    # cuBLAS asks for a variable of the environment, which a test cannot set anymore: a warning does
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        yield
    finally:
        torch.set_num_threads(before)


LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
AMBIENT: dict[str, Ambient] = {
    **{f"autocast {place} {name}": partial(autocast, place, LOW[name]) for place in ("cpu", "cuda") for name in LOW},
    **{f"default {name}": partial(default_dtype, LOW[name]) for name in LOW},
    "default float64": partial(default_dtype, torch.float64),
    "default device": partial(torch.device, "meta"),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "allow TF32": partial(precision, allow_tf32),
    **{f"matmul {name}": partial(precision, partial(torch.set_float32_matmul_precision, name)) for name in MATMUL},
    **{f"fp32 {name}": partial(precision, partial(fp32_precision, name)) for name in ("tf32", "bf16")},
    **{f"reduced sums {allowed}": partial(reduced_sums, allowed) for allowed in (True, False)},
    "deterministic": deterministic,
    "two threads": two_threads,
}
ambients = pytest.mark.parametrize("ambient", AMBIENT.values(), ids=AMBIENT)


def check_same(run: Callable[..., Any], given: dict[str, Any], ambient: Ambient) -> None:
    """What `run` returns, and leaves in its arguments, is the same within `ambient` as outside, bit for bit."""
    results = []
    for around in (torch.no_grad, ambient):
        own = copied(given)
        with around():
            returned = run(**own)
        returned = returned if isinstance(returned, tuple) else (returned,)
        results.append([x for x in (*returned, *own.values()) if isinstance(x, Tensor)])
    assert len(results[0]) == len(results[1]) > 0
    for outside, within in zip(*results, strict=True):
        assert outside.device == within.device
        assert same_bits(outside, within)


@ambients
@pytest.mark.parametrize("op", OPS)
def test_an_op(device: torch.device, op: str, ambient: Ambient) -> None:
    check_same(public(op), arguments(op, device), ambient)


@ambients
def test_a_product_that_is_worth_reducing(device: torch.device, ambient: Ambient) -> None:
    """Of a size at which libraries take their units for bfloat16 and TF32."""
    query, key = random(0, 1, 4, 200, 64, device=device), random(1, 1, 2, 200, 64, device=device)
    check_same(attention_scores, {"query": query, "key": key}, ambient)
    order = torch.arange(200, dtype=torch.int32, device=device).expand(1, 2, -1)
    check_same(nearest_kept, {"key": key, "kept": order[..., :70], "evicted": order[..., 70:]}, ambient)


@ambients
@pytest.mark.parametrize("gate", [None, "mean_similarity"])
@pytest.mark.parametrize("rule", rules.RULES)
def test_a_rule(device: torch.device, rule: str, gate: str | None, ambient: Ambient) -> None:
    given = arguments("merge_", device)
    similarity = random(0, *given["pivot"].shape, device=device)
    given = {"rule": rule, "similarity": similarity, "pivot": given["pivot"], "kept": given["kept"], "gate": gate}
    check_same(merge_weights, given, ambient)


@ambients
def test_a_rule_that_multiplies_matrices(device: torch.device, ambient: Ambient, monkeypatch: Any) -> None:
    monkeypatch.setattr(rules, "RULES", {**rules.RULES})

    @register_rule("mixed")
    def mixed(similarity: Tensor, pivot_count: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return similarity @ (similarity.mT @ similarity), 1 / (1 + count)

    check_same(public("compress_"), arguments("compress_", device) | {"rule": "mixed"}, ambient)


@ambients
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_8_bit_floats(device: torch.device, dtype: torch.dtype, ambient: Ambient) -> None:
    start = torch.tensor([0, 3], dtype=torch.int32, device=device)
    check_same(quantize_heads, {"x": 100 * random(0, 2, 3, 13, 8, dtype=dtype, device=device), "start": start}, ambient)


@ambients
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy(device: torch.device, name: str, ambient: Ambient) -> None:
    """Its score and its classes, causal or not, with padding and without."""
    policy, tokens = POLICIES[name], 13
    query, key = random(0, 2, 6, tokens, 8, device=device), random(1, 2, 3, tokens, 8, device=device)
    start = torch.tensor([4, 0], dtype=torch.int32, device=device)
    given = {"query": query, "key": key, "image": random(2, 2, tokens, device=device) > 0, "start": start}

    def decided(query: Tensor, key: Tensor, image: Tensor, start: Tensor | None, causal: bool) -> tuple[Tensor, ...]:
        valid = None if start is None else torch.arange(tokens, device=device) >= start[:, None]
        mask = None if causal or valid is None else valid[:, None, None].expand(-1, -1, tokens, -1)
        prompt = Prompt(image, valid, [5, 6], [2, 3], [1, 0])
        weight = policy.query_weight(prompt)
        seen = Attention(
            query, key, prompt, 0.3, causal=causal, key_start=start if causal else None, mask=mask, query_weight=weight
        )
        sums = policy.score(seen)
        pairs = Pairs(prompt, key, key, sums, sums)
        pairs = replace(pairs, scores=policy.finish(pairs))
        assert pairs.scores.dtype == torch.float32
        merging = policy.merging(pairs)
        given = (policy.levels(pairs), merging.group, merging.min_similarity)
        decided = [tensor for tensor in given if isinstance(tensor, Tensor)]
        return pairs.scores, prompt.tiers(policy.text_prior), *decided

    for causal in (True, False):
        check_same(decided, given | {"causal": causal}, ambient)
        check_same(decided, given | {"causal": causal, "start": None}, ambient)


@ambients
@pytest.mark.parametrize("queries", ["text", "sampled"])
def test_the_queries_of_a_policy(device: torch.device, queries: str, ambient: Ambient) -> None:
    image = random(2, 2, 13, device=device) > 0
    weight = Policy(queries=queries, stride=3).query_weight

    def of(image: Tensor) -> Tensor | None:
        return weight(Prompt(image, None, [5, 6], [2, 3], [1, 0]))

    check_same(of, {"image": image}, ambient)


@pytest.mark.parametrize("op", [*OPS, "merge_weights"])
def test_compiled_within_autocast(device: torch.device, op: str) -> None:
    given, function = arguments(op if op in OPS else "merge_", device), public(op)
    if op == "merge_weights":
        similarity = random(0, *given["pivot"].shape, device=device)
        given = {"rule": "weighted", "similarity": similarity, "pivot": given["pivot"], "kept": given["kept"]}
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=op in OPS, backend="aot_eager")
    goal, result = copied(given), copied(given)
    expected = function(**goal)
    with autocast(device.type, torch.bfloat16):
        came = compiled(**result)
    for ours, theirs in zip([came, result], [expected, goal], strict=True):
        for x, y in zip(*(tree_leaves(tree) for tree in (ours, theirs)), strict=True):
            assert not isinstance(x, Tensor) or same_bits(x, y)


def settings() -> list[str]:
    return [module.fp32_precision for module in FP32_PRECISION]


class Precisions(TorchDispatchMode):
    """The precision that a product of float32 on a CPU may have, noted at every product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            self.seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("inherited", [False, True])
@pytest.mark.parametrize("run", [scores.attention_scores, nearest.nearest_kept])
def test_the_reference_multiplies_whole_numbers(run: Callable[..., Any], inherited: bool) -> None:
    """Whatever the processor does with less: torch is told not to, and finds its settings as they were."""
    change = partial(fp32_precision, "bf16") if inherited else partial(torch.set_float32_matmul_precision, "medium")
    with precision(change):
        before = settings()
        with Precisions() as precisions:
            run(**arguments(run.__name__))
        assert set(precisions.seen) == {"ieee"}
        assert settings() == before
        if inherited:
            torch.backends.fp32_precision = "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        else:
            assert torch.get_float32_matmul_precision() == "medium"


def test_the_precision_returns_when_the_last_thread_is_done() -> None:
    """Two ops at once, of which the first ends first."""
    first, second, cpu = ExitStack(), ExitStack(), torch.device("cpu")
    with precision(partial(torch.set_float32_matmul_precision, "medium")):
        first.enter_context(whole_products(cpu))
        second.enter_context(whole_products(cpu))
        first.close()
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        second.close()
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
