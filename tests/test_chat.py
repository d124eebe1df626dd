"""`lookm chat`: what a conversation in the terminal prints, and that Ctrl-C ends an answer and nothing else."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlamaForCausalLM, LlavaForConditionalGeneration, StoppingCriteriaList
from typer.testing import CliRunner, Result

from lookm import LookMCache
from lookm.chat import HELP, interruptible
from lookm.cli import app
from lookm.demo.checkpoint import MODEL
from lookm.demo.task import draw_prompts, held_out_scans
from lookm.generate import answer, build_inputs, load_checkpoint


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of the demo's task."""
    folder = tmp_path_factory.mktemp("pictures")
    prompt = draw_prompts(1, 3, "after", 1, held_out_scans(), torch.Generator().manual_seed(3))
    for index, pixels in enumerate(prompt.pictures(0)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


def talk(lines: list[str], *arguments: object) -> Result:
    command = ["chat", "--model", str(MODEL), "--max-new-tokens", "8", *map(str, arguments)]
    return CliRunner().invoke(app, command, input="".join(f"{line}\n" for line in lines))


def test_a_conversation(pictures: list[Path]) -> None:
    lines = [
        "/report",
        "note 3 1 4 ; Q note",
        "/image nowhere.png",
        f"/image {pictures[1]}",
        "B note 2 7 ; Q note",
        "",
        "/what",
        "/report",
        "/quit",
        "not read",
    ]
    result = talk(lines, "--image", pictures[0], "--budget", "60%")
    assert result.exit_code == 0, result.output
    said = result.stdout.replace("> ", "").splitlines()
    assert said[:2] == [HELP, "nothing read yet"]
    assert said[2] == "3 1 4"
    assert said[3].startswith("(4 tokens, ")
    assert said[4] == "error: image nowhere.png does not exist"
    assert said[6].startswith("(")
    assert said[7] == HELP
    report = " ".join(said[8:])
    assert "image" in report
    assert "KiB" in report
    assert not result.stderr


def test_it_is_the_dialogue_that_the_library_gives(pictures: list[Path]) -> None:
    questions = ["note 3 1 4 ; Q note", "Q A", "Q note"]
    said = talk(questions, "--image", pictures[0], "--image", pictures[1], "--budget", "100%").stdout
    answers = said.replace("> ", "").splitlines()[1::2]
    checkpoint = load_checkpoint(str(MODEL))
    model, processor = checkpoint.load_model("cpu"), checkpoint.processor
    messages: list[dict[str, Any]] = []
    images = [Image.open(path) for path in pictures[:2]]
    for question, given in zip(questions, answers, strict=False):
        messages.append(checkpoint.message(question, images))
        images = []
        inputs = build_inputs(processor, messages)
        plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = processor.decode(plain, skip_special_tokens=True)
        assert given.strip() == text.strip()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})


def test_what_is_refused_does_not_stay(tmp_path: Path, pictures: list[Path]) -> None:
    whole, processor = LlavaForConditionalGeneration.from_pretrained(MODEL), AutoProcessor.from_pretrained(MODEL)
    LlamaForCausalLM(whole.config.text_config).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    lines = f"/image {pictures[0]}\nQ A\nQ A\n"
    result = CliRunner().invoke(app, ["chat", "--model", str(tmp_path), "--max-new-tokens", "2"], input=lines)
    assert result.exit_code == 0, result.output
    said = result.stdout.replace("> ", "").splitlines()
    assert "is a text-only model (llama)" in said[1]
    assert said[3].startswith("(2 tokens, ")


def test_the_end_of_the_input_ends_it() -> None:
    result = talk([])
    assert (result.exit_code, result.stderr) == (0, "")


def test_no_template_no_chat(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    result = CliRunner().invoke(app, ["chat", "--model", str(tmp_path / "model")], input="hello\n")
    assert result.exit_code == 2
    assert "has no chat template" in result.stderr


class Pressing:
    """A streamer that presses Ctrl-C when it is given the second token of an answer."""

    given = 0

    def put(self, value: torch.Tensor) -> None:
        self.given += 1
        if self.given == 3:  # the prompt comes first
            signal.raise_signal(signal.SIGINT)

    def end(self) -> None:
        pass


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also in a process that a shell started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_control_c_ends_an_answer_and_the_cache_goes_on() -> None:
    checkpoint = load_checkpoint(str(MODEL))
    model, processor = checkpoint.load_model("cpu"), checkpoint.processor
    inputs = build_inputs(processor, [checkpoint.message("A B C D ; Q A")])
    cache = LookMCache(model, 1.0, later_turns="dense")
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as criterion:
        stopping = StoppingCriteriaList([criterion])
        result = answer(
            model, processor, inputs, cache, 50, streamer=Pressing(), stopping_criteria=stopping, eos_token_id=None
        )
    assert signal.getsignal(signal.SIGINT) == before
    assert result.tokens < 5
    assert cache.get_seq_length() == result.sequences.shape[1] - 1
    with interruptible() as criterion:
        signal.raise_signal(signal.SIGINT)
        assert criterion.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
