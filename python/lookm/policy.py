"""What a policy is: a frozen dataclass that scores the tokens of a prompt, in a registry by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

import lookm_kernels
from lookm_kernels.rules import GATES, RULES

PADDING, IMAGE, TEXT, PROTECTED = 0, 1, 2, 3
QUERIES = ("all", "text", "sampled")


def is_number(value: Any) -> bool:
    """Whether an option is a plain number: True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether an option is a whole number, 0 or more."""
    return is_number(value) and isinstance(value, int) and value >= 0


def on_device(counts: Sequence[int], device: torch.device) -> Tensor:
    """[B, 1] of a number a row, filled on the device: a copy from the host would wait for it."""
    return torch.cat([torch.full((1, 1), count, dtype=torch.long, device=device) for count in counts])


@dataclass(frozen=True)
class Prompt:
    """The tokens under compression: N seen so far, `remaining` still to come (chunked prefill).

    image, valid: [B, N] bool, True for image or video tokens and for tokens that are not padding; valid None: no
        padding.
    keep, recent, sinks: what the budget allows each row, in tokens.
    """

    image: Tensor
    valid: Tensor | None
    keep: Sequence[int]
    recent: Sequence[int]
    sinks: Sequence[int]
    remaining: int = 0

    def last(self, counts: Sequence[int]) -> Tensor:
        """[B, N] bool: the last counts[row] valid tokens of each row's whole prompt."""
        return self._within(counts, from_end=True)

    def first(self, counts: Sequence[int]) -> Tensor:
        """[B, N] bool: the first counts[row] valid tokens of each row."""
        return self._within(counts, from_end=False)

    def _within(self, counts: Sequence[int], from_end: bool) -> Tensor:
        valid = torch.ones_like(self.image) if self.valid is None else self.valid
        place = valid.flip(1).cumsum(1).flip(1) + self.remaining if from_end else valid.cumsum(1)
        return valid & (place <= on_device(counts, valid.device))

    def tiers(self, text_prior: bool) -> Tensor:
        """[B, N] int32 selection classes for select_tokens: protected, text, image, padding."""
        tier = (
            torch.where(self.image, IMAGE, TEXT) if text_prior else torch.full_like(self.image, IMAGE, dtype=torch.long)
        )
        tier = tier.masked_fill(self.last(self.recent) | self.first(self.sinks), PROTECTED)
        if self.valid is not None:
            tier = tier.masked_fill(~self.valid, PADDING)
        return tier.int()


@dataclass(frozen=True)
class Attention:
    """One layer's attention over (a chunk of) the prompt, as a policy sees it.

    query [B, Hq, M, D], key [B, H, N, D] after rotary embedding, the queries being the last M of the N tokens.
    query_weight: [B, M] float32, how much each query counts (Policy.query_weight), 0 for padding; None: all 1.
    picked: [B, M'] int32, those of the M queries with a weight, ascending, -1 (first) for an empty place; None for all.
    fp8: score on 8-bit floats.
    The other fields are the arguments of lookm_kernels.attention_scores; a mask beside causal hides padding, nothing
    else. The prompt is the last prompt.image.shape[1] of the N tokens: earlier ones belong to turns that were
    compressed before.
    """

    query: Tensor
    key: Tensor
    prompt: Prompt
    scale: float
    softcap: float | None = None
    causal: bool = True
    key_start: Tensor | None = None
    mask: Tensor | None = None
    lse: Tensor | None = None
    query_weight: Tensor | None = None
    picked: Tensor | None = None
    fp8: bool = False

    def column_sums(self) -> Tensor:
        """[B, H, prompt tokens] float32: attention received from this chunk's queries, each counting its weight.

        Prompts only: turns compressed before take their share of the softmax but no score.
        """
        tokens = self.prompt.image.shape[1]
        looking, position = self, None
        if self.picked is not None:
            if self.picked.shape[1] == 0:
                dtype = torch.float64 if torch.float64 in (self.query.dtype, self.key.dtype) else torch.float32
                return self.key.new_zeros((*self.key.shape[:2], tokens), dtype=dtype)
            looking = self._only_picked(self.picked)
            position = torch.where(self.picked < 0, -1, self.picked + self.key.shape[2] - self.query.shape[2])
        query, key, head_scale = looking.query, looking.key, None
        if self.fp8:
            query, key, head_scale = looking._quantized()
        scores = lookm_kernels.attention_scores(
            query,
            key,
            scale=self.scale,
            causal=self.causal,
            lse=looking.lse,
            query_weight=looking.query_weight,
            key_start=self.key_start,
            mask=looking.mask,
            softcap=self.softcap,
            query_position=position,
            head_scale=head_scale,
        )
        return scores[..., -tokens:]

    def visits(self) -> Tensor:
        """[B, 1 or Hq, prompt tokens] float32: how many of this chunk's queries can see each key, weighted alike."""
        queries, tokens = self.query.shape[2], self.prompt.image.shape[1]
        weight = self.query_weight
        if weight is None:
            weight = torch.ones(self.query.shape[0], queries, dtype=torch.float32, device=self.query.device)
        if not self.causal:
            if self.mask is None:
                return weight.sum(1)[:, None, None].expand(-1, 1, tokens)
            seen = self.mask[..., -tokens:] * weight[:, None, :, None]
            return seen.sum(2)
        # key j of the last M tokens is seen by the queries from j on, an earlier key by all of them
        own = weight.flip(1).cumsum(1).flip(1)
        earlier = own[:, :1].expand(-1, tokens - queries)
        return torch.cat([earlier, own], 1)[:, None]

    def _only_picked(self, picked: Tensor) -> Attention:
        """The same with the picked queries alone; an empty place holds the first query."""
        place = picked.clamp(min=0).long()
        mask, lse, weight = self.mask, self.lse, self.query_weight
        if mask is not None and mask.stride(2) == 0:
            mask = mask[:, :, : place.shape[1]]
        elif mask is not None:
            mask = mask.expand(len(place), -1, -1, -1).take_along_dim(place[:, None, :, None], 2)
        return replace(
            self,
            query=self.query.take_along_dim(place[:, None, :, None], 2),
            mask=mask,
            lse=None if lse is None else lse.take_along_dim(place[:, None], 2),
            query_weight=None if weight is None else weight.gather(1, place),
        )

    def _quantized(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key as 8-bit floats, and the scale of each query head; padding sets none."""
        start = self.key_start
        if self.picked is not None:
            start = (self.picked < 0).sum(1).int()
        elif start is not None:
            start = (start - (self.key.shape[2] - self.query.shape[2])).clamp(min=0)
        query, query_scale = lookm_kernels.quantize_heads(self.query, start)
        key, key_scale = lookm_kernels.quantize_heads(self.key, self.key_start)
        return query, key, query_scale * key_scale.repeat_interleave(query.shape[1] // key.shape[1], 1)


@dataclass(frozen=True)
class Policy:
    """Which tokens stay and how the others merge. A new policy overrides a method, or only sets the fields.

    recent_share: share of the budget for the most recent tokens.
    sinks: first tokens that always stay (at most half of the budget).
    text_prior: text tokens go before image tokens (LOOK-M, section 3.2).
    rule, gate: merge rule and gate, names of lookm_kernels.rules.
    protect_text: never evict text, even where that exceeds the budget, as the authors' code does.
    queries: whose attention is summed; scoring costs as much as their number: "all"; "text", those of text tokens
        alone; "sampled", those of text tokens, and of every `stride`-th image token of a row, which counts `stride`
        times: averaged over the phases that is "all".
    stride, phase: of "sampled": image token c of a row, from 0 on, looks where c % stride == phase.
    fp8: sum the attention of 8-bit floats, one scale a head, for GPUs that multiply them faster; not for float64. It is
        normalised by the model's own sums where these come free (sdpa without a mask), else by those of the 8-bit
        floats, so a row alone and in a padded batch may score a few percent apart.
    evicts, looks: a class may say that it evicts nothing, or that its scores need no attention.
    ValueError for a value outside of what is said here.
    """

    recent_share: float = 0.5
    sinks: int = 0
    text_prior: bool = False
    rule: str = "none"
    gate: str | None = None
    protect_text: bool = False
    queries: str = "all"
    stride: int = 8
    phase: int = 0
    fp8: bool = False
    evicts: ClassVar[bool] = True
    looks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("recent_share", is_number(self.recent_share) and 0 <= self.recent_share <= 1, "a share from 0 to 1"),
            ("sinks", is_count(self.sinks), "a number of tokens, 0 or more"),
            ("text_prior", isinstance(self.text_prior, bool), "True or False"),
            ("rule", self.rule in list(RULES), f"one of {sorted(RULES)}"),
            ("gate", self.gate is None or self.gate in GATES, f"None or one of {list(GATES)}"),
            ("protect_text", isinstance(self.protect_text, bool), "True or False"),
            ("queries", self.queries in QUERIES, f"one of {list(QUERIES)}"),
            ("stride", is_count(self.stride) and self.stride >= 1, "a number of tokens, 1 or more"),
            (
                "phase",
                is_count(self.phase) and self.phase < self.stride,
                f"from 0 to {self.stride} - 1, below `stride`",
            ),
            ("fp8", isinstance(self.fp8, bool), "True or False"),
            ("protect_text", self.text_prior or not self.protect_text, "False in a policy without text prior"),
        ):
            if not good:
                raise ValueError(f"`{name}` must be {expected}, got {getattr(self, name)!r}")

    def query_weight(self, prompt: Prompt) -> Tensor | None:
        """How much the attention of each token of the prompt so far counts: [B, N] float32, None where all count 1.

        Called once for each chunk of a prompt, for all layers; padding counts 0 whatever is said here.
        """
        if self.queries == "all":
            return None
        text = (~prompt.image).float()
        if self.queries == "text":
            return text
        image = prompt.image if prompt.valid is None else prompt.image & prompt.valid
        looks = image & ((image.cumsum(1) - 1) % self.stride == self.phase)
        return text + self.stride * looks

    def score(self, attention: Attention) -> Tensor:
        """Score of every token of the prompt so far: [B, any, N] float32, added up over the chunks of a prompt.

        By default the accumulated attention of all queries, weighted (H2O; LOOK-M, section 3.2).
        """
        return attention.column_sums()

    def finish(self, scores: Tensor, prompt: Prompt) -> Tensor:
        """The sum over all chunks as the final score [B, H, N]; unchanged by default."""
        return scores


POLICIES: dict[str, Policy] = {}
DESCRIPTIONS: dict[str, str] = {}
ALIASES = {"lookm": "text_prior_pivot_merge"}
OWN_MODULE = "lookm.policies"  # of the policies that come with the package
PolicyType = TypeVar("PolicyType", bound=type[Policy])


def register_policy(name: str, **defaults: Any) -> Callable[[PolicyType], PolicyType]:
    """Class decorator: register the policy with these field values, described by its docstring's first line.

    A name may be registered again, as a notebook's cell does. ValueError for one that comes with the package.
    """

    def add(policy: PolicyType) -> PolicyType:
        ours = name in POLICIES and type(POLICIES[name]).__module__ == OWN_MODULE != policy.__module__
        if ours or name in ALIASES:
            raise ValueError(f"`name` must not be that of a policy of the package, got {name!r}")
        POLICIES[name] = replace(policy(), **defaults)
        DESCRIPTIONS[name] = (policy.__doc__ or "").strip().partition("\n")[0]
        return policy

    return add


def resolve_policy(policy: str | Policy, options: dict[str, Any]) -> Policy:
    """A registered policy by name, or one given, with some of its fields replaced.

    ValueError for an unknown name or field, TypeError for anything that is no policy.
    """
    if isinstance(policy, str):
        name = ALIASES.get(policy, policy)
        if name not in POLICIES:
            known = [*ALIASES, *POLICIES]
            raise ValueError(f"`policy` must be one of {', '.join(known)}; {_got(policy, known)}")
        policy = POLICIES[name]
    if not isinstance(policy, Policy):
        raise TypeError(f"`policy` must be a name or a lookm.Policy, got {type(policy).__name__}")
    known = [field.name for field in fields(policy)]
    for name in options:
        if name not in known:
            raise ValueError(f"options of this policy are {', '.join(known)}; {_got(name, known)}")
    return replace(policy, **options)


def _got(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name.lower(), known, n=1)
    return f"got {name!r}" + (f": did you mean {close[0]!r}?" if close else "")
