"""Tables and curves of the test beds, with 95 % intervals over their units, from the result files of measure.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

RESULTS = Path(__file__).parent / "results"
DRAWS, SEED = 2000, 0
# the policies of the package that come from papers before this one's defaults, `full` apart
TWELVE = (
    "h2o", "mean_h2o", "snapkv", "streaming", "avg_merge", "weighted_merge", "pivot_merge", "text_prior_h2o",
    "text_prior_avg_merge", "text_prior_weighted_merge", "text_prior_pivot_merge",
)  # fmt: skip
CURVES = {"full": "#888", "text_prior_pivot_merge": "#c33", "text_prior_h2o": "#36c", "snapkv": "#393", "auto": "#000"}
SHOWN = {"text_prior_pivot_merge": "lookm"}

Cell = dict[str, Any]
Floats = npt.NDArray[np.float64]


def _layout(name: str) -> Callable[[Cell], Floats]:
    def of(cell: Cell) -> Floats:
        units = [unit for unit in cell["units"] if unit["layout"] == name]
        return np.array([100 * unit["right"] / unit["answers"] for unit in units])

    return of


def _mean(name: str, factor: float = 1.0, share: str | None = None) -> Callable[[Cell], Floats]:
    return lambda cell: np.array([factor * unit[name] / (unit[share] if share else 1) for unit in cell["units"]])


DIALOGUE = {"after": _layout("after"), "before": _layout("before")}
DOCUMENT = {"continuation": _mean("nll"), "recall": _mean("recall")}
METRICS: dict[str, dict[str, Callable[[Cell], Floats]]] = {
    "demo": DIALOGUE, "detail": DIALOGUE, "detail16": DIALOGUE, "text": DOCUMENT, "text-bf16": DOCUMENT,
}  # fmt: skip


def cells(bed: str, split: str = "final") -> list[Cell]:
    """The cells of a result file, none where it is not there."""
    file = RESULTS / f"bed-{bed}-{split}.json"
    return json.loads(file.read_text())["cells"] if file.exists() else []


def interval(values: Floats) -> tuple[float, float, float]:
    """Mean, and the 2.5th and 97.5th percentile of the means of units drawn with replacement."""
    drawn = np.random.default_rng(SEED).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def difference(ours: Cell, theirs: Cell, metric: Callable[[Cell], Floats]) -> tuple[float, float, float]:
    """Mean and interval of ours - theirs, unit by unit: what is hard in a unit is so for both."""
    return interval(metric(ours) - metric(theirs))


def better(bed: str) -> int:
    """1 where more is better, -1 where less is."""
    return -1 if bed.startswith("text") else 1


def table(bed: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a policy a row; a budget a column with all metrics, then loyalty and length at 20 %."""
    found, metrics = cells(bed), METRICS[bed]
    budgets = sorted({cell["budget"] for cell in found if cell["policy"] != "full"}, reverse=True)
    digits = 2 if bed.startswith("text") else 0
    header = ["policy", *(f"{100 * budget:g} %" for budget in budgets), "loyalty at 20 %"]
    header += [] if bed.startswith("text") else ["length at 20 %"]

    def shown(cell: Cell) -> str:
        parts = (interval(metric(cell)) for metric in metrics.values())
        return " \\| ".join(f"{mean:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})" for mean, low, high in parts)

    rows = []
    for name, protect in dict.fromkeys((cell["policy"], cell["protect_text"]) for cell in found):
        own = {cell["budget"]: cell for cell in found if (cell["policy"], cell["protect_text"]) == (name, protect)}
        label = f"`{SHOWN.get(name, name)}`" + (", text protected" if protect else "")
        at = own.get(1.0) if name == "full" else own.get(0.2)
        row = [
            label,
            *(shown(own[1.0 if name == "full" else b]) if (b in own or name == "full") else "" for b in budgets),
        ]
        if at is None:
            row += ["", ""][: len(header) - len(row)]
        else:
            agree = _mean("agree", 100.0, None if bed.startswith("text") else "answers")(at)
            row.append(f"{agree.mean():.0f}")
            row += [] if bed.startswith("text") else [f"{_mean('length')(at).mean():.2f}"]
        rows.append(row)
    return header, rows


def against_published(policy: str = "auto") -> tuple[list[str], list[list[str]]]:
    """Header and rows: a policy against the best of the published ones, at every bed, metric and budget.

    The difference is that of means with its paired interval; best is chosen on these very units, which favours it.
    """
    rows = []
    for bed, metrics in METRICS.items():
        found = [cell for cell in cells(bed) if not cell["protect_text"]]
        for name, metric in metrics.items():
            for own in (cell for cell in found if cell["policy"] == policy):
                rivals = [cell for cell in found if cell["policy"] in TWELVE and cell["budget"] == own["budget"]]
                if not rivals:
                    continue
                best = max(rivals, key=lambda cell: better(bed) * metric(cell).mean())
                mean, low, high = difference(own, best, metric)
                worse = high < 0 if better(bed) > 0 else low > 0
                ahead = low > 0 if better(bed) > 0 else high < 0
                verdict = "worse" if worse else "better" if ahead else "within noise"
                digits = 3 if bed.startswith("text") else 1
                rows.append(
                    [
                        bed, name, f"{100 * own['budget']:g} %", f"{metric(own).mean():.{digits}f}",
                        f"{metric(best).mean():.{digits}f} (`{SHOWN.get(best['policy'], best['policy'])}`)",
                        f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})", verdict,
                    ]
                )  # fmt: skip
    return ["bed", "metric", "budget", policy, "best published", "difference", ""], rows


def curves(bed: str) -> str:
    """Every metric of a bed against the budget, as SVG, with intervals."""
    found, metrics = [cell for cell in cells(bed) if not cell["protect_text"]], METRICS[bed]
    budgets = sorted({cell["budget"] for cell in found if cell["policy"] != "full"})
    parts = []
    for panel, (name, metric) in enumerate(metrics.items()):
        series: dict[str, list[tuple[float, float, float]]] = {}
        for policy in CURVES:
            own = {cell["budget"]: interval(metric(cell)) for cell in found if cell["policy"] == policy}
            if policy == "full" and 1.0 in own:
                own = dict.fromkeys(budgets, own[1.0])
            if set(budgets) <= set(own):
                series[policy] = [own[budget] for budget in budgets]
        every = [number for points in series.values() for point in points for number in point]
        low, high = min(every), max(every)
        left = 60 + 420 * panel

        def place(
            column: int, value: float, left: int = left, low: float = low, high: float = high
        ) -> tuple[float, float]:
            return left + 40 + column * 290 / max(1, len(budgets) - 1), 340 - 290 * (value - low) / ((high - low) or 1)

        parts.append(f'<rect x="{left}" y="30" width="370" height="320" fill="none" stroke="#999"/>')
        parts.append(f'<text x="{left + 185}" y="20" text-anchor="middle">{bed}: {name}</text>')
        for column, budget in enumerate(budgets):
            x, _ = place(column, low)
            parts.append(f'<text x="{x:.1f}" y="366" text-anchor="middle">{100 * budget:g} %</text>')
        for value in (low, high):
            _, y = place(0, value)
            parts.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        for number, (policy, points) in enumerate(series.items()):
            colour = CURVES[policy]
            line = " ".join("{:.1f},{:.1f}".format(*place(c, mean)) for c, (mean, _, _) in enumerate(points))
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for column, (_, bottom, top) in enumerate(points):
                (x, y1), (_, y2) = place(column, bottom), place(column, top)
                parts.append(f'<line x1="{x:.1f}" y1="{y1:.1f}" x2="{x:.1f}" y2="{y2:.1f}" stroke="{colour}"/>')
            parts.append(
                f'<text x="{left + 10 + 90 * (number % 4)}" y="{386 + 16 * (number // 4)}" fill="{colour}">'
                f"{SHOWN.get(policy, policy)}</text>"
            )
    width = 60 + 420 * len(metrics)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="420" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def beds_measured() -> Sequence[str]:
    """Those with a result file."""
    return [bed for bed in METRICS if cells(bed)]
