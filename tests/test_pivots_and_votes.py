"""Votes, groups, similarity of values and refining rounds, against plain loops, on every backend."""

from __future__ import annotations

import pytest
import torch
from inputs import random, same_bits, tiers
from loops import pivot_of
from torch import Tensor

from lookm_kernels import compress_, kept_attention, merge_, merge_weights, nearest_kept, select_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")
B, H, N, D, DV = 2, 2, 41, 16, 24
KEEP = [9, 12]


def layer(seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """key, value, scores and tier of a layer with padding in one row."""
    key, value = (random(seed + i, B, H, N, width, dtype=dtype, device=device) for i, width in enumerate((D, DV)))
    tier = tiers(seed, B, N, device)
    return key, value, random(seed + 2, B, H, N, device=device), tier


def nearest_by_loops(
    key: Tensor, kept: Tensor, evicted: Tensor, value: Tensor | None = None, group: Tensor | None = None,
    least: Tensor | None = None, kept_key: Tensor | None = None, kept_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token at a time, in float64."""
    pivot, similarity = torch.full_like(evicted, -1), torch.zeros(evicted.shape, dtype=torch.float64)
    for b, h, e in torch.ones_like(evicted).nonzero().tolist():
        token, places = int(evicted[b, h, e]), kept[b, h].long()
        if token < 0:
            continue
        allowed = (places >= 0) if group is None else (places >= 0) & (group[b, places.clamp(min=0)] == group[b, token])
        rows, options = [], []
        for x, merged in ((key, kept_key), (value, kept_value)):
            if x is not None:
                rows.append(x[b, h, token])
                options.append(x[b, h, places.clamp(min=0)] if merged is None else merged[b, h])
        enough = {} if least is None else {"least": float(least[b, h])}
        pivot[b, h, e], similarity[b, h, e] = pivot_of(rows, options, allowed.tolist(), **enough)
    return pivot, similarity


@pytest.mark.parametrize("which", ["group", "value", "value and group", "least", "least by head", "merged", "all"])
def test_pivots(which: str, device: torch.device):
    key, value, scores, tier = layer(0, device)
    kept, evicted = select_tokens(scores, tier, KEEP)
    # group 3 has no kept token in row 0
    group = torch.arange(N, dtype=torch.int32, device=device).expand(B, N) % 4
    group = group.masked_fill((kept[0, 0][:, None] == torch.arange(N, device=device)).any(0) & (group == 3), 2)
    merged = random(9, B, H, max(KEEP), D, device=device), random(10, B, H, max(KEEP), DV, device=device)
    by_head = torch.tensor([[0.1, 0.3], [0.2, -1.0]], device=device)
    given = {
        "group": {"group": group},
        "value": {"value": value},
        "value and group": {"value": value, "group": group},
        "least": {"min_similarity": 0.25},
        "least by head": {"min_similarity": by_head},
        "merged": {"kept_key": merged[0]},
        "all": {
            "value": value, "group": group, "min_similarity": by_head, "kept_key": merged[0], "kept_value": merged[1],
        },
    }[which]  # fmt: skip
    pivot, similarity = nearest_kept(key, kept, evicted, **given)
    least = given.pop("min_similarity", None)
    least = torch.full((B, H), least) if isinstance(least, float) else least
    goal_pivot, goal = nearest_by_loops(key, kept, evicted, least=least, **given)
    assert torch.equal(pivot.cpu(), goal_pivot.cpu())
    torch.testing.assert_close(similarity.cpu().double(), goal.cpu(), atol=1e-5, rtol=0)
    assert (pivot == -1).any()


@pytest.mark.parametrize("merged", ["key", "value"])
def test_merged_rows_of_one_beside_the_other_as_it_is(merged: str, device: torch.device):
    key, value, scores, tier = layer(3, device)
    kept, evicted = select_tokens(scores, tier, KEEP)
    rows = {f"kept_{merged}": random(9, B, H, max(KEEP), {"key": D, "value": DV}[merged], device=device)}
    ours = nearest_kept(key, kept, evicted, value=value, **rows)
    goal = nearest_by_loops(key, kept, evicted, value, **rows)
    assert torch.equal(ours[0].cpu(), goal[0].cpu())
    torch.testing.assert_close(ours[1].cpu().double(), goal[1].cpu(), atol=1e-5, rtol=0)


def votes_by_loops(kept: Tensor, evicted: Tensor, pivot: Tensor, weight: Tensor, votes: Tensor) -> Tensor:
    out = torch.zeros(kept.shape)
    for b, h, c in torch.ones_like(kept).nonzero().tolist():
        if kept[b, h, c] < 0:
            continue
        out[b, h, c] = votes[b, h, kept[b, h, c]]
        for e, token in enumerate(evicted[b, h].tolist()):
            if token >= 0 and pivot[b, h, e] == c and weight[b, h, e] != 0:
                out[b, h, c] += votes[b, h, token]
    return out


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("into", ["in place", "outs"])
def test_votes_are_counted(given: bool, hub: bool, into: str, device: torch.device):
    """Whole numbers, exactly; a token of weight 0 does not count."""
    key, value, scores, tier = layer(1, device)
    kept, evicted = select_tokens(scores, tier, KEEP)
    pivot = nearest_kept(key, kept, evicted)[0]
    pivot = torch.where(pivot >= 0, max(KEEP) - 1, -1).int() if hub else pivot
    weight = random(5, *evicted.shape, device=device)
    weight = weight.masked_fill(weight > 0.8, 0.0)
    votes = torch.randint(1, 9, (B, H, N), generator=torch.Generator().manual_seed(0)).float().to(device)
    out = torch.full(kept.shape, float("nan"), device=device)
    outs = {"out_key": key.new_empty(B, H, max(KEEP), D), "out_value": value.new_empty(B, H, max(KEEP), DV)}
    merge_(
        key, value, kept, evicted, pivot, weight, torch.ones_like(kept, dtype=torch.float32),
        votes=votes if given else None, out_votes=out, **(outs if into == "outs" else {}),
    )  # fmt: skip
    goal = votes_by_loops(kept, evicted, pivot, weight, votes if given else torch.ones_like(votes))
    assert torch.equal(out.cpu(), goal)


@pytest.mark.parametrize("rule", ["average", "pivotal"])
def test_merging_merged_pairs_is_merging_their_tokens(rule: str, device: torch.device):
    """Pairs with votes weigh as that many equal tokens do."""
    key, value, scores, _ = layer(2, device)
    votes = torch.randint(1, 4, (1, 1, N), generator=torch.Generator().manual_seed(0)).float().to(device)
    key, value, scores = key[:1, :1], value[:1, :1], scores[:1, :1]
    tier = torch.ones(1, N, dtype=torch.int32, device=device)
    kept, evicted = select_tokens(scores, tier, [8])
    pivot, similarity = nearest_kept(key, kept, evicted)
    weights = merge_weights(rule, similarity, pivot, kept, evicted=evicted, votes=votes)
    ours = key.clone(), value.clone()
    merge_(*ours, kept, evicted, pivot, *weights, votes=votes)
    for c, token in enumerate(kept[0, 0].tolist()):
        total, parts = votes[0, 0, token].double(), [(votes[0, 0, token].double(), token)]
        parts += [
            (votes[0, 0, e].double(), e)
            for e, to in zip(evicted[0, 0].tolist(), pivot[0, 0].tolist(), strict=True)
            if to == c
        ]
        total = sum(own for own, _ in parts)
        for x, got in zip((key, value), ours, strict=True):
            pivotal = x[0, 0, token].double()
            moved = [
                x[0, 0, e].double() if rule == "average" else (x[0, 0, e].double() + pivotal) / 2 for _, e in parts
            ]
            goal = sum(own * row for (own, _), row in zip(parts, moved, strict=True)) / total
            torch.testing.assert_close(got[0, 0, token].double(), goal, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("refine", [0, 1, 3])
@pytest.mark.parametrize("similarity", ["key", "key_value"])
def test_rounds_of_refining(refine: int, similarity: str, device: torch.device):
    """Pivots among the averages of the round before, then the originals averaged anew; in place and outs alike."""
    key, value, scores, tier = layer(4, device)
    group = (torch.arange(N, dtype=torch.int32, device=device) % 2).expand(B, N).contiguous()
    kept, evicted = select_tokens(scores, tier, KEEP)
    merged: tuple[Tensor | None, Tensor | None] = None, None
    for _ in range(refine + 1):
        compared = merged if similarity == "key_value" else (merged[0], None)
        pivot, _ = nearest_by_loops(
            key, kept, evicted, value if similarity == "key_value" else None, group, None, *compared
        )
        rows, counts = [], torch.zeros(kept.shape)
        for x in (key, value):
            out = torch.zeros(*kept.shape, x.shape[3], dtype=torch.float64)
            for b, h, c in torch.ones_like(kept).nonzero().tolist():
                if kept[b, h, c] < 0:
                    continue
                own = [int(kept[b, h, c])] + [
                    int(t) for t, p in zip(evicted[b, h], pivot[b, h], strict=True) if p == c and t >= 0
                ]
                out[b, h, c], counts[b, h, c] = x[b, h, own].double().mean(0).cpu(), len(own)
            rows.append(out.to(key))
        merged = rows[0], rows[1]
    options = {"similarity": similarity, "group": group, "refine": refine}
    votes = [torch.empty(kept.shape, device=device) for _ in range(2)]
    in_place = key.clone(), value.clone()
    assert torch.equal(compress_(*in_place, scores, tier, KEEP, "average", out_votes=votes[0], **options), kept)
    outs = {"out_key": key.new_empty(B, H, max(KEEP), D), "out_value": value.new_empty(B, H, max(KEEP), DV)}
    compress_(key, value, scores, tier, KEEP, "average", out_votes=votes[1], **outs, **options)
    for ours, out, goal in zip(in_place, outs.values(), merged, strict=True):
        assert same_bits(ours[:, :, : max(KEEP)].contiguous(), out)
        torch.testing.assert_close(out, goal, atol=1e-5, rtol=1e-5)
    assert torch.equal(votes[0].cpu(), counts)
    assert torch.equal(votes[1].cpu(), counts)


@pytest.mark.parametrize("heads", [2, 6])
def test_repeated_pairs_with_votes_attend_as_all_of_them(heads: int, device: torch.device):
    """The invariant; without votes it does not hold."""
    repeats, distinct = 6, 7
    key, value = (random(i, 1, 2, distinct, D, device=device).repeat(1, 1, repeats, 1) for i in range(2))
    query = random(2, 1, heads, 3, D, device=device)
    full = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (query, *(x.repeat_interleave(heads // 2, 1) for x in (key, value))))
    )
    scores = torch.arange(repeats * distinct, 0, -1, dtype=torch.float32, device=device).expand(1, 2, -1).contiguous()
    votes = torch.empty(1, 2, distinct, device=device)
    compress_(key, value, scores, torch.ones_like(scores[:, 0]).int(), [distinct], "average", out_votes=votes)
    pairs = key[:, :, :distinct].contiguous(), value[:, :, :distinct].contiguous()
    loud = kept_attention(query, *pairs, key_bias=votes.log(), causal=False)
    assert torch.equal(votes, torch.full_like(votes, repeats))
    torch.testing.assert_close(loud.double(), full, atol=1e-5, rtol=1e-5)


def test_votes_that_differ_change_the_attention(device: torch.device):
    """A pair that one token in ten stands for is quieter: the invariant's other half."""
    key, value = (random(i, 1, 2, 7, D, device=device) for i in range(2))
    query, counts = random(2, 1, 4, 3, D, device=device), [1, 1, 1, 8, 1, 2, 1]
    every = [x.repeat_interleave(torch.tensor(counts, device=device), 2).repeat_interleave(2, 1) for x in (key, value)]
    full = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (query, *every)))
    votes = torch.tensor(counts, dtype=torch.float32, device=device).expand(1, 2, -1)
    loud = kept_attention(query, key, value, key_bias=votes.log(), causal=False)
    torch.testing.assert_close(loud.double(), full, atol=1e-5, rtol=1e-5)
    assert (kept_attention(query, key, value, causal=False) - full).abs().max() > 1e-2


def test_a_row_is_as_alone(device: torch.device):
    key, value, scores, tier = layer(6, device)
    tier, group = (
        torch.ones_like(tier),
        (torch.arange(N, dtype=torch.int32, device=device) % 3).expand(B, N).contiguous(),
    )
    results = []
    for row in (slice(0, B), slice(1, B)):
        pairs = key[row].clone(), value[row].clone()
        votes = torch.empty(*pairs[0].shape[:2], 12, device=device)
        options = {"similarity": "key_value", "refine": 1, "group": group[row], "min_similarity": 0.1}
        kept = compress_(*pairs, scores[row], tier[row], 12, "average", out_votes=votes, **options)
        results.append((kept[-1], votes[-1], *(x[-1, :, :12].contiguous() for x in pairs)))
    assert all(map(same_bits, *results))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "value"}, "`similarity` must be one of"),
        ({"refine": -1}, "`refine` must be a number of rounds"),
        ({"min_similarity": torch.zeros(B)}, r"`min_similarity` must be \[B, H\]"),
        ({"group": torch.zeros(B, N - 1, dtype=torch.int32)}, r"`group` must be \[B, N\]"),
        ({"votes": torch.ones(B, H, N - 1)}, r"`votes` must be \[B, H, N\]"),
        ({"out_votes": torch.ones(B, H, 3)}, r"`out_votes` must be \[B, H, K\]"),
        ({"out_votes": torch.ones(B, max(KEEP), H).mT}, "`out_votes` must be contiguous"),
    ],
    ids=str,
)
def test_bad_input_changes_nothing(options: dict, message: str):
    key, value, scores, tier = layer(7, torch.device("cpu"))
    before = key.clone(), value.clone()
    with pytest.raises(ValueError, match=message):
        compress_(key, value, scores, tier, KEEP, **options)
    assert same_bits(key, before[0])
    assert same_bits(value, before[1])
