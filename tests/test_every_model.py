"""A quick part of `make families`: models of every kind through all its checks, as the record has them."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from every_model import sweep  # noqa: E402
from every_model.table import newest  # noqa: E402

from lookm import modality, policies  # noqa: E402

QUICK = (
    "llava",  # images among the text
    "qwen2_5_vl",  # a multimodal rotary embedding
    "qwen3_5",  # linear attention
    "gemma3",  # sliding layers, scaled embeddings
    "gemma4",  # images attend in both directions
    "paligemma",  # a mask that its module knows nothing of
    "blip-2",  # a part generates
    "kosmos-2.5",  # image tokens under another name
    "qwen2_audio",  # audio
    "mllama",  # cross attention
    "llama",
    "gpt2",  # no grouped queries, positions of its own
    "gemma2",  # a soft cap
    "qwen2_moe",  # a mask that no layer uses
    "bert",
    "deepseek_v3",  # latent attention
    "diffllama",  # attends twice
    "gpt_oss",  # sinks
    "rwkv",  # no cache
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def entries(model_type: str) -> list[sweep.Entry]:
    found = [entry for entry in sweep.entries() if entry.model_type == model_type]
    if not found:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return found


def recorded(row: sweep.Row) -> dict[str, Any]:
    same = (row.model_type, row.model_class, row.vision)
    (found,) = [
        model for model in newest()["models"] if (model["model_type"], model["model_class"], model["vision"]) == same
    ]
    return found


@pytest.mark.parametrize("model_type", QUICK)
def test_as_recorded(model_type: str) -> None:
    for entry in entries(model_type):
        row = sweep.examine(entry)
        assert row.status not in sweep.BROKEN, row.words
        if transformers.__version__ == newest()["transformers"]:
            found = recorded(row)
            assert (row.status, row.inputs, set(row.without)) == (
                found["status"],
                found["inputs"],
                set(found.get("without", {})),
            )


def test_the_record_has_every_model_and_none_is_broken() -> None:
    record = newest()
    assert not [model for model in record["models"] if model["status"] in sweep.BROKEN]
    if transformers.__version__ == record["transformers"]:
        found = [(model["model_type"], model["model_class"], model["vision"]) for model in record["models"]]
        assert sorted(found) == sorted(tuple(entry) for entry in sweep.entries())


def test_wrong_scores_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # too many by a hundredth: kept tokens, and all that follows from them, stay the same
    score = policies.Policy.score
    monkeypatch.setattr(policies.Policy, "score", lambda self, attention: 1.01 * score(self, attention))
    row = sweep.examine(*entries("llama"))
    assert row.status == "wrong"
    assert "scores differ from the attention paid" in row.words


def test_uncounted_images_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modality, "media_token_ids", lambda config: {})
    row = sweep.examine(*entries("llava"))
    assert row.status != "works"


def test_a_hang_or_a_crash_costs_one_row(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def examine(entry: sweep.Entry) -> sweep.Row:
        if entry.model_type == "hangs":
            time.sleep(60)
        if entry.model_type == "dies":
            os._exit(3)
        return sweep.Row(*entry, status="works")

    monkeypatch.setattr(sweep, "examine", examine)
    monkeypatch.setattr(sweep, "SECONDS", 1)
    chosen = [sweep.Entry(name, "AnyClass", False) for name in ("hangs", "dies", "first", "second")]
    rows = {row.model_type: row for row in sweep.sweep(chosen)}
    assert {name: row.status for name, row in rows.items()} == {
        "hangs": "crashes",
        "dies": "crashes",
        "first": "works",
        "second": "works",
    }
    assert "no end after 1 s" in rows["hangs"].words
    assert "exit code 3" in rows["dies"].words
    sweep.write(tmp_path / "record.json", sweep.record(list(rows.values())))
    assert [model["model_type"] for model in json.loads((tmp_path / "record.json").read_text())["models"]] == [
        "dies",
        "first",
        "hangs",
        "second",
    ]
