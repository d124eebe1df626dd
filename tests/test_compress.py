"""compress_: the five steps as one op."""

from __future__ import annotations

import math
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
    PLACE_MATTERS,
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

from lookm_kernels import compact_, compress_, kept_attention, merge_, merge_weights, nearest_kept, rules, select_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PAIR = ("key", "value")
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


def by_rounds(layer: dict[str, Any], rule: str, row: int, head: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Merged keys, values and votes of one head by loops, in float64: of the first round and `refine` more.

    A pair of v votes is v equal tokens, and all rules but "none" are told by those; v whole numbers.
    """
    key, value = (layer[name][row, head].double() for name in ("key", "value"))
    kept, evicted = loops.select(layer["scores"][row, head], layer["tier"][row].tolist(), layer["keep"][row])
    counts = [1] * len(key) if options.get("votes") is None else options["votes"][row, head].int().tolist()
    group = [0] * len(key) if options.get("group") is None else options["group"][row].tolist()
    both = options.get("similarity") == "key_value"
    merged, totals = (key[kept], value[kept]), torch.tensor([counts[c] for c in kept], dtype=torch.float64)
    for _ in range(options.get("refine", 0) + 1):
        found = [
            loops.pivot_of(
                (key[e], value[e])[: 1 + both],
                merged[: 1 + both],
                [group[c] == group[e] for c in kept],
                options.get("min_similarity", -math.inf),
            )
            for e in evicted
        ]
        tokens = [(c, place, 1.0) for place, c in enumerate(kept) for _ in range(counts[c] - 1)]
        tokens += [(e, *to) for e, to in zip(evicted, found, strict=True) if to[0] >= 0 for _ in range(counts[e])]
        pairs = (torch.cat([x[kept], x[[token for token, *_ in tokens]]]) for x in (key, value))
        slots, cosines = [place for _, place, _ in tokens], [cosine for *_, cosine in tokens]
        own = range(len(kept), len(kept) + len(tokens))
        merged = tuple(loops.merge(x, range(len(kept)), own, slots, cosines, rule) for x in pairs)
        totals = torch.tensor([1.0 + slots.count(place) for place in range(len(kept))], dtype=torch.float64)
    return *merged, totals


def check_rounds(layer: dict[str, Any], device: torch.device, rule: str, tolerance: float, **options: Any) -> None:
    """In place and into others, bit for bit the same, and both what the loops give."""
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    ours, read = (on(device, {**layer, "key": layer["key"].clone(), "value": layer["value"].clone()}) for _ in range(2))
    shape = *layer["scores"].shape[:2], max(layer["keep"])
    votes = [torch.full(shape, float("nan"), device=device) for _ in range(2)]
    outs = {f"out_{name}": torch.full((*shape, layer[name].shape[3]), float("nan")).to(ours[name]) for name in PAIR}
    kept = compress_(**ours, rule=rule, out_votes=votes[0], **given)
    assert same_bits(compress_(**read, rule=rule, out_votes=votes[1], **outs, **given), kept)
    assert same_bits(*votes)
    for name in PAIR:
        assert same_bits(read[name].cpu(), layer[name])
        assert same_bits(outs[f"out_{name}"], ours[name][:, :, : shape[2]])
    for row, head in torch.cartesian_prod(*map(torch.arange, shape[:2])).tolist():
        *goal, totals = by_rounds(layer, rule, row, head, **options)
        empty = shape[2] - len(totals)
        assert torch.equal(votes[0][row, head, empty:].cpu().double(), totals)
        assert not votes[0][row, head, :empty].any()
        for name, rows in zip(PAIR, goal, strict=True):
            own = outs[f"out_{name}"][row, head].cpu().double()
            assert not own[:empty].any()
            torch.testing.assert_close(own[empty:], rows, rtol=tolerance, atol=tolerance)


def a_layer(seed: int, tokens: int = 40, dtype: torch.dtype = EXACT[-1]) -> dict[str, Any]:
    """Two rows of two heads, one with padding and a smaller budget."""
    key, value = (random(seed + i, 2, 2, tokens, width, dtype=dtype) for i, width in enumerate((8, 5)))
    rest = {
        "scores": random(seed + 2, 2, 2, tokens),
        "tier": tiers(seed, 2, tokens),
        "keep": [tokens // 4, tokens // 5],
    }
    return {"key": key, "value": value, **rest}


@pytest.mark.parametrize("similarity", ["key", "key_value"])
@pytest.mark.parametrize("refine", [0, 1, 3])
@pytest.mark.parametrize("rule", ["average", "pivotal"])
def test_rounds_equal_loops(device: torch.device, rule: str, refine: int, similarity: str) -> None:
    tolerance = 1e-11 if EXACT[-1] == torch.float64 else 1e-5
    check_rounds(a_layer(0), device, rule, tolerance, refine=refine, similarity=similarity)


@pytest.mark.parametrize("refine", [0, 1, 3])
@pytest.mark.parametrize("rule", ["average", "pivotal", "weighted"])
def test_votes_groups_and_thresholds_in_every_round(device: torch.device, rule: str, refine: int) -> None:
    """Votes are float32, and what is made of them."""
    layer = a_layer(10)
    options = {
        "votes": random(13, 2, 2, 40).abs().mul(3).ceil(),
        "group": (torch.arange(40) // 9 % 3).int().repeat(2, 1),
        "min_similarity": 0.2,
        "similarity": "key_value",
        "refine": refine,
    }
    check_rounds(layer, device, rule, 1e-5, **options)


def test_rounds_move_pairs(device: torch.device) -> None:
    """Else the tests above would say nothing: of these tokens some have another pivot in every round."""
    results = []
    for refine in (0, 1, 3):
        layer = on(device, a_layer(0))
        compress_(**layer, rule="average", refine=refine)
        results.append(layer["key"][:, :, :8])
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[1], results[2])


@pytest.mark.parametrize("votes", [False, True], ids=["one each", "given"])
def test_the_votes_of_what_is_only_evicted(device: torch.device, votes: bool) -> None:
    """Those of the kept tokens; whatever else is asked for changes nothing."""
    layer = a_layer(20)
    own = random(23, 2, 2, 40).abs().mul(3).ceil()
    ours, plain = on(device, layer), on(device, {**layer, "key": layer["key"].clone(), "value": layer["value"].clone()})
    out = torch.full((2, 2, 10), float("nan"), device=device)
    more = {"refine": 2, "group": torch.zeros(2, 40, dtype=torch.int32, device=device), "out_votes": out}
    kept = compress_(**ours, rule="none", votes=own.to(device) if votes else None, **more)
    assert same_bits(compress_(**plain, rule="none"), kept)
    for name in PAIR:
        assert same_bits(ours[name][:, :, :10], plain[name][:, :, :10])
    goal = (own if votes else torch.ones_like(own)).gather(2, kept.cpu().clamp(min=0).long())
    assert same_bits(out.cpu(), goal.masked_fill(kept.cpu() < 0, 0.0))


@pytest.mark.skipif(INTERPRETED, reason=PLACE_MATTERS)
@pytest.mark.parametrize("refine", [0, 2])
def test_a_row_with_every_option_is_the_same_alone(device: torch.device, refine: int) -> None:
    layer = on(device, a_layer(30, 200, torch.float32))
    votes = random(33, 2, 2, 200, device=device).abs().mul(3).ceil()
    group = (torch.arange(200, device=device) // 30 % 3).int().repeat(2, 1)
    more = {"similarity": "key_value", "min_similarity": 0.1, "refine": refine}
    alone = []
    for row in range(2):
        own = {name: x[row : row + 1].clone() if isinstance(x, Tensor) else [x[row]] for name, x in layer.items()}
        out = torch.empty(1, 2, own["keep"][0], device=device)
        own_votes, own_group = votes[row : row + 1], group[row : row + 1]
        kept = compress_(**own, rule="average", votes=own_votes, group=own_group, out_votes=out, **more)
        alone.append((kept, out, *(own[name][:, :, : kept.shape[2]] for name in PAIR)))
    out = torch.empty(2, 2, 50, device=device)
    kept = compress_(**layer, rule="average", votes=votes, group=group, out_votes=out, **more)
    together = kept, out, *(layer[name][:, :, :50] for name in PAIR)
    for row, own in enumerate(alone):
        assert all(same_bits(x[row : row + 1, :, 50 - y.shape[2] :], y) for x, y in zip(together, own, strict=True))


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("repeats", [2, 7])
def test_repeated_pairs_with_their_votes_are_the_whole_prompt(
    device: torch.device, repeats: int, group_size: int
) -> None:
    """Every pair many times, compressed to the distinct ones in two goes: with votes the attention of all of them.

    Without the votes, or with those of the second go alone, it is another.
    """
    distinct, width = 11, 16
    key, value = (random(i, 2, 2, distinct, width) for i in (0, 1))
    # pair 0 twice as often, and all in another order in every head
    order = torch.stack(
        [torch.randperm(repeats * (distinct + 1), generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    )
    tokens = torch.cat([torch.arange(distinct), torch.zeros(1, dtype=torch.long)]).repeat(repeats)[order]
    spread = tokens[None, :, :, None].expand(2, -1, -1, width)
    full = [x.gather(2, spread).to(device) for x in (key, value)]
    query = random(2, 2, 2 * group_size, 3, width, device=device)
    # the first of each pair, then twice as many as are needed
    first = torch.stack([torch.stack([(own == p).nonzero()[0, 0] for p in range(distinct)]) for own in tokens])
    scores = random(3, 2, 2, tokens.shape[1]).clamp(-3, 3)
    scores = scores.scatter_add(2, first.expand(2, -1, -1), torch.full((2, 2, distinct), 100.0)).to(device)
    goal = torch.nn.functional.scaled_dot_product_attention(
        query.double(), *(x.double().repeat_interleave(group_size, 1) for x in full)
    )
    length, halfway = tokens.shape[1], min(tokens.shape[1], 2 * distinct)
    ones = torch.ones(2, length, dtype=torch.int32, device=device)
    counted = torch.empty(2, 2, halfway, device=device)
    kept = compress_(*full, scores, ones, halfway, "average", out_votes=counted)
    pairs = [x[:, :, :halfway].clone() for x in full]
    again = torch.empty(2, 2, distinct, device=device)
    own_scores = scores.gather(2, kept.long())
    compress_(*pairs, own_scores, ones[:, :halfway].contiguous(), distinct, "average", votes=counted, out_votes=again)
    pairs = [x[:, :, :distinct].contiguous() for x in pairs]
    assert bool((again.sum(2) == length).all())
    assert sorted(again[0, 0].tolist()) == [repeats] * (distinct - 1) + [2 * repeats]
    with_votes = kept_attention(query, *pairs, key_bias=again.log(), causal=False)
    torch.testing.assert_close(with_votes.double(), goal, rtol=1e-5, atol=1e-5)
    without = kept_attention(query, *pairs, causal=False)
    assert (without - goal).abs().max() > 1e-2
