"""What a policy is: a frozen dataclass that scores the tokens of a prompt, in a registry by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lookm.attention import Attention, Pairs
from lookm.coverage import floor_levels, grid_levels
from lookm.prompt import Prompt
from lookm_kernels.rules import GATES, RULES

QUERIES = ("all", "text", "sampled")
SIMILARITIES = ("key", "key_value")
GROUPS = ("medium", "image")


def is_number(value: Any) -> bool:
    """Whether an option is a plain number: True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether an option is a whole number, 0 or more."""
    return is_number(value) and isinstance(value, int) and value >= 0


@dataclass(frozen=True)
class Merging:
    """How the evicted pairs of one layer merge: arguments of lookm_kernels.compress_ of the same names."""

    rule: str
    gate: str | None = None
    similarity: str = "key"
    group: Tensor | None = None
    min_similarity: float | Tensor | None = None
    refine: int = 0


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
    votes: a kept pair stands for itself and all that merged into it: later attention adds log(votes) to its logit, as
        token merging does in vision (proportional attention, ToMe, arXiv 2210.09461; KeepKV, arXiv 2504.09936).
    similarity: what makes a pivot the nearest: "key", the cosine of the keys (LOOK-M, section 3.3), or "key_value", the
        mean of that and of the cosine of the values.
    group: a token merges only into one of its own "medium" (text, or images) or of its own "image" (all text is one);
        None: into any. Where none of its group is kept, it is evicted.
    min_similarity: a token less similar to its pivot than this is evicted; None: all merge.
    refine: rounds in which the pivots are found again among the merged keys, and the tokens merged anew.
    floor: tokens of every image (or frame) that go before all other image tokens: its best ones.
    grid: share of the image budget, 0 to 1, that goes first to an even grid over every image.
    visit_power: scores are divided by the number of queries that can see the token, to this power: 0 as they are, 1
        mean attention (RoCo, arXiv 2402.06262), 0.5 in between.
    evicts, looks, by_head: a class may say that it evicts nothing, that its scores need no attention, or that it does
        not judge each head by itself: under tensor parallelism, where a process has some of them, it is refused.
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
    votes: bool = False
    similarity: str = "key"
    group: str | None = None
    min_similarity: float | None = None
    refine: int = 0
    floor: int = 0
    grid: float = 0.0
    visit_power: float = 0.0
    evicts: ClassVar[bool] = True
    looks: ClassVar[bool] = True
    by_head: ClassVar[bool] = True

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
            ("votes", isinstance(self.votes, bool), "True or False"),
            ("similarity", self.similarity in SIMILARITIES, f"one of {list(SIMILARITIES)}"),
            ("group", self.group is None or self.group in GROUPS, f"None or one of {list(GROUPS)}"),
            (
                "min_similarity",
                self.min_similarity is None or (is_number(self.min_similarity) and -1 <= self.min_similarity <= 1),
                "None or a cosine from -1 to 1",
            ),
            ("refine", is_count(self.refine), "a number of rounds, 0 or more"),
            ("floor", is_count(self.floor), "a number of tokens, 0 or more"),
            ("grid", is_number(self.grid) and 0 <= self.grid <= 1, "a share from 0 to 1"),
            ("visit_power", is_number(self.visit_power) and self.visit_power >= 0, "a number, 0 or more"),
            ("protect_text", not (self.protect_text and self.uneven), "False in a policy that gives layers budgets"),
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

        By default the accumulated attention of all queries, weighted (H2O; LOOK-M, section 3.2); behind it, with a
        visit_power, the number of queries that see the token.
        """
        sums = attention.column_sums()
        return torch.cat([sums, attention.visits().to(sums.dtype)], 1) if self.visit_power else sums

    def finish(self, pairs: Pairs) -> Tensor:
        """The final score [B, H, N], from pairs.sums; a key that no query sees scores 0."""
        if not self.visit_power:
            return pairs.sums
        sums, visits = pairs.sums.chunk(2, dim=1)
        return sums / visits.clamp(min=1) ** self.visit_power

    def levels(self, pairs: Pairs) -> Tensor | None:
        """[B, H or 1, N] whole numbers: tokens of a higher level go first within their tier; None: all are equal.

        By default the floor and the grid.
        """
        levels = floor_levels(pairs.scores, pairs.prompt.segment, self.floor) if self.floor else None
        if self.grid:
            grid = grid_levels(pairs.prompt, pairs.prompt.tiers(self.text_prior), self.grid)
            levels = grid if levels is None else torch.maximum(levels, grid)
        return levels

    def merging(self, pairs: Pairs) -> Merging:
        """How the evicted pairs of this layer merge; by default as the fields say, the same in every layer."""
        group = None
        if self.group is not None:
            group = pairs.prompt.image.int() if self.group == "medium" else pairs.prompt.segment + 1
        return Merging(self.rule, self.gate, self.similarity, group, self.min_similarity, self.refine)

    def take(self, pairs: Pairs, left: Sequence[int], layers: int) -> Sequence[int]:
        """How many tokens of each row this layer keeps; override it to give layers budgets of their own.

        left: what the budget still has in each row for this layer and those behind it, `layers` in all. What is given
        is moved to where every layer gets one token at least and none more than its prompt, so that the sum over the
        layers is the budget asked for. The numbers are the host's: where they follow from scores, every layer waits
        for its device. By default an even share.
        """
        return [tokens // layers for tokens in left]

    @property
    def uneven(self) -> bool:
        """Whether layers may keep different numbers of tokens."""
        return type(self).take is not Policy.take


POLICIES: dict[str, Policy] = {}
DESCRIPTIONS: dict[str, str] = {}
ALIASES = {"lookm": "text_prior_pivot_merge"}
OWN_MODULES = ("lookm.policies", "lookm.published")  # of the policies that come with the package
PolicyType = TypeVar("PolicyType", bound=type[Policy])


def register_policy(name: str, **defaults: Any) -> Callable[[PolicyType], PolicyType]:
    """Class decorator: register the policy with these field values, described by its docstring's first line.

    A name may be registered again, as a notebook's cell does. ValueError for one that comes with the package.
    """

    def add(policy: PolicyType) -> PolicyType:
        theirs = policy.__module__ not in OWN_MODULES
        ours = name in POLICIES and type(POLICIES[name]).__module__ in OWN_MODULES and theirs
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
