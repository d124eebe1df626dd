"""LOOK-M by plain loops in float64, and the logits it implies for a whole model, without any Cache class.

`teacher_forced` runs one forward over prompt and continuation, `use_cache=False`, under an attention function of its
own: in the full-attention layers the continuation reads the compressed prompt instead of the prompt. Step-by-step
decoding from a compressed cache must give the same logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # the kernels' tests use the loops without transformers
    from transformers import PreTrainedModel

PADDING, IMAGE, TEXT, PROTECTED = 0, 1, 2, 3


@dataclass(frozen=True)
class Recipe:
    """The choices of one policy, and the budget."""

    budget: float | int = 0.2
    recent_share: float = 0.5
    text_prior: bool = True
    protect_text: bool = False
    sinks: int = 0
    rule: str = "pivotal"
    gated: bool = False
    mean: bool = False  # scores divided by the number of queries that see the key

    def counts(self, length: int) -> tuple[int, int]:
        """Kept and recent tokens of a prompt of that length."""
        whole = min(length, self.budget) if isinstance(self.budget, int) else max(1, math.floor(self.budget * length))
        return whole, math.floor(self.recent_share * whole)


RECIPES = {
    "h2o": Recipe(text_prior=False, rule="none"),
    "mean_h2o": Recipe(text_prior=False, rule="none", mean=True),
    "avg_merge": Recipe(text_prior=False, rule="average", sinks=4),
    "weighted_merge": Recipe(text_prior=False, rule="weighted", sinks=4),
    "pivot_merge": Recipe(text_prior=False, rule="pivotal", sinks=4),
    "text_prior_h2o": Recipe(rule="none"),
    "text_prior_avg_merge": Recipe(rule="average"),
    "text_prior_weighted_merge": Recipe(rule="weighted"),
    "text_prior_pivot_merge": Recipe(rule="pivotal"),
    "lookm": Recipe(rule="pivotal"),
}


def visible(queries: int, keys: int, causal: bool = True, mask: Tensor | None = None) -> Tensor:
    """[M, N] bool, or [Hq, M, N] with such a mask: which keys a query sees; causal is aligned to the last key."""
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        for i in range(queries):
            seen[i, i + 1 + keys - queries :] = False
    return seen if mask is None else seen & mask


def softmax_row(query: Tensor, key: Tensor, scale: float, seen: Tensor, softcap: float | None = None) -> Tensor:
    """Attention of one query [D] over keys [N, D]; zero everywhere when it sees none."""
    logits = (key * query).sum(-1) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if not seen.any():
        return torch.zeros_like(logits)
    return torch.softmax(logits.masked_fill(~seen, -math.inf), -1)


def column_sums(
    query: Tensor,
    key: Tensor,
    scale: float,
    causal: bool = True,
    mask: Tensor | None = None,
    query_weight: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[H, N]: attention each key of `key` [H, N, D] gets from all queries of `query` [Hq, M, D]."""
    query, key = query.double(), key.double()
    group = query.shape[0] // key.shape[0]
    seen = visible(query.shape[1], key.shape[1], causal, mask).expand(query.shape[0], -1, -1)
    sums = torch.zeros(key.shape[:2], dtype=torch.float64)
    for head in range(query.shape[0]):
        for i in range(query.shape[1]):
            weight = 1.0 if query_weight is None else float(query_weight[i])
            sums[head // group] += weight * softmax_row(
                query[head, i], key[head // group], scale, seen[head, i], softcap
            )
    return sums


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor, softcap: float | None = None
) -> Tensor:
    """[Hq, M, D]: ordinary attention, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[0] // key.shape[0]
    out = torch.zeros(*query.shape[:2], value.shape[-1], dtype=torch.float64)
    for head in range(query.shape[0]):
        for i in range(query.shape[1]):
            row = softmax_row(query[head, i], key[head // group], scale, seen[i], softcap)
            out[head, i] = row @ value[head // group]
    return out


def tiers(image: Sequence[bool], recent: int, sinks: int, text_prior: bool) -> list[int]:
    """Selection class of every token of an unpadded row."""
    last = len(image) - recent
    return [
        PROTECTED if i < sinks or i >= last else IMAGE if is_image or not text_prior else TEXT
        for i, is_image in enumerate(image)
    ]


def select(scores: Tensor, tier: Sequence[int], keep: int) -> tuple[list[int], list[int]]:
    """Kept and evicted tokens, ascending: the best by tier, score, index. Non-finite scores come last in their tier."""

    def order(i: int) -> tuple[int, bool, float, int]:
        score = float(scores[i])
        finite = math.isfinite(score)
        return -int(tier[i]), not finite, -score if finite else 0.0, i

    valid = [i for i in range(len(scores)) if int(tier[i]) != PADDING]
    ranked = sorted(valid, key=order)
    return sorted(ranked[:keep]), sorted(ranked[keep:])


def nearest(key: Tensor, kept: Sequence[int], evicted: Sequence[int]) -> tuple[list[int], list[float]]:
    """For every evicted token the position in `kept` of the key [N, D] closest in direction, and the cosine."""
    key = key.double()
    norms = key.norm(dim=-1, keepdim=True)
    unit = torch.where(norms > 0, key / norms, 0.0)
    slots, similarity = [], []
    for e in evicted:
        cosines = (unit[list(kept)] * unit[e]).sum(-1).tolist()
        slots.append(max(range(len(kept)), key=cosines.__getitem__))  # the first of equals
        similarity.append(cosines[slots[-1]])
    return slots, similarity


def pivot_of(
    rows: Sequence[Tensor], options: Sequence[Tensor], allowed: Sequence[bool], least: float = -math.inf
) -> tuple[int, float]:
    """The place of the best of some pairs for one, and its similarity; -1 and 0 where none may be.

    rows: the key, and the value if it counts too, of the token; options: those [K, D] of what it may merge into.
    """
    best = -1, 0.0
    for place in range(len(allowed)):
        if not allowed[place]:
            continue
        cosines = []
        for row, others in zip(rows, options, strict=True):
            row, other = row.double(), others[place].double()
            lengths = float(row.norm() * other.norm())
            cosines.append(float(row @ other) / lengths if lengths > 0 else 0.0)
        similarity = sum(cosines) / len(cosines)
        if similarity >= least and (best[0] < 0 or similarity > best[1]):
            best = place, similarity
    return best


def gate(similarity: Tensor) -> list[bool]:
    """Which positions of the evicted lists merge, given the similarities [H, E] of all heads of a row."""
    mean = float(similarity.mean()) if similarity.numel() else 0.0
    return [float(similarity[:, e].mean()) >= mean for e in range(similarity.shape[1])]


def merge(
    x: Tensor,
    kept: Sequence[int],
    evicted: Sequence[int],
    slots: Sequence[int],
    similarity: Sequence[float],
    rule: str,
    gated: Sequence[bool] | None = None,
) -> Tensor:
    """[K, D]: the kept rows of `x` [N, D] with the evicted rows merged in; `gated` says which of them merge."""
    x = x.double()
    out = x[list(kept)].clone()
    for slot, c in enumerate(kept):
        members = [e for e in range(len(evicted)) if slots[e] == slot and (gated is None or gated[e])]
        if rule == "none" or not members:
            continue
        total = x[c].clone()
        for e in members:
            row = x[evicted[e]]
            if rule == "average":
                total += row
            elif rule == "pivotal":
                total += (row + x[c]) / 2
            elif rule == "weighted":
                total += float(similarity[e]) * row
            else:
                raise ValueError(f"unknown rule {rule!r}")
        out[slot] = total / (1 + len(members))
    return out


def compress(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    image: Sequence[bool],
    recipe: Recipe,
    causal: bool = True,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """One layer's prompt, a row without padding: compressed keys and values [H, K, D] and the kept tokens per head."""
    heads, length = key.shape[:2]
    scores = column_sums(query, key, scale, causal, mask, softcap=softcap)
    if recipe.mean:
        scores = scores / visible(query.shape[1], length, causal, mask).sum(-2)
    keep, recent = recipe.counts(length)
    tier = tiers(image, recent, recipe.sinks, recipe.text_prior)
    if recipe.protect_text and recipe.text_prior:
        keep = max(keep, sum(t >= TEXT for t in tier))
    chosen = [select(scores[h], tier, keep) for h in range(heads)]
    pivots = [nearest(key[h], *chosen[h]) for h in range(heads)]
    gated = gate(torch.tensor([similarity for _, similarity in pivots])) if recipe.gated else None

    def merged(x: Tensor) -> Tensor:
        rows = [merge(x[h], *chosen[h], *pivots[h], recipe.rule, gated) for h in range(heads)]
        return torch.stack(rows)

    return merged(key), merged(value), [kept for kept, _ in chosen]


def teacher_forced(
    model: PreTrainedModel, inputs: dict[str, Tensor], prompt: int, image: Tensor, recipe: Recipe
) -> Tensor:
    """Logits [T + 1, V] from the end of the prompt on, for one row `inputs`: a prompt and a continuation of T tokens.

    The first `prompt` tokens are the prompt, the part that is compressed; `image` [N] marks the image tokens.
    """
    if inputs["input_ids"].shape[0] != 1 or not bool(inputs["attention_mask"].all()):
        raise ValueError("one row without padding, please")
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers

    def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
        (query,), (key,), (value,) = query, key, value
        seen = attention_mask[0, 0]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        read = read_compressed if kinds[module.layer_idx] == "full_attention" else attend
        out = read(query, key, value, scale, seen, softcap)
        return out.transpose(0, 1)[None].to(query.dtype), None

    def read_compressed(query, key, value, scale, seen, softcap):
        past = [x[:, :prompt] for x in (query, key, value)]
        query, key, value = (x[:, prompt:].double() for x in (query, key, value))
        inside, own = seen[:prompt, :prompt], seen[prompt:, prompt:]
        out = attend(*past, scale, inside, softcap)
        keys, values, _ = compress(*past, scale, image[:prompt].tolist(), recipe, False, inside, softcap)
        everything = torch.ones(own.shape[0], keys.shape[1], dtype=torch.bool)
        keys, values = torch.cat([keys, key], 1), torch.cat([values, value], 1)
        later = attend(query, keys, values, scale, torch.cat([everything, own], 1), softcap)
        return torch.cat([out, later], 1)

    with _attention(config, attention), torch.no_grad():
        return model(**inputs, use_cache=False).logits[0, prompt - 1 :]


@contextmanager
def _attention(config, function: Callable) -> Iterator[None]:
    """Runs the decoder, and nothing else, under `function`, with its masks always given as [B, 1, M, N] bool."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def full_mask(*args, **kwargs) -> Tensor:
        return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})

    AttentionInterface.register("loops", function)
    AttentionMaskInterface.register("loops", full_mask)
    before = config._attn_implementation
    config._attn_implementation = "loops"
    try:
        yield
    finally:
        config._attn_implementation = before
