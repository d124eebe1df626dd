"""Fixtures of the GPU benchmarks: the record of a file, and the backend its ops run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timing

from lookm_kernels import use_backend


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[timing.Record]:
    """The rows of one file; its ops run on the backend under test."""
    if not timing.ON_GPU and not timing.SMALL:
        pytest.skip("needs a GPU; LOOKM_BENCH_SIZE=small runs it on a processor")
    name = request.module.__name__.removeprefix("bench_")
    with use_backend(timing.BACKEND):
        yield timing.Record(name)
