"""The demo's task and the model shipped for it."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import pytest
import torch

from lookm.demo import task
from lookm.demo.task import LAYOUTS, TOKEN, Layout, Prompt, Scans, ask_note, ask_picture, draw_prompts, held_out_scans

MODEL = Path(str(importlib.resources.files("lookm.demo"))) / "model"
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
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 3 * 2**20


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
