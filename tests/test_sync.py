"""Nothing waits for the device between a layer's prefill attention and the end of its compression."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE
from transformers import LlamaConfig, LlamaForCausalLM

from lookm import POLICIES, LookMCache
from lookm.layer import LookMLayer
from lookm_kernels._dispatch import why_missing, why_no_float8

LLAVA, QWEN = FAMILIES["llava"], FAMILIES["qwen3"]
# results on the host, shapes that depend on data, and numbers or lists that come from the host
WAITING_OPS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::lift_fresh",
    "aten::_unique2", "aten::unique_dim", "aten::bincount", "aten::repeat_interleave",
}  # fmt: skip
# what on a CPU tensor never reaches the dispatcher
WAITING_FUNCTIONS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.tensor, torch.as_tensor, torch.Tensor.cpu}


class HostReads:
    """Counts, or refuses, what would wait on a GPU; `lookm::` ops are left to their own tests."""

    def __init__(self) -> None:
        self.count, self.refusing = 0, False

    def met(self, name: str) -> None:
        self.count += 1
        if self.refusing:
            raise AssertionError(f"{name} waits for the device")

    @contextmanager
    def watching(self) -> Iterator[None]:
        reads = self

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func in WAITING_FUNCTIONS:
                    reads.met(func.__name__)
                return func(*args, **kwargs or {})

        class Ops(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                name = func._schema.name
                indices = args[1] if name.startswith("aten::index") and isinstance(args[1], (list, tuple)) else ()
                if name in WAITING_OPS or any(i is not None and i.dtype == torch.bool for i in indices):
                    reads.met(name)
                return func(*args, **kwargs or {})

        with Functions(), Ops():
            yield


@contextmanager
def no_read_after_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Refuses them from the end of every attention call to the end of LookMLayer.attend; yields the layers met."""
    attend, layers = LookMLayer.attend, []

    def guarded(self: LookMLayer, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        reads = HostReads()

        def then_refuse(*inner_args: Any, **inner_kwargs: Any) -> Any:
            output = inner(*inner_args, **inner_kwargs)
            reads.refusing = True
            return output

        with reads.watching():
            output = attend(self, then_refuse, *args, **kwargs)
        layers.append(self.stored)
        return output

    monkeypatch.setattr(LookMLayer, "attend", guarded)
    yield layers


def test_the_guard_sees_what_waits():
    numbers, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    waiting: list[Callable[[], Any]] = [
        lambda: numbers.tolist(), lambda: float(numbers[0]), lambda: bool(mask.all()), lambda: numbers[mask],
        lambda: torch.tensor([1, 2]), lambda: mask.nonzero(), lambda: torch.equal(numbers, numbers),
        lambda: numbers.unique(), lambda: numbers.masked_select(mask), lambda: numbers.repeat_interleave(mask.long()),
    ]  # fmt: skip
    for wait in waiting:
        reads = HostReads()
        reads.refusing = True
        with reads.watching(), pytest.raises(AssertionError, match="waits for the device"):
            wait()
    reads = HostReads()
    with reads.watching():
        torch.where(mask, numbers, 0.0).cumsum(0).masked_fill(mask, 1)
    assert reads.count == 0


def rows(*layouts: tuple, family=LLAVA, device: str = "cpu") -> dict[str, Tensor]:
    inputs = family.inputs([family.prompt(layout, seed) for seed, layout in enumerate(layouts)])
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def in_parts(inputs: dict[str, Tensor], *ends: int) -> list[dict[str, Tensor]]:
    """Forwards over the tokens up to each of the ends; the mask grows with them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return [
        {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        for start, end in zip((0, *ends[:-1]), ends, strict=True)
    ]


RAGGED = ((9, IMAGE, 12), (5, IMAGE, 4))
TEXTS = partial(rows, (30,), (21,), family=QWEN)


def one_row(**_: Any) -> list[dict[str, Tensor]]:
    return [rows(RAGGED[0], **_)]


def left(**_: Any) -> list[dict[str, Tensor]]:
    return [rows(*RAGGED, **_)]


def holes(**_: Any) -> list[dict[str, Tensor]]:
    (inputs,) = left(**_)
    inputs["attention_mask"][0, [3, 38]] = 0
    return [inputs]


def four_dimensions(**_: Any) -> list[dict[str, Tensor]]:
    inputs = TEXTS(**_)
    seen = torch.ones(30, 30, dtype=torch.bool, device=inputs["input_ids"].device).tril()
    return [inputs | {"attention_mask": seen & inputs["attention_mask"][:, None, None].bool()}]


def chunks(**_: Any) -> list[dict[str, Tensor]]:
    return in_parts(TEXTS(**_), 13, 22, 30)


def turns(**_: Any) -> list[dict[str, Tensor]]:
    return in_parts(TEXTS(**_), 16, 30)


CASES: dict[str, tuple[Any, Callable[..., list[dict[str, Tensor]]], dict[str, Any]]] = {
    "one row": (LLAVA, one_row, {"budget": 0.3}),
    "left padding": (LLAVA, left, {"budget": 0.3}),
    "padding anywhere": (LLAVA, holes, {"budget": 0.3}),
    "a 4D mask": (QWEN, four_dimensions, {"budget": 0.3}),
    "a number of tokens": (LLAVA, left, {"budget": 12}),
    "bytes": (LLAVA, left, {"budget": "32KiB"}),
    "protected text": (LLAVA, left, {"budget": 0.3, "protect_text": True, "sinks": 2}),
    "text queries": (LLAVA, left, {"budget": 0.3, "queries": "text"}),
    "sampled queries": (LLAVA, one_row, {"budget": 0.3, "queries": "sampled"}),
    "8-bit floats": (LLAVA, left, {"budget": 0.3, "fp8": True, "queries": "sampled"}),
    "chunks": (QWEN, chunks, {"budget": 0.3, "prompt_length": 30}),
    "segments": (QWEN, turns, {"budget": 0.3, "later_turns": "segment"}),
    # the budget of a layer that follows from its scores is a number of the host
    **{name: (LLAVA, left, {"budget": 0.3, "policy": name}) for name, policy in POLICIES.items() if not policy.uneven},
}


@torch.no_grad()
def read(model: Any, cache: LookMCache, forwards: list[dict[str, Tensor]]) -> None:
    for inputs in forwards:
        model(**inputs, past_key_values=cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_no_layer_waits_after_its_attention(case: str, attention: str, monkeypatch: pytest.MonkeyPatch):
    family, forwards, options = CASES[case]
    if case == "a 4D mask" and attention == "eager":
        pytest.skip("eager attention takes additive masks only")
    model = family.model(attention)
    cache = LookMCache(model, **options)
    with no_read_after_attention(monkeypatch) as layers:
        read(model, cache, forwards())
    assert len(layers) == 3 * len(forwards())
    assert cache.report().mean()["evicted"] > 0 or options.get("policy") == "full"


def deep(layers: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, num_hidden_layers=layers)).eval()


@pytest.mark.parametrize("case", ["one row", "left padding", "padding anywhere", "a 4D mask", "chunks", "segments"])
@pytest.mark.parametrize("options", [{}, {"protect_text": True}, {"queries": "text"}], ids=str)
def test_reads_do_not_grow_with_the_layers(case: str, options: dict):
    """Whatever the rows and the forwards, two layers read what six do."""
    _, forwards, given = CASES[case]
    counts = []
    for layers in (2, 6):
        model, reads = deep(layers), HostReads()
        texts = [{name: x for name, x in inputs.items() if name != "pixel_values"} for inputs in forwards()]
        cache = LookMCache(model, **given, **options, image_mask=rows(*RAGGED)["input_ids"][:1] == 120)
        with reads.watching():
            read(model, cache, texts)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.gpu
@pytest.mark.skipif(bool(why_missing("triton")), reason=f"the reference waits; backend triton: {why_missing('triton')}")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
@pytest.mark.parametrize("case", CASES)
def test_no_layer_waits_for_the_gpu_after_its_attention(case: str, monkeypatch: pytest.MonkeyPatch):
    if case == "8-bit floats" and why_no_float8(torch.device("cuda")):
        pytest.skip("needs compute capability 8.9 to multiply float8_e4m3fn; the reference waits")
    family, forwards, options = CASES[case]
    model, attend = copy.deepcopy(family.model()).to("cuda"), LookMLayer.attend

    def guarded(self: LookMLayer, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def then_refuse(*inner_args: Any, **inner_kwargs: Any) -> Any:
            output = inner(*inner_args, **inner_kwargs)
            torch.cuda.set_sync_debug_mode("error")
            return output

        try:
            return attend(self, then_refuse, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    # once for the kernels, which wait while they are compiled and loaded
    read(model, LookMCache(model, **options), forwards(device="cuda"))
    monkeypatch.setattr(LookMLayer, "attend", guarded)
    cache = LookMCache(model, **options)
    read(model, cache, forwards(device="cuda"))
    assert cache.report().mean()["evicted"] > 0 or options.get("policy") == "full"
