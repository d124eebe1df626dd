"""The table of what few bits cost: every cell once, and the cache that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

from quality import formats
from quality.beds.demo import DEMO, DialogueBed
from quality.table import cells_of

from lookm import Policy
from lookm.options import FORMATS


class Told(DialogueBed):
    """Notes what it is asked to measure, and gives one unit for it."""

    def __init__(self) -> None:
        super().__init__("demo", DEMO.model_folder, DEMO.scene, DEMO.frames)
        self.asked: list[tuple[float, dict[str, Any]]] = []

    def measure(self, policy: Policy, budget: float | int, split: Any, **options: Any) -> list[dict[str, Any]]:
        self.asked.append((budget, options))
        held = 10 * (1 + len(self.asked))
        return [{"unit": 0, "layout": "after", "answers": 8, "right": 8, "agree": 8, "length": 1.0, "bytes": held}]


def test_every_format_is_measured_once(tmp_path: Path) -> None:
    bed, file = Told(), tmp_path / "formats.json"
    formats.measure([bed], file)
    assert bed.asked == [(1.0, {}), (0.2, {}), *((0.2, {"quantize": name}) for name in FORMATS)]
    formats.measure([bed], file)
    assert len(bed.asked) == 5
    assert [cell["quantize"] for cell in cells_of(file)] == [None, None, *FORMATS]


def test_a_bed_makes_the_cache_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes fall with the bits, and the answers are still mostly the full cache's."""
    from quality.beds import demo as module

    monkeypatch.setattr(module, "UNITS", {"tune": range(4), "final": ()})
    bed = DialogueBed("demo", DEMO.model_folder, DEMO.scene, DEMO.frames)
    policy = formats.POLICIES[formats.POLICY]
    held = {}
    for name in (None, *FORMATS):
        units = bed.measure(policy, 0.2, "tune", **({} if name is None else {"quantize": name}))
        held[name] = sum(unit["bytes"] for unit in units)
        assert sum(unit["agree"] for unit in units) >= 0.7 * sum(unit["answers"] for unit in units)
    assert held["int4"] < held["int8"] == held["fp8"] < held[None]
