"""Which models a LookMCache takes, judged by their configuration and by the cache that transformers makes for them."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticSlidingWindowLayer

CROSS_ATTENTION = "its image tokens live in cross-attention layers, not in the self-attention cache"
REFUSED = {"mllama": CROSS_ATTENTION, "idefics": CROSS_ATTENTION}
ONE_MASK = (
    "lookm: {model} is not supported: its {others} layers stay whole and share one attention mask with the layers that "
    "would be compressed"
)


def check_config(config: Any) -> Any:
    """The text configuration of a supported model's configuration. NotImplementedError with the reason otherwise."""
    text = config.get_text_config(decoder=True)
    for kind in (config.model_type, text.model_type):
        if kind in REFUSED:
            raise NotImplementedError(f"lookm: {kind} is not supported: {REFUSED[kind]}")
    crosses = (getattr(text, name, None) for name in ("cross_attention_layers", "add_cross_attention"))
    if any(crosses) or getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"lookm: {config.model_type} is not supported: it attends to another sequence")
    linear = "linear_attention" in (getattr(text, "layer_types", None) or ())
    if linear and not hasattr(cache_utils, "LinearAttentionLayer"):
        raise NotImplementedError(
            f"lookm: {config.model_type} is not supported with transformers {transformers.__version__}: its linear "
            "attention layers have a cache of their own there; a newer release keeps them in DynamicCache"
        )
    if getattr(text, "num_kv_shared_layers", 0) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise NotImplementedError(f"lookm: {config.model_type} is not supported: its layers share keys and values")
    return text


def check_masks(model: str, layers: list[Any]) -> None:
    """NotImplementedError where a layer that stays whole would get the mask made for the compressed ones.

    transformers makes one mask for all layers that are neither sliding nor linear nor empty.
    """
    whole = {
        type(layer).__name__
        for layer in layers
        if isinstance(layer, DynamicLayer) and type(layer) is not DynamicLayer and not layer.is_sliding
    }
    if whole:
        raise NotImplementedError(ONE_MASK.format(model=model, others=", ".join(sorted(whole))))


def of_fixed_size(layer: Any) -> Any:
    """The same layer with a tensor of fixed size, where transformers has one that reads a prompt of any length."""
    if type(layer) is DynamicSlidingWindowLayer:
        return StaticSlidingWindowLayer(max_cache_len=layer.sliding_window, sliding_window=layer.sliding_window)
    return layer
