"""Which backend runs an op, and how a backend that cannot refuses."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from inputs import INTERPRETED, OPS, arguments, public, random
from torch import Tensor

import lookm_kernels
from lookm_kernels import _dispatch, _native, attention_scores, nearest_kept
from lookm_kernels._checks import FP8
from lookm_kernels._dispatch import (
    BACKENDS,
    backend_of_process,
    default_backend,
    implementation,
    preferred_backend,
    use_backend,
    why_missing,
)


def module_of(tensor: Tensor) -> str:
    return implementation("select_tokens", "select", tensor).__module__


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_can_be_forced_or_says_why_not(backend: str) -> None:
    reason = why_missing(backend)
    if reason is None:
        with use_backend(backend):
            assert module_of(random(0, 1, 1, 2, 4)) == f"lookm_kernels.{backend}.select"
    else:
        with (
            pytest.raises(RuntimeError, match=re.escape(f"backend {backend} is missing: {reason}")),
            use_backend(backend),
        ):
            pass
    assert module_of(random(0, 1, 1, 2, 4)) == "lookm_kernels.reference.select"


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
        # which the interpreter computes wrongly
        (torch.bfloat16, 128, "reference" if INTERPRETED else "triton"),
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
    backend = SimpleNamespace(run=lambda *arguments: (entered[:], arguments))
    with (
        patch.object(importlib, "import_module", lambda name: backend),
        patch.object(torch.cuda, "device", lambda device: entered.append(device) or nullcontext()),
    ):
        result = implementation("run", "scores", on_gpu)(1, 2)  # type: ignore[arg-type]
    assert result == ([torch.device("cuda", 3)], (1, 2))
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


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """LOOKM_BACKEND is read anew in the test and after it."""
    backend_of_process.cache_clear()
    yield monkeypatch
    backend_of_process.cache_clear()


def test_the_environment_chooses_a_backend(environment: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    environment.setenv("LOOKM_BACKEND", "triton")
    environment.setattr(_dispatch, "why_missing", lambda backend: None)
    environment.setattr(importlib, "import_module", lambda name: chosen.append(name) or SimpleNamespace(run=None))
    implementation("run", "scores", random(0, 1, 1, 2, 4))
    environment.setenv("LOOKM_BACKEND", "reference")
    implementation("run", "scores", random(0, 1, 1, 2, 4))
    with use_backend("reference"):
        implementation("run", "scores", random(0, 1, 1, 2, 4))
    assert chosen == [f"lookm_kernels.{backend}.scores" for backend in ("triton", "triton", "reference")]


def test_the_environment_is_refused_as_loudly(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("LOOKM_BACKEND", "vulkan")
    with pytest.raises(ValueError, match="`LOOKM_BACKEND` must be one of cuda, triton, reference, got 'vulkan'"):
        nearest_kept(**arguments("nearest_kept"))
    environment.setenv("LOOKM_BACKEND", "triton")
    environment.setattr(_dispatch, "why_missing", lambda backend: "there is none")
    with pytest.raises(RuntimeError, match="backend triton is missing: there is none"):
        nearest_kept(**arguments("nearest_kept"))
    environment.setenv("LOOKM_BACKEND", "")
    assert backend_of_process() is None


@pytest.mark.usefixtures("gpu_with_triton")
def test_a_faster_backend_is_preferred_where_it_was_measured_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert preferred_backend("select", gpu) == "triton"
    monkeypatch.setitem(_dispatch.FASTER, ("select", (8, 0)), ("cuda", "this test"))
    assert preferred_backend("select", gpu) == "cuda"
    assert preferred_backend("merge", gpu) == "triton"
    assert preferred_backend("select", torch.device("cpu")) == "reference"
    monkeypatch.setattr(_dispatch, "why_missing", lambda backend: "no" if backend == "cuda" else None)
    assert preferred_backend("select", gpu) == "triton"


@pytest.mark.filterwarnings("ignore:lookm_kernels. the slow reference runs")
@pytest.mark.usefixtures("gpu_with_triton")
def test_csrc_runs_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "why_missing", lambda backend: "no" if backend == "triton" else None)
    assert preferred_backend("select", torch.device("cuda", 0)) == "cuda"
    assert preferred_backend("scores", torch.device("cuda", 0)) == "reference"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="`backend` must be one of cuda, triton, reference, got 'vulkan'"):
        use_backend("vulkan").__enter__()


@pytest.mark.skipif(why_missing("triton") is not None, reason=f"backend triton: {why_missing('triton')}")
@pytest.mark.parametrize("op", OPS)
def test_triton_refuses_float64(op: str) -> None:
    given = arguments(op)
    # votes are float32 whatever the pairs are
    floats = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    doubled = given | {name: x.double() for name, x in floats.items() if "votes" not in name}
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


def test_triton_refuses_bfloat16_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any tensor; without being asked for, it leaves it to the reference."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_dispatch, "why_missing", lambda backend: None)
    chosen: list[str] = []
    monkeypatch.setattr(importlib, "import_module", lambda name: chosen.append(name) or SimpleNamespace(merge_=None))
    key, value = random(0, 1, 1, 2, 4), random(1, 1, 1, 2, 4, dtype=torch.bfloat16)
    message = r"backend triton: bfloat16, which its interpreter multiplies and rounds wrongly \(TRITON_INTERPRET=1\)"
    with use_backend("triton"):
        implementation("merge_", "merge", key, value.half())
        for tensors in ((key, value), (value, key)):
            with pytest.raises(ValueError, match=message):
                implementation("merge_", "merge", *tensors)
    monkeypatch.setattr(_dispatch, "preferred_backend", lambda module, device: "triton")
    implementation("merge_", "merge", key, value)
    assert chosen == ["lookm_kernels.triton.merge", "lookm_kernels.reference.merge"]


@pytest.fixture
def load_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`_native.load` forgets what it found, before the test and after it."""
    monkeypatch.delitem(sys.modules, "lookm_kernels._C", raising=False)
    _native.load.cache_clear()
    yield
    _native.load.cache_clear()


@pytest.mark.usefixtures("load_anew")
def test_a_broken_extension_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.abi3.so").write_bytes(b"")
    monkeypatch.setattr(lookm_kernels, "__path__", [str(tmp_path), *lookm_kernels.__path__])
    assert "the CUDA extension does not load: " in str(why_missing("cuda"))
    with pytest.raises(RuntimeError, match="backend cuda is missing: the CUDA extension does not load"):
        use_backend("cuda").__enter__()


@pytest.mark.usefixtures("load_anew")
def test_a_missing_extension_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # an editable installation finds its modules whatever the path of the package
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("lookm_kernels._build.__file__", str(tmp_path / "_build.py"))
    assert str(why_missing("cuda")).startswith("the CUDA extension was not built: this is a checkout")
    (tmp_path / "_build.json").write_text('{"archs": ["80"], "cuda": "13.0"}')
    _native.load.cache_clear()
    assert why_missing("cuda") == "the CUDA extension for sm_80 with CUDA 13.0 is not there for this Python"


@pytest.mark.skipif(_native.why_missing() is not None, reason=str(_native.why_missing()))
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_extension_without_a_gpu() -> None:
    """It loads, knows why it cannot run, and its launchers raise rather than crash."""
    assert _native.device_type() == "cuda"
    assert why_missing("cuda") == "torch sees no GPU"
    module = _native.load()
    rows = (256, (64, 64, 8), 8, 0)
    with pytest.raises(RuntimeError, match=r"select \(B=1 H=8 N=32768 K=5 E=32763\): .+ \[cudaError\w+\]"):
        module.select(256, 256, 0, 256, 256, 1, 8, 32768, 5, 5, 32763, 0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"merge's workspace \(B=1 H=8 K=5 E=32763\): .+ \[cudaError\w+\]"):
        module.merge_workspace(1, 8, 5, 32763, 8, 8)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"merge \(B=1 H=8 N=9 K=3 .+\): .+ \[cudaError\w+\]"):
        module.merge(*(4 * [rows]), *(7 * [256]), 1, 8, 9, 3, 6, 256, 1 << 20, 0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"kernels \(on the current device\): .+ \[cudaError\w+\]"):
        module.can_run()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"compact \(B=1 H=8 N=9 K=3 .+\): .+ \[cudaError\w+\]"):
        module.compact(*(4 * [rows]), 256, 1, 8, 9, 3, 0)  # type: ignore[union-attr]
