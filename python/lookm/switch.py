"""The zero-line use: models whose `generate` is called out of reach."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from lookm.cache import LookMCache
from lookm.modality import forward_arguments, outermost


def enable(model: nn.Module, *settings: Any, **options: Any) -> None:
    """From now on `model.generate(**inputs)` runs on a LookMCache; arguments as for LookMCache.

    The fresh DynamicCache that generate makes becomes a LookMCache before the model first reads it. A cache that holds
    something already, and a LookMCache passed by the caller, stay what they are; a forward without a cache is not
    touched. Calling enable again replaces the settings.

    Raises what LookMCache raises, and later, from generate, NotImplementedError for a cache of another kind (static,
    quantized, offloaded).
    """
    LookMCache(model, *settings, **options)
    module = outermost(model)
    disable(model)
    hook = functools.partial(_convert, settings, options)
    # before the hook of LookMCache, which then finds one
    module._lookm_enabled = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def _convert(
    settings: tuple[Any, ...], options: dict[str, Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    cache = forward_arguments(module, args, kwargs).get("past_key_values")
    if not isinstance(cache, Cache) or isinstance(cache, LookMCache) or cache.get_seq_length() > 0:
        return
    if type(cache) is not DynamicCache or cache.offloading:
        raise NotImplementedError(
            f"lookm: enabled for this model, but generate was told to use a {type(cache).__name__}"
            f"{' with offloading' if getattr(cache, 'offloading', False) else ''}; only the default DynamicCache "
            "can be compressed. Remove cache_implementation from the call, or call lookm.disable(model)."
        )
    # in place: generate, or its caller, keeps this very object for the next forward
    cache.__class__ = LookMCache
    cache.__dict__.update(LookMCache(module, *settings, **options).__dict__)


def disable(model: nn.Module) -> None:
    """Undo enable: `generate` uses its ordinary cache again. Does nothing where enable was not called."""
    module = outermost(model)
    handle = module.__dict__.pop("_lookm_enabled", None)
    if handle is not None:
        handle.remove()
