"""LookMCache: a transformers cache that holds 5-20 % of a prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
)

from lookm import published as _registers_the_policies  # noqa: F401
from lookm.budget import Budget, parse_budget
from lookm.forward import Forward
from lookm.layer import LookMLayer
from lookm.masks import is_4d, is_step_mask
from lookm.modality import (
    cache_argument,
    find_media,
    forward_arguments,
    generating,
    image_mask_of_part,
    input_ids_of,
    outermost,
    tokens_of,
)
from lookm.observe import install, over_generate
from lookm.options import check_options
from lookm.parallel import check_policy
from lookm.plan import Settings
from lookm.policy import Policy, resolve_policy
from lookm.refusals import NO_ASSISTANT, NOT_INTERCEPTED
from lookm.report import Report, layer_report
from lookm.segments import item_starts
from lookm.store.fixed import Fixed, Steps
from lookm.store.growing import Growing
from lookm.store.quantized import Quantized
from lookm.supported import check_config, check_masks, of_fixed_size
from lookm.window import check_by_head

DEFAULT_BUDGET = 0.2
DEFAULT_POLICY = "auto"
MORE_PROMPT = (
    "lookm: the first {first} tokens were compressed as the whole prompt, and {more} more follow. If they are the rest "
    "of it, declare that: LookMCache(..., prompt_length=TOKENS). If they are a later turn, say later_turns='dense' or "
    "'segment' to silence this. If they are another prompt, call cache.reset() before it: this cache holds the first."
)
ANOTHER_PROMPT = (
    "`input_ids` must begin with the {seen} tokens that this cache has read, and go on; got {got}. Before another "
    "prompt, call cache.reset(); for the next turn, pass the whole conversation"
)
INTERRUPTED = (
    "lookm: an earlier forward on this cache did not come to its end, and some layers may hold more tokens than "
    "others: call cache.reset() and read the prompt again"
)
NOT_STORED = (
    "lookm: {model} read {tokens} tokens and stored none of them in the LookMCache it was given: not supported, or it "
    "was called in training with gradient checkpointing, which uses no cache"
)
NOT_REACHED = (
    "`prompt_length` is {declared}, but decoding starts after {seen} tokens: declare how many tokens the prompt has, "
    "padding included"
)
OWN_MASK = (
    "`attention_mask` in 4D must fit what the compressed cache holds: [batch, heads, queries, {stored} stored places + "
    "{queries} new tokens], got {got}. Give a 2D mask over all tokens, read and new ones"
)


class LookMCache(DynamicCache):
    """The cache of one conversation with one model, compressed right after each layer read the prompt (LOOK-M).

    >>> cache = LookMCache(model, budget=0.2)
    >>> model.generate(**inputs, past_key_values=cache)

    From transformers 5.24 on `generate` and every forward also take it as `cache=`, its new name there.

    Args:
        model: the transformers model that will be called (or a wrapper of it); the cache keeps no reference to it.
        budget: what stays of the prompt: a fraction 0 < f <= 1.0 of each row (0.2 by default), a number of tokens
            (int), or bytes for the whole cache ("512MiB"). A prompt that fits is left as it is.
        policy: a registered name (lookm.POLICIES; "auto" by default, "lookm" is the paper's method) or a lookm.Policy.
        prompt_length: number of tokens of a prompt that comes in several forwards (chunked prefill), padding included.
            A forward of one token before that, after longer ones, is taken for decoding and refused.
        later_turns: what becomes of further prompts: "dense" (default) keeps them whole, "segment" compresses each
            on its own, with its own budget.
        max_new_tokens: slots for new tokens, later turns included, in buffers of a fixed size: a step copies nothing,
            and `generate` compiles decoding into one graph where it compiles at all (on GPUs, unless disable_compile
            is set). None (default): the cache grows, and every step copies it.
        when_full: "raise" (default), a ValueError before anything is overwritten, or "double", twice as many slots.
        quantize: "int8", "fp8" or "int4" (see lookm_kernels.quantize_pairs): what stays of the prompt, all but its
            newest 32 tokens, is held in so many bits; what comes later stays whole, and so do sliding layers. None
            (default): nothing is. A budget in bytes counts pairs as they are before.
        generated: what becomes of an answer: "whole" (default), it stays and the cache grows; "window", everything that
            is stored is compressed to the budget again whenever `compress_every` more tokens came, by the attention
            that all tokens paid, and likewise after a later turn: one budget for the whole conversation, of which the
            cache never holds more than compress_every tokens above. A fraction is that of the first prompt.
        image_mask: bool [B, tokens], image, video and audio tokens, where the model's inputs cannot tell (features
            merged into inputs_embeds beforehand, or an inner model called directly); the report calls them images.
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
        policy: str | Policy | None = None,
        *,
        prompt_length: int | None = None,
        later_turns: str | None = None,
        max_new_tokens: int | None = None,
        when_full: str = "raise",
        quantize: str | None = None,
        generated: str = "whole",
        compress_every: int = 256,
        image_mask: Tensor | None = None,
        important: float | None = None,
        recent: float | None = None,
        **options: Any,
    ) -> None:
        config = check_config(outermost(model).config)
        try:
            super().__init__(config=config)
        except AttributeError as error:
            raise NotImplementedError(
                f"lookm: transformers makes no DynamicCache for {config.model_type}: {error}"
            ) from error
        check_options(later_turns, prompt_length, max_new_tokens, when_full, quantize, generated, compress_every)
        streams = generated == "window"
        is_tensor = isinstance(image_mask, Tensor)
        if image_mask is not None and not (is_tensor and image_mask.ndim == 2 and image_mask.dtype == torch.bool):
            got = f"{image_mask.dtype} {list(image_mask.shape)}" if is_tensor else type(image_mask).__name__
            raise ValueError(f"`image_mask` must be a bool tensor [batch, tokens], got {got}")
        chosen = resolve_policy(DEFAULT_POLICY if policy is None else policy, options)
        check_policy(outermost(model), chosen)
        default = DEFAULT_BUDGET if important is None and recent is None else None
        budgeted = parse_budget(default if budget is None else budget, important, recent)
        if recent is not None and "recent_share" in options:
            raise ValueError("`recent_share` and `recent` both say how much stays recent: give one of them")
        if streams:
            check_by_head(chosen)
        if budgeted.bytes is not None and later_turns == "segment" and not streams:
            raise ValueError(f"`budget` must be a fraction or tokens with later_turns='segment', got {budget!r}")
        if not chosen.evicts:
            budgeted = Budget(fraction=1.0)
        compressible = [type(layer) is DynamicLayer for layer in self.layers]
        if not any(compressible):
            raise NotImplementedError("lookm: this model has no full-attention layer to compress")
        check_masks(outermost(model).config.model_type, self.layers)
        later = "segment" if streams else later_turns or "dense"
        settings = Settings(
            chosen, budgeted, later, sum(compressible), compress_every if streams and chosen.evicts else None
        )
        self.forward_state = Forward(image_mask, prompt_length)
        self.warn_of_more = later_turns is None and prompt_length is None and not streams
        self.steps = Steps(doubles=when_full == "double")
        self.layers = [
            LookMLayer(settings, self.forward_state, self._new_store(max_new_tokens, quantize)) if replaced else layer
            for layer, replaced in zip(self.layers, compressible, strict=True)
        ]
        if max_new_tokens is not None:
            self.layers = [of_fixed_size(layer) for layer in self.layers]
        watch(model)

    def _new_store(self, max_new_tokens: int | None, quantize: str | None) -> Growing:
        if quantize is not None:
            return Quantized(quantize)
        return Growing() if max_new_tokens is None else Fixed(max_new_tokens, self.steps)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin_forward(self, model: PreTrainedModel, arguments: dict[str, Any]) -> None:
        """Called by the model's pre-hook before it reads: note what the tokens of this forward stand for."""
        state, layer = self.forward_state, self._first
        if state.model not in (None, id(model)):
            return  # a model inside the one that was called
        if not (state.complete or self._even()):
            raise RuntimeError(INTERRUPTED)
        state.model, state.begun_at = id(model), layer.seen
        state.note_tokens(layer.seen, arguments.get("input_ids"))
        tokens = tokens_of(arguments)
        if tokens is None:
            return
        queries = tokens.shape[1]
        mask = arguments.get("attention_mask")
        masks: list[Any] = list(mask.values()) if isinstance(mask, dict) else [mask]
        # generate makes the masks of a cache that can be compiled before the forward
        prepared = any(state.made(each) for each in masks) and state.masks(layer.seen, queries)
        own_masks = [] if prepared else [each for each in masks if is_4d(each)]
        if own_masks and layer.store.settled:
            self.steps.make_room(queries)
            self.steps.steady = False
        for own in own_masks:
            if layer.stored < layer.seen and own.shape[-1] != layer.stored + queries:
                raise ValueError(OWN_MASK.format(stored=layer.stored, queries=queries, got=list(own.shape)))
        if not prepared:
            state.masked = None  # after a crop or a failed forward, this one may begin at the same token
        if layer.compressed and queries == 1:
            return
        declared = state.prompt_length
        if declared is not None and queries == 1 and state.length > 1 and layer.seen + 1 < declared:
            raise ValueError(NOT_REACHED.format(declared=declared, seen=layer.seen))
        # in older releases, and under enable, only the number of logits asked for tells assisted decoding
        logits = arguments.get("logits_to_keep")
        if not layer.compressed and isinstance(logits, int) and logits > 1:
            raise NotImplementedError(NO_ASSISTANT)
        if self.warn_of_more and layer.compressed and layer.seen == layer.compressed_at:
            warnings.warn(MORE_PROMPT.format(first=layer.seen, more=queries), stacklevel=4)
            self.warn_of_more = False
        install(attention_implementation(model))
        given = state.given_image_mask
        known = given is not None and layer.seen < given.shape[1]
        own_mask = bool(own_masks) or (isinstance(mask, dict) and not prepared)
        media = None if known else find_media(model, arguments)
        starts = None if media is None else item_starts(media, arguments, model.config)
        state.begin(layer.seen, queries, media, starts, own_mask, prepared)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end_forward(self, model: PreTrainedModel, arguments: dict[str, Any], finished: bool) -> None:
        """Called by the model's hook after it has read, or failed to: refuse what was not scored or not stored."""
        state = self.forward_state
        if state.model != id(model):
            return
        state.model = None
        if not finished:
            return
        if any(layer.pending for layer in self._compressible):
            raise NotImplementedError(NOT_INTERCEPTED)
        tokens = tokens_of(arguments)
        if tokens is not None and all(layer.seen == state.begun_at for layer in self._compressible):
            raise NotImplementedError(NOT_STORED.format(model=type(model).__name__, tokens=tokens.shape[1]))
        state.complete = True
        self.steps.settle()

    def check_continues(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """ValueError where what generate is given, ids [B, n], is not the conversation in this cache and more.

        transformers takes the first tokens of the ids for those that the cache holds, without looking at them; ids that
        are fewer than the mask's columns are new ones alone.
        """
        seen = self._first.seen
        if seen == 0 or (attention_mask is not None and attention_mask.shape[1] > input_ids.shape[1]):
            return
        read = self.forward_state.tokens_read(seen)
        if input_ids.shape[1] <= seen:
            raise ValueError(ANOTHER_PROMPT.format(seen=seen, got=f"{input_ids.shape[1]} tokens"))
        if read is None or read.shape[0] != input_ids.shape[0]:
            return
        differs = read.to(input_ids.device) != input_ids[:, :seen]
        if attention_mask is not None:  # an answer that ended early is padded anew
            differs &= attention_mask[:, :seen].to(input_ids.device).bool()
        if bool(differs.any()):
            row, column = differs.nonzero()[0].tolist()
            raise ValueError(ANOTHER_PROMPT.format(seen=seen, got=f"another one in row {row}, column {column}"))

    def note_generated(self, sequences: Tensor) -> None:
        """What generate returned, [B, n]: compiled graphs did not say which tokens they read."""
        state, seen = self.forward_state, self._first.seen
        if state.tokens and state.token_count < seen <= sequences.shape[1] and len(sequences) == len(state.tokens[0]):
            state.tokens, state.token_count = [sequences[:, :seen].clone()], seen

    def _even(self) -> bool:
        """Whether all layers are known to hold as many tokens; the state of a linear layer does not say."""
        if any(not isinstance(layer, CacheLayerMixin) for layer in self.layers):
            return False
        counted = [layer for layer in self.layers if isinstance(layer, LookMLayer) or layer.is_sliding]
        return len({int(layer.get_seq_length()) for layer in counted}) == 1

    @property
    def _compressible(self) -> list[LookMLayer]:
        return [layer for layer in self.layers if isinstance(layer, LookMLayer)]

    @property
    def _first(self) -> LookMLayer:
        return next(layer for layer in self.layers if isinstance(layer, LookMLayer))

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
        removed = max(layer.check_crop(tokens_to_remove) for layer in self._compressible)
        if removed > 0:
            # layers of other kinds first: they may refuse
            for layer in sorted(self.layers, key=lambda layer: isinstance(layer, LookMLayer)):
                layer.crop(-removed)

    def reset(self) -> None:
        """Forget everything that was read, for another prompt; buffers of a fixed size stay for it."""
        self.steps.clear()
        for layer in self.layers:
            layer.reset()
            if isinstance(layer, DynamicLayer):
                # older releases set what other layers hold to zero, and keep it
                layer.keys, layer.values, layer.is_initialized = None, None, False

    def report(self) -> Report:
        """What was seen, kept and evicted, by layer and in total; print it, or take report().to_dict()."""
        return Report([layer_report(index, layer) for index, layer in enumerate(self.layers)])


def attention_implementation(model: PreTrainedModel) -> str:
    """The attention implementation of the decoder."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def watch(model: nn.Module) -> None:
    """Make the model tell a LookMCache which tokens it is about to read; harmless to call again."""
    for module in generating(outermost(model)):
        install(attention_implementation(module))
        if not getattr(module, "_lookm_watched", False):
            module.register_forward_pre_hook(_before_forward, with_kwargs=True)
            module.register_forward_hook(_after_forward, with_kwargs=True, always_call=True)
            module._lookm_watched = True
        if isinstance(module, GenerationMixin):
            over_generate(type(module), _around_generate)


def _around_generate(
    generate: Callable[..., Any], model: PreTrainedModel, args: tuple[Any, ...], arguments: dict[str, Any]
) -> Any:
    cache, tokens = cache_argument(arguments), input_ids_of(args, arguments)
    if not isinstance(cache, LookMCache) or tokens is None:
        return generate(*args, **arguments)
    cache.check_continues(tokens, arguments.get("attention_mask"))
    state = cache.forward_state
    given = state.given_image_mask
    if given is None and cache.get_seq_length() == 0:
        state.given_image_mask = image_mask_of_part(model, arguments | {"input_ids": tokens})
    try:
        result = generate(*args, **arguments)
    finally:
        state.given_image_mask = given
    sequences = getattr(result, "sequences", result)
    if isinstance(sequences, Tensor):  # the full Omni models return sound beside it
        cache.note_generated(sequences)
    return result


def _is_graph_step(arguments: dict[str, Any]) -> bool:
    """Whether this forward is a step over buffers of fixed size, for which generate has prepared everything."""
    cache = arguments.get("cache", arguments.get("past_key_values"))
    mask = arguments.get("attention_mask")
    prepared = any(is_step_mask(each) for each in mask.values()) if isinstance(mask, dict) else is_step_mask(mask)
    return isinstance(cache, LookMCache) and cache.steps.steady and prepared


def _before_forward(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() and _is_graph_step(kwargs):
        return
    arguments = forward_arguments(module, args, kwargs)
    cache = cache_argument(arguments)
    if isinstance(cache, LookMCache):
        cache.begin_forward(module, arguments)
        cache.forward_state.complete = False


def _after_forward(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if torch.compiler.is_compiling() and _is_graph_step(kwargs):
        return
    arguments = forward_arguments(module, args, kwargs)
    cache = cache_argument(arguments)
    if isinstance(cache, LookMCache):
        # torch calls it with None where the forward raised
        cache.end_forward(module, arguments, finished=output is not None)
