"""Where one image ends and the next begins inside a run of image tokens, as far as the model's inputs tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lookm.modality import IMAGE, VIDEO

# (t, h, w) in patches of every image or video, and the pictures themselves
SOURCES = {IMAGE: ("image_grid_thw", "pixel_values"), VIDEO: ("video_grid_thw", "pixel_values_videos")}


@torch.no_grad()
def item_starts(media: Tensor, arguments: dict[str, Any], config: Any) -> Tensor:
    """[B, q] bool: image tokens that begin an image, or a frame of a video, right after another one.

    media [B, q]: see lookm.modality.find_media. arguments: of the model's forward. A grid (t, h, w) gives t frames of
    h w / merge_size^2 tokens; pictures of one size give each the same number of tokens. What does not add up to the
    tokens that are there is not used: a run of placeholders is then one image.
    """
    starts = torch.zeros_like(media, dtype=torch.bool)
    starts[:, 1:] = (media[:, 1:] != media[:, :-1]) & (media[:, 1:] > 0) & (media[:, :-1] > 0)
    for medium, (grid, pictures) in SOURCES.items():
        here = media == medium
        if not bool(here.any()):
            continue
        lengths = _by_grid(arguments.get(grid), config)
        if lengths is None:
            lengths = _by_count(arguments.get(pictures), here, arguments)
        if lengths is None or int(lengths.sum()) != int(here.sum()):
            continue
        place = here.flatten().nonzero()[:, 0]
        starts.view(-1)[place[(lengths.cumsum(0) - lengths).to(place.device)]] = True
    return starts


def _by_grid(grid: Tensor | None, config: Any) -> Tensor | None:
    """Tokens of every frame from a grid [items, 3]."""
    if grid is None:
        return None
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    frames, height, width = grid.long().cpu().unbind(1)
    return (height * width // merge**2).repeat_interleave(frames)


def _by_count(pictures: Any, here: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """Tokens of every picture of [items, C, H, W] or [videos, frames, C, H, W], where they share them evenly."""
    if not isinstance(pictures, Tensor) or pictures.ndim not in (4, 5) or arguments.get("image_sizes") is not None:
        return None
    items = pictures.shape[0] if pictures.ndim == 4 else pictures.shape[0] * pictures.shape[1]
    tokens, rest = divmod(int(here.sum()), items)
    return torch.full((items,), tokens, dtype=torch.long) if rest == 0 and tokens else None
