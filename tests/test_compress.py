"""compress_: the five steps as one op."""

from __future__ import annotations

from typing import Any

import loops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import (
    EXACT,
    INTERPRETED,
    LAYOUTS,
    LOW_PRECISION,
    check_outs,
    laid_out,
    memory,
    moved,
    only_written,
    random,
    same_bits,
    tiers,
)
from torch import Tensor

from lookm_kernels import compact_, compress_, merge_, merge_weights, nearest_kept, rules, select_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")

VARIANTS = [(rule, gate) for rule in rules.RULES for gate in (None, *rules.GATES)]


def step_by_step(
    key: Tensor, value: Tensor, scores: Tensor, tier: Tensor, keep: list[int], rule: str, gate: str | None
) -> Tensor:
    """The five public functions one after the other."""
    kept, evicted = select_tokens(scores, tier, keep)
    pivot, similarity = nearest_kept(key, kept, evicted)
    merge_(key, value, kept, evicted, pivot, *merge_weights(rule, similarity, pivot, kept, gate))
    compact_(key, value, kept)
    return kept


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """One layer with tied scores, padding, per-row budgets and any layout, on the CPU.

    Keys have two numbers at least: all cosines of keys of one are 1 or -1, and rounding decides.
    """
    batch, heads, tokens, value_width = (draw(st.integers(1, top)) for top in (2, 3, 30, 9))
    width = draw(st.integers(2, 16))
    seed, layout = draw(st.integers(0, 2**31)), st.sampled_from(LAYOUTS)
    dtype = draw(st.sampled_from(EXACT))
    return {
        "key": laid_out(random(seed, batch, heads, tokens, width, dtype=dtype), draw(layout)),
        "value": laid_out(random(seed + 1, batch, heads, tokens, value_width, dtype=dtype), draw(layout)),
        "scores": random(seed + 2, batch, heads, tokens).mul(2).round(),
        "tier": tiers(seed, batch, tokens),
        "keep": draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch)),
    }


def on(device: torch.device, layer: dict[str, Any]) -> dict[str, Any]:
    """The layer on a device, memory layout kept."""
    return {name: moved(value, device) if isinstance(value, Tensor) else value for name, value in layer.items()}


@given(layer=layers(), variant=st.sampled_from(VARIANTS))
def test_is_the_five_steps(device: torch.device, layer: dict[str, Any], variant: tuple[str, str | None]) -> None:
    layer = on(device, layer)
    steps = {**layer, "key": layer["key"].clone(), "value": layer["value"].clone()}
    call = [layer[name] for name in ("scores", "tier", "keep")]
    keep = max(layer["keep"])
    check_outs(lambda *pair, **outs: compress_(*pair, *call, *variant, **outs), layer["key"], layer["value"], keep)
    written = torch.ones(layer["tier"].shape, dtype=torch.bool, device=device)[:, None, :, None]
    before = [(x, memory(x).clone()) for x in (layer["key"], layer["value"])]
    kept = compress_(**layer, rule=variant[0], gate=variant[1])
    assert same_bits(kept, step_by_step(**steps, rule=variant[0], gate=variant[1]))
    for x, was in before:
        assert only_written(x, was, written.expand_as(x))
    for name in ("key", "value"):
        assert same_bits(layer[name][:, :, : kept.shape[-1]], steps[name][:, :, : kept.shape[-1]])


@given(layer=layers(), variant=st.sampled_from(VARIANTS))
def test_equals_loops(device: torch.device, layer: dict[str, Any], variant: tuple[str, str | None]) -> None:
    """In float64 where there is: there no two different cosines of random keys are so close that rounding decides."""
    rule, gate = variant
    exact, tolerance = EXACT[-1], 1e-11 if EXACT[-1] == torch.float64 else 1e-5
    layer = {**layer, "key": layer["key"].to(exact), "value": layer["value"].to(exact)}
    ours = on(device, {**layer, "key": layer["key"].clone(), "value": layer["value"].clone()})
    kept = compress_(**ours, rule=rule, gate=gate).cpu()
    heads = range(kept.shape[1])
    for row, keep in enumerate(layer["keep"]):
        chosen = [loops.select(layer["scores"][row, h], layer["tier"][row].tolist(), keep) for h in heads]
        stay, leave = len(chosen[0][0]), len(chosen[0][1])
        empty = kept.shape[-1] - stay
        assert kept[row].tolist() == [[-1] * empty + list(stays) for stays, _ in chosen]
        pivots = [loops.nearest(layer["key"][row, h], *chosen[h]) if stay else ([], []) for h in heads]
        similarity = torch.tensor([cosines for _, cosines in pivots], dtype=torch.float64)
        gated = loops.gate(similarity) if gate and stay and leave else None
        for name in ("key", "value"):
            x, result = layer[name][row], ours[name][row].cpu()
            assert not result[:, :empty].any()
            for h in heads:
                goal = loops.merge(x[h], *chosen[h], *pivots[h], rule, gated)
                own = result[h, empty : kept.shape[-1]].double()
                torch.testing.assert_close(own, goal, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("rule", "gate"), VARIANTS)
@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32])
def test_everything_kept_changes_no_bit(device: torch.device, dtype: torch.dtype, rule: str, gate: str | None) -> None:
    key, value = (random(seed, 2, 3, 17, 8, dtype=dtype, device=device) for seed in (0, 1))
    before = key.clone(), value.clone()
    tier = torch.ones(2, 17, dtype=torch.int32, device=device)
    kept = compress_(key, value, random(2, 2, 3, 17, device=device), tier, 17, rule, gate)
    assert kept.tolist() == [[list(range(17))] * 3] * 2
    assert same_bits(key, before[0])
    assert same_bits(value, before[1])


@pytest.mark.parametrize(("rule", "gate"), VARIANTS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("tokens", [1, 17, 255] if INTERPRETED else [1, 17, 255, 507])
def test_low_precision_rounds_once(
    device: torch.device, tokens: int, dtype: torch.dtype, rule: str, gate: str | None
) -> None:
    """The same 16-bit inputs in float32 give, rounded, the same cache to one unit in the last place."""
    key, value = (random(seed, 2, 3, tokens, 64, dtype=dtype, device=device) for seed in (0, 1))
    exact = key.float(), value.float()
    call = random(2, 2, 3, tokens, device=device), tiers(0, 2, tokens, device), max(1, tokens // 5), rule, gate
    kept = compress_(key, value, *call)
    assert same_bits(kept, compress_(*exact, *call))
    for x, goal in zip((key, value), exact, strict=True):
        ours, goal = x[:, :, : kept.shape[-1]].float(), goal[:, :, : kept.shape[-1]]
        torch.testing.assert_close(ours, goal, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("rule", "gate"), VARIANTS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_values_of_another_dtype(device: torch.device, dtype: torch.dtype, rule: str, gate: str | None) -> None:
    """Keys and the choice of tokens are those beside values of the keys' dtype; the values are rounded once."""
    key, value = random(0, 2, 3, 40, 64, device=device), random(1, 2, 3, 40, 24, dtype=dtype, device=device)
    exact = key.clone(), value.float()
    call = random(2, 2, 3, 40, device=device), tiers(0, 2, 40, device), [12, 9], rule, gate
    check_outs(lambda *pair, **outs: compress_(*pair, *call, **outs), key, value, 12)
    kept = compress_(key, value, *call)
    assert same_bits(kept, compress_(*exact, *call))
    for x, goal in zip((key, value), exact, strict=True):
        ours, goal = x[:, :, :12].float(), goal[:, :, :12]
        torch.testing.assert_close(ours, goal, rtol=torch.finfo(x.dtype).eps, atol=1e-6)


def test_no_scores_worth_the_name(device: torch.device) -> None:
    """NaN in every score: the lowest indices of the highest tier stay, and the cache stays finite."""
    key, value = (random(seed, 1, 2, 17, 8, device=device) for seed in (0, 1))
    tier = torch.tensor([[1] * 7 + [2] * 10], dtype=torch.int32, device=device)
    kept = compress_(key, value, torch.full((1, 2, 17), float("nan"), device=device), tier, 5)
    assert kept.tolist() == [[[7, 8, 9, 10, 11]] * 2]
    assert bool(key.isfinite().all())
    assert bool(value.isfinite().all())
