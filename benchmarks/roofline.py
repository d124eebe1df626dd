"""The roofline plot: rates against FLOP per byte, under the ceilings of arithmetic and of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """A kernel in the roofline plot: FLOP per byte and FLOP/s; `measured` False for what the ceilings would allow."""

    label: str
    intensity: float
    flops_per_s: float
    measured: bool


def roofline(placed: Sequence[Point], bytes_per_s: float, flops_per_s: float) -> str:
    """An SVG: the two ceilings on logarithmic axes, measured points filled, floors hollow, named in a list beside."""
    left, top, wide, high = 70, 30, 480, 320
    low_x, high_x = -1, math.ceil(max(5.0, *(math.log10(point.intensity) for point in placed)))
    low_y, high_y = 11, 15
    ridge = flops_per_s / bytes_per_s

    def at(intensity: float, rate: float) -> tuple[float, float]:
        x = left + wide * (math.log10(intensity) - low_x) / (high_x - low_x)
        return x, top + high * (1 - (math.log10(rate) - low_y) / (high_y - low_y))

    def text(x: float, y: float, words: str, anchor: str = "start") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'

    roof = [at(10**low_x, 10**low_x * bytes_per_s), at(ridge, flops_per_s), at(10**high_x, flops_per_s)]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in roof)
    lines = [
        f'<rect x="{left}" y="{top}" width="{wide}" height="{high}" fill="none" stroke="#999"/>',
        f'<polyline points="{corners}" fill="none" stroke="#c33" stroke-width="2"/>',
        text(roof[1][0] - 10, roof[1][1] + 4, f"{flops_per_s / 1e12:.3g} TFLOP/s", "end"),
        text(*(coordinate + 14 for coordinate in at(1, bytes_per_s)), f"{bytes_per_s / 1e12:.3g} TB/s"),
        text(left + wide / 2, top + high + 36, "FLOP per byte", "middle"),
        text(left - 8, top - 14, "FLOP/s", "end"),
    ]
    lines += [text(at(10**x, 1)[0], top + high + 16, f"1e{x}", "middle") for x in range(low_x, high_x + 1)]
    lines += [text(left - 8, at(1, 10**y)[1] + 4, f"1e{y}", "end") for y in range(low_y, high_y + 1)]
    for number, point in enumerate(placed, 1):
        x, y = at(point.intensity, point.flops_per_s)
        fill = "#36c" if point.measured else "white"
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="#36c"/>')
        lines.append(text(x + 7, y + 14 + 12 * ((number - 1) % 3), str(number)))
        words = point.label if point.measured else f"{point.label}: what the ceilings allow"
        lines.append(text(left + wide + 20, top + 4 + 20 * number, f"{number}  {words}"))
    style = "font-family='sans-serif' font-size='12'"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="940" height="{top + high + 50}" {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>"]) + "\n"
