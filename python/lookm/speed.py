"""What lookm.bench measured: a row a cache, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lookm.report import format_bytes


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cache: seconds and bytes; None for what cannot be told here, `missing` says why there is nothing.

    prefill_s: the prompt until the logits of the first new token, the median of a few; compression_s: how much longer
    than the full cache's, of one that is smaller; first_step_s: with what is compiled; step_s, fastest_s: one token of
    every row, median and least; tokens_per_s: of all rows; cache_bytes: held after the prompt, buffers whole;
    peak_bytes: allocated at most on a GPU, weights included, other caches not; floor_s: weights and cache at the rate
    of the memory; over_floor: a step over its floor, and faster: the full cache's step over this one, medians of the
    pairs of a round; prompt_error, last_error: how far the logits after the prompt and after the last step are from
    the full cache's, relative; prefills, steps: seconds of each; together: rows of the same number were timed
    alternately.
    """

    variant: str
    missing: str | None = None
    prefill_s: float | None = None
    compression_s: float | None = None
    first_step_s: float | None = None
    step_s: float | None = None
    fastest_s: float | None = None
    tokens_per_s: float | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    floor_s: float | None = None
    over_floor: float | None = None
    faster: float | None = None
    prompt_error: float | None = None
    last_error: float | None = None
    together: int = 0
    prefills: list[float] = field(default_factory=list, repr=False)
    steps: list[float] = field(default_factory=list, repr=False)


def pairwise(slow: Row, fast: Row) -> float | None:
    """The median of the quotients of steps that stood side by side; None where the two did not."""
    if not (slow.steps and fast.steps) or slow.together != fast.together:
        return None
    return median(one / other for one, other in zip(slow.steps, fast.steps, strict=True))


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model and one prompt. weight_bytes: read a step, None where unknown; bytes_per_s: the memory's rate."""

    device: str
    dtype: str
    threads: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    weight_bytes: int | None
    bytes_per_s: float
    rows: Sequence[Row]

    def row(self, variant: str) -> Row:
        """The row of a variant."""
        return next(row for row in self.rows if row.variant == variant)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return asdict(self)

    def __str__(self) -> str:
        """A line, then a table of all caches."""
        weights = "an unknown part of the weights" if self.weight_bytes is None else format_bytes(self.weight_bytes)
        where = f"{self.device}, {self.threads} threads" if self.device == "cpu" else self.device
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        # a column of which nothing is known is left out
        columns = [column for column in zip(HEADINGS, *map(cells, self.rows), strict=True) if any(column[1:])]
        for heading, *_ in columns:
            table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right", no_wrap=True)
        for line in list(zip(*columns, strict=True))[1:]:
            table.add_row(*line)
        text = StringIO()
        Console(file=text, width=200).print(table)
        return (
            f"{self.batch} x {self.prompt_tokens} tokens, then {self.new_tokens} more; {self.dtype} on {where}; a step "
            f"reads {weights} and the cache, memory gives {self.bytes_per_s / 1e9:.4g} GB/s\n{text.getvalue().rstrip()}"
        )


HEADINGS = (
    "cache", "prefill", "compression", "a step", "fastest", "floor", "over floor", "tokens/s", "faster", "bytes",
    "peak",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row of the table, under HEADINGS; what is not known is left empty."""
    if row.missing is not None:
        return [row.variant, row.missing, *[""] * (len(HEADINGS) - 2)]

    def shown(value: float | None, text: Callable[[float], str]) -> str:
        return "" if value is None else text(value)

    times = (row.prefill_s, row.compression_s, row.step_s, row.fastest_s, row.floor_s)
    return [
        row.variant,
        *(shown(seconds, lambda value: f"{1e3 * value:.4g} ms") for seconds in times),
        shown(row.over_floor, lambda ratio: f"{ratio:.2f}"),
        shown(row.tokens_per_s, lambda rate: f"{rate:.4g}"),
        shown(row.faster, lambda ratio: f"{ratio:.2f}x"),
        shown(row.cache_bytes, format_bytes),
        shown(row.peak_bytes, format_bytes),
    ]
