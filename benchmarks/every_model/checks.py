"""What is checked of a model: each function runs it on a DynamicCache first, then on a LookMCache, and compares."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

import lookm
from every_model.inputs import Row, arguments, image_mask, text
from every_model.specs import Spec
from every_model.tiny import AUDIO_ID
from lookm import LookMCache, plan

TOKENS = 4
BUDGET = 0.25
CLOSE = 1e-4
NEVER = 10**6  # a prompt length that is never reached: the scores of the whole prompt stay in the layers


class TransformersError(Exception):
    """What transformers itself cannot do with a DynamicCache; the words are its own."""


class WrongError(AssertionError):
    """A check that failed."""


@dataclass(frozen=True)
class Subject:
    """A model, its prompts, and whether its cache is told which tokens are images."""

    model: PreTrainedModel
    spec: Spec
    rows: list[Row]
    told: bool = False

    def cache(self, rows: Sequence[Row], budget: float, policy: str | None = None, **options: Any) -> LookMCache:
        """A LookMCache for these rows: of the default policy, with the whole budget of the paper's.

        The checks make layers select and compact at 1.0 too; attention with votes then has other last bits.
        """
        policy = policy or ("lookm" if budget == 1.0 else "auto")
        told = {"image_mask": image_mask(rows)} if self.told else {}
        return LookMCache(self.model, budget, policy, later_turns="dense", **told, **options)

    def plain(self) -> DynamicCache:
        """The cache that generate would make."""
        return DynamicCache(config=self.model.config)

    def arguments(self, rows: Sequence[Row], **options: bool) -> dict[str, Any]:
        """The arguments of a call over these rows."""
        return arguments(self.model, self.spec, rows, **options)


@contextlib.contextmanager
def transformers_alone() -> Iterator[None]:
    """Around a call without any LookMCache: what it raises is transformers' own."""
    try:
        yield
    except Exception as error:
        raise TransformersError(f"{type(error).__name__}: {error}") from error


def ensure(condition: bool, words: str) -> None:
    """WrongError with these words unless the condition holds."""
    if not condition:
        raise WrongError(words)


def same(found: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise."""
    ensure(found.shape == expected.shape, f"{what}: {list(found.shape)} instead of {list(expected.shape)}")
    ensure(torch.equal(found, expected), f"{what} differ from DynamicCache's by up to {(found - expected).abs().max()}")


@torch.no_grad()
def read(model: PreTrainedModel, inputs: dict[str, Any], cache: Cache, **options: Any) -> Any:
    """One forward over the prompt."""
    return model(**inputs, use_cache=True, **named(model, cache), **options)


def named(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """The cache under the name that the model has for it; `cache` since transformers 5.24."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def generate(model: PreTrainedModel, inputs: dict[str, Any], cache: Cache, **mode: Any) -> tuple[Tensor, Tensor]:
    """The new ids [B, T] and their logits [B, T, V] before any processing."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": TOKENS}
    result = model.generate(**inputs, **named(model, cache), **options | mode)
    return result.sequences[:, -TOKENS:], torch.stack(result.logits, 1)


def whole_budget(subject: Subject) -> None:
    """A budget of 1.0 gives DynamicCache's bits, though every layer scores, selects and compacts."""
    for rows in (subject.rows[:1], subject.rows):
        inputs = subject.arguments(rows)
        with transformers_alone():
            once, whole = subject.plain(), subject.plain()
            logits = read(subject.model, inputs, once).logits
            ids, steps = generate(subject.model, inputs, whole)
            _ensure_sound(once.get_seq_length(), whole.get_seq_length(), steps)
        with _compression_forced():
            same(read(subject.model, inputs, subject.cache(rows, 1.0)).logits, logits, "logits of the prompt")
            found, found_steps = generate(subject.model, inputs, subject.cache(rows, 1.0))
        same(found, ids, "greedy tokens")
        same(found_steps, steps, "greedy logits")


def _ensure_sound(prompt: int, whole: int, logits: Tensor) -> None:
    """RuntimeError where a comparison would say nothing: the cache was not used, or generate read tokens twice."""
    if not prompt < whole < 2 * prompt:
        raise RuntimeError(f"a DynamicCache has {prompt} tokens after the prompt and {whole} after {TOKENS} new ones")
    if not logits.isfinite().all():
        raise RuntimeError("logits are not finite")


@contextlib.contextmanager
def _compression_forced() -> Iterator[None]:
    # a prompt that fits is normally left alone
    with mock.patch.object(plan, "over_budget", return_value=True):
        yield


def small_budget(subject: Subject) -> None:
    """A quarter: the prompt's logits are DynamicCache's bits; a row keeps a quarter, rounded down, in every layer."""
    for rows in (subject.rows[:1], subject.rows):
        inputs = subject.arguments(rows)
        with transformers_alone():
            logits = read(subject.model, inputs, subject.plain()).logits
        cache = subject.cache(rows, BUDGET)
        same(read(subject.model, inputs, cache).logits, logits, "logits of the prompt")
        for layer in compressed_layers(cache):
            ensure(cache.layers[layer].is_initialized, f"layer {layer} was not used")
            kept = cache.kept_positions(layer)
            for index, row in enumerate(rows):
                counts = (kept[index] >= 0).sum(-1)
                due = int(len(row) * BUDGET)
                ensure(bool((counts == due).all()), f"layer {layer} keeps {counts.tolist()} of a row instead of {due}")
        _, steps = generate(subject.model, inputs, subject.cache(rows, BUDGET))
        ensure(bool(steps.isfinite().all()), "logits after the compression are not finite")


def compressed_layers(cache: LookMCache) -> list[int]:
    """Indices of the layers that are compressed."""
    return [layer.layer for layer in cache.report().layers if layer.compressed]


def refused_at_once(subject: Subject) -> None:
    """A model that is refused is refused by the forward that reads its prompt at the latest."""
    try:
        row = subject.rows[:1]
        generate(subject.model, subject.arguments(row), subject.cache(row, BUDGET), max_new_tokens=1)
    except (NotImplementedError, ValueError):
        return
    raise WrongError("refused, but not by the forward that reads the prompt")


def scores(subject: Subject) -> None:
    """Under eager attention, the scores are the column sums of the attention it returns."""
    for rows in (subject.rows[:1], subject.rows):
        _compare_scores(_eager(subject), rows, _paid(subject, rows)[0], "eager attention")


def default_scores(subject: Subject) -> None:
    """So they are under the default attention, where transformers computes the same by it as by eager."""
    for rows in (subject.rows[:1], subject.rows):
        paid, eager = _paid(subject, rows)
        inputs = subject.arguments(rows)
        real = inputs["attention_mask"].bool()
        with transformers_alone():
            default = read(subject.model, inputs, subject.plain()).logits
            if default.shape[:2] == real.shape and not torch.allclose(default[real], eager[real], 1e-3, 1e-3):
                raise RuntimeError("the default attention gives other logits than eager")
        _compare_scores(subject, rows, paid, "the default attention")


def _eager(subject: Subject) -> Subject:
    model = copy.deepcopy(subject.model)
    model.set_attn_implementation("eager")
    return replace(subject, model=model)


def _paid(subject: Subject, rows: Sequence[Row]) -> tuple[dict[int, Tensor], Tensor]:
    """By layer [B, heads, N], what eager's attention paid every token (by queries that are no padding); its logits."""
    inputs, cache = subject.arguments(rows), subject.plain()
    with transformers_alone():
        result = read(_eager(subject).model, inputs, cache, output_attentions=True)
        layers = [index for index, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]
        whole = getattr(result, "language_model_outputs", result)  # of BLIP-2
        given = [part for part in getattr(whole, "attentions", None) or () if isinstance(part, Tensor)]
        if len(given) != len(layers):
            raise RuntimeError(f"output_attentions gives {len(given)} for {len(layers)} layers with keys and values")
    real = inputs["attention_mask"][:, None, :, None].bool()
    return {layer: part.masked_fill(~real, 0).sum(2) for layer, part in zip(layers, given, strict=True)}, result.logits


def _compare_scores(subject: Subject, rows: Sequence[Row], paid: dict[int, Tensor], where: str) -> None:
    cache = subject.cache(rows, 0.5, "h2o", prompt_length=NEVER)
    read(subject.model, subject.arguments(rows), cache)
    for layer in compressed_layers(cache):
        found = cache.layers[layer].scores
        expected = paid[layer].view(*found.shape[:2], -1, found.shape[-1]).sum(2)  # query heads of a kv head
        off = (found - expected).abs().max()
        ensure(bool(off < 1e-3), f"layer {layer}, {where}: scores differ from the attention paid by up to {off:.3g}")


def image_counts(subject: Subject) -> None:
    """The report counts as many tokens of images, video and audio as were fed."""
    fed = sum(sum(row.image) for row in subject.rows)
    cache = subject.cache(subject.rows, BUDGET)
    read(subject.model, subject.arguments(subject.rows), cache)
    audio = any(AUDIO_ID in row.ids for row in subject.rows)
    for layer in cache.report().layers:
        if layer.compressed:
            found = sum(layer.seen_by.get(medium, 0) for medium in (("audio",) if audio else ("image", "video")))
            ensure(found == fed, f"{dict(layer.seen_by)} tokens are reported, {fed} of images or audio were fed")


def rows_alone(subject: Subject) -> None:
    """A row of a padded batch keeps the tokens and gives the logits that it does alone."""
    together = _first_steps(subject, subject.rows, None)
    for index, row in enumerate(subject.rows):
        _, alone = _first_steps(subject, [row], None)
        if not torch.allclose(together[1][index], alone[0], CLOSE, CLOSE):
            off = (together[1][index] - alone[0]).abs().max()
            raise TransformersError(f"a row of a padded batch differs from the row alone by {off:.3g} in its logits")
    kept, steps = _first_steps(subject, subject.rows, BUDGET)
    for index, row in enumerate(subject.rows):
        pads = max(map(len, subject.rows)) - len(row)
        kept_alone, alone = _first_steps(subject, [row], BUDGET)
        for layer, positions in kept_alone.items():
            mine = kept[layer][index]
            same_kept = torch.equal(mine[mine >= 0] - pads, positions[0][positions[0] >= 0])
            ensure(same_kept, f"layer {layer} keeps other tokens of row {index} than of the row alone")
        close = torch.allclose(steps[index], alone[0], CLOSE, CLOSE)
        off = (steps[index] - alone[0]).abs().max()
        ensure(close, f"logits of row {index} differ from those of the row alone by {off:.3g}")


def _first_steps(subject: Subject, rows: Sequence[Row], budget: float | None) -> tuple[dict[int, Tensor], Tensor]:
    """Positions kept by layer, and the logits [B, 2, V] of the prompt's last token and of a given one after it."""
    inputs = subject.arguments(rows)
    with transformers_alone() if budget is None else contextlib.nullcontext():
        cache = subject.plain() if budget is None else subject.cache(rows, budget)
        # equal tokens in every run: greedy ones may differ by the last bits
        forced = {"prefix_allowed_tokens_fn": lambda row, ids: [5]}
        _, steps = generate(subject.model, inputs, cache, max_new_tokens=2, **forced)
    layers = compressed_layers(cache) if isinstance(cache, LookMCache) else []
    return {layer: cache.kept_positions(layer)[:, :, :-1] for layer in layers}, steps


def beams(subject: Subject) -> None:
    """Three beams: DynamicCache's bits at 1.0, finite logits at a quarter."""
    inputs = subject.arguments(subject.rows)
    with transformers_alone():
        ids, steps = generate(subject.model, inputs, subject.plain(), num_beams=3)
    with _compression_forced():
        found, found_steps = generate(subject.model, inputs, subject.cache(subject.rows, 1.0), num_beams=3)
    same(found, ids, "tokens of the beams")
    same(found_steps, steps, "logits of the beams")
    _, steps = generate(subject.model, inputs, subject.cache(subject.rows, BUDGET), num_beams=3)
    ensure(bool(steps.isfinite().all()), "logits of the beams after the compression are not finite")


def second_turn(subject: Subject) -> None:
    """A question about what was read: DynamicCache's bits at 1.0, finite logits at a quarter."""
    with transformers_alone():
        ids, steps = _two_turns(subject, subject.plain())
    with _compression_forced():
        found, found_steps = _two_turns(subject, subject.cache(subject.rows, 1.0))
    same(found, ids, "tokens of the second turn")
    same(found_steps, steps, "logits of the second turn")
    _, steps = _two_turns(subject, subject.cache(subject.rows, BUDGET))
    ensure(bool(steps.isfinite().all()), "logits of the second turn after the compression are not finite")


def _two_turns(subject: Subject, cache: Cache) -> tuple[Tensor, Tensor]:
    first, _ = generate(subject.model, subject.arguments(subject.rows), cache)
    asked = [
        row.then([*answer, *text(5, 30 + index)])
        for index, (row, answer) in enumerate(zip(subject.rows, first.tolist(), strict=True))
    ]
    return generate(subject.model, subject.arguments(asked, shown=False), cache)


def enabled(subject: Subject) -> None:
    """lookm.enable compresses in generate, wherever that makes its cache."""
    inputs = subject.arguments(subject.rows)
    with transformers_alone():
        subject.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    told = {"image_mask": image_mask(subject.rows)} if subject.told else {}
    lookm.enable(subject.model, BUDGET, **told)
    try:
        result = subject.model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    finally:
        lookm.disable(subject.model)
    cache = getattr(result, "cache", None) or result.past_key_values
    ensure(isinstance(cache, LookMCache), f"generate used a {type(cache).__name__}")
    short = all(cache.layers[layer].stored < cache.layers[layer].seen for layer in compressed_layers(cache))
    ensure(short, "nothing was compressed")


CHECKS: dict[str, Callable[[Subject], None]] = {
    "whole budget": whole_budget,
    "small budget": small_budget,
    "scores": scores,
    "scores of the default attention": default_scores,
    "image counts": image_counts,
    "rows alone": rows_alone,
    "beams": beams,
    "second turn": second_turn,
    "enable": enabled,
}
