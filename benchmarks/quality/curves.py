"""Curves against the budget, one panel a metric, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LEFT, TOP, WIDE, HIGH = 60, 34, 340, 290
STEP = LEFT + WIDE + 24


class Curve(NamedTuple):
    """(mean, low, high) at each budget that was measured."""

    label: str
    colour: str
    points: dict[float, tuple[float, float, float]]


class Panel(NamedTuple):
    """One metric."""

    title: str
    curves: list[Curve]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, three to eight of them, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def draw(panels: Sequence[Panel], budgets: Sequence[float]) -> str:
    """An SVG: budgets evenly spaced from left to right, means joined by lines, intervals as bars, labels below."""

    def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#000") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    def line(start: tuple[float, float], end: tuple[float, float], colour: str) -> str:
        (x1, y1), (x2, y2) = start, end
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'

    parts = []
    for number, panel in enumerate(panels):
        left = LEFT + number * STEP
        marks = ticks(*(limit(v for curve in panel.curves for point in curve.points.values() for v in point)
                        for limit in (min, max)))  # fmt: skip
        low, high = marks[0], marks[-1]

        def place(
            budget: float, value: float, aside: float = 0.0, left: int = left, low: float = low, high: float = high
        ) -> tuple[float, float]:
            x = left + WIDE * (budgets.index(budget) + 0.5) / len(budgets) + aside
            return x, TOP + HIGH * (high - value) / (high - low)

        parts.append(f'<rect x="{left}" y="{TOP}" width="{WIDE}" height="{HIGH}" fill="none" stroke="#999"/>')
        parts.append(text(left + WIDE / 2, TOP - 12, panel.title))
        parts += [text(place(budget, low)[0], TOP + HIGH + 18, f"{100 * budget:g} %") for budget in budgets]
        for mark in marks:
            y = place(budgets[0], mark)[1]
            parts += [line((left, y), (left + WIDE, y), "#eee"), text(left - 6, y + 4, f"{mark:.4g}", "end")]
        for index, curve in enumerate(panel.curves):
            # a little beside each other, so that no interval hides another
            aside = 4.0 * (index - (len(panel.curves) - 1) / 2)
            joined = [place(budget, mean, aside) for budget, (mean, _, _) in curve.points.items()]
            middles = " ".join(f"{x:.1f},{y:.1f}" for x, y in joined)
            parts.append(f'<polyline points="{middles}" fill="none" stroke="{curve.colour}" stroke-width="2"/>')
            for budget, (mean, bottom, top) in curve.points.items():
                x, y = place(budget, mean, aside)
                parts.append(line(place(budget, bottom, aside), place(budget, top, aside), curve.colour))
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.colour}"/>')
            x = left + WIDE * (index % 3) / 3
            parts.append(text(x, TOP + HIGH + 42 + 18 * (index // 3), curve.label, "start", curve.colour))
    wide, high = LEFT + len(panels) * STEP, TOP + HIGH + 76
    style = "font-family='sans-serif' font-size='12'"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"
