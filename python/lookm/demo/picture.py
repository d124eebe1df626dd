"""One picture of what stayed: the images of a prompt, layer by layer, evicted tokens dimmed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lookm.demo.task import IMAGE, IMAGE_SIZE, PATCH_SIZE, Prompt

SCALE = 4
STEP = IMAGE_SIZE * SCALE + 6
PER_LINE = 12
LABEL = 92
TITLE = 34
DIM = 0.12


def kept_share(input_ids: Tensor, positions: Tensor) -> Tensor:
    """[images, patches, patches]: share of the heads that kept each image token of one row.

    input_ids [N]; positions [H, stored], as cache.kept_positions gives them for one row.
    """
    counts = torch.zeros(len(input_ids))
    inside = positions[(positions >= 0) & (positions < len(input_ids))]
    counts.scatter_add_(0, inside.long(), torch.ones(len(inside)))
    side = IMAGE_SIZE // PATCH_SIZE
    return (counts[input_ids == IMAGE] / positions.shape[0]).view(-1, side, side)


def draw_kept(prompt: Prompt, positions: Sequence[Tensor], title: str, row: int = 0) -> Image.Image:
    """The images of one row as they are, then once a layer, a token as bright as the share of heads that kept it.

    positions: one tensor [B, H, stored] a layer.
    """
    frames = prompt.images[row].float()
    shares = [torch.ones(len(frames), 1, 1), *(kept_share(prompt.input_ids[row], layer[row]) for layer in positions)]
    names = ["prompt", *(f"layer {index}: {100 * share.mean():.0f} %" for index, share in enumerate(shares[1:]))]
    blocks = -(-len(frames) // PER_LINE)
    size = (LABEL + min(PER_LINE, len(frames)) * STEP, TITLE + blocks * len(shares) * STEP)
    picture = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    pen.text((6, 8), title, fill="black", font=font)
    for index, frame in enumerate(frames):
        block, place = divmod(index, PER_LINE)
        for line, (name, share) in enumerate(zip(names, shares, strict=True)):
            top = TITLE + (block * len(shares) + line) * STEP
            if place == 0:
                pen.text((6, top + STEP // 3), name.replace(": ", "\n"), fill="black", font=font)
            patch = IMAGE_SIZE // share.shape[-1]
            light = share[index].repeat_interleave(patch, 0).repeat_interleave(patch, 1)[..., None]
            tile = Image.fromarray((frame * (DIM + (1 - DIM) * light)).round().to(torch.uint8).numpy())
            tile = tile.resize((IMAGE_SIZE * SCALE, IMAGE_SIZE * SCALE), Image.Resampling.NEAREST)
            picture.paste(tile, (LABEL + place * STEP, top))
    return picture
