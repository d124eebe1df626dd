"""Which tokens of a forward are image or video tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TOKEN_ID_FIELDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
MERGED = (
    "lookm: no image placeholder is recognisable in inputs_embeds; if image features are merged into them already (or "
    "there are none), say which tokens are images with LookMCache(..., image_mask=bool [batch, prompt tokens])"
)


UNNAMED = (
    "lookm: this forward brings images ({!r}), but the model's configuration names no image token; say which tokens "
    "are images with LookMCache(..., image_mask=bool [batch, prompt tokens])"
)


def outermost(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, also inside a wrapper (PEFT, torch.compile). TypeError where there is none."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"`model` must be a transformers PreTrainedModel, got {type(model).__name__}")


def image_token_ids(config: Any) -> list[int]:
    """Placeholder ids of image and video tokens that the configuration names; none for a text-only model."""
    places = (config, getattr(config, "vision_config", None))
    ids = {getattr(place, field, None) for place in places for field in TOKEN_ID_FIELDS}
    return sorted(token for token in ids if isinstance(token, int))


def forward_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward call by name."""
    if not args:
        return kwargs
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}


def find_image_tokens(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor | None:
    """[B, q] bool of a forward's arguments, None where the model knows no image tokens.

    From input_ids and the configuration's placeholder ids; else from mm_token_type_ids (1 image, 2 video); else from
    the placeholder's rows of the embedding table. ValueError where the forward brings images, or embeddings alone, and
    nothing tells which tokens they are.
    """
    ids = image_token_ids(model.config)
    tokens: Tensor | None = arguments.get("input_ids")
    if tokens is not None and ids:
        return torch.isin(tokens, torch.tensor(ids, device=tokens.device))
    embeddings: Tensor = arguments["inputs_embeds"] if tokens is None else tokens
    types: Tensor | None = arguments.get("mm_token_type_ids")
    if types is not None and types.shape[-1] == embeddings.shape[1]:
        return (types == 1) | (types == 2)
    pictures = [name for name, value in arguments.items() if "pixel_values" in name and value is not None]
    if tokens is not None and pictures:
        raise ValueError(UNNAMED.format(pictures[0]))
    if tokens is not None:
        return None
    table = model.get_input_embeddings().weight
    rows = table[[token for token in ids if token < table.shape[0]]].to(embeddings)
    found: Tensor = (embeddings[:, :, None] == rows).all(-1).any(-1)
    if not found.any():
        raise ValueError(MERGED)
    return found
