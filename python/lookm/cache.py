"""LookMCache: a transformers cache that holds 5-20 % of a prompt."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer

from lookm import policies as _registers_the_policies  # noqa: F401
from lookm.budget import Budget, parse_budget
from lookm.forward import Forward
from lookm.layer import NO_ASSISTANT, LookMLayer
from lookm.modality import find_image_tokens, forward_arguments, outermost
from lookm.observe import install
from lookm.plan import Settings
from lookm.policy import Policy, is_count, resolve_policy
from lookm.report import Report, layer_report

DEFAULT_BUDGET = 0.2
LATER_TURNS = ("dense", "segment")
CROSS_ATTENTION = "its image tokens live in cross-attention layers, not in the self-attention cache"
REFUSED = {"mllama": CROSS_ATTENTION, "idefics": CROSS_ATTENTION}
MORE_PROMPT = (
    "lookm: the first {first} tokens were compressed as the whole prompt, and {more} more follow. If they are the rest "
    "of it, declare that: LookMCache(..., prompt_length=TOKENS). If they are a later turn, say later_turns='dense' or "
    "'segment' to silence this."
)


class LookMCache(DynamicCache):
    """The cache of one conversation with one model, compressed right after each layer read the prompt (LOOK-M).

    >>> cache = LookMCache(model, budget=0.2)
    >>> model.generate(**inputs, past_key_values=cache)

    Args:
        model: the transformers model that will be called (or a wrapper of it); the cache keeps no reference to it.
        budget: what stays of the prompt: a fraction 0 < f <= 1.0 of each row (0.2 by default), a number of tokens
            (int), or bytes for the whole cache ("512MiB"). A prompt that fits is left as it is.
        policy: a registered name (lookm.POLICIES; "lookm" by default) or a lookm.Policy.
        prompt_length: number of tokens of a prompt that comes in several forwards (chunked prefill), padding included.
        later_turns: what becomes of further prompts: "dense" (default) keeps them whole, "segment" compresses each
            on its own, with its own budget.
        image_mask: bool [B, tokens], image and video tokens, where the model's inputs cannot tell (features merged into
            inputs_embeds beforehand, or an inner model called directly).
        important, recent: two fractions instead of `budget`, each rounded down, as in the authors' code.
        options: fields of the policy to change: rule, gate, sinks, recent_share, text_prior, protect_text, queries, ...
            (see lookm.Policy)

    Only full-attention layers are compressed; sliding, chunked and linear ones stay as they are. A prompt without
    images is compressed by the same policy. ValueError for an argument that is not accepted, TypeError when model is
    none, NotImplementedError for a model or an attention implementation that is not supported, with the reason.
    """

    layers: list[Any]

    def __init__(
        self,
        model: nn.Module,
        budget: float | int | str | None = None,
        policy: str | Policy = "lookm",
        *,
        prompt_length: int | None = None,
        later_turns: str | None = None,
        image_mask: Tensor | None = None,
        important: float | None = None,
        recent: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config=check_config(outermost(model).config))
        if later_turns is not None and later_turns not in LATER_TURNS:
            raise ValueError(f"`later_turns` must be one of {LATER_TURNS}, got {later_turns!r}")
        if prompt_length is not None and not (is_count(prompt_length) and prompt_length >= 1):
            raise ValueError(f"`prompt_length` must be a number of tokens, 1 or more, got {prompt_length!r}")
        is_tensor = isinstance(image_mask, Tensor)
        if image_mask is not None and not (is_tensor and image_mask.ndim == 2 and image_mask.dtype == torch.bool):
            got = f"{image_mask.dtype} {list(image_mask.shape)}" if is_tensor else type(image_mask).__name__
            raise ValueError(f"`image_mask` must be a bool tensor [batch, tokens], got {got}")
        chosen = resolve_policy(policy, options)
        default = DEFAULT_BUDGET if important is None and recent is None else None
        budgeted = parse_budget(default if budget is None else budget, important, recent)
        if recent is not None and "recent_share" in options:
            raise ValueError("`recent_share` and `recent` both say how much stays recent: give one of them")
        if budgeted.bytes is not None and later_turns == "segment":
            raise ValueError(f"`budget` must be a fraction or tokens with later_turns='segment', got {budget!r}")
        if not chosen.evicts:
            budgeted = Budget(fraction=1.0)
        compressible = [type(layer) is DynamicLayer for layer in self.layers]
        if not any(compressible):
            raise NotImplementedError("lookm: this model has no full-attention layer to compress")
        settings = Settings(chosen, budgeted, later_turns or "dense", sum(compressible))
        self.forward_state = Forward(image_mask, prompt_length)
        self.warn_of_more = later_turns is None and prompt_length is None
        self.layers = [
            LookMLayer(settings, self.forward_state) if replaced else layer
            for layer, replaced in zip(self.layers, compressible, strict=True)
        ]
        watch(model)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin_forward(self, model: PreTrainedModel, arguments: dict[str, Any]) -> None:
        """Called by the model's pre-hook before it reads: note the image tokens of this forward."""
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        layer = next(layer for layer in self.layers if isinstance(layer, LookMLayer))
        if tokens is None or (layer.compressed and tokens.shape[1] == 1):
            return
        # in older releases, and under enable, only the number of logits asked for tells assisted decoding
        logits = arguments.get("logits_to_keep")
        if not layer.compressed and isinstance(logits, int) and logits > 1:
            raise NotImplementedError(NO_ASSISTANT)
        if self.warn_of_more and layer.compressed and layer.seen == layer.compressed_at:
            warnings.warn(MORE_PROMPT.format(first=layer.seen, more=tokens.shape[1]), stacklevel=4)
            self.warn_of_more = False
        install(attention_implementation(model))
        given = self.forward_state.given_image_mask
        known = given is not None and layer.seen < given.shape[1]
        self.forward_state.begin(layer.seen, None if known else find_image_tokens(model, arguments))

    def kept_positions(self, layer: int) -> Tensor:
        """[B, H, stored] int32: the original position of each cached token of a layer, -1 for an empty place.

        Positions count the tokens of the inputs, padding included. ValueError for a layer that is not compressed or
        that has read nothing yet.
        """
        chosen = self.layers[layer] if layer in range(-len(self.layers), len(self.layers)) else None
        if not isinstance(chosen, LookMLayer) or not chosen.is_initialized:
            raise ValueError(f"`layer` must be a full-attention layer that has read a prompt, got {layer}")
        return chosen.kept_positions()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens (see LookMLayer.crop); where a layer cannot, no layer is changed. 0 drops none."""
        removed = max(layer.check_crop(tokens_to_remove) for layer in self.layers if isinstance(layer, LookMLayer))
        if removed > 0:
            # layers of other kinds first: they may refuse
            for layer in sorted(self.layers, key=lambda layer: isinstance(layer, LookMLayer)):
                layer.crop(-removed)

    def report(self) -> Report:
        """What was seen, kept and evicted, by layer and in total; print it, or take report().to_dict()."""
        return Report([layer_report(index, layer) for index, layer in enumerate(self.layers)])


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
    if getattr(text, "num_kv_shared_layers", 0):
        raise NotImplementedError(f"lookm: {config.model_type} is not supported: its layers share keys and values")
    return text


def attention_implementation(model: PreTrainedModel) -> str:
    """The attention implementation of the decoder."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def watch(model: nn.Module) -> None:
    """Make the model tell a LookMCache which tokens it is about to read; harmless to call again."""
    module = outermost(model)
    install(attention_implementation(module))
    if not getattr(module, "_lookm_watched", False):
        module.register_forward_pre_hook(_before_forward, with_kwargs=True)
        module._lookm_watched = True


def _before_forward(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arguments = forward_arguments(module, args, kwargs)
    cache = arguments.get("past_key_values")
    if isinstance(cache, LookMCache):
        cache.begin_forward(module, arguments)
