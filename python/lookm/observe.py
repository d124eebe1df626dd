"""The overlays: attention calls hand their query to the cache, masks become true for what is stored, generate is seen.

The backend's name stays: a wrapper takes the place of "sdpa", "flash_attention_2", ... in transformers' registries,
runs the untouched backend, and does more only where the key carries the `attend` of a layer of a LookMCache, or the
mask's offset its `make_mask`. Everything else passes straight through: other models, vision towers, cross attention,
decoding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import AttentionInterface

Attend = Callable[..., Any]


class Offset(int):
    """A mask offset that knows who makes the mask of its layer; arithmetic on it gives plain ints."""

    make_mask: Attend | None = None


def offset_of(make_mask: Attend, value: int) -> Offset:
    """The offset `value` of a layer's stored keys, for the mask overlay to recognise."""
    offset = Offset(value)
    offset.make_mask = make_mask
    return offset


def tag(keys: Tensor, attend: Attend) -> Tensor:
    """A fresh alias of keys that carries `attend` to the attention call (fresh: no reference cycle is made)."""
    alias = keys.view(keys.shape)
    alias._lookm_attend = attend  # type: ignore[attr-defined]
    return alias


def install(implementation: str) -> None:
    """Lay the overlays over one attention implementation; once for good, whatever the number of calls.

    NotImplementedError for an implementation that transformers builds no mask for.
    """
    masks = AttentionMaskInterface._global_mapping
    if implementation not in masks or (
        implementation != "eager" and implementation not in AttentionInterface._global_mapping
    ):
        raise NotImplementedError(
            f"lookm: attention implementation {implementation!r} is not registered with transformers' attention and "
            f"mask interfaces; registered: {', '.join(masks)}"
        )
    if implementation == "eager":
        _install_eager()
    else:
        attend = AttentionInterface._global_mapping[implementation]
        AttentionInterface.register(implementation, _over_attention(attend, implementation))
    AttentionMaskInterface.register(implementation, _over_mask(masks[implementation]))


def _install_eager() -> None:
    # eager functions live in the model files, not in the registry: catch them where a model asks for one
    original = AttentionInterface.get_interface
    if getattr(original, "_lookm", False):
        return

    @functools.wraps(original)
    def get_interface(self: AttentionInterface, attn_implementation: str, default: Attend) -> Attend:
        attend: Attend = original(self, attn_implementation, default)
        return _over_attention(attend, "eager") if attn_implementation == "eager" else attend

    get_interface._lookm = True  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface


def over_generate(model_class: type, around: Callable[..., Any]) -> None:
    """Lay `around(generate, model, args, kwargs)` over the class's generate, once for good.

    Over the class, as one on a model would keep the model alive in a circle; `around` lets other models pass.
    """
    home = next(parent for parent in model_class.__mro__ if "generate" in vars(parent))
    generate = vars(home)["generate"]
    if around in getattr(generate, "_lookm", ()):
        return

    @functools.wraps(generate)
    def lookm_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(generate, self), self, args, kwargs)

    lookm_generate._lookm = (*getattr(generate, "_lookm", ()), around)  # type: ignore[attr-defined]
    home.generate = lookm_generate  # type: ignore[attr-defined]


@functools.cache
def _over_attention(attend: Attend, implementation: str) -> Attend:
    if getattr(attend, "_lookm", False):
        return attend

    @functools.wraps(attend)
    def lookm_attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        attend_in_cache = getattr(key, "_lookm_attend", None)
        if attend_in_cache is None:
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        return attend_in_cache(attend, implementation, module, query, key, value, attention_mask, *args, **kwargs)

    lookm_attention._lookm = True  # type: ignore[attr-defined]
    return lookm_attention


@functools.cache
def _over_mask(make: Attend) -> Attend:
    if getattr(make, "_lookm", False):
        return make

    @functools.wraps(make)
    def lookm_mask(*args: Any, **kwargs: Any) -> Any:
        offset = kwargs.get("kv_offset", 0)
        make_in_cache = getattr(offset, "make_mask", None)
        if make_in_cache is None:
            return make(*args, **kwargs)
        kwargs["kv_offset"] = int(offset)
        plain = kwargs.get("mask_function") is causal_mask_function
        return make_in_cache(functools.partial(make, *args), plain, kwargs)

    lookm_mask._lookm = True  # type: ignore[attr-defined]
    return lookm_mask
