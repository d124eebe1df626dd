"""Which backend runs an op, and how a backend that cannot refuses."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from inputs import OPS, arguments, public, random
from torch import Tensor

from lookm_kernels import _dispatch, attention_scores, nearest_kept
from lookm_kernels._checks import FP8
from lookm_kernels._dispatch import BACKENDS, default_backend, implementation, use_backend, why_missing


def module_of(tensor: Tensor) -> str:
    return implementation("nearest_kept", "nearest", tensor).__module__


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_can_be_forced_or_says_why_not(backend: str) -> None:
    reason = why_missing(backend)
    if reason is None:
        with use_backend(backend):
            assert module_of(random(0, 1, 1, 2, 4)) == f"lookm_kernels.{backend}.nearest"
    else:
        with pytest.raises(RuntimeError, match=f"backend {backend} is missing: {reason}"), use_backend(backend):
            pass
    assert module_of(random(0, 1, 1, 2, 4)) == "lookm_kernels.reference.nearest"


@pytest.fixture
def gpu_with_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the dispatcher would see on a GPU of compute capability 8.0, without one."""
    monkeypatch.setattr(_dispatch, "why_missing", lambda backend: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    default_backend.cache_clear()
    yield
    default_backend.cache_clear()


@pytest.mark.usefixtures("gpu_with_triton")
@pytest.mark.parametrize(
    ("dtype", "width", "backend"),
    [
        (torch.bfloat16, 128, "triton"),
        (torch.float32, 512, "triton"),
        (torch.float32, 513, "reference"),
        (torch.float64, 128, "reference"),
    ],
)
def test_a_gpu_runs_triton_for_what_it_takes(dtype: torch.dtype, width: int, backend: str) -> None:
    on_gpu = SimpleNamespace(dtype=dtype, ndim=4, shape=(1, 1, 1, width), device=torch.device("cuda", 0))
    chosen: list[str] = []
    with patch.object(importlib, "import_module", lambda name: chosen.append(name) or SimpleNamespace(run=None)):
        implementation("run", "scores", on_gpu)  # type: ignore[arg-type]
    assert chosen == [f"lookm_kernels.{backend}.scores"]


@pytest.mark.usefixtures("gpu_with_triton")
def test_float8_on_a_gpu_without_it_is_refused() -> None:
    on_gpu = SimpleNamespace(dtype=FP8, ndim=4, shape=(1, 1, 1, 128), device=torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=r"float8_e4m3fn needs a GPU of compute capability 8\.9"):
        implementation("attention_scores", "scores", on_gpu)  # type: ignore[arg-type]


@pytest.mark.usefixtures("gpu_with_triton")
def test_a_kernel_is_launched_on_the_device_of_its_tensors() -> None:
    on_gpu = SimpleNamespace(dtype=torch.float16, ndim=4, shape=(1, 1, 1, 128), device=torch.device("cuda", 3))
    entered: list[torch.device] = []
    with patch.object(torch.cuda, "device", lambda device: entered.append(device) or nullcontext()):
        assert implementation("chip", "_configs", on_gpu)(torch.device("cpu")) == "sm_90"  # type: ignore[arg-type]
    assert entered == [torch.device("cuda", 3)]


def test_a_gpu_without_triton_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "why_missing", lambda backend: "the package triton is not installed")
    default_backend.cache_clear()
    with pytest.warns(UserWarning, match="backend triton is missing: the package triton is not installed"):
        assert default_backend("cuda") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_backend("cuda") == "reference"
    default_backend.cache_clear()


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="`backend` must be one of cuda, triton, reference, got 'vulkan'"):
        use_backend("vulkan").__enter__()


@pytest.mark.skipif(why_missing("triton") is not None, reason=f"backend triton: {why_missing('triton')}")
@pytest.mark.parametrize("op", OPS)
def test_triton_refuses_float64(op: str) -> None:
    given = arguments(op)
    doubled = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()}
    with use_backend("triton"), pytest.raises(ValueError, match="backend triton: float64"):
        public(op)(**doubled)


@pytest.mark.skipif(why_missing("triton") is not None, reason=f"backend triton: {why_missing('triton')}")
def test_triton_refuses_wider_heads_than_it_has_configurations_for() -> None:
    key = random(0, 1, 1, 4, 513)
    with use_backend("triton"), pytest.raises(ValueError, match="a head dimension of 513 is above 512"):
        attention_scores(key, key)
    lists = torch.tensor([[[0, 1]]], dtype=torch.int32), torch.tensor([[[2, 3]]], dtype=torch.int32)
    with use_backend("triton"), pytest.raises(ValueError, match="a head dimension of 513 is above 512"):
        nearest_kept(key, *lists)
