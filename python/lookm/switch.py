"""The zero-line use: models whose `generate` is called out of reach."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from lookm.cache import LookMCache
from lookm.modality import cache_argument, forward_arguments, generating, image_mask_of_part, input_ids_of, outermost
from lookm.observe import over_generate

NOT_USED = (
    "lookm: enabled for this model, but generate ran without a LookMCache ({reason}), so nothing was compressed. Leave "
    "the cache to generate, pass a LookMCache, or call lookm.disable(model)"
)


@dataclass
class Enabled:
    """What enable was told, and whether it takes effect.

    forwards: those that ran on a LookMCache. handles: of the hooks.
    image_mask: bool [B, tokens], of the running generate, where it hands embeddings alone to a part of the model.
    cache: the one that the running generate made.
    """

    settings: tuple[Any, ...]
    options: dict[str, Any]
    forwards: int = 0
    image_mask: Tensor | None = None
    cache: LookMCache | None = None
    handles: tuple[Any, ...] = ()

    def new_cache(self, model: PreTrainedModel) -> LookMCache:
        """A fresh cache for the model that reads the prompt."""
        image_mask = {} if self.image_mask is None else {"image_mask": self.image_mask}
        return LookMCache(model, *self.settings, **image_mask | self.options)


def enable(model: nn.Module, *settings: Any, **options: Any) -> None:
    """From now on `model.generate(**inputs)` runs on a LookMCache; arguments as for LookMCache.

    The fresh DynamicCache that generate makes becomes a LookMCache before the model first reads it; where generate
    hands over to a part of the model (BLIP-2, InstructBLIP, Kosmos-2, the full Omni models), before that part does. A
    cache that holds something already, and a LookMCache passed by the caller, stay what they are; a forward without a
    cache is not touched. Calling enable again replaces the settings.

    Raises what LookMCache raises; later, from generate, NotImplementedError for a cache of another kind (static,
    quantized, offloaded), and RuntimeError where generate came to its end without a LookMCache.
    """
    LookMCache(model, *settings, **options)
    module = outermost(model)
    disable(model)
    enabled = Enabled(settings, options)
    # before the hooks of LookMCache, which then find one
    enabled.handles = tuple(
        part.register_forward_pre_hook(functools.partial(_convert, enabled), with_kwargs=True, prepend=True)
        for part in generating(module)
    )
    module._lookm_enabled = enabled
    if isinstance(module, GenerationMixin):
        over_generate(type(module), _around_generate)


def _around_generate(
    generate: Callable[..., Any], module: PreTrainedModel, args: tuple[Any, ...], arguments: dict[str, Any]
) -> Any:
    enabled: Enabled | None = module.__dict__.get("_lookm_enabled")
    if enabled is None:
        return generate(*args, **arguments)
    tokens, before = input_ids_of(args, arguments), enabled.forwards
    if tokens is not None and "image_mask" not in enabled.options:
        enabled.image_mask = image_mask_of_part(module, arguments | {"input_ids": tokens})
    try:
        result = generate(*args, **arguments)
    finally:
        if enabled.cache is not None and enabled.image_mask is not None:
            enabled.cache.forward_state.given_image_mask = None  # of this prompt alone
        enabled.cache = enabled.image_mask = None
    if enabled.forwards == before:
        passed = cache_argument(arguments)
        without = "it was called with use_cache=False" if arguments.get("use_cache") is False else None
        given = None if passed is None else f"it was given a {type(passed).__name__} that holds tokens already"
        raise RuntimeError(NOT_USED.format(reason=without or given or f"{type(module).__name__} makes one of its own"))
    return result


def _convert(enabled: Enabled, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = cache_argument(forward_arguments(module, args, kwargs))
    if isinstance(cache, LookMCache):
        enabled.forwards += 1
        return
    if not isinstance(cache, Cache) or cache.get_seq_length() > 0:
        return
    if type(cache) is not DynamicCache or cache.offloading:
        raise NotImplementedError(
            f"lookm: enabled for this model, but generate was told to use a {type(cache).__name__}"
            f"{' with offloading' if getattr(cache, 'offloading', False) else ''}; only the default DynamicCache "
            "can be compressed. Remove cache_implementation from the call, or call lookm.disable(model)."
        )
    # in place: generate, or its caller, keeps this very object for the next forward
    cache.__class__ = LookMCache
    cache.__dict__.update(enabled.new_cache(module).__dict__)
    enabled.cache, enabled.forwards = cast(LookMCache, cache), enabled.forwards + 1


def disable(model: nn.Module) -> None:
    """Undo enable: `generate` uses its ordinary cache again. Does nothing where enable was not called."""
    module = outermost(model)
    enabled = module.__dict__.pop("_lookm_enabled", None)
    if enabled is None:
        return
    for handle in enabled.handles:
        handle.remove()
