"""The `lookm` command: what it prints, and one clear line with exit code 2 for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MllamaConfig,
)
from typer.testing import CliRunner, Result

import lookm
from lookm import POLICIES, LookMCache
from lookm import generate as generate_module
from lookm.cli import app
from lookm.demo.checkpoint import MODEL
from lookm.demo.task import draw_prompts, held_out_scans
from lookm.errors import reason
from lookm.generate import Sampling, answer, build_inputs, load_checkpoint
from lookm.media import open_image
from lookm.policy import ALIASES
from lookm.typed import read_budget, read_policy

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
    assert "4 tokens in" in result.stderr
    assert "tokens/s" in result.stderr


def test_generate_compares_with_the_full_cache(pictures: list[Path]) -> None:
    result = run(*GENERATE, *images(pictures), "--prompt", "Q note", "--compare", "--max-new-tokens", 3)
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["lookm", "full cache"]


def test_generate_is_what_the_library_gives(pictures: list[Path]) -> None:
    checkpoint = load_checkpoint(str(MODEL))
    model, processor = checkpoint.load_model("cpu"), checkpoint.processor
    message = checkpoint.message("A B C ; Q A", [open_image(path) for path in pictures])
    inputs = build_inputs(processor, [message])
    ours = answer(model, processor, inputs, LookMCache(model, 1.0), 3)
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert ours.text == processor.decode(plain, skip_special_tokens=True)
    assert ours.report.bytes == ours.report.bytes_full


def test_a_processor_without_chat_template(pictures: list[Path]) -> None:
    processor = AutoProcessor.from_pretrained(MODEL)
    processor.chat_template = None
    content = [{"type": "image", "image": open_image(path)} for path in pictures] + [{"type": "text", "text": "Q note"}]
    inputs = build_inputs(processor, [{"role": "user", "content": content}])
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
    message = complaint("generate", "--model", tmp_path, "--prompt", "Q")
    assert f"model {tmp_path} does not load: " in message
    assert not message.strip().endswith(":")


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


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's decoder alone, with its tokenizer: a model of text."""
    folder = tmp_path_factory.mktemp("text")
    whole = LlavaForConditionalGeneration.from_pretrained(MODEL)
    torch.manual_seed(0)
    LlamaForCausalLM(whole.config.text_config).save_pretrained(folder)
    tokenizer = AutoProcessor.from_pretrained(MODEL).tokenizer
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_of_text_answers(text_model: Path) -> None:
    arguments = ("--prompt", "note 1 2 3 Q note", "--max-new-tokens", 3, "--budget", "100%", "--quiet")
    result = run("generate", "--model", text_model, *arguments)
    assert result.exit_code == 0, result.output
    tokenizer, model = AutoTokenizer.from_pretrained(text_model), LlamaForCausalLM.from_pretrained(text_model)
    # as the demo's chat template has it
    ids = tokenizer("<bos> note 1 2 3 Q note", return_tensors="pt")["input_ids"]
    plain = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    assert result.stdout.strip() == tokenizer.decode(plain, skip_special_tokens=True).strip()


def test_a_model_of_text_sees_no_pictures(text_model: Path, pictures: list[Path]) -> None:
    message = complaint("generate", "--model", text_model, "--prompt", "Q", "--image", pictures[0])
    assert "is a text-only model (llama)" in message


def test_a_model_that_is_neither(tmp_path: Path) -> None:
    CLIPVisionConfig().save_pretrained(tmp_path)
    message = complaint("generate", "--model", tmp_path, "--prompt", "Q")
    assert "(clip_vision_model) is neither a vision-language nor a text model" in message


@pytest.mark.parametrize("name", ["no/such-model", "two words"])
def test_a_hub_without_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "get_hf_file_metadata", unreachable)
    start = time.perf_counter()
    message = complaint("generate", "--model", name, "--prompt", "Q")
    assert f"model {name} is " in message
    assert "the hub is out of reach: no route" in message or "neither a folder here nor a model on the hub" in message
    assert time.perf_counter() - start < 5


def unreachable(*_: object, **__: object) -> None:
    raise ConnectionError("no route")


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (RepositoryNotFoundError, "is neither a folder here nor a model on the hub"),
        (EntryNotFoundError, "is neither a folder here nor a model on the hub"),
        (GatedRepoError, "is gated: ask for access on its page, then `hf auth login`"),
    ],
)
def test_what_the_hub_answers(kind: type[Exception], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*_: object, **__: object) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr(generate_module, "get_hf_file_metadata", answers)
    assert f"model no/such {line}" in complaint("generate", "--model", "no/such", "--prompt", "Q")


def test_a_cached_model_is_read_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(generate_module, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(generate_module, "try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    assert generate_module._where("some/model") == {"local_files_only": True}


def test_a_bad_layout() -> None:
    assert "`layout` must be one of after, before" in complaint("demo", "--layout", "between")


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.2", 0.2),
        ("300", 300),
        ("1.0", 1.0),
        ("20%", 0.2),
        ("100 %", 1.0),
        ("1 token", 1),
        ("512mb", "512mb"),
        ("2MiB", "2MiB"),
    ],
)
def test_budgets_as_typed(text: str, budget: object) -> None:
    assert json.dumps(read_budget(text)) == json.dumps(budget)


def test_one_is_no_budget_as_typed() -> None:
    message = complaint(*GENERATE, "--prompt", "Q", "--budget", "1")
    assert "'1 token'" in message
    assert "'100%'" in message


def test_options_of_a_policy() -> None:
    policy = read_policy("lookm", ["rule=average", "sinks=4", "gate=none", "recent_share=0.25", "text_prior=False"])
    assert policy == lookm.policy.replace(
        POLICIES[ALIASES["lookm"]], rule="average", sinks=4, gate=None, recent_share=0.25, text_prior=False
    )
    assert read_policy("snapkv", ["window=8"]).window == 8
    assert "`option` must be NAME=VALUE" in complaint(*GENERATE, "--prompt", "Q", "--option", "sinks")
    assert "options of this policy are" in complaint(*GENERATE, "--prompt", "Q", "--option", "sink=4")
    assert "`sinks` must be a number of tokens" in complaint(*GENERATE, "--prompt", "Q", "--option", "sinks=four")
    assert "`text_prior` must be True or False" in complaint(*GENERATE, "--prompt", "Q", "--option", "text_prior=2")


def test_a_policy_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policies.py").write_text(
        "from dataclasses import dataclass\n"
        "from lookm import Policy, register_policy\n"
        "@register_policy('typed_test', sinks=3)\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Policy):\n"
        "    width: int = 2\n"
        "other = Mine(width=5)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        assert read_policy("my_policies:Mine", ["width=7"]).width == 7
        assert read_policy("my_policies:Mine").sinks == 3, "as registered"
        assert read_policy("my_policies:other").width == 5
        result = run(*GENERATE, "--prompt", "note 1 2 Q note", "--policy", "my_policies:Mine", "--max-new-tokens", 2)
        assert result.exit_code == 0, result.output
        assert "cannot be imported: AttributeError" in complaint(
            *GENERATE, "--prompt", "Q", "--policy", "my_policies:None_"
        )
        assert "cannot be imported: ModuleNotFoundError" in complaint(
            *GENERATE, "--prompt", "Q", "--policy", "no_mod:A"
        )
        assert "must be a lookm.Policy" in complaint(*GENERATE, "--prompt", "Q", "--policy", "my_policies:dataclass")
    finally:
        POLICIES.pop("typed_test", None)
        lookm.policy.DESCRIPTIONS.pop("typed_test", None)


def test_json_and_quiet(pictures: list[Path]) -> None:
    arguments = (*GENERATE, *images(pictures), "--prompt", "note 3 1 4 ; Q note", "--budget", "30%")
    result = run(*arguments, "--max-new-tokens", 8, "--json", "--compare")
    said = json.loads(result.stdout)
    assert not result.stderr
    assert (said["text"], said["tokens"]) == ("3 1 4", 4)
    assert said["tokens_per_second"] == pytest.approx(said["tokens"] / said["seconds"], rel=0.05)
    ours, full = said["report"], said["full_cache"]["report"]
    assert sum(layer["bytes"] for layer in ours["layers"]) < sum(layer["bytes"] for layer in full["layers"])
    quiet = run(*arguments, "--max-new-tokens", 8, "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("3 1 4\n", "")


def test_sampling_is_seeded_and_differs_from_greedy(pictures: list[Path]) -> None:
    arguments = (*GENERATE, "--image", pictures[0], "--prompt", "Q A", "--max-new-tokens", 12, "--quiet")
    hot = (*arguments, "--temperature", 3.0, "--top-p", 0.99, "--top-k", 40)
    first, again, other = (run(*hot, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert Sampling(temperature=0, top_k=5).arguments() == {"do_sample": False}
    assert Sampling(seed=1).arguments() == {"do_sample": False}
    assert Sampling(top_p=0.5).arguments() == {"do_sample": True, "top_p": 0.5}


def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation")

    monkeypatch.setattr(generate_module, "answer", full)
    assert complaint(*GENERATE, "--prompt", "Q") == "error: CUDA out of memory. Tried to allocate 2 GiB.\n"
    monkeypatch.setattr(generate_module, "answer", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    assert isinstance(run(*GENERATE, "--prompt", "Q").exception, RuntimeError), "a defect keeps its traceback"


def test_device_and_dtype() -> None:
    assert load_checkpoint(str(MODEL)).load_model("cpu", "bfloat16").dtype == torch.bfloat16
    assert "`device` 'tpu9' is not there" in complaint(*GENERATE, "--prompt", "Q", "--device", "tpu9")
    assert "`dtype` must be auto, float32" in complaint(*GENERATE, "--prompt", "Q", "--dtype", "int8")


def test_a_warm_start_has_no_warnings(pictures: list[Path]) -> None:
    arguments = ["generate", "--model", str(MODEL), "--image", str(pictures[0]), "--prompt", "Q note", "--quiet"]
    done = subprocess.run([sys.executable, "-m", "lookm", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_version() -> None:
    assert run("--version").stdout == f"lookm {lookm.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "lookm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lookm {lookm.__version__}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  \nreally this\nand more"), "really this"),
        (KeyError(), "KeyError"),
        (
            ImportError("\nXProcessor requires the Torchvision library but it was not found. Check\nthe page"),
            "XProcessor requires the Torchvision library but it was not found: pip install torchvision",
        ),
        (ModuleNotFoundError("No module named 'num2words'", name="num2words"), "'num2words': pip install num2words"),
        (ImportError("Install it with `pip install num2words`."), "Install it with `pip install num2words`."),
    ],
)
def test_the_reason_of_an_error(error: Exception, line: str) -> None:
    assert reason(error).endswith(line)


def broken_torchvision(folder: Path) -> dict[str, str]:
    """An environment whose torchvision is installed and does not import, as one of another torch does not."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision/__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n__version__ = '0.20.0'\n"
    )
    record = folder / "torchvision-0.20.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}


def test_a_broken_torchvision(tmp_path: Path) -> None:
    environment = broken_torchvision(tmp_path)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, "-m", "lookm", *arguments]
        return subprocess.run(whole, capture_output=True, text=True, env=environment, check=False)

    for arguments in (["--help"], ["--version"], ["policies"], ["generate", "--help"]):
        done = command(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    done = command("generate", "--model", str(MODEL), "--prompt", "Q")
    assert done.returncode == 2
    assert done.stderr.startswith("error: torchvision is broken (operator torchvision::nms does not exist): install")
    assert len(done.stderr.splitlines()) == 1
    code = [sys.executable, "-c", "from lookm import LookMCache"]
    done = subprocess.run(code, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: torchvision is broken (operator torchvision::nms does")


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command, from the moment on at which its first line of Python has run."""
    code = "import sys, lookm.__main__ as command; print('started', flush=True); command.main()"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code, *arguments], text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("seconds", [0.2, 0.7, 1.5, 6])
def test_control_c_at_any_time(seconds: float) -> None:
    # chat waits for its first line for ever
    with started("chat", "--model", str(MODEL)) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        # not communicate(), which closes stdin: the chat would end by itself
        assert process.wait(timeout=20) == 130
        assert process.stderr is not None
        assert process.stderr.read() in ("interrupted\n", "\ninterrupted\n")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved checkpoint of a text model, without a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookm.bench.BUFFER_BYTES", 1 << 20)


@pytest.mark.usefixtures("small_buffer")
def test_bench_times_every_cache_of_a_checkpoint(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    result = run(
        "bench",
        tiny,
        "--prompt-tokens",
        "48,64",
        "--batch",
        "1,2",
        "--budget",
        "25%,8",
        "--new-tokens",
        3,
        "--json",
        file,
    )
    assert result.exit_code == 0, result.output
    said = json.loads(file.read_text())
    assert said["model"] == str(tiny)
    assert [(each["batch"], each["prompt_tokens"]) for each in said["results"]] == [(1, 48), (1, 64), (2, 48), (2, 64)]
    for each in said["results"]:
        rows = {row["variant"]: row for row in each["rows"]}
        assert {"DynamicCache", "StaticCache", "LookMCache 25 %", "LookMCache 8"} <= set(rows)
        assert all(len(row["steps"]) == 3 for row in rows.values())
        pair = 2 * 2 * 16 * 4 * 2 * each["batch"]
        assert rows["DynamicCache"]["cache_bytes"] == each["prompt_tokens"] * pair
        assert rows["LookMCache 8"]["cache_bytes"] < rows["DynamicCache"]["cache_bytes"] / 3
    assert result.stdout.count("LookMCache 25 % ") == 4
    assert "1 x 48 tokens, then 3 more; float32 on cpu" in result.stdout


@pytest.mark.usefixtures("small_buffer")
def test_bench_takes_a_vision_language_model_and_other_dtypes() -> None:
    result = run("bench", MODEL, "--prompt-tokens", 64, "--new-tokens", 2, "--dtype", "bfloat16", "--policy", "lookm")
    assert result.exit_code == 0, result.output
    assert "bfloat16 on cpu" in result.stdout


def test_bench_names_what_it_does_not_take(tiny: Path, tmp_path: Path) -> None:
    assert "`prompt-tokens` must be whole numbers" in complaint("bench", tiny, "--prompt-tokens", "4k")
    assert "`batch` must be whole numbers" in complaint("bench", tiny, "--batch", "1,0")
    assert "`budget` must be a fraction" in complaint("bench", tiny, "--budget", "0.2,5.5")
    assert "`policy`" in complaint("bench", tiny, "--policy", "none such")
    assert "No such file or directory" in complaint("bench", tiny, "--json", tmp_path / "none" / "speed.json")
    assert "does not exist" in complaint("bench", "./nowhere")
    assert "is not there" in complaint("bench", tiny, "--device", "tpu9")
