"""Where images begin and end, and the tokens of each that go first: segments, floors and even grids."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE, TALL, VIDEO
from inputs import random

from lookm import LookMCache, Prompt
from lookm.coverage import floor_levels, grid_levels, with_levels
from lookm.segments import item_starts

IMAGES = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1, 1, 1, 0]]).bool()


def prompt(image: torch.Tensor = IMAGES, starts: torch.Tensor | None = None, keep=(5, 6)) -> Prompt:
    return Prompt(image, None, list(keep), [1, 1], [0, 0], 0, starts)


def test_a_run_is_one_image_unless_the_inputs_tell_more():
    starts = torch.zeros_like(IMAGES)
    assert prompt().segment.tolist() == [[-1, 0, 0, 0, 0, -1, 1, 1, -1, -1], [0, 0, -1, 1, 1, 1, 1, 1, 1, -1]]
    starts[0, 3] = starts[1, 6] = True
    assert prompt(starts=starts).segment.tolist() == [
        [-1, 0, 0, 1, 1, -1, 2, 2, -1, -1],
        [0, 0, -1, 1, 1, 1, 2, 2, 2, -1],
    ]


@pytest.mark.parametrize(
    ("family", "layout", "lengths"),
    [
        ("llava", (3, IMAGE, IMAGE, 2, IMAGE, 1), [16, 16, 16]),
        ("qwen2_5_vl", (3, IMAGE, TALL, 2, VIDEO, 1), None),
    ],
)
def test_images_side_by_side_are_told_apart(family: str, layout: tuple, lengths: list[int] | None):
    """By the number of pictures, or by the grids the processor gives."""
    chosen = FAMILIES[family]
    drawn = chosen.prompt(layout, 0)
    inputs, cache = chosen.inputs([drawn]), LookMCache(chosen.model(), 0.9)
    chosen.model()(**inputs, past_key_values=cache)
    layer = cache.layers[0]
    segment = Prompt(layer.image, None, [1], [0], [0], 0, layer.starts).segment[0]
    sizes = torch.bincount(segment[segment >= 0]).tolist()
    if lengths is None:
        grids = [inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs]
        merge = chosen.model().config.vision_config.spatial_merge_size ** 2
        lengths = [int(h * w) // merge for grid in grids for t, h, w in grid.tolist() for _ in range(t)]
    assert sorted(sizes) == sorted(lengths)


def test_counts_that_do_not_add_up_are_not_used():
    media = torch.tensor([[0, 1, 1, 1, 1, 1, 0]], dtype=torch.int8)
    pictures = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    assert not item_starts(media, pictures, None).any()
    whole = item_starts(media[:, :5], pictures, None)
    assert whole.tolist() == [[False, True, False, True, False]]
    # pictures of several sizes share no number of tokens
    assert not item_starts(media[:, :5], pictures | {"image_sizes": torch.ones(2, 2)}, None).any()


def test_a_floor_gives_every_image_its_best_tokens_in_turn():
    scores, segment = random(0, 2, 3, 10), prompt().segment
    levels = floor_levels(scores, segment, 2)
    for b in range(2):
        for h in range(3):
            for image in range(2):
                here = (segment[b] == image).nonzero()[:, 0]
                best = here[scores[b, h, here].argsort(descending=True)]
                assert levels[b, h, best].tolist() == [2, 1, *[0] * (len(best) - 2)]
            assert (levels[b, h, segment[b] < 0] == 0).all()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_grid_spreads_its_share_evenly(share: float):
    image = torch.zeros(1, 60, dtype=torch.bool)
    image[0, 4:28] = image[0, 30:54] = True
    given = Prompt(image, None, [28], [2], [0])
    grid = grid_levels(given, given.tiers(True), share)[0, 0]
    # 12 text tokens come first, which leaves 16 for two images
    each = int(16 * share / 2)
    for begin in (4, 30):
        places = grid[begin : begin + 24].nonzero()[:, 0]
        assert len(places) == each
        assert set(places.diff().tolist()) == {24 // each}
    assert grid.sum() == 2 * each


def test_levels_go_before_scores_and_ties_to_the_lower_index():
    scores = torch.tensor([[[0.5, float("nan"), 0.9, 0.5, 0.1]]])
    levels = torch.tensor([[[0, 1, 0, 0, 2]]])
    assert with_levels(scores, levels).argsort(descending=True).tolist() == [[[4, 1, 2, 0, 3]]]


@torch.no_grad()
@pytest.mark.parametrize("options", [{"floor": 1}, {"grid": 1.0}], ids=str)
def test_every_image_keeps_tokens_at_a_small_budget(options: dict):
    llava = FAMILIES["llava"]
    layout = (3, *[IMAGE, IMAGE, 2] * 6, 4)
    cache = LookMCache(llava.model(), 0.5, "text_prior_h2o", recent_share=0.1, **options)
    llava.model()(**llava.inputs([llava.prompt(layout, 0)]), past_key_values=cache)
    for layer in cache.layers:
        segment = Prompt(layer.image, None, [1], [0], [0], 0, layer.starts).segment[0]
        for head in layer.kept_positions()[0]:
            assert set(segment[head.long()].tolist()) >= set(range(12))
