"""select_tokens: the first tokens by (tier, score), ties to the lower index."""

from __future__ import annotations

import loops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import EXACT, random, same_bits, tiers
from torch import Tensor

from lookm_kernels import select_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAN, INF = float("nan"), float("inf")
# few values, so that most are tied; the last two differ from 0 by the smallest steps there are
SCORES = [NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 3e38, 1e-45, -1e-45]


def right_aligned(lists: list[list[list[int]]], width: int) -> Tensor:
    """[B, H, width] int32 with the empty places (-1) first."""
    rows = [[[-1] * (width - len(head)) + head for head in row] for row in lists]
    return torch.tensor(rows, dtype=torch.int32).view(len(lists), len(lists[0]), width)


def by_loops(scores: Tensor, tier: Tensor, keep: list[int]) -> tuple[Tensor, Tensor]:
    (batch, heads, tokens), keep = scores.shape, keep * (scores.shape[0] // len(keep))
    kept, evicted = [], []
    for row in range(batch):
        chosen = [loops.select(scores[row, head], tier[row].tolist(), keep[row]) for head in range(heads)]
        kept.append([stays for stays, _ in chosen])
        evicted.append([leaves for _, leaves in chosen])
    return right_aligned(kept, max(keep)), right_aligned(evicted, tokens - min(keep))


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int]]:
    batch, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**31))
    pool = torch.tensor(draw(st.lists(st.sampled_from(SCORES), min_size=1, max_size=6)))
    scores = pool[random(seed, batch, heads, tokens).mul(1e6).long() % len(pool)]
    if draw(st.booleans()):
        scores = scores.transpose(1, 2).contiguous().transpose(1, 2)
    highest = draw(st.sampled_from([0, 1, 3]))
    tier = (random(seed + 1, batch, tokens).mul(1e6).long() % (highest + 1)).int()
    keep = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch) | st.tuples(st.integers(0, tokens)))
    return scores, tier, list(keep)


@given(call=calls())
def test_equals_loops(device: torch.device, call: tuple[Tensor, Tensor, list[int]]) -> None:
    scores, tier, keep = call
    kept, evicted = select_tokens(scores.to(device), tier.to(device), keep)
    expected_kept, expected_evicted = by_loops(scores, tier, keep)
    assert same_bits(kept.cpu(), expected_kept)
    assert same_bits(evicted.cpu(), expected_evicted)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("tokens", [1, 17, 255, 507])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_odd_sizes(device: torch.device, tokens: int, share: float, dtype: torch.dtype) -> None:
    scores, tier, keep = random(tokens, 2, 3, tokens, dtype=dtype), tiers(tokens, 2, tokens), [int(share * tokens)]
    kept, evicted = select_tokens(scores.to(device), tier.to(device), keep[0])
    expected_kept, expected_evicted = by_loops(scores, tier, keep)
    assert same_bits(kept.cpu(), expected_kept)
    assert same_bits(evicted.cpu(), expected_evicted)


def test_ties_go_to_the_lower_index(device: torch.device) -> None:
    tier = torch.ones(1, 507, dtype=torch.int32, device=device)
    kept, evicted = select_tokens(torch.full((1, 2, 507), 0.25, device=device), tier, 255)
    assert kept.tolist() == [[list(range(255))] * 2]
    assert evicted.tolist() == [[list(range(255, 507))] * 2]


def test_padding_is_in_neither_list(device: torch.device) -> None:
    """Not even when more tokens are asked for than are valid, nor when their scores are the highest."""
    scores = torch.tensor([[[9.0, 9.0, 9.0, 1.0, 2.0]]], device=device)
    tier = torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.int32, device=device)
    kept, evicted = select_tokens(scores, tier, 4)
    assert kept.tolist() == [[[-1, -1, 3, 4]]]
    assert evicted.tolist() == [[[-1]]]


def test_not_a_number_orders_below_every_number_and_above_padding(device: torch.device) -> None:
    scores = torch.tensor([[[NAN, 5.0, INF, -3e38, -INF, 1.0]]], device=device)
    tier = torch.tensor([[1, 0, 1, 1, 1, 1]], dtype=torch.int32, device=device)
    kept = [select_tokens(scores, tier, keep)[0].tolist()[0][0] for keep in range(1, 6)]
    assert kept == [[5], [3, 5], [0, 3, 5], [0, 2, 3, 5], [0, 2, 3, 4, 5]]


def test_text_tier_is_the_papers_sum(device: torch.device) -> None:
    """Adding the highest score to the text tokens' scores, in float64, selects the same tokens as their higher tier."""
    scores = random(0, 1, 4, 255, device=device).abs()
    text = random(1, 255, device=device) > 1
    raised = scores.double() + text * scores.amax(-1, keepdim=True)
    kept, _ = select_tokens(scores, (1 + text.int())[None], 60)
    assert torch.equal(kept.long(), raised.topk(60).indices.sort().values)


def test_one_number_is_the_same_for_every_row(device: torch.device) -> None:
    scores, tier = random(0, 3, 2, 17, device=device), tiers(0, 3, 17, device)
    for one, each in zip(select_tokens(scores, tier, 6), select_tokens(scores, tier, (6, 6, 6)), strict=True):
        assert same_bits(one, each)
