"""Merge rules: how strongly an evicted token enters its pivot (LOOK-M, section 3.3).

With n tokens merging into kept token c, every rule has the form  x_c <- a x_c + sum_e w_e x_e. A rule is the function

    rule(similarity [B, H, E], pivot_count [B, H, E], count [B, H, K]) -> (w [B, H, E], a [B, H, K])

similarity: cosine of each evicted token with its pivot; pivot_count: n of each evicted token's pivot; count: n of each
kept token. All float. `@register_rule("name")` makes a rule known to compress_, to every policy and to the CLI.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lookm_kernels._ambient import without_autocast
from lookm_kernels._checks import SCORE_DTYPES, check_call, check_indices, check_shape, check_tensor, require

Rule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
RULES: dict[str, Rule] = {}
GATES = ("mean_similarity",)


def register_rule(name: str) -> Callable[[Rule], Rule]:
    """Decorator: add a merge rule to the registry. ValueError when the name is taken."""

    def add(rule: Rule) -> Rule:
        require(name not in RULES, "name", f"none of the registered rules {sorted(RULES)}", name)
        RULES[name] = rule
        return rule

    return add


@register_rule("none")
def none(similarity: Tensor, pivot_count: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Evict only: kept tokens stay as they are."""
    return torch.zeros_like(similarity), torch.ones_like(count)


@register_rule("average")
def average(similarity: Tensor, pivot_count: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """x_c <- (x_c + sum x_e) / (1 + n)."""
    return 1 / (1 + pivot_count), 1 / (1 + count)


@register_rule("pivotal")
def pivotal(similarity: Tensor, pivot_count: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """x_c <- (x_c + sum (x_e + x_c) / 2) / (1 + n)."""
    return 0.5 / (1 + pivot_count), (1 + 0.5 * count) / (1 + count)


@register_rule("weighted")
def weighted(similarity: Tensor, pivot_count: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """x_c <- (x_c + sum s_e x_e) / (1 + n), s_e the cosine."""
    return similarity / (1 + pivot_count), 1 / (1 + count)


def check_rule(rule: str, gate: str | None) -> None:
    """ValueError unless both names are known."""
    require(rule in RULES, "rule", f"one of {sorted(RULES)}", rule)
    require(gate is None or gate in GATES, "gate", f"None or one of {list(GATES)}", gate)


def merge_weights(
    rule: str,
    similarity: Tensor,
    pivot: Tensor,
    kept: Tensor,
    gate: str | None = None,
    *,
    evicted: Tensor | None = None,
    votes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights of one merge, as merge_ takes them.

    rule, gate: names (RULES, GATES); similarity [B, H, E] float and pivot [B, H, E] int32 as nearest_kept gives them;
    kept [B, H, K] int32. Returns evicted_weight [B, H, E] and kept_weight [B, H, K] of similarity's dtype.

    gate="mean_similarity" merges a token only where its similarity, averaged over the heads at the same place of the
    evicted lists, is at least the row's mean; the others have weight 0 and do not count in n.

    votes [B, H, N] float32, with the lists evicted [B, H, E] int32: how many tokens each pair stands for. n is then the
    sum of the votes that merge into a pivot, in votes of the pivot, and w_e counts v_e / v_c times: the rule is that of
    the tokens themselves, so "average" gives (v_c x_c + sum v_e x_e) / (v_c + sum v_e). ValueError for an unknown name,
    or votes without evicted.
    """
    check_rule(rule, gate)
    check_call(similarity=similarity, pivot=pivot, kept=kept)
    check_tensor("similarity", similarity, "B H E", SCORE_DTYPES)
    check_tensor("pivot", pivot, "B H E", (torch.int32,))
    check_shape("pivot", pivot, similarity.shape, "B H E")
    check_tensor("kept", kept, "B H K", (torch.int32,))
    check_shape("kept", kept, (*similarity.shape[:2], kept.shape[2]), "B H K")
    check_indices("pivot", pivot, kept.shape[2])
    merging = pivot >= 0
    if gate is not None:
        merging = merging & _at_least_mean(similarity, merging)
    place = pivot.clamp(min=0).long()
    count = torch.zeros(kept.shape, dtype=similarity.dtype, device=kept.device)
    if kept.shape[-1] == 0:
        return torch.zeros_like(similarity), count
    own, votes_kept = (None, None) if votes is None else _votes_of(votes, evicted, kept, similarity)
    count.scatter_add_(-1, place, merging.to(count.dtype) if own is None else own.masked_fill(~merging, 0.0))
    # divided behind the sum: whole votes add up to the same in any order, and a GPU's order is not fixed
    count = count if votes_kept is None else (count / votes_kept).masked_fill(count == 0, 0.0)
    with without_autocast(similarity.device):
        evicted_weight, kept_weight = RULES[rule](similarity, count.gather(-1, place), count)
    for which, weight, shape in (("first", evicted_weight, similarity.shape), ("second", kept_weight, kept.shape)):
        require(weight.shape == shape, "rule", f"a function whose {which} result is {list(shape)}", weight)
    if own is not None and votes_kept is not None:
        evicted_weight = evicted_weight * (own / votes_kept.gather(-1, place))
    return evicted_weight.masked_fill(~merging, 0.0), kept_weight


def check_votes(votes: Tensor, shape: torch.Size) -> None:
    """Votes [B, H, N] float32 of tokens [B, H, N]."""
    check_tensor("votes", votes, "B H N", (torch.float32,))
    check_shape("votes", votes, shape, "B H N")


def _votes_of(votes: Tensor, evicted: Tensor | None, kept: Tensor, similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Votes [B, H, E] of the evicted tokens and [B, H, K] of the kept ones, in similarity's dtype."""
    require(evicted is not None, "evicted", "the lists [B, H, E] where `votes` are given", evicted)
    check_call(votes=votes, evicted=evicted)
    check_tensor("evicted", evicted, "B H E", (torch.int32,))  # type: ignore[arg-type]
    check_shape("evicted", evicted, similarity.shape, "B H E")  # type: ignore[arg-type]
    check_votes(votes, torch.Size((*kept.shape[:2], votes.shape[-1])))
    votes = votes.to(similarity.dtype)
    own, of_kept = (votes.gather(-1, lists.clamp(min=0).long()) for lists in (evicted, kept))  # type: ignore[union-attr]
    return own, of_kept


def _at_least_mean(similarity: Tensor, listed: Tensor) -> Tensor:
    # sums in float64 instead of means in float32: a tie with the mean stays a tie
    head_sum = similarity.double().masked_fill(~listed, 0.0).sum(1)
    places = listed[:, 0].sum(-1, keepdim=True)
    return (head_sum * places >= head_sum.sum(-1, keepdim=True))[:, None]
