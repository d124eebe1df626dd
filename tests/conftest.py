"""Fixtures shared by the tests: the device they run on, and memory that shows when it is read before it is written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("lookm", deadline=None, max_examples=150, print_blob=True)
settings.load_profile("lookm")
# small tensors: more threads mostly wait for each other, for seconds where the machine is busy
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device the ops run on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm GPU")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return NaN and the largest integer, which torch does under deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
