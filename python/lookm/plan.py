"""What becomes of a prompt: decided before its attention, once for all layers of a forward.

Everything that has to wait for the device (lengths, padding, text) is read here, so that nothing waits between a
layer's attention and the end of its compression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lookm.budget import Budget, extend_for_text
from lookm.masks import left_padding
from lookm.policy import Policy
from lookm.prompt import Prompt, right_aligned


@dataclass(frozen=True)
class Settings:
    """What all layers of one cache share: policy, budget, what becomes of later turns, number of compressed layers.

    compress_every: tokens after which what was generated is compressed too; None: never.
    """

    policy: Policy
    budget: Budget
    later_turns: str
    layers: int
    compress_every: int | None = None


@dataclass(frozen=True)
class Stored:
    """What a layer holds when a plan is made for it, and for all others that hold as much on its device.

    image [B, N] bool: image tokens among the N of the prompt, the last of `places` stored ones.
    valid [B, places] bool: places that are no padding; visible: those that this forward's mask lets be seen besides;
        None: all.
    bytes_per_token: of one token column, all rows and compressed layers together.
    starts [B, N] bool: see lookm.prompt.Prompt.
    """

    image: Tensor
    starts: Tensor | None
    places: int
    valid: Tensor | None
    visible: Tensor | None
    bytes_per_token: int


@dataclass(frozen=True)
class Plan:
    """prompt: the tokens under compression, with the budget of each row.

    evicts: whether the prompt is over its budget.
    valid [B, stored] bool: places that may be attended now; stored_valid: those after the compression; None: all.
    key_start [B] int32: the first place that is not padding, None where there is none, or some elsewhere.
    tiers [B, N] int32: selection classes.
    query_weight, picked: see lookm.attention.Attention.
    stored, lengths: what it was made from; valid tokens of each row.
    """

    stored: Stored
    lengths: Sequence[int]
    prompt: Prompt
    evicts: bool
    valid: Tensor | None
    stored_valid: Tensor | None
    key_start: Tensor | None
    tiers: Tensor
    query_weight: Tensor | None
    picked: Tensor | None


def make_plan(stored: Stored, settings: Settings, queries: int, remaining: int) -> Plan:
    """The plan of a forward of `queries` tokens; `remaining` tokens of the prompt are still to come."""
    policy = settings.policy
    prompt, lengths = _budgeted(stored, settings, remaining)
    evicts = over_budget(prompt, lengths)
    stored_valid = _stored_valid(stored, prompt.keep) if evicts else stored.valid
    looking = pick_queries(policy, prompt, queries) if evicts and policy.looks else (None, None)
    return Plan(
        stored,
        lengths,
        prompt,
        evicts,
        stored.visible,
        stored_valid,
        left_padding(stored.visible),
        prompt.tiers(policy.text_prior),
        *looking,
    )


@dataclass
class Ledger:
    """What a policy with budgets by layer may still give: tokens of each row, and layers that have had none."""

    left: list[int]
    layers: int

    def take(self, wanted: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """What a layer keeps of rows of these lengths, as near to what is wanted as the layers behind it allow."""
        behind = self.layers - 1
        taken = [
            min(max(int(want), 1, left - behind * length), length, left - behind)
            for want, left, length in zip(wanted, self.left, lengths, strict=True)
        ]
        self.left = [left - own for left, own in zip(self.left, taken, strict=True)]
        self.layers = behind
        return taken


def with_keep(plan: Plan, keep: Sequence[int], policy: Policy) -> Plan:
    """The plan for a layer that keeps another number of tokens; recent ones and sinks take the same shares of it."""
    recent, sinks = shares(plan.prompt, keep, policy)
    prompt = replace(plan.prompt, keep=keep, recent=recent, sinks=sinks)
    return replace(
        plan, prompt=prompt, tiers=prompt.tiers(policy.text_prior), stored_valid=_stored_valid(plan.stored, keep)
    )


def shares(prompt: Prompt, keep: Sequence[int], policy: Policy) -> tuple[list[int], list[int]]:
    """Recent tokens and sinks of rows that keep other numbers of tokens than the prompt's."""
    sinks = [min(policy.sinks, own // 2) for own in keep]
    recent = [
        min(given * own // even, own - first)
        for given, even, own, first in zip(prompt.recent, prompt.keep, keep, sinks, strict=True)
    ]
    return recent, sinks


def pick_queries(policy: Policy, prompt: Prompt, queries: int) -> tuple[Tensor | None, Tensor | None]:
    """query_weight [B, M] of the last M queries of the prompt, and those `picked`, as Attention has them.

    Picked are the queries with a weight, wherever the policy gives weights: were it for few of them only, the other
    rows of a batch would decide the last bits of a row.
    """
    weight = policy.query_weight(prompt)
    if weight is None:
        return None if prompt.valid is None else prompt.valid[:, -queries:].float(), None
    weight = (weight if prompt.valid is None else weight * prompt.valid)[:, -queries:]
    used = weight != 0
    most = int(used.sum(1).max())
    place = torch.arange(queries, dtype=torch.int32, device=weight.device)
    return weight, torch.where(used, place, -1).sort(1).values[:, queries - most :]


def over_budget(prompt: Prompt, lengths: Sequence[int]) -> bool:
    """Whether the budget of any row is smaller than the row; padding alone is no reason to touch the cache."""
    return any(keep < length + prompt.remaining for keep, length in zip(prompt.keep, lengths, strict=True))


def _budgeted(stored: Stored, settings: Settings, remaining: int) -> tuple[Prompt, list[int]]:
    """The prompt with the budget of each row, and how many valid tokens each row has."""
    policy, image = settings.policy, stored.image
    size = image.shape[1]
    inside = None if stored.valid is None else stored.valid[:, stored.places - size :]
    lengths = [size] * len(image) if inside is None else inside.sum(1).tolist()
    splits = [settings.budget.split(n + remaining, policy, stored.bytes_per_token) for n in lengths]
    keep, recent, sinks = (list(part) for part in zip(*splits, strict=True))
    prompt = Prompt(image, inside, keep, recent, sinks, remaining, stored.starts)
    if not policy.protect_text:
        return prompt, lengths
    # sinks go before text, so an image among them needs a place of its own
    text = (~image | prompt.first(sinks)) & ~prompt.last(recent)
    text = text if inside is None else text & inside
    return replace(prompt, keep=extend_for_text(keep, recent, text.sum(1).tolist())), lengths


def _stored_valid(stored: Stored, keep: Sequence[int]) -> Tensor | None:
    # a row that keeps fewer than another has empty places first
    start, device, valid = stored.places - stored.image.shape[1], stored.image.device, stored.valid
    before = torch.ones(len(keep), start, dtype=torch.bool, device=device) if valid is None else valid[:, :start]
    inside = right_aligned(keep, max(keep), device)
    if inside is None and (valid is None or bool(before.all())):
        return None
    inside = before.new_ones(len(keep), max(keep)) if inside is None else inside
    return torch.cat([before, inside], 1)
