"""Tiny models of any type of transformers, and prompts for them, for what differs from the families of families.py."""

from __future__ import annotations

from typing import Any

import torch
from every_model import checks, inputs, sweep, tiny
from every_model.specs import SPECS, Spec
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lookm import LookMCache

NEVER = checks.NEVER


def known(model_type: str) -> bool:
    """Whether this transformers lists the model type."""
    return any(entry.model_type == model_type for entry in sweep.entries())


def subject(model_type: str, attention: str = "sdpa", changes: tuple[tuple[str, Any], ...] = ()) -> checks.Subject:
    """A model with an attention implementation and its prompts, as the sweep over all models builds them.

    changes: fields of its configuration, by dotted name, beside those of the sweep.
    """
    entry = next(entry for entry in sweep.entries() if entry.model_type == model_type)
    spec = SPECS.get(model_type, Spec())
    config = tiny.tiny_config(model_type, entry.model_class, spec.changes | dict(changes))
    model = tiny.tiny_model(entry.model_class, config)
    if attention != "sdpa":
        model.set_attn_implementation(attention)
    return checks.Subject(model, spec, inputs.draw(model.config, spec))


def prompt(model_type: str, attention: str = "sdpa") -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model and the arguments of its first prompt, a row without padding."""
    found = subject(model_type, attention)
    return found.model, found.arguments(found.rows[:1])


@torch.no_grad()
def read(model: PreTrainedModel, given: dict[str, Any], cache: Any, **options: Any) -> Any:
    """One forward."""
    return model(**given, past_key_values=cache, **options)


def scored(model: PreTrainedModel, given: dict[str, Any], **options: Any) -> dict[int, Tensor]:
    """Scores [B, H, N] of the whole prompt by compressed layer: accumulated attention, nothing evicted yet."""
    cache = LookMCache(model, 0.5, "h2o", prompt_length=NEVER, **options)
    read(model, given, cache)
    return {index: layer.scores for index, layer in enumerate(cache.layers) if hasattr(layer, "scores")}


def paid(model: PreTrainedModel, given: dict[str, Any]) -> list[Tensor]:
    """The same of every layer of an eager model, from the attention weights that it returns."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    attentions, sums = read(model, given, cache, output_attentions=True).attentions, []
    kv_heads = [layer.keys.shape[1] for layer in cache.layers]
    for weights, heads in zip(attentions, kv_heads, strict=True):
        mask = given.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            weights = weights.masked_fill(~mask[:, None, :, None].bool(), 0)
        sums.append(weights.view(len(weights), heads, -1, *weights.shape[2:]).sum((2, 3)))
    return sums
