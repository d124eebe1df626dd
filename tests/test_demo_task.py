"""The demo's task and the model shipped for it."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import pytest
import torch

from lookm.demo import task
from lookm.demo.task import (
    DETAIL,
    LAYOUTS,
    TOKEN,
    Layout,
    Prompt,
    Scans,
    ask_note,
    ask_picture,
    draw_prompts,
    held_out_scans,
)

MODEL, DETAIL_MODEL = (Path(str(importlib.resources.files("lookm.demo"))) / name for name in ("model", "detail"))
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def scans() -> Scans:
    return held_out_scans()


def draw(scans: Scans, layout: Layout, *, seed: int = 0, batch: int = 2, images: int = 8, frames: int = 2) -> Prompt:
    return draw_prompts(batch, images, layout, frames, scans, torch.Generator().manual_seed(seed))


def test_equal_seeds_give_equal_prompts_and_others_differ(scans: Scans) -> None:
    first, again, other = (draw(scans, "after", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert not torch.equal(first.images, other.images)


@each_layout
def test_colours_and_letters_differ_within_a_prompt(scans: Scans, layout: Layout) -> None:
    facts = draw(scans, layout, batch=64, images=6).facts
    for fact in (facts.colour, facts.letter):
        assert all(len(row.unique()) == 6 for row in fact)
    assert torch.equal(facts.digit, scans.labels[facts.scan])


@each_layout
@pytest.mark.parametrize("frames", [1, 3])
def test_the_name_stands_where_the_layout_says(scans: Scans, layout: Layout, frames: int) -> None:
    prompt = draw(scans, layout, images=4, frames=frames)
    run = frames * task.IMAGE_TOKENS
    for ids, letters in zip(prompt.input_ids, prompt.facts.letter, strict=True):
        pictures = (ids == task.IMAGE).nonzero().flatten().view(4, run)
        assert torch.equal(pictures[:, -1] - pictures[:, 0], torch.full((4,), run - 1))
        names = ids[pictures[:, -1] + 1] if layout == "after" else ids[pictures[:, 0] - 1]
        assert torch.equal(names - TOKEN["A"], letters)
    note = (prompt.input_ids[0] == TOKEN["note"]).nonzero().item()
    assert torch.equal(prompt.input_ids[:, note + 1 : note + 4] - TOKEN["0"], prompt.facts.note)


def test_a_turn_reads_as_documented(scans: Scans) -> None:
    facts = draw(scans, "after").facts
    question, answer = ask_picture(facts, torch.tensor([3, 0]))
    colour, digit = list(task.COLOURS)[facts.colour[0, 3]], int(facts.digit[0, 3])
    assert task.text_of(question[0]) == f"Q {task.LETTERS[facts.letter[0, 3]]}"
    assert task.text_of(answer[0]) == f"{colour} {digit} <eos>"
    note = ask_note(facts)
    assert task.text_of(note.question[1]) == "Q note"
    assert task.text_of(note.answer[1]) == " ".join(map(str, facts.note[1].tolist())) + " <eos>"


@pytest.mark.parametrize(
    ("wrong", "name"), [({"images": 9}, "images"), ({"images": 0}, "images"), ({"frames": 0}, "frames")]
)
def test_impossible_prompts_are_refused(scans: Scans, wrong: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        draw(scans, "after", **wrong)
    with pytest.raises(ValueError, match="layout must be one of after, before"):
        draw(scans, "beside")  # type: ignore[arg-type]


def test_frames_of_a_picture_show_the_same_scan_anew(scans: Scans) -> None:
    pictures = draw(scans, "before", frames=3).pictures(0)
    assert len(pictures) == 24
    assert pictures[0].shape == (24, 24, 3)
    assert len({picture.tobytes() for picture in pictures}) == 24


def test_the_prompts_that_figures_are_of_stay_the_same(scans: Scans) -> None:
    """Drawn when the demo was published; pixels only to what another processor's rounding may change."""
    prompt = draw(scans, "after", seed=7, images=3)
    assert prompt.facts.scan.tolist() == [[315, 292, 421], [236, 283, 447]]
    assert prompt.facts.letter.tolist() == [[7, 2, 3], [7, 6, 3]]
    assert prompt.facts.note.tolist() == [[5, 0, 9], [1, 4, 2]]
    light = prompt.images.float().mean(dim=(2, 3))
    torch.testing.assert_close(
        light[:, -1], torch.tensor([[95.88, 80.88, 67.84], [48.85, 40.18, 57.23]]), rtol=0, atol=0.05
    )


def bright(pictures: torch.Tensor) -> torch.Tensor:
    """Where ink may be and paper cannot: its lightest, 0.3 + 0.12, is five sigmas of noise below."""
    return pictures.amax(dim=-1) > 0.58 * 255


def test_a_detail_is_small_and_anywhere_but_in_one_square(scans: Scans) -> None:
    generator, count = torch.Generator().manual_seed(0), 400
    placed = task.place(count, generator, 1.0, DETAIL)
    pictures = task.paint(placed, scans.pixels[:count], torch.arange(count) % 8, generator)
    assert pictures.shape == (count, 48, 48, 3)
    squares = bright(task.cut(pictures, DETAIL)).view(count, 4, 24, 24)
    assert (squares.flatten(2).any(dim=2).sum(dim=1) == 1).all()
    ink = bright(pictures)
    middle = torch.stack([ink.any(dim=side).float().argmax(dim=1) for side in (1, 2)], dim=1)
    assert ((middle - placed.middle).abs() <= 8).all(), "the first inked column and row are near the digit's middle"
    assert (ink.any(dim=2).sum(dim=1) <= 14).all()
    # all of the picture is used: no part of 12 x 12 pixels without a digit's middle
    assert len((placed.middle / 12).long().unique(dim=0)) == 16


def test_squares_are_in_reading_order() -> None:
    rows = torch.arange(48)
    picture = (rows[:, None] * 48 + rows).view(1, 48, 48, 1).expand(-1, -1, -1, 3)
    squares = task.cut(picture, DETAIL)
    assert squares[:, 0, 0, 0].tolist() == [0, 24, 24 * 48, 24 * 48 + 24]
    assert torch.equal(squares[3], picture[0, 24:, 24:])


@pytest.mark.parametrize("frames", [1, 2])
def test_one_frame_of_a_detailed_clip_shows_the_digit(scans: Scans, frames: int) -> None:
    generator = torch.Generator().manual_seed(0)
    prompt = draw_prompts(16, 8, "after", frames, scans, generator, scene=DETAIL)
    shows = bright(prompt.images).flatten(2).any(dim=2).view(16, 8, frames, 4)
    assert (shows.flatten(2).sum(dim=2) == 1).all()
    assert shows.any(dim=3).flatten(0, 1).any(dim=0).all(), "any frame may be the one"
    assert prompt.input_ids.shape[1] == 1 + 8 * (frames * 4 * task.IMAGE_TOKENS + 1) + 4


@each_layout
def test_a_detailed_prompt_passes_the_processor_unchanged(scans: Scans, layout: Layout) -> None:
    transformers, image = pytest.importorskip("transformers"), pytest.importorskip("PIL.Image")
    processor = transformers.AutoProcessor.from_pretrained(DETAIL_MODEL)
    prompt = draw_prompts(1, 3, layout, 2, scans, torch.Generator().manual_seed(0), scene=DETAIL)
    pictures = [image.fromarray(picture) for picture in prompt.pictures(0)]
    inputs = processor(text=[prompt.text(0)], images=[pictures], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], prompt.input_ids)
    torch.testing.assert_close(inputs["pixel_values"], prompt.pixel_values, rtol=0, atol=1e-6)


def test_held_out_scans_are_disjoint_from_the_training_scans(scans: Scans) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    everything = datasets.load_digits().images
    known = {image.astype("uint8").tobytes(): place for place, image in enumerate(everything)}
    shipped = {known[(image * 16).round().to(torch.uint8).numpy().tobytes()] for image in scans.pixels}
    assert len(shipped) == len(scans) == 450
    assert len(known) == len(everything)
    assert scans.labels.bincount().min() >= 43


@each_layout
def test_the_processor_gives_the_same_tokens_and_pixels(scans: Scans, layout: Layout) -> None:
    transformers, image = pytest.importorskip("transformers"), pytest.importorskip("PIL.Image")
    processor = transformers.AutoProcessor.from_pretrained(MODEL)
    prompt = draw(scans, layout)
    pictures = [[image.fromarray(picture) for picture in prompt.pictures(row)] for row in range(2)]
    inputs = processor(text=[prompt.text(0), prompt.text(1)], images=pictures, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], prompt.input_ids)
    torch.testing.assert_close(inputs["pixel_values"], prompt.pixel_values, rtol=0, atol=1e-6)


def test_the_chat_template_keeps_the_order_and_answers_decode_to_words(scans: Scans) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(MODEL)
    content = [{"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "; Q A"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red 7"}]
    assert processor.apply_chat_template(turns) == "<bos> A <image> ; Q A red 7 <eos>"
    assert processor.decode([TOKEN["red"], TOKEN["7"], task.EOS], skip_special_tokens=True) == "red 7"


def test_the_model_is_small() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(MODEL)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    files = [file for folder in (MODEL, DETAIL_MODEL) for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) <= 3 * 2**20


@each_layout
@torch.no_grad()
def test_the_full_cache_answers_later_turns(scans: Scans, layout: Layout) -> None:
    """A dialogue through `generate`: it stops by itself, and the next turn goes on with the same cache."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(MODEL).eval()
    prompt = draw(scans, layout, batch=16, frames=3)
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    turns = [ask_picture(prompt.facts, torch.full((16,), k)) for k in (6, 1, 3)] + [ask_note(prompt.facts)]
    ids, right = prompt.input_ids, []
    for number, (question, answer) in enumerate(turns):
        length = ids.shape[1] + question.shape[1]
        pictures = {} if number else {"pixel_values": prompt.pixel_values}
        ids = model.generate(torch.cat([ids, question], dim=1), past_key_values=cache, do_sample=False, **pictures)
        right.append((ids[:, length:] == answer).all(dim=1))
    assert torch.cat(right).float().mean() >= 0.95
