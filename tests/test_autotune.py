"""LOOKM_AUTOTUNE=1: the fastest tile runs, timed once for every dtype and shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import INTERPRETED, random

from lookm_kernels import attention_scores, nearest_kept, use_backend

triton = pytest.importorskip("triton", reason="the package triton is not installed")
if not INTERPRETED:
    pytest.skip("runs the kernels: under TRITON_INTERPRET=1", allow_module_level=True)

from lookm_kernels.triton import _configs, _lse, nearest, scores  # noqa: E402


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every tile's time in turn falls, so that the last one tried wins; the list of times that were taken."""
    times: list[float] = []

    def time(function: Any, **options: Any) -> float:
        function()
        times.append(-float(len(times)))
        return times[-1]

    monkeypatch.setenv("LOOKM_AUTOTUNE", "1")
    monkeypatch.setattr(triton.testing, "do_bench", time)
    monkeypatch.setattr(_configs, "_fastest", {})
    return times


def test_the_fastest_tile_runs_and_is_measured_once_a_shape(timed: list[float]) -> None:
    query, key = random(0, 1, 2, 33, 16), random(1, 1, 1, 33, 16)
    with use_backend("triton"):
        found = attention_scores(query, key)
        taken = len(timed)
        again = attention_scores(query, key)
        assert taken == len(timed) > len(_lse.CANDIDATES)
        attention_scores(query[:, :, 1:], key)
        assert len(timed) == 2 * taken
    assert torch.equal(found, again)
    torch.testing.assert_close(found, attention_scores(query, key), rtol=1e-5, atol=1e-5)
    assert set(_configs._fastest.values()) == {_lse.CANDIDATES[-1], scores.CANDIDATES[-1]}


def test_every_tile_gives_the_same_pivots(timed: list[float]) -> None:
    key = random(0, 1, 2, 200, 16)
    kept, evicted = (torch.arange(200)[rows].int().expand(1, 2, -1) for rows in (slice(0, None, 3), slice(1, None, 3)))
    goal = nearest_kept(key, kept, evicted)
    with use_backend("triton"):
        pivot, similarity = nearest_kept(key, kept, evicted)
    assert torch.equal(pivot, goal[0])
    torch.testing.assert_close(similarity, goal[1], rtol=1e-5, atol=1e-5)
    assert list(_configs._fastest.values()) == [nearest.CANDIDATES[-1]]


def test_a_tile_that_does_not_fit_is_passed_over(timed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    fits, too_large = _configs.Config(16, 32, 4, 1), _configs.Config(512, 512, 4, 1)

    def run(config: _configs.Config) -> None:
        if config == too_large:
            raise triton.runtime.errors.OutOfResources(300000, 232448, "shared memory")

    _configs.launch("test", nearest.CONFIGS, [fits, too_large], random(0, 1, 1, 1, 64), (1,), run)
    assert list(_configs._fastest.values()) == [fits]


def test_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOOKM_AUTOTUNE", raising=False)
    monkeypatch.setattr(triton.testing, "do_bench", pytest.fail)
    ran: list[_configs.Config] = []
    half = random(0, 1, 1, 1, 128, dtype=torch.float16)
    for tensor in (half, half.float()):
        _configs.launch("test", nearest.CONFIGS, nearest.CANDIDATES, tensor, (1,), ran.append)
    assert ran == [nearest.CONFIGS["sm_90"][256], _configs.FLOAT32[512]]
