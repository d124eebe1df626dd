"""`lookm demo`: the dialogue, the comparison and the picture, on few prompts."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from lookm import LookMCache
from lookm.cli import app
from lookm.demo import show
from lookm.demo.checkpoint import load
from lookm.demo.compare import Cell, compare
from lookm.demo.dialogue import converse, exact_matches, script
from lookm.demo.picture import DIM, LABEL, STEP, TITLE, draw_kept, kept_share
from lookm.demo.task import IMAGE, LAYOUTS, draw_prompts, held_out_scans
from lookm.policy import POLICIES


@pytest.fixture(scope="module")
def model() -> object:
    return load()[0]


@pytest.fixture(scope="module")
def cells(model: object) -> list[Cell]:
    return list(compare(model, held_out_scans(), ["streaming", "lookm"], [0.5, 0.1], images=6, dialogues=8, seed=1))


def test_the_full_cache_knows_nearly_everything(cells: list[Cell]) -> None:
    assert cells[0].policy == "full"
    assert cells[0].exact_match >= 95
    assert cells[0].kept == cells[0].seen


def test_answers_depend_on_the_policy_as_the_method_promises(cells: list[Cell]) -> None:
    match = {(cell.policy, cell.budget): cell.exact_match for cell in cells}
    for budget in (0.5, 0.1):
        assert match["lookm", budget] >= match["streaming", budget] + 15
    assert match["lookm", 0.1] < match["full", 1.0]


def test_a_cell_counts_what_it_should(cells: list[Cell]) -> None:
    small = cells[-1]
    assert (small.policy, small.budget) == ("lookm", 0.1)
    assert small.answers == 2 * 8 * 6, "two layouts, eight dialogues, five pictures and the note after the first turn"
    assert small.kept == int(0.1 * small.seen)
    assert small.bytes == small.kept / small.seen * cells[0].bytes


def test_the_first_turn_comes_from_the_prefill(model: object) -> None:
    """Compression acts from the second token on: the first is the full cache's, whatever the budget."""
    generator = torch.Generator().manual_seed(5)
    prompt = draw_prompts(4, 4, LAYOUTS[0], 1, held_out_scans(), generator)
    turns = script(prompt, generator)
    full, one = (converse(model, prompt, turns, LookMCache(model, budget)) for budget in (1.0, 1))
    assert torch.equal(full.said[0][:, 0], one.said[0][:, 0])
    assert not torch.equal(exact_matches(turns, full.said), exact_matches(turns, one.said))


def test_every_picture_is_asked_about_once(model: object) -> None:
    prompt = draw_prompts(3, 5, LAYOUTS[1], 1, held_out_scans(), torch.Generator().manual_seed(0))
    asked = torch.stack([turn.question[:, 1] for turn in script(prompt, torch.Generator())[:-1]], 1)
    assert all(len(set(row)) == 5 for row in asked.tolist())


def test_kept_share_counts_heads() -> None:
    ids = torch.full((40,), IMAGE)
    ids[:4] = 5
    positions = torch.tensor([[-1, 4, 5], [0, 4, 41]])
    share = kept_share(ids, positions)
    assert share.shape == (1, 6, 6)
    assert share[0, 0, :3].tolist() == [1.0, 0.5, 0.0]


def test_the_picture_dims_what_was_evicted() -> None:
    prompt = draw_prompts(1, 2, LAYOUTS[0], 1, held_out_scans(), torch.Generator().manual_seed(0))
    tokens = prompt.input_ids.shape[1]
    everything, nothing = torch.arange(tokens)[None, None], torch.full((1, 1, 1), -1)
    bright, dark = (draw_kept(prompt, [kept], "title") for kept in (everything, nothing))
    top = TITLE + STEP
    light = [np.asarray(each)[top : top + 96, LABEL : LABEL + 96].mean() for each in (bright, dark)]
    assert light[1] == pytest.approx(DIM * light[0], rel=0.1)


def test_no_table_is_cut_in_a_narrow_terminal() -> None:
    name = "text_prior_weighted_merge"
    cells = [Cell(name, budget, 88.0, 99.0, 77.0, 256, 880, 440, 2.0**20) for budget in (0.5, 0.2, 0.1)]
    text = StringIO()
    Console(file=text, width=50).print(show.policy_table(cells))
    assert "…" not in text.getvalue()
    assert name in "".join(word for line in text.getvalue().splitlines() for word in line.split()[:1])


def test_the_command_writes_a_picture_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "BUDGETS", (0.5,))
    monkeypatch.setattr(
        show, "POLICIES", {name: POLICIES[name] for name in ("full", "streaming", "text_prior_pivot_merge")}
    )
    monkeypatch.setattr(show, "Console", lambda: Console(width=120))
    out = tmp_path / "new" / "folder"
    result = CliRunner().invoke(
        app, ["demo", "--images", "2", "--seed", "9", "--budget", "60", "--policy", "lookm", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "lookm demo --seed 9" in result.output
    assert "exact match in %" in result.output
    table = json.loads((out / "table.json").read_text())
    assert table["seed"] == 9
    assert {(cell["policy"], cell["budget"]) for cell in table["cells"]} == {
        ("full", 1.0), ("streaming", 0.5), ("streaming", 60), ("lookm", 0.5), ("lookm", 60)
    }  # fmt: skip
    assert Image.open(out / "kept.png").size[0] > 300
