"""The test beds' harness: what is measured once stays measured, intervals, and prompts read once for all policies."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from lookm import POLICIES, LookMCache, Policy
from lookm.policy import resolve_policy

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "quality"))

import measure
import table
from beds import text


class Counted:
    """A bed of four units whose every measurement is counted."""

    name = "counted"

    def __init__(self) -> None:
        self.asked: list[tuple[Policy, float]] = []

    def units(self, split: str) -> range:
        return range(4)

    def measure(self, policy: Policy, budget: float, split: str) -> list[dict]:
        self.asked.append((policy, budget))
        return [{"unit": unit, "nll": budget + unit, "recall": 1.0, "agree": 0.5} for unit in self.units(split)]


def test_a_cell_is_measured_once_and_again_where_its_policy_changed(tmp_path: Path):
    bed, file = Counted(), tmp_path / "cells.json"
    wanted = measure.cells_wanted(["h2o", "lookm"], [0.2, 0.1], protect_text=True)
    assert [(name, policy.protect_text, budget) for name, policy, budget in wanted] == [
        ("full", False, 1.0),
        ("h2o", False, 0.2),
        ("h2o", False, 0.1),
        *(("lookm", protect, budget) for protect in (False, True) for budget in (0.2, 0.1)),
    ]
    cells = measure.measure(bed, "tune", wanted[:4], file, say=lambda _: None)
    assert len(bed.asked) == 4
    cells = measure.measure(bed, "tune", wanted, file, say=lambda _: None)
    assert len(bed.asked) == len(wanted) == len(cells)
    assert cells == measure.cells_of(file)
    changed = [("h2o", resolve_policy("h2o", {"sinks": 2}), 0.2)]
    cells = measure.measure(bed, "tune", changed, file, say=lambda _: None)
    assert len(bed.asked) == len(wanted) + 1
    assert [cell["fields"]["sinks"] for cell in cells if cell["policy"] == "h2o"] == [0, 2]
    assert not list(tmp_path.glob("*.partial"))


def test_an_interval_is_that_of_the_means_of_drawn_units():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    generator, means = np.random.default_rng(table.SEED), []
    for row in generator.integers(0, 4, (table.DRAWS, 4)):
        means.append(sum(values[place] for place in row) / 4)
    mean, low, high = table.interval(values)
    assert mean == 4.0
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    assert low < mean < high


def test_a_difference_is_taken_unit_by_unit():
    hard = {"units": [{"nll": unit + 0.5} for unit in (1.0, 5.0, 9.0)]}
    easy = {"units": [{"nll": unit} for unit in (1.0, 5.0, 9.0)]}
    assert table.difference(hard, easy, table.DOCUMENT["continuation"]) == (0.5, 0.5, 0.5)


def test_tables_and_curves_of_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bed = Counted()
    wanted = measure.cells_wanted(["text_prior_h2o", "auto"], [0.2, 0.1], protect_text=False)
    measure.measure(bed, "final", wanted, tmp_path / "bed-text-final.json", say=lambda _: None)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    header, rows = table.table("text")
    assert header == ["policy", "20 %", "10 %", "loyalty at 20 %"]
    assert [row[0] for row in rows] == ["`full`", "`text_prior_h2o`", "`auto`"]
    assert rows[1][1].startswith("1.70 (")
    assert rows[1][3] == "50"
    _, compared = table.against_published()
    assert {row[-1] for row in compared} == {"within noise"}
    assert table.curves("text").count("<polyline") == 2 * 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["text_prior_h2o", "snapkv", "auto", "madakv"])
def test_a_replayed_prompt_is_a_read_one(name: str):
    """The same tokens stay, and the next ones get the same logits, also with scores of an earlier policy."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(0, 64, (1, 80))
    image = torch.ones_like(ids, dtype=torch.bool)
    image[:, :4] = image[:, -4:] = False
    recording = text.record(model, ids)
    policy = POLICIES[name]
    for other in (policy, resolve_policy(name, {"sinks": 2})):
        read = LookMCache(model, 0.3, other, image_mask=image, later_turns="dense")
        model(ids, past_key_values=read)
        replayed = LookMCache(
            model, 0.3, text.with_known_scores(other, recording), image_mask=image, later_turns="dense"
        )
        text.replay(model, recording, replayed)
        for ours, theirs in zip(replayed.layers, read.layers, strict=True):
            assert torch.equal(ours.kept_positions(), theirs.kept_positions())
        turn = torch.randint(0, 64, (1, 5))
        goal = model(turn, past_key_values=read).logits
        torch.testing.assert_close(model(turn, past_key_values=replayed).logits, goal, atol=1e-5, rtol=1e-5)


def test_the_documents_are_there_in_several_kinds():
    documents = json.loads(text.DOCUMENTS.read_text())
    for split, least in (("tune", 8), ("final", 16)):
        own = [document for document in documents if document["split"] == split]
        assert len(own) >= least
        assert {document["kind"] for document in own} == {"prose", "code", "table"}
