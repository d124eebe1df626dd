"""Reports: numbers counted by hand on a small ragged batch."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from families import FAMILIES, HEAD_DIM, IMAGE, IMAGE_ID, KV_HEADS, VIDEO, VIDEO_ID
from transformers import cache_utils

from lookm import LayerReport, LookMCache, Report
from lookm.modality import MEDIA
from lookm.report import format_bytes

LLAVA, GEMMA, LINEAR = FAMILIES["llava"], FAMILIES["gemma3"], FAMILIES["qwen3_5"]
TOKEN = 2 * KV_HEADS * HEAD_DIM * 4  # bytes of one token in one row and layer


@torch.no_grad()
def prefilled(family, rows, **options) -> LookMCache:
    model = family.model()
    cache = LookMCache(model, **options)
    read(family, cache, [family.prompt(layout, seed) for seed, layout in enumerate(rows)])
    return cache


@torch.no_grad()
def read(family, cache, prompts) -> None:
    family.model()(**family.inputs(prompts), past_key_values=cache)


def by(text: float, image: float) -> dict[str, float]:
    return dict.fromkeys(MEDIA, 0) | {"text": text, "image": image}


def table(report: Report) -> list[list[str]]:
    """The words of each line after the summary and the rule."""
    lines = str(report).splitlines()[1:]
    return [line.split() for line in lines if "─" not in line]


def test_a_ragged_batch():
    """39 tokens with 16 of an image, 27 with 16, 21 with none; 30 % stay: 11, 8 and 6, of them 5, 4 and 3 recent."""
    cache = prefilled(LLAVA, [(9, IMAGE, 12), (5, IMAGE, 4), (21,)], budget=0.3)
    # text goes before images: 11 and 6 text tokens; the second row has 11 text tokens for 8 places, all of them text
    expected = LayerReport(
        0, True, 3, 11, by(87 - 32, 32), by(11 + 8 + 6, 0), by(0, 0), 3 * 11 * TOKEN, 3 * 39 * TOKEN, 0
    )
    report = cache.report()
    assert report.layers[0] == expected
    assert (expected.seen, expected.kept, expected.evicted, expected.later) == (87, 25, 62, 0)
    assert report.bytes == 3 * expected.bytes
    assert report.bytes_full == 3 * expected.bytes_full
    assert report.summary() == (
        "prompt: 87 tokens in 3 rows (55 text, 32 image) -> 25 kept in each of 3 layers (28.7 %); "
        "cache 24.75 KiB of 87.75 KiB (28.2 %)"
    )


def test_images_that_stay_and_tokens_after_the_prompt():
    """What is read after the prompt is in the cache and outside of the budget: the prompt's share stays 50 %."""
    cache = prefilled(LLAVA, [(2, IMAGE, 4)], budget=12)
    # a start and an end token around the image: 8 text tokens, so 4 image tokens have a place
    before = cache.report()
    assert (before.layers[1].kept_text, before.layers[1].kept_image) == (8, 4)
    with torch.no_grad():
        LLAVA.model()(input_ids=torch.tensor([[5]]), past_key_values=cache)
    report = cache.report()
    layer = report.layers[1]
    assert (layer.seen, layer.seen_image, layer.kept_text, layer.kept_image) == (25, 16, 9, 4)
    assert (layer.later, layer.later_by) == (1, by(1, 0))
    assert (layer.places, layer.bytes, layer.bytes_full, layer.later_bytes) == (13, 13 * TOKEN, 25 * TOKEN, TOKEN)
    assert report.summary() == before.summary() + "; since then 1 token, 768 B"
    assert "24 tokens (8 text, 16 image) -> 12 kept in each of 3 layers (50.0 %); cache 9 KiB of 18 KiB (50.0 %)" in (
        report.summary()
    )
    assert table(report) == table(before)


@pytest.mark.parametrize("later_turns", ["dense", "segment"])
def test_a_later_turn_with_an_image(later_turns: str):
    """Rows of 26 and 4 tokens, then of 20 and 3: a dense turn is counted apart, without its padding."""
    cache = prefilled(LLAVA, [(4, IMAGE, 4), (4,)], budget=0.5, later_turns=later_turns)
    first = cache.report().layers[0]
    model, turn = LLAVA.model(), [LLAVA.prompt((2, IMAGE), 5), LLAVA.prompt((3,), 6)]
    inputs = LLAVA.inputs(turn)
    earlier = LLAVA.inputs([LLAVA.prompt((4, IMAGE, 4), 0), LLAVA.prompt((4,), 1)])["attention_mask"]
    inputs["attention_mask"] = torch.cat([earlier, inputs["attention_mask"]], 1)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    layer = cache.report().layers[0]
    assert layer.seen_by == by(first.seen_text + 4 + 3, first.seen_image + 16)
    if later_turns == "dense":
        assert layer.later_by == by(4 + 3, 16)
        assert layer.kept_by == by(first.kept_text + 7, first.kept_image + 16)
        assert layer.later_bytes == 2 * 20 * TOKEN
        assert cache.report().summary().startswith(f"prompt: {first.seen} tokens in 2 rows")
    else:
        assert (layer.later, layer.later_bytes) == (0, 0)
        assert layer.kept == first.kept + 10 + 1
        assert "since" not in cache.report().summary()


def test_heads_that_keep_different_tokens_are_averaged():
    cache = prefilled(LLAVA, [(9, IMAGE, 12)], budget=20, policy="h2o")
    for index, layer in enumerate(cache.report().layers):
        positions = cache.kept_positions(index)[0]
        images = [int(((head >= 10) & (head < 26)).sum()) for head in positions]
        assert layer.kept_image == sum(images) / 2
        assert layer.kept == 20


def test_layers_that_are_left_as_they_are_show_what_they_hold():
    cache = prefilled(GEMMA, [(30,), (20,)], budget=5)
    report = cache.report()
    assert [layer.compressed for layer in report.layers] == [False, True] * 2
    sliding = LayerReport(0, False, 2, 19, by(0, 0), by(0, 0), by(0, 0), 2 * 19 * TOKEN, 2 * 19 * TOKEN, 0)
    assert report.layers[0] == sliding
    assert report.mean()["seen"] == 50
    assert report.bytes == 2 * sliding.bytes + 2 * 2 * 5 * TOKEN
    assert table(report)[2] == ["0", "19", "9.5", "KiB", "as", "is"]
    assert "10 kept in each of 2 layers (20.0 %), 2 layers as they are; cache" in report.summary()


@pytest.mark.skipif(
    not hasattr(cache_utils, "LinearAttentionLayer"), reason="linear attention has a cache of its own here"
)
def test_linear_layers_show_the_bytes_of_their_states():
    cache = prefilled(LINEAR, [(30,)], budget=5)
    layer = cache.report().layers[0]
    states = [cache.layers[0].conv_states, cache.layers[0].recurrent_states]
    expected = sum(tensor.nbytes for state in states for tensor in state.values())
    assert (layer.compressed, layer.places, layer.bytes, layer.bytes_full) == (False, 0, expected, expected)
    assert expected > 0
    assert table(cache.report())[2][-2:] == ["as", "is"]


def test_to_dict_is_json():
    report = prefilled(LLAVA, [(9, IMAGE, 12), (21,)], budget=0.3).report()
    numbers = json.loads(json.dumps(report.to_dict()))
    assert (numbers["bytes"], numbers["bytes_full"], numbers["later_bytes"]) == (report.bytes, report.bytes_full, 0)
    assert numbers["mean"]["seen"] == 60
    assert numbers["mean"]["kept"] + numbers["mean"]["evicted"] == 60
    assert numbers["layers"][2] == {
        "layer": 2, "compressed": True, "rows": 2, "places": 11, "seen": 60, "kept": 17, "evicted": 43, "later": 0,
        **{f"{name}_{medium}": 0 for name in ("seen", "kept", "later") for medium in MEDIA},
        "seen_text": 44, "seen_image": 16, "kept_text": 17,
        "bytes": 2 * 11 * TOKEN, "bytes_full": 2 * 39 * TOKEN, "later_bytes": 0, "merged": 0,
    }  # fmt: skip


def test_nothing_read_yet():
    report = LookMCache(LLAVA.model()).report()
    assert not any(report.to_dict()["mean"].values())
    assert str(report) == report.summary() == "nothing read yet"


def test_the_table_fits_a_narrow_terminal():
    report = prefilled(LLAVA, [(9, IMAGE, 12), (21,)], budget=0.3).report()
    assert str(report).splitlines()[0] == report.summary()
    assert table(report) == [
        ["layer", "tokens", "text", "image", "bytes", "share"],
        ["prompt", "60", "44", "16", "19.5", "KiB", "100.0", "%"],
        *([str(index), "17", "17", "0", "5.5", "KiB", "28.2", "%"] for index in range(3)),
    ]
    assert max(map(len, str(report).splitlines()[1:])) <= 50


def test_a_video_is_a_medium_of_its_own():
    family = FAMILIES["qwen2_vl"]
    prompt = family.prompt((5, IMAGE, 3, VIDEO, 4))
    cache = LookMCache(family.model(), budget=1.0)
    read(family, cache, [prompt])
    ids = torch.tensor(prompt.ids)
    images, videos = int((ids == IMAGE_ID).sum()), int((ids == VIDEO_ID).sum())
    layer = cache.report().layers[0]
    assert layer.seen_by == {"text": len(ids) - images - videos, "image": images, "video": videos, "audio": 0}
    assert layer.kept_by == layer.seen_by
    assert f"{images} image, {videos} video)" in cache.report().summary()
    assert table(cache.report())[0][2:5] == ["text", "image", "video"]


def test_a_prompt_without_images_has_no_column_for_them():
    report = prefilled(LLAVA, [(21,)], budget=0.3).report()
    assert table(report)[0] == ["layer", "tokens", "text", "bytes", "share"]
    assert "(21 text)" in report.summary()


def test_long_prompts_are_written_out():
    """As many tokens as a long video, half a token between two heads."""
    seen, kept = by(1000, 1234567), by(1000, 123456.5)
    report = Report([LayerReport(0, True, 1, 124457, seen, kept, by(0, 0), 2**30, 10 * 2**30)])
    assert "1235567 tokens (1000 text, 1234567 image) -> 124456.5 kept in each of 1 layer (10.1 %)" in report.summary()
    assert table(report)[2] == ["0", "124456.5", "1000", "123456.5", "1", "GiB", "10.0", "%"]
    assert max(map(len, str(report).splitlines()[1:])) <= 60
    assert report.layers[0].evicted == 1111110.5


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (5 * 2**40, "5120 GiB")]
)
def test_bytes(number: int, text: str):
    assert format_bytes(number) == text
