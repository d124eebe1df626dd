"""The `lookm` command: what it prints, and one clear line with exit code 2 for every mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, MllamaConfig
from typer.testing import CliRunner, Result

from lookm.cli import app, read_budget
from lookm.demo.checkpoint import MODEL
from lookm.demo.task import draw_prompts, held_out_scans
from lookm.generate import answer, build_inputs, load_model, load_processor, open_images
from lookm.policy import ALIASES, POLICIES

GENERATE = ("generate", "--model", MODEL)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def complaint(*arguments: object) -> str:
    """The one line of an error."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not result.stdout
    return result.stderr


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pictures of the demo's task, the second named B, and what they show."""
    folder = tmp_path_factory.mktemp("pictures")
    prompt = draw_prompts(1, 3, "after", 1, held_out_scans(), torch.Generator().manual_seed(3))
    paths = []
    for index, pixels in enumerate(prompt.pictures(0)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
        paths.append(folder / f"{index}.png")
    return paths


def images(paths: list[Path]) -> list[object]:
    return [argument for path in paths for argument in ("--image", path)]


def test_policies_are_listed_with_one_line_each() -> None:
    lines = run("policies").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*POLICIES, *ALIASES]


def test_generate_answers_and_reports(pictures: list[Path]) -> None:
    result = run(
        *GENERATE, *images(pictures), "--prompt", "note 3 1 4 ; Q note", "--budget", 0.3, "--max-new-tokens", 8
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == "3 1 4\n"
    assert "108" in result.stderr, "the report counts the image tokens"


def test_generate_compares_with_the_full_cache(pictures: list[Path]) -> None:
    result = run(*GENERATE, *images(pictures), "--prompt", "Q note", "--compare", "--max-new-tokens", 3)
    assert [line.partition(" (")[0] for line in result.stdout.splitlines()] == ["lookm", "full cache"]


def test_generate_is_what_the_library_gives(pictures: list[Path]) -> None:
    model, processor = load_model(str(MODEL)), load_processor(str(MODEL))
    inputs = build_inputs(processor, open_images(pictures), "A B C ; Q A")
    ours = answer(model, processor, inputs, 1.0, "lookm", 3)
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert ours.text == processor.decode(plain, skip_special_tokens=True)
    assert ours.report.bytes == ours.report.bytes_full


def test_a_processor_without_chat_template(pictures: list[Path]) -> None:
    processor = AutoProcessor.from_pretrained(MODEL)
    processor.chat_template = None
    inputs = build_inputs(processor, open_images(pictures), "Q note")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 3 * 36


def test_text_alone(pictures: list[Path]) -> None:
    assert run(*GENERATE, "--prompt", "note 1 2 3 Q note", "--max-new-tokens", 3).exit_code == 0


@pytest.mark.parametrize("budget", ["0", "1.5", "-3", "12XB", "", "nan"])
def test_a_bad_budget(budget: str) -> None:
    assert "`budget` must be a fraction" in complaint(*GENERATE, "--prompt", "Q", "--budget", budget)
    assert "`budget` must be a fraction" in complaint("demo", "--budget", budget)


def test_a_bad_policy() -> None:
    assert "`policy` must be one of" in complaint(*GENERATE, "--prompt", "Q", "--policy", "best")
    assert "`policy` must be one of" in complaint("demo", "--policy", "best")


def test_a_missing_image() -> None:
    assert "nowhere.png does not exist" in complaint(*GENERATE, "--prompt", "Q", "--image", "nowhere.png")


def test_an_image_that_does_not_open(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    message = complaint(*GENERATE, "--prompt", "Q", "--image", tmp_path / "text.png")
    assert "text.png does not open" in message
    assert "does not open" in complaint(*GENERATE, "--prompt", "Q", "--image", tmp_path)


def test_a_truncated_image(tmp_path: Path, pictures: list[Path]) -> None:
    half = pictures[0].read_bytes()
    (tmp_path / "half.png").write_bytes(half[: len(half) // 2])
    assert "half.png does not open" in complaint(*GENERATE, "--prompt", "Q", "--image", tmp_path / "half.png")


def test_an_unsupported_model(tmp_path: Path) -> None:
    MllamaConfig().save_pretrained(tmp_path)
    message = complaint("generate", "--model", tmp_path, "--prompt", "Q")
    assert "mllama is not supported" in message
    assert "cross-attention" in message


@pytest.mark.parametrize("name", ["/no/such/folder", "./none"])
def test_a_model_that_is_not_there(name: str) -> None:
    assert f"model folder {name} does not exist" in complaint("generate", "--model", name, "--prompt", "Q")


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    assert "does not load as a vision-language model" in complaint("generate", "--model", tmp_path, "--prompt", "Q")


def test_a_broken_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "does not load" in complaint("generate", "--model", tmp_path / "model", "--prompt", "Q")


def test_a_broken_chat_template(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for %}")
    assert "chat template" in complaint("generate", "--model", tmp_path / "model", "--prompt", "Q")


def test_the_full_cache_is_not_compared_with_itself() -> None:
    assert "`policy` must evict" in complaint("demo", "--policy", "full")


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    LlavaForConditionalGeneration.from_pretrained(MODEL).config.text_config.save_pretrained(tmp_path)
    assert "does not load as a vision-language model" in complaint("generate", "--model", tmp_path, "--prompt", "Q")


def test_a_bad_layout() -> None:
    assert "`layout` must be one of after, before" in complaint("demo", "--layout", "between")


@pytest.mark.parametrize(("text", "budget"), [("0.2", 0.2), ("300", 300), ("1.0", 1.0), ("1", 1), ("2MiB", "2MiB")])
def test_budgets_as_typed(text: str, budget: object) -> None:
    assert json.dumps(read_budget(text)) == json.dumps(budget)
