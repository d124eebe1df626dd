"""Reports: numbers counted by hand on a small ragged batch."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from families import FAMILIES, HEAD_DIM, IMAGE, KV_HEADS

from lookm import LayerReport, LookMCache, Report
from lookm.report import format_bytes

LLAVA, GEMMA = FAMILIES["llava"], FAMILIES["gemma3"]
TOKEN = 2 * KV_HEADS * HEAD_DIM * 4  # bytes of one token in one row and layer


@torch.no_grad()
def prefilled(family, rows, **options) -> LookMCache:
    model = family.model()
    cache = LookMCache(model, **options)
    model(**family.inputs([family.prompt(layout, seed) for seed, layout in enumerate(rows)]), past_key_values=cache)
    return cache


def test_a_ragged_batch():
    """39 tokens with 16 of an image, 27 with 16, 21 with none; 30 % stay: 11, 8 and 6, of them 5, 4 and 3 recent."""
    cache = prefilled(LLAVA, [(9, IMAGE, 12), (5, IMAGE, 4), (21,)], budget=0.3)
    # text goes before images: 11 and 6 text tokens; the second row has 11 text tokens for 8 places, all of them text
    expected = LayerReport(0, True, 87 - 32, 32, 11 + 8 + 6, 0, 3 * 11 * TOKEN, 3 * 39 * TOKEN)
    report = cache.report()
    assert report.layers[0] == expected
    assert (expected.seen, expected.kept, expected.evicted) == (87, 25, 62)
    assert report.bytes == 3 * expected.bytes
    assert report.bytes_full == 3 * expected.bytes_full


def test_images_that_stay_and_tokens_after_the_prompt():
    cache = prefilled(LLAVA, [(2, IMAGE, 4)], budget=12)
    # a start and an end token around the image: 8 text tokens, so 4 image tokens have a place
    assert (cache.report().layers[1].kept_text, cache.report().layers[1].kept_image) == (8, 4)
    with torch.no_grad():
        LLAVA.model()(input_ids=torch.tensor([[5]]), past_key_values=cache)
    layer = cache.report().layers[1]
    assert (layer.seen, layer.seen_image, layer.kept_text, layer.kept_image) == (25, 16, 9, 4)
    assert (layer.bytes, layer.bytes_full) == (13 * TOKEN, 25 * TOKEN)


def test_heads_that_keep_different_tokens_are_averaged():
    cache = prefilled(LLAVA, [(9, IMAGE, 12)], budget=20, policy="h2o")
    for index, layer in enumerate(cache.report().layers):
        positions = cache.kept_positions(index)[0]
        images = [int(((head >= 10) & (head < 26)).sum()) for head in positions]
        assert layer.kept_image == sum(images) / 2
        assert layer.kept == 20


def test_layers_that_are_not_compressed_are_counted_in_bytes():
    cache = prefilled(GEMMA, [(30,), (20,)], budget=5)
    report = cache.report()
    assert [layer.compressed for layer in report.layers] == [False, True] * 2
    sliding = LayerReport(0, False, 0, 0, 0, 0, 2 * 19 * TOKEN, 2 * 19 * TOKEN)
    assert report.layers[0] == sliding
    total = report.to_dict()["total"]
    assert total["seen"] == 2 * 50
    assert total["bytes"] == 2 * sliding.bytes + 2 * 2 * 5 * TOKEN
    assert "0 (as is)" in str(report)


def test_to_dict_is_json():
    report = prefilled(LLAVA, [(9, IMAGE, 12), (21,)], budget=0.3).report()
    numbers = json.loads(json.dumps(report.to_dict()))
    assert numbers["total"]["seen"] == 3 * 60
    assert numbers["total"]["kept"] + numbers["total"]["evicted"] == 3 * 60
    assert numbers["layers"][2] == {
        "layer": 2, "compressed": True, "seen": 60, "kept": 17, "evicted": 43, "seen_text": 44, "seen_image": 16,
        "kept_text": 17, "kept_image": 0, "bytes": 2 * 11 * TOKEN, "bytes_full": 2 * 39 * TOKEN,
    }  # fmt: skip


def test_nothing_read_yet():
    report = LookMCache(LLAVA.model()).report()
    assert report.to_dict()["total"] == dict.fromkeys(report.to_dict()["total"], 0)
    assert "100.0 %" in str(report)


def test_the_table():
    report = prefilled(LLAVA, [(9, IMAGE, 12), (21,)], budget=0.3).report()
    lines = [line.split("│") for line in str(report).splitlines() if "│" in line or "┃" in line]
    rows = [[cell.strip() for cell in line[1:-1]] for line in lines if len(line) > 2]
    assert rows[0] == ["0", "60 (44 + 16)", "17 (17 + 0)", "43 (27 + 16)", "5.5 KiB (28.2 %)", "19.5 KiB"]
    assert rows[-1][:2] == ["total", "180 (132 + 48)"]


def test_long_prompts_are_written_out():
    """As many tokens as a long video, half a token between two heads."""
    layer = LayerReport(0, True, 1000, 1234567, 1000, 123456.5, 2**30, 10 * 2**30)
    text = str(Report([layer]))
    assert "1235567 (1000 + 1234567)" in text
    assert "124456.5 (1000 + 123456.5)" in text
    assert "1111110.5 (0 + 1111110.5)" in text
    assert "1 GiB (10.0 %)" in text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (5 * 2**40, "5120 GiB")]
)
def test_bytes(number: int, text: str):
    assert format_bytes(number) == text
