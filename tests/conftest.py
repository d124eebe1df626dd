"""Fixtures shared by the tests: the device they run on, and memory that shows when it is read before it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import settings
from inputs import INTERPRETED

from lookm_kernels._dispatch import use_backend, why_missing

settings.register_profile("lookm", deadline=None, max_examples=150, print_blob=True)
# the interpreter takes milliseconds for every program of a kernel
settings.register_profile("interpreted", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("interpreted" if INTERPRETED else "lookm")
# small tensors: more threads mostly wait for each other, for seconds where the machine is busy
torch.set_num_threads(1)


ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cuda-reference")]
DEVICES = ["triton"] if INTERPRETED else ["cpu", *ON_GPU]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device the ops run on, a GPU with its default backend, Triton, and with the reference.

    Under TRITON_INTERPRET=1 the CPU, on which the Triton kernels then run instead.
    """
    place, _, backend = request.param.partition("-")
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm GPU")
    if place == "triton":
        if why_missing("triton"):
            pytest.skip(f"backend triton: {why_missing('triton')}")
        place, backend = "cpu", "triton"
    with use_backend(backend) if backend else nullcontext():
        yield torch.device(place)


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return NaN and the largest integer, which torch does under deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
