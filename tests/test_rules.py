"""Merge rules and the gate: how similarity and counts become weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import loops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import EXACT, random, same_bits
from torch import Tensor

from lookm_kernels import compress_, merge_, merge_weights, register_rule, rules

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def halved() -> Iterator[str]:
    """A rule of the user's own: half of every merged token, the kept one as it is."""

    @register_rule("halved")
    def halved(similarity: Tensor, pivot_count: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(similarity, 0.5), torch.ones_like(count)

    yield "halved"
    del rules.RULES["halved"]


def all_kept_first(heads: int, keep: int, device: torch.device) -> Tensor:
    """[1, H, K]: the first tokens of every head."""
    return torch.arange(keep, dtype=torch.int32, device=device).expand(1, heads, keep)


def test_the_registry_holds_the_papers_rules() -> None:
    assert list(rules.RULES) == ["none", "average", "pivotal", "weighted"]


@given(data=st.data())
def test_equals_loops(device: torch.device, data: st.DataObject) -> None:
    """Weights and merge together give every rule's equation, gated or not."""
    heads, keep, leave, width = (data.draw(st.integers(1, top)) for top in (3, 6, 20, 5))
    seed, rule = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from(sorted(rules.RULES)))
    gate = data.draw(st.sampled_from([None, *rules.GATES]))
    exact, tolerance = EXACT[-1], 1e-12 if EXACT[-1] == torch.float64 else 1e-5
    x = random(seed, 1, heads, keep + leave, width, dtype=exact, device=device)
    kept = all_kept_first(heads, keep, device)
    evicted = kept[..., :1] + torch.arange(keep, keep + leave, dtype=torch.int32, device=device)
    # few similarities, all of them exact: a mean that a token just reaches is reached
    similarity = random(seed + 1, 1, heads, leave, dtype=exact, device=device).clamp(-1, 1).mul(2).round() / 2
    pivot = random(seed + 2, 1, heads, leave, device=device).mul(1e6).int() % keep
    gated = loops.gate(similarity[0].cpu()) if gate else None
    lists = kept[0].tolist(), evicted[0].tolist(), pivot[0].tolist(), similarity[0].tolist()
    goal = [loops.merge(x[0, h].cpu(), *(each[h] for each in lists), rule, gated) for h in range(heads)]
    merge_(x, x.clone(), kept, evicted, pivot, *merge_weights(rule, similarity, pivot, kept, gate))
    torch.testing.assert_close(x[0, :, :keep].cpu().double(), torch.stack(goal), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", ["average", "pivotal", "weighted"])
@given(data=st.data())
def test_a_pair_with_votes_merges_as_all_it_stands_for(device: torch.device, rule: str, data: st.DataObject) -> None:
    """v equal tokens: what votes give is what the rule gives for every token on its own, by loops.

    A pivot of v tokens is one of them and v - 1 that merge into it with a similarity of 1.
    """
    keep, leave, width = (data.draw(st.integers(1, top)) for top in (4, 8, 5))
    counts = data.draw(st.lists(st.integers(1, 4), min_size=keep + leave, max_size=keep + leave))
    seed, exact = data.draw(st.integers(0, 2**31)), EXACT[-1]
    x = random(seed, 1, 1, keep + leave, width, dtype=exact, device=device)
    kept = all_kept_first(1, keep, device)
    evicted = torch.arange(keep, keep + leave, dtype=torch.int32, device=device)[None, None]
    similarity = random(seed + 1, 1, 1, leave, dtype=exact, device=device).clamp(-1, 1)
    pivot = random(seed + 2, 1, 1, leave, device=device).mul(1e6).int() % keep
    # every token on its own: first the kept ones, then their twins, then the tokens that the evicted pairs stand for
    twins = [(c, c, 1.0) for c in range(keep) for _ in range(counts[c] - 1)]
    into, alike = pivot[0, 0].tolist(), similarity[0, 0].tolist()
    twins += [(keep + e, into[e], alike[e]) for e in range(leave) for _ in range(counts[keep + e])]
    every = torch.cat([x[0, 0, :keep], x[0, 0, [token for token, _, _ in twins]]]).cpu()
    merging, slots, cosines = range(keep, len(every)), [c for _, c, _ in twins], [cosine for *_, cosine in twins]
    goal = loops.merge(every, range(keep), merging, slots, cosines, rule)
    votes = torch.tensor(counts, dtype=torch.float32, device=device)[None, None]
    weights = merge_weights(rule, similarity, pivot, kept, evicted=evicted, votes=votes)
    total = torch.empty(1, 1, keep, device=device)
    merge_(x, x.clone(), kept, evicted, pivot, *weights, votes=votes, out_votes=total)
    assert total[0, 0].tolist() == [1.0 + slots.count(c) for c in range(keep)]
    torch.testing.assert_close(x[0, 0, :keep].cpu().double(), goal, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", [None, *rules.GATES])
@pytest.mark.parametrize("rule", sorted(rules.RULES))
def test_one_vote_each_is_no_votes(device: torch.device, rule: str, gate: str | None) -> None:
    similarity, pivot = random(0, 2, 3, 9, device=device), random(1, 2, 3, 9, device=device).mul(9).int().clamp(-1, 3)
    kept = torch.arange(4, dtype=torch.int32, device=device).repeat(2, 3, 1)
    evicted = torch.arange(4, 13, dtype=torch.int32, device=device).repeat(2, 3, 1)
    call = rule, similarity, pivot, kept, gate
    ones = merge_weights(*call, evicted=evicted, votes=torch.ones(2, 3, 13, device=device))
    assert all(map(same_bits, ones, merge_weights(*call)))


def test_a_gated_token_has_no_votes_in_the_count(device: torch.device) -> None:
    """(2 x_c + 3 x_1) / 5: the second evicted token, of 100 votes, is below the mean."""
    similarity = torch.tensor([[[0.9, 0.1]]], device=device)
    pivot = torch.zeros(1, 1, 2, dtype=torch.int32, device=device)
    kept, evicted = pivot[..., :1], torch.tensor([[[1, 2]]], dtype=torch.int32, device=device)
    votes = torch.tensor([[[2.0, 3.0, 100.0]]], device=device)
    weight, own = merge_weights("average", similarity, pivot, kept, "mean_similarity", evicted=evicted, votes=votes)
    torch.testing.assert_close(weight, torch.tensor([[[3 / 5, 0.0]]], device=device))
    torch.testing.assert_close(own, torch.tensor([[[2 / 5]]], device=device))


@pytest.mark.parametrize("rule", ["average", "pivotal"])
def test_weights_of_a_pivot_sum_to_one(device: torch.device, rule: str) -> None:
    pivot = torch.tensor([[[0, 2, 2, 2, -1]]], dtype=torch.int32, device=device)
    similarity = random(0, 1, 1, 5, device=device)
    evicted_weight, kept_weight = merge_weights(rule, similarity, pivot, all_kept_first(1, 3, device))
    total = kept_weight.clone().scatter_add_(-1, pivot[..., :4].long(), evicted_weight[..., :4])
    torch.testing.assert_close(total, torch.ones_like(total))
    assert float(evicted_weight[0, 0, 4]) == 0
    assert float(kept_weight[0, 0, 1]) == 1


def test_gate_is_per_row_and_over_all_heads(device: torch.device) -> None:
    """Row 0 merges where the mean of its two heads reaches 0.5, row 1 all: everything tied merges."""
    similarity = torch.tensor([[[0.9, 0.1, 0.5], [0.7, 0.3, 0.5]], [[0.1] * 3, [0.1] * 3]], device=device)
    pivot = torch.zeros(2, 2, 3, dtype=torch.int32, device=device)
    kept = torch.zeros(2, 2, 1, dtype=torch.int32, device=device)
    evicted_weight, kept_weight = merge_weights("average", similarity, pivot, kept, "mean_similarity")
    third, fourth = [1 / 3, 0.0, 1 / 3], [0.25] * 3
    torch.testing.assert_close(evicted_weight, torch.tensor([[third] * 2, [fourth] * 2], device=device))
    torch.testing.assert_close(kept_weight, torch.tensor([[[1 / 3]] * 2, [[0.25]] * 2], device=device))


def test_gate_does_not_count_empty_places(device: torch.device) -> None:
    similarity = torch.tensor([[[0.0, 0.0, 0.2, 0.4]]], device=device)
    pivot = torch.tensor([[[-1, -1, 0, 0]]], dtype=torch.int32, device=device)
    kept = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
    weight, _ = merge_weights("average", similarity, pivot, kept, "mean_similarity")
    assert weight.tolist() == [[[0.0, 0.0, 0.0, 0.5]]]


def test_weights_with_votes_do_not_depend_on_the_order_of_the_list(device: torch.device) -> None:
    """Sums of whole votes are exact, so that a GPU, whose order is not fixed, gives the same bits every run."""
    leave, own = 3000, 3.0
    votes = torch.randint(1, 50, (1, 1, leave + 1), generator=torch.Generator().manual_seed(0)).float()
    votes[..., 0] = own
    goal = own / votes.double().sum()
    kept = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
    pivot = torch.zeros(1, 1, leave, dtype=torch.int32, device=device)
    found = set()
    for seed in range(8):
        order = 1 + torch.randperm(leave, generator=torch.Generator().manual_seed(seed)).int()
        given = {"evicted": order[None, None].to(device), "votes": votes.to(device)}
        similarity = torch.ones(1, 1, leave, dtype=EXACT[-1], device=device)
        weights = merge_weights("average", similarity, pivot, kept, **given)
        found.add(float(weights[1]))
        expected = votes[0, 0, order.long()].double() * goal / own
        torch.testing.assert_close(weights[0][0, 0].cpu().double(), expected, rtol=1e-6, atol=0)
    assert len(found) == 1
    assert abs(found.pop() / float(goal) - 1) < (1e-12 if EXACT[-1] == torch.float64 else 1e-6)


def test_nothing_kept(device: torch.device) -> None:
    similarity, pivot = torch.zeros(1, 2, 3, device=device), torch.full((1, 2, 3), -1, dtype=torch.int32, device=device)
    weight, kept_weight = merge_weights("pivotal", similarity, pivot, pivot[..., :0])
    assert not weight.any()
    assert kept_weight.shape == (1, 2, 0)


def test_a_rule_of_ones_own(device: torch.device, halved: str) -> None:
    key = torch.tensor([2.0, 4.0, 8.0], device=device).view(1, 1, 3, 1)
    value = key.clone()
    scores = torch.tensor([[[3.0, 1.0, 1.0]]], device=device)
    compress_(key, value, scores, torch.ones(1, 3, dtype=torch.int32, device=device), 1, rule=halved)
    assert float(key[0, 0, 0]) == 2 + 4 / 2 + 8 / 2
    assert same_bits(key[:, :, :1], value[:, :, :1])


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_rule_of_the_wrong_shape(which: str) -> None:
    def short(similarity: Tensor, pivot_count: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return (similarity[..., :1], count) if which == "first" else (similarity, count[..., :1])

    rules.RULES["short"] = short
    try:
        with pytest.raises(ValueError, match=rf"`rule` must be a function whose {which} result is \[1, 1, 3\]"):
            merge_weights("short", torch.zeros(1, 1, 3), *torch.zeros(2, 1, 1, 3, dtype=torch.int32))
    finally:
        del rules.RULES["short"]


@pytest.mark.parametrize(
    ("bad", "error", "argument"),
    [
        ({"similarity": None}, TypeError, "similarity"),
        ({"similarity": torch.zeros(1, 3)}, ValueError, "similarity"),
        ({"pivot": torch.full((1, 1, 3), 9, dtype=torch.int32)}, ValueError, "pivot"),
        ({"pivot": torch.zeros(1, 1, 2, dtype=torch.int32)}, ValueError, "pivot"),
        ({"kept": torch.zeros(1, 2, 3, dtype=torch.int32)}, ValueError, "kept"),
        ({"votes": torch.ones(1, 1, 6)}, ValueError, "evicted"),
        ({"votes": torch.ones(1, 1, 6), "evicted": torch.zeros(1, 1, 3)}, TypeError, "evicted"),
        ({"votes": torch.ones(1, 1, 6), "evicted": torch.zeros(1, 1, 2).int()}, ValueError, "evicted"),
        ({"votes": torch.ones(1, 2, 6), "evicted": torch.zeros(1, 1, 3).int()}, ValueError, "votes"),
        ({"votes": torch.ones(1, 1, 6).int(), "evicted": torch.zeros(1, 1, 3).int()}, TypeError, "votes"),
        ({"votes": [1.0] * 6, "evicted": torch.zeros(1, 1, 3).int()}, TypeError, "votes"),
    ],
)
def test_wrong_arguments(bad: dict[str, Any], error: type[Exception], argument: str) -> None:
    pivot, kept = torch.zeros(2, 1, 1, 3, dtype=torch.int32)
    with pytest.raises(error, match=f"`{argument}` must be"):
        merge_weights("average", **({"similarity": torch.zeros(1, 1, 3), "pivot": pivot, "kept": kept} | bad))


@pytest.mark.parametrize(("names", "argument"), [(("mean", None), "rule"), (("average", "median"), "gate")])
def test_unknown_names(names: tuple[str, str | None], argument: str) -> None:
    accepted = sorted(rules.RULES) if argument == "rule" else list(rules.GATES)
    empty = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match=f"`{argument}` must be .*{re.escape(str(accepted))}.*, got '(mean|median)'"):
        merge_weights(names[0], empty, empty.int(), empty.int(), names[1])


def test_a_name_is_taken_once(halved: str) -> None:
    with pytest.raises(ValueError, match=r"`name` must be none of .*'halved'.*, got 'halved'"):
        register_rule(halved)(rules.RULES["none"])
