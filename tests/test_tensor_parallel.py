"""A model split over two processes (tensor parallelism) generates what it does in one; each caches its own heads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, KV_HEADS
from PIL import Image
from tensor_parallel_worker import generate
from transformers import AutoModelForImageTextToText, AutoProcessor, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from lookm import POLICIES
from lookm.cli import app
from lookm.demo.checkpoint import MODEL
from lookm.parallel import checked_split

PROCESSES = 2
BY_HEAD = [name for name, policy in POLICIES.items() if policy.by_head and policy.evicts]
# arguments of LookMCache; {} is transformers' own cache
CASES: dict[str, dict[str, Any]] = {
    "ordinary": {},
    "whole": {"budget": 1.0, "policy": "auto"},
    "tokens": {"budget": 20, "policy": "auto"},
    "fixed": {"budget": 0.3, "policy": "auto", "max_new_tokens": 12},
    **{name: {"budget": 0.3, "policy": name} for name in BY_HEAD},
}
PER_PROCESS = {"bytes": {"budget": "20KiB", "policy": "auto"}}
REFUSED = {name: {"policy": name} for name, policy in POLICIES.items() if not policy.by_head}
REFUSED["gate"] = {"policy": "lookm", "gate": "mean_similarity"}
ON_GPU = pytest.param(("cuda", "llava"), marks=pytest.mark.gpu)


def torchrun(*arguments: object, on_gpu: bool = False) -> subprocess.CompletedProcess[str]:
    """A Python program in two processes, on a processor unless it is to use the GPUs."""
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **hidden},
        timeout=300,
        check=False,
    )


@pytest.fixture(
    scope="module", params=[("cpu", "qwen3"), ("cpu", "llava"), ("cpu", "qwen2_5_vl"), ON_GPU], ids=" ".join
)
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, list[dict[str, Any]]]:
    """A device, a family, and what each of two processes found in every case."""
    device, family = request.param
    if device == "cuda" and torch.cuda.device_count() < PROCESSES:
        pytest.skip(f"needs {PROCESSES} GPUs, there are {torch.cuda.device_count()}")
    folder = tmp_path_factory.mktemp(family)
    FAMILIES[family].model().save_pretrained(folder / "model")
    (folder / "cases.json").write_text(json.dumps(CASES | PER_PROCESS | REFUSED))
    worker = Path(__file__).with_name("tensor_parallel_worker.py")
    done = torchrun(worker, family, folder / "model", folder / "cases.json", folder, on_gpu=device == "cuda")
    assert done.returncode == 0, done.stderr
    return device, family, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(found: tuple[str, str, list[dict[str, Any]]], case: str) -> None:
    device, family, ranks = found
    model = FAMILIES[family].model()
    try:
        whole, parts = generate(FAMILIES[family], model.to(device), CASES[case]), [rank[case] for rank in ranks]
    finally:
        model.to("cpu")
    assert whole["heads"] == [KV_HEADS] * len(whole["heads"])
    for part in parts:
        assert part["tokens"] == whole["tokens"]
        assert part["heads"] == [KV_HEADS // PROCESSES] * len(whole["heads"])
    for layer, kept in enumerate(whole["kept"]):
        halves = [torch.tensor(part["kept"][layer]) for part in parts]
        assert torch.equal(torch.cat(halves, 1), torch.tensor(kept))


def test_a_whole_budget_is_the_ordinary_cache(found: tuple[str, str, list[dict[str, Any]]]) -> None:
    for rank in found[2]:
        assert rank["whole"]["tokens"] == rank["ordinary"]["tokens"]
        assert rank["auto"]["tokens"] != rank["ordinary"]["tokens"]


def test_bytes_are_those_of_a_process(found: tuple[str, str, list[dict[str, Any]]]) -> None:
    device, family, ranks = found
    if device != "cpu":
        pytest.skip("the same on every device")
    whole = generate(FAMILIES[family], FAMILIES[family].model(), {"budget": "40KiB", "policy": "auto"})
    for rank in ranks:
        assert rank["bytes"]["tokens"] == whole["tokens"]
        assert len(rank["bytes"]["kept"][0][0][0]) == len(whole["kept"][0][0][0])


@pytest.mark.parametrize("policy", REFUSED)
def test_what_needs_all_heads_is_refused(found: tuple[str, str, list[dict[str, Any]]], policy: str) -> None:
    what = "gate 'mean_similarity'" if policy == "gate" else f"policy {type(POLICIES[policy]).__name__}"
    for rank in found[2]:
        assert f"{what} looks at all heads" in rank[policy]["refused"]


def test_sampling_starts_from_one_seed(found: tuple[str, str, list[dict[str, Any]]]) -> None:
    # with one of its own, each process would go on with another token
    (seed,) = {rank["seed"] for rank in found[2]}
    assert isinstance(seed, int)


QUESTION = ("--prompt", "note 3 1 4 ; Q note", "--max-new-tokens", "8", "--budget", "30%")


def test_generate_under_torchrun(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("L", (24, 24), 90).save(picture)
    arguments = ["generate", "--model", str(MODEL), "--image", str(picture), *QUESTION]
    one = CliRunner().invoke(app, [*arguments, "--json"])
    both = torchrun("-m", "lookm", *arguments, "--json", "--compare")
    assert both.returncode == 0, both.stderr
    # of one process, or it would be two objects
    said, alone = json.loads(both.stdout), json.loads(one.stdout)
    assert (said["text"], said["tokens"]) == (alone["text"], alone["tokens"])
    assert said["report"]["mean"] == alone["report"]["mean"]
    assert 2 * said["report"]["bytes"] == alone["report"]["bytes"]
    assert 2 * said["full_cache"]["report"]["bytes"] == alone["report"]["bytes_full"]


def test_generate_samples_and_says_whose_cache_it_reports() -> None:
    sampled = torchrun("-m", "lookm", "generate", "--model", MODEL, *QUESTION, "--temperature", "5")
    assert sampled.returncode == 0, sampled.stderr
    assert len(sampled.stdout.splitlines()) == 1
    assert "; the cache of one of 2 processes" in sampled.stderr


def test_a_model_without_a_plan(tmp_path: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(MODEL).tokenizer
    tokenizer.save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    done = torchrun("-m", "lookm", "generate", "--model", tmp_path, *QUESTION)
    assert done.returncode != 0
    assert not done.stdout
    assert f"error: model {tmp_path} (gpt2) cannot be split over 2 processes: transformers" in done.stderr


@pytest.fixture
def second_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells the second of three processes."""
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("second_of_three")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", *QUESTION), "key/value heads, which 3 processes cannot share evenly"),
        (("generate", *QUESTION, "--device", "cpu"), "`device` must be auto under torchrun"),
        (("chat",), "`lookm chat` runs in one process"),
    ],
)
def test_what_several_processes_cannot_do(arguments: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, [*arguments, "--model", str(MODEL)])
    assert result.exit_code == 2
    assert result.stderr.startswith("process 1: error: ")
    assert said in result.stderr


@pytest.mark.usefixtures("second_of_three")
@pytest.mark.parametrize("arguments", [("demo",), ("bench", str(MODEL))], ids=str)
def test_what_runs_in_one_process(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert f"`lookm {arguments[0]}` runs in one process" in result.stderr


def test_a_plan_that_leaves_the_attention_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    # transformers has none for its attention in any release so far
    config = FAMILIES["qwen3_vl"].config()
    with pytest.raises(ValueError, match=r"model here \(qwen3_vl\) cannot be split over 2 processes"):
        checked_split("here", AutoModelForImageTextToText, config, "auto")
    assert checked_split("here", AutoModelForImageTextToText, FAMILIES["llava"].config(), "auto")
