"""compact_: kept rows come first, bit for bit, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import (
    EXACT,
    LAYOUTS,
    LOW_PRECISION,
    MIXED,
    check_outs,
    laid_out,
    memory,
    only_written,
    random,
    same_bits,
    tiers,
)
from torch import Tensor

from lookm_kernels import compact_, select_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(key: Tensor, value: Tensor, kept: Tensor) -> None:
    """Row i holds what row kept[i] held, 0 where kept[i] is -1; the rows behind and the memory around are untouched."""
    tensors = (key, value)
    check_outs(lambda *pair, **outs: compact_(*pair, kept, **outs), key, value, kept.shape[2])
    before = [(x.clone(), memory(x).clone()) for x in tensors]
    assert compact_(key, value, kept) is None
    for x, (was, was_memory) in zip(tensors, before, strict=True):
        for row, head, place in torch.cartesian_prod(*(torch.arange(size) for size in kept.shape)).tolist():
            source = int(kept[row, head, place])
            goal = was[row, head, source] if source >= 0 else torch.zeros_like(was[row, head, 0])
            assert same_bits(x[row, head, place], goal)
        written = torch.zeros_like(x, dtype=torch.bool)
        written[:, :, : kept.shape[-1]] = True
        assert only_written(x, was_memory, written)


@given(data=st.data())
def test_moves_rows(device: torch.device, data: st.DataObject) -> None:
    batch, heads, tokens, width, value_width = (data.draw(st.integers(1, top)) for top in (2, 2, 20, 9, 9))
    keep = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    seed, layout = data.draw(st.integers(0, 2**31)), st.sampled_from(LAYOUTS)
    shape, dtype = (batch, heads, tokens), st.sampled_from([*LOW_PRECISION, *EXACT])
    key = laid_out(random(seed, *shape, width, dtype=data.draw(dtype), device=device), data.draw(layout))
    value = laid_out(random(seed + 1, *shape, value_width, dtype=data.draw(dtype), device=device), data.draw(layout))
    tier = tiers(seed, batch, tokens, device)
    check(key, value, select_tokens(random(seed, batch, heads, tokens, device=device), tier, keep)[0])


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_each_in_its_own_dtype(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    key = laid_out(random(0, 2, 2, 255, 64, dtype=dtypes[0], device=device), "heads_last")
    value = laid_out(random(1, 2, 2, 255, 24, dtype=dtypes[1], device=device), "window")
    check(key, value, select_tokens(random(2, 2, 2, 255, device=device), tiers(0, 2, 255, device), [60, 50])[0])


@pytest.mark.parametrize(("tokens", "keep"), [(1, 1), (17, 16), (255, 17), (507, 255)])
def test_odd_sizes(device: torch.device, tokens: int, keep: int) -> None:
    key, value = (laid_out(random(seed, 1, 1, tokens, 64, device=device), "window") for seed in (0, 1))
    check(key, value, select_tokens(random(2, 1, 1, tokens, device=device), tiers(0, 1, tokens, device), keep)[0])


def test_numbers_that_are_not_numbers_move_too(device: torch.device) -> None:
    key = torch.tensor([1.0, float("nan"), float("inf"), -0.0], device=device).view(1, 1, 4, 1)
    check(key, key.clone(), torch.tensor([[[1, 2, 3]]], dtype=torch.int32, device=device))


def test_everything_kept_changes_nothing(device: torch.device) -> None:
    key, value = random(0, 2, 3, 255, 8, device=device), random(1, 2, 3, 255, 8, device=device)
    before = key.clone(), value.clone()
    compact_(key, value, torch.arange(255, dtype=torch.int32, device=device).expand(2, 3, -1))
    assert same_bits(key, before[0])
    assert same_bits(value, before[1])
