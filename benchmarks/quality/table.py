"""Tables and curves of the test beds, with 95 % intervals over their units, from the result files of measure.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from quality.curves import Curve, Panel, draw
from tables import markdown

from lookm import POLICIES

RESULTS = Path(__file__).parent / "results"
DRAWS, SEED = 2000, 0
OURS = "auto"
# what the default is compared with: the policies of the package that come from papers and evict
PUBLISHED = [
    name
    for name, policy in POLICIES.items()
    if policy.evicts and name != OURS and type(policy).__module__ == "lookm.policies"
]
SHOWN = {"text_prior_pivot_merge": "lookm"}
COLOURS = {"full": "#888", "text_prior_pivot_merge": "#c33", "text_prior_h2o": "#36c", "snapkv": "#393", OURS: "#000"}

Cell = dict[str, Any]
Interval = tuple[float, float, float]


class Metric(NamedTuple):
    """A number of every unit: factor * field, or factor * field / share; of the units of one layout, or of all.

    over_full: shown as what it is more than with the full cache. less: whether less of it is better.
    """

    name: str
    field: str
    share: str | None = None
    layout: str | None = None
    factor: float = 1.0
    over_full: bool = False
    less: bool = False
    digits: int = 0

    def shown(self, interval: Interval) -> str:
        """Mean and interval."""
        mean, low, high = (f"{number:.{self.digits}f}" for number in interval)
        return f"{mean} ({low}, {high})"


class Sort(NamedTuple):
    """What is shown of a kind of bed: the metrics a policy is judged by, then those shown at 20 % only."""

    metrics: tuple[Metric, ...]
    beside: tuple[Metric, ...]
    text: str


DIALOGUES = Sort(
    tuple(Metric(layout, "right", "answers", layout, factor=100) for layout in ("after", "before")),
    (Metric("loyalty", "agree", "answers", factor=100), Metric("length", "length", digits=2)),
    "exact match in %, names after \\| before their pictures; loyalty: answers in % that are the full cache's own; "
    "length: tokens an answer",
)
DOCUMENTS = Sort(
    (
        Metric("continuation", "nll", over_full=True, less=True, digits=3),
        Metric("recall", "recall", less=True, digits=2),
    ),
    (Metric("loyalty", "agree", factor=100),),
    "nats a token, added to the full cache's on a continuation \\| in all on a passage repeated; loyalty: tokens in % "
    "at which the likeliest is the full cache's",
)
BEDS = {"demo": DIALOGUES, "detail": DIALOGUES, "detail16": DIALOGUES, "text": DOCUMENTS, "text-bf16": DOCUMENTS}


def file_of(bed: str, split: str) -> Path:
    """The result file of a bed and a split."""
    return RESULTS / f"bed-{bed}-{split}.json"


def cells_of(file: Path) -> list[Cell]:
    """The cells of a result file, none where it is not there."""
    return json.loads(file.read_text())["cells"] if file.exists() else []


def cells(bed: str) -> list[Cell]:
    """The cells of a bed on the units for the end."""
    return cells_of(file_of(bed, "final"))


def measured() -> list[str]:
    """The beds with results."""
    return [bed for bed in BEDS if cells(bed)]


def values(cell: Cell, metric: Metric) -> dict[int, float]:
    """The metric of every unit, by its id."""
    units = [unit for unit in cell["units"] if metric.layout in (None, unit.get("layout"))]
    return {
        unit["unit"]: metric.factor * unit[metric.field] / (unit[metric.share] if metric.share else 1) for unit in units
    }


def interval(found: npt.ArrayLike) -> Interval:
    """Mean, and the 2.5th and 97.5th percentile of the means of units drawn with replacement."""
    array = np.asarray(found, dtype=np.float64)
    drawn = np.random.default_rng(SEED).integers(0, len(array), (DRAWS, len(array)))
    low, high = np.percentile(array[drawn].mean(1), [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def difference(ours: Cell, theirs: Cell, metric: Metric) -> Interval:
    """Mean and interval of ours - theirs, unit by unit: what is hard in a unit is so for both.

    ValueError where the two were measured on different units.
    """
    own, other = values(ours, metric), values(theirs, metric)
    if own.keys() != other.keys():
        raise ValueError(f"both cells must have the same units, got {sorted(own)} and {sorted(other)}")
    return interval([own[unit] - other[unit] for unit in own])


def full_of(found: Sequence[Cell]) -> Cell:
    """The full cache's cell, which measure.py makes first."""
    return next(cell for cell in found if cell["policy"] == "full")


def of(cell: Cell, metric: Metric, full: Cell) -> Interval:
    """A metric of a cell as it is shown."""
    return difference(cell, full, metric) if metric.over_full else interval(list(values(cell, metric).values()))


def budgets_of(found: Sequence[Cell]) -> list[float]:
    """Those of the policies that evict, the largest first."""
    return sorted({cell["budget"] for cell in found if cell["policy"] != "full"}, reverse=True)


def published(found: Sequence[Cell], budget: float) -> list[Cell]:
    """The published policies' cells at a budget, those that exceed it to protect text apart."""
    rivals = [cell for cell in found if cell["policy"] in PUBLISHED and cell["budget"] == budget]
    return [cell for cell in rivals if not cell["protect_text"]]


def best_published(found: Sequence[Cell], budget: float, metric: Metric) -> list[Cell]:
    """Those of them with the best mean: one, or equals; none where none was measured."""
    rivals = published(found, budget)
    means = [float(np.mean(list(values(cell, metric).values()))) for cell in rivals]
    best = (min if metric.less else max)(means, default=0.0)
    return [cell for cell, mean in zip(rivals, means, strict=True) if mean == best]


def bed_table(bed: str) -> str:
    """A policy a row, a budget a column; the best published policy of every metric and budget in bold."""
    found, sort = cells(bed), BEDS[bed]
    budgets, full = budgets_of(found), full_of(found)
    best = {(budget, metric): best_published(found, budget, metric) for budget in budgets for metric in sort.metrics}

    def shown(cell: Cell) -> str:
        parts = []
        for metric in sort.metrics:
            words = metric.shown(of(cell, metric, full))
            parts.append(f"**{words}**" if cell in best.get((cell["budget"], metric), []) else words)
        return " \\| ".join(parts)

    rows = []
    for name, protected in dict.fromkeys((cell["policy"], cell["protect_text"]) for cell in found):
        own = {cell["budget"]: cell for cell in found if (cell["policy"], cell["protect_text"]) == (name, protected)}
        if name == "full":
            own = dict.fromkeys([*budgets, 0.2], full)
        row = [f"`{SHOWN.get(name, name)}`" + (", text protected" if protected else "")]
        row += [shown(own[budget]) if budget in own else "" for budget in budgets]
        row += [f"{of(own[0.2], metric, full)[0]:.{metric.digits}f}" if 0.2 in own else "" for metric in sort.beside]
        rows.append(row)
    header = ["policy", *(f"{100 * budget:g} %" for budget in budgets)]
    header += [f"{metric.name} at 20 %" for metric in sort.beside]
    return markdown(header, rows)


def beds() -> str:
    """For every bed with results its table and its curves."""
    parts = []
    for bed in measured():
        units = len(full_of(cells(bed))["units"])
        text = f"**{bed}**, {units} units of the split `final`, in brackets 95 % intervals: {BEDS[bed].text}."
        parts += [text, bed_table(bed), f"![{bed}: metrics against budget]({plot_of(bed).name})"]
    return "\n\n".join(parts) or "Not measured yet: `make quality`."


def against_published() -> str:
    """The policy `auto` against the best published one at every bed, metric and budget; empty where it has no results.

    Intervals are paired ones. The best is chosen on these very units, which favours it.
    """
    rows = []
    for bed in measured():
        found = cells(bed)
        for metric in BEDS[bed].metrics:
            own = {cell["budget"]: cell for cell in found if cell["policy"] == OURS and not cell["protect_text"]}
            for budget in budgets_of(found):
                best = best_published(found, budget, metric)
                if budget not in own or not best:
                    continue
                mean, low, high = difference(own[budget], best[0], metric)
                better, worse = (high < 0, low > 0) if metric.less else (low > 0, high < 0)
                verdict = "better" if better else "**worse**" if worse else "within noise"
                digits = max(1, metric.digits)
                by = f"{mean:+.{digits}f} ({low:+.{digits}f}, {high:+.{digits}f})"
                ours, theirs = (of(cell, metric, full_of(found))[0] for cell in (own[budget], best[0]))
                name = SHOWN.get(best[0]["policy"], best[0]["policy"])
                rival = f"{theirs:.{digits}f} (`{name}`, of {len(published(found, budget))})"
                rows.append([bed, metric.name, f"{100 * budget:g} %", f"{ours:.{digits}f}", rival, by, verdict])
    if not rows:
        return ""
    better, worse = (sum(row[-1] == verdict for row in rows) for verdict in ("better", "**worse**"))
    text = (
        f"`{OURS}` against the best of the published policies that evict (of as many of the {len(PUBLISHED)} as were "
        "measured there), with the 95 % interval of the difference unit by unit. The best is chosen on these very "
        f"units, which favours it. Of {len(rows)} comparisons {better} are better, {worse} worse, the others within "
        "noise."
    )
    header = ["bed", "metric", "budget", OURS, "best published", "difference", ""]
    return text + "\n\n" + markdown(header, rows)


def plot_of(bed: str) -> Path:
    """The file of a bed's curves."""
    return Path(__file__).parent / f"curves-{bed}.svg"


def curves(bed: str) -> str:
    """Every metric of a bed against the budget, as SVG, for a handful of policies."""
    found = [cell for cell in cells(bed) if not cell["protect_text"]]
    budgets, full = budgets_of(found)[::-1], full_of(found)
    panels = []
    for metric in BEDS[bed].metrics:
        drawn = []
        for policy, colour in COLOURS.items():
            own = {cell["budget"]: of(cell, metric, full) for cell in found if cell["policy"] == policy}
            if policy == "full":
                own = dict.fromkeys(budgets, own[1.0])
            points = {budget: own[budget] for budget in budgets if budget in own}
            if points:
                drawn.append(Curve(SHOWN.get(policy, policy), colour, points))
        panels.append(Panel(f"{bed}: {metric.name}", drawn))
    return draw(panels, budgets)
