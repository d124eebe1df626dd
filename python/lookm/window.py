"""Answers longer than the budget: what a layer holds is compressed again and again, as it grows.

Pairs of different heads stand for different tokens by then, so every head is a row of its own: to policies and kernels
[B, H, N, D] is [B * H, 1, N, D].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lookm.attention import Attention, Pairs
from lookm.compression import compress_pairs
from lookm.masks import left_padding, padding_mask
from lookm.plan import pick_queries, shares
from lookm.policy import Policy
from lookm.prompt import IMAGE, TEXT, Prompt, right_aligned
from lookm.reading import Compressed
from lookm.rows import StoringLayer, by_place

NOT_BY_HEAD = (
    "`generated` must be 'whole' with policy {policy}{how}, which looks at all heads or layers together: once an "
    "answer is compressed, their pairs stand for different tokens"
)


def check_by_head(policy: Policy) -> None:
    """ValueError for a policy that does not judge every head of every layer by itself."""
    if policy.gate is not None or policy.uneven or not policy.by_head:
        how = "" if policy.gate is None else f" and gate {policy.gate!r}"
        raise ValueError(NOT_BY_HEAD.format(policy=type(policy).__name__, how=how))


def alone(x: Tensor) -> Tensor:
    """[B * H, 1, ...] of x [B, H, ...]: every head a row."""
    return x.flatten(0, 1)[:, None]


@dataclass(frozen=True)
class Rows:
    """What one layer holds: keys, values [B, H, N, D]; media flags by place, for each head.

    positions [B, H, N] int32: of the tokens in the conversation, -1 for an empty place.
    image, starts, answer [B, H, N] bool: places of image tokens, those that begin an image right after another, and
    those of generated tokens. valid [B, N] bool: places that are no padding, None: all. votes [B, H, N] float32: tokens
    that each pair stands for, None: one each.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    image: Tensor
    starts: Tensor
    answer: Tensor
    valid: Tensor | None
    votes: Tensor | None

    @property
    def votes_alone(self) -> Tensor | None:
        """votes, every head a row."""
        return None if self.votes is None else alone(self.votes)

    def prompt(self, keep: Sequence[int], recent: Sequence[int], sinks: Sequence[int]) -> Prompt:
        """All that is stored as one prompt, every head a row."""
        heads = self.keys.shape[1]
        valid = None if self.valid is None else self.valid.repeat_interleave(heads, 0)
        keep, recent, sinks = ([share for share in part for _ in range(heads)] for part in (keep, recent, sinks))
        return Prompt(self.image.flatten(0, 1), valid, keep, recent, sinks, 0, self.starts.flatten(0, 1))


def held_rows(layer: StoringLayer, answers: Sequence[range]) -> Rows:
    """What a layer stores, and what it stands for; answers: positions of generated tokens."""
    positions, votes = layer.kept_positions(), layer.votes
    generated = torch.zeros(len(positions), layer.seen, dtype=torch.bool, device=positions.device)
    for tokens in answers:
        generated[:, tokens.start : tokens.stop] = True
    media, starts = (pad(known, (0, layer.seen - known.shape[1])) for known in (layer.image, layer.starts))
    image = layer.at(media, positions)
    # which image each place is of: where it changes, another one begins
    number = by_place(Prompt(media, None, (), (), (), 0, starts).segment, positions)
    begins = image.clone()
    begins[:, :, 1:] &= number[:, :, 1:] != number[:, :, :-1]
    if votes is not None:
        votes = pad(votes, (0, layer.stored - votes.shape[2]), value=1.0)
    answer = layer.at(generated, positions)
    return Rows(layer.keys, layer.values, positions, image, begins, answer, layer.valid, votes)


@dataclass
class Window:
    """The attention that one layer's pairs have had.

    every: tokens after which the layer is compressed. keep, recent, sinks: what each row may hold then.
    sums [B, H, W, <= stored]: of Policy.score, up to the last time; queries [B, Hq, m, D] and their log-sum-exps
    [B, Hq, m], in parts: those since. scale, softcap: of the attention.
    answers: positions of generated tokens.
    """

    every: int
    keep: Sequence[int] = ()
    recent: Sequence[int] = ()
    sinks: Sequence[int] = ()
    sums: Tensor | None = None
    queries: list[Tensor] = field(default_factory=list)
    lse: list[Tensor] = field(default_factory=list)
    scale: float = 1.0
    softcap: float | None = None
    answers: list[range] = field(default_factory=list)

    def begin(self, limits: Sequence[int], prompt: Prompt, policy: Policy) -> None:
        """After the prompt was compressed: from now on a row may hold as many tokens as limits say."""
        self.keep = limits
        self.recent, self.sinks = shares(prompt, limits, policy)

    def carry(self, sums: Tensor | None, kept: Tensor) -> None:
        """Keep the sums [B, W * H, N] of what stayed: kept [B, H, K] int32 places, -1: an empty one."""
        if sums is None:
            self.sums = None
            return
        by_head = sums.reshape(len(sums), -1, kept.shape[1], sums.shape[2]).transpose(1, 2)
        place = kept.clamp(min=0).long()[:, :, None].expand(-1, -1, by_head.shape[2], -1)
        self.sums = by_head.gather(3, place).masked_fill(kept[:, :, None] < 0, 0.0)

    def note(self, query: Tensor, lse: Tensor, scale: float, softcap: float | None) -> None:
        """The last tokens' queries [B, Hq, m, D] and the log-sum-exps of their attention."""
        self.queries.append(query.detach())
        self.lse.append(lse.detach())
        self.scale, self.softcap = scale, softcap

    def due(self, stored: int, turn: bool) -> bool:
        """Whether it is time to compress, after a turn as soon as there is too much."""
        return stored > max(self.keep) if turn else stored >= max(self.keep) + self.every

    def score(self, policy: Policy, rows: Rows) -> None:
        """Add up what the noted queries paid, who are the last tokens of the rows."""
        if not self.queries:
            return
        query, lse = (torch.cat(parts, 2) for parts in (self.queries, self.lse))
        self.queries, self.lse = [], []
        heads, tokens = rows.keys.shape[1:3]
        prompt = rows.prompt(self.keep, self.recent, self.sinks)
        weight, picked = pick_queries(policy, prompt, query.shape[2]) if policy.looks else (None, None)
        attention = Attention(
            query.reshape(-1, query.shape[1] // heads, *query.shape[2:]), alone(rows.keys), prompt,
            self.scale, self.softcap, query_weight=weight, picked=picked,
            lse=lse.reshape(-1, lse.shape[1] // heads, lse.shape[2]),
            votes=rows.votes_alone,
            **padding_mask(prompt.valid, left_padding(prompt.valid), query.shape[2]),
        )  # fmt: skip
        new = policy.score(attention)
        new = new.reshape(-1, heads, *new.shape[1:])
        self.sums = new if self.sums is None else new + pad(self.sums, (0, tokens - self.sums.shape[3]))

    @torch.no_grad()
    def compress(self, policy: Policy, rows: Rows, room: Callable[[int, int], tuple[Tensor, Tensor]]) -> Compressed:
        """What stays of all that is stored, in the memory that `room` gives."""
        self.score(policy, rows)
        heads, tokens = rows.keys.shape[1:3]
        lengths = [tokens] * len(self.keep) if rows.valid is None else rows.valid.sum(1).tolist()
        keep = [min(limit, length) for limit, length in zip(self.keep, lengths, strict=True)]
        prompt = rows.prompt(keep, [min(part) for part in zip(self.recent, keep, strict=True)], self.sinks)
        keys, values = (alone(x.detach()) for x in (rows.keys, rows.values))
        sums = self.sums.flatten(0, 1) if self.sums is not None else keys.new_zeros((len(keys), 1, tokens)).float()
        pairs = Pairs(prompt, keys, values, sums, sums)
        pairs = replace(pairs, scores=policy.finish(pairs))
        # an answer competes with the images: it would push all of them out, being text
        tiers = prompt.tiers(policy.text_prior)
        tiers = tiers.masked_fill((tiers == TEXT) & rows.answer.flatten(0, 1), IMAGE)
        stays = room(0, max(keep))
        out_key, out_value = (alone(x) for x in stays)
        kept, votes = compress_pairs(policy, pairs, tiers, out_key, out_value, rows.votes_alone)
        kept = kept.view(-1, heads, max(keep))
        votes = None if votes is None else votes.view(kept.shape)
        self.carry(sums.reshape(-1, heads, *sums.shape[1:]).transpose(1, 2).flatten(1, 2), kept)
        return Compressed(*stays, kept, votes, right_aligned(keep, max(keep), keys.device))

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor [B, ...] by change(tensor)."""
        self.sums = None if self.sums is None else change(self.sums)
        self.queries, self.lse = [change(x) for x in self.queries], [change(x) for x in self.lse]
