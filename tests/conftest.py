"""Fixtures shared by the tests: the device they run on, and memory that shows when it is read before it is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from emulator import Emulator, emulated, why_not_built
from hypothesis import settings
from inputs import INTERPRETED

from lookm_kernels import _dispatch, _native
from lookm_kernels._dispatch import use_backend, why_missing

settings.register_profile("lookm", deadline=None, max_examples=150, print_blob=True)
# the interpreter takes milliseconds for every program of a kernel
settings.register_profile("interpreted", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("interpreted" if INTERPRETED else "lookm")
# small tensors: more threads mostly wait for each other, for seconds where the machine is busy
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def papers_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that names no policy is of the paper's method; those of the default name it."""
    if "lookm.cache" in sys.modules:
        monkeypatch.setattr(sys.modules["lookm.cache"], "DEFAULT_POLICY", "lookm")


ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cuda-kernels", "cuda-reference")]
DEVICES = ["triton"] if INTERPRETED else ["cpu", *ON_GPU]
# the modules that test an op written in CUDA C++, and what holds for every op
OF_CSRC = {
    "test_select",
    "test_merge",
    "test_pivots_and_votes",
    "test_compact",
    "test_compress",
    "test_ops",
    "test_ambient",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The devices of a test that asks for one."""
    if "device" in metafunc.fixturenames:
        emulated = ["emulated"] if metafunc.module.__name__ in OF_CSRC and not INTERPRETED else []
        metafunc.parametrize("device", [*DEVICES, *emulated], indirect=True, scope="module")


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device the ops run on: a GPU with its default backend, Triton, with the kernels in CUDA C++ for all they
    take, and with the reference; the CPU with the reference, and with the kernels of csrc/ emulated.

    Under TRITON_INTERPRET=1 the CPU, on which the Triton kernels then run instead.
    """
    place, _, backend = request.param.partition("-")
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm GPU")
    if place == "triton":
        if why_missing("triton"):
            pytest.skip(f"backend triton: {why_missing('triton')}")
        place, backend = "cpu", "triton"
    if place == "emulated":
        place, backend = "cpu", "kernels"
        request.getfixturevalue("emulator")
    if backend == "kernels" and why_missing("cuda"):
        pytest.skip(f"backend cuda: {why_missing('cuda')}")
    with prefer_csrc() if backend == "kernels" else use_backend(backend) if backend else nullcontext():
        yield torch.device(place)


@contextmanager
def prefer_csrc() -> Iterator[None]:
    """The kernels in CUDA C++ run whatever they take; use_backend would refuse the rest."""
    before = _dispatch.preferred_backend

    def preferred(module: str, device: torch.device) -> str:
        return "cuda" if _dispatch.has_op("cuda", module) else before(module, device)

    with patch.object(_dispatch, "preferred_backend", preferred):
        yield


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    """The extension is that of tests/emulator, whose kernels run on tensors of the CPU."""
    if why_not_built():
        pytest.skip(str(why_not_built()))
    found = emulated()
    with patch.object(_native, "load", lambda: found.module):
        yield found


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return NaN and the largest integer, which torch does under deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
