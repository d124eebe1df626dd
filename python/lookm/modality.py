"""Which tokens of a forward stand for images, videos or audio."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache

# a medium's number is the one that transformers' mm_token_type_ids has for it
MEDIA = ("text", "image", "video", "audio")
IMAGE, VIDEO, AUDIO = 1, 2, 3
TOKEN_ID_FIELDS = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "image_patch_id": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "audio_token_id": AUDIO,
    "audio_token_index": AUDIO,
}
# arguments of a forward that bring the features of a medium
VISUAL = re.compile(
    r"pixel_values|flattened_patches$|image_patches$|(image|video)_(embeds|features|patches)$|image_embeds_position_mask$"
)
AUDIBLE = re.compile(r"input_features$|input_values$|audio_(values|features|embeds|codes|input_ids)$")
# the name of a forward's cache from transformers 5.24 on, and before
CACHE_ARGUMENTS = ("cache", "past_key_values")
# parts to which a model's own `generate` hands over (the full Omni models; BLIP-2, InstructBLIP; Kosmos-2; BLIP)
GENERATING_PARTS = ("thinker", "language_model", "text_model", "text_decoder")
MERGED = (
    "lookm: no image placeholder is recognisable in inputs_embeds; if image features are merged into them already (or "
    "there are none), say which tokens are images with LookMCache(..., image_mask=bool [batch, prompt tokens])"
)
UNNAMED = (
    "lookm: this forward brings {medium} ({name!r}), but the model's configuration names no token for it; say which "
    "tokens are images (or audio) with LookMCache(..., image_mask=bool [batch, prompt tokens])"
)


def outermost(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, also inside a wrapper (PEFT, torch.compile). TypeError where there is none."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"`model` must be a transformers PreTrainedModel, got {type(model).__name__}")


def generating(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models whose forward may decode when `model.generate` is called: itself, and a part it may hand over to."""
    part = None
    if isinstance(model, GenerationMixin) and type(model).generate is not GenerationMixin.generate:
        part = next((getattr(model, name) for name in GENERATING_PARTS if hasattr(model, name)), None)
    return [model, part] if isinstance(part, PreTrainedModel) and part.can_generate() else [model]


def media_token_ids(config: Any) -> dict[int, int]:
    """Placeholder ids that the configuration names, and the medium of each; none for a text-only model."""
    places = (config, *(getattr(config, name, None) for name in ("vision_config", "audio_config")))
    ids: dict[int, int] = {}
    for place in places:
        for field, medium in TOKEN_ID_FIELDS.items():
            token = getattr(place, field, None)
            if isinstance(token, int):
                ids.setdefault(token, medium)  # some have one token for images and for videos
    return ids


def forward_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward call by name."""
    if not args:
        return kwargs
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}


def cache_keyword(model: nn.Module) -> str:
    """The name under which the model's forward, and its generate, take a cache in this transformers."""
    parameters = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_ARGUMENTS if name in parameters)


def cache_argument(arguments: dict[str, Any]) -> Cache | None:
    """The cache among a forward's arguments, under its old or its new name."""
    found = (arguments.get(name) for name in CACHE_ARGUMENTS)
    return next((cache for cache in found if isinstance(cache, Cache)), None)


@torch.no_grad()
def find_media(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor | None:
    """[B, q] int8, the medium (see MEDIA) of each token of a forward; None where the model knows none but text.

    From the argument image_embeds_position_mask; else from input_ids and the configuration's placeholder ids; else from
    mm_token_type_ids; else from the placeholders' embeddings. ValueError where the forward brings images or audio, or
    embeddings alone, and nothing tells which tokens they are.
    """
    ids = media_token_ids(model.config)
    tokens: Tensor | None = arguments.get("input_ids")
    length = tokens_of(arguments).shape[1]  # type: ignore[union-attr]
    marked: Tensor | None = arguments.get("image_embeds_position_mask")
    if marked is not None and marked.shape[-1] == length:
        return (marked != 0).to(torch.int8)
    types: Tensor | None = arguments.get("mm_token_type_ids")
    typed = types is not None and types.shape[-1] == length
    if tokens is None and typed:
        return types.to(torch.int8)  # type: ignore[union-attr]
    if tokens is None:
        return _by_embedding(model, arguments["inputs_embeds"], ids)
    _refuse_unnamed(arguments, set(ids.values()) | ({IMAGE, AUDIO} if typed else set()))
    if ids:
        return _by_id(tokens, ids)
    return types.to(torch.int8) if typed else None  # type: ignore[union-attr]


def image_mask_of_part(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor | None:
    """bool [B, N] for a generate that hands embeddings alone to a part of the model, which cannot tell images.

    arguments: of generate, with input_ids. None where the part can tell, or there is none.
    """
    part = generating(model)[-1]
    if part is model or media_token_ids(part.config) or arguments.get("inputs_embeds") is not None:
        return None
    media = find_media(model, arguments)
    return None if media is None else media > 0


def input_ids_of(args: tuple[Any, ...], arguments: dict[str, Any]) -> Tensor | None:
    """The ids [B, N] that generate was given, by name (`inputs` is another one of them) or first."""
    given = arguments.get("input_ids", arguments.get("inputs", args[0] if args else None))
    return given if isinstance(given, Tensor) and given.ndim == 2 and not given.is_floating_point() else None


def tokens_of(arguments: dict[str, Any]) -> Tensor | None:
    """What a forward reads: ids [B, q], else embeddings [B, q, D]."""
    ids: Tensor | None = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def _by_id(tokens: Tensor, ids: dict[int, int]) -> Tensor:
    media = torch.zeros_like(tokens, dtype=torch.int8)
    for token, medium in ids.items():
        media.masked_fill_(tokens == token, medium)
    return media


def _by_embedding(model: PreTrainedModel, embeddings: Tensor, ids: dict[int, int]) -> Tensor:
    # through the embedding layer: some scale what the table holds
    embed = model.get_input_embeddings()
    known = [token for token in ids if token < embed.weight.shape[0]]
    media = torch.zeros(embeddings.shape[:2], dtype=torch.int8, device=embeddings.device)
    rows = embed(torch.tensor(known, dtype=torch.long, device=embed.weight.device)).to(embeddings)
    for token, row in zip(known, rows, strict=True):
        media.masked_fill_((embeddings == row).all(-1), ids[token])
    if not media.any():
        raise ValueError(MERGED)
    return media


def _refuse_unnamed(arguments: dict[str, Any], named: set[int]) -> None:
    for pattern, medium, known in ((VISUAL, "images", {IMAGE, VIDEO}), (AUDIBLE, "audio", {AUDIO})):
        for name, value in arguments.items():
            if value is not None and pattern.search(name) and not known & named:
                raise ValueError(UNNAMED.format(medium=medium, name=name))
