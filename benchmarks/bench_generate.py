"""Decoding beside the bandwidth limit: real architectures with random weights, every cache beside the full one.

What is measured is lookm.bench's. The shapes are in configs/: all of a text decoder, and one small layer of a vision
tower that never runs. On a GPU: LLaVA-1.5 at 32k; LOOKM_BENCH_SWEEP=1 adds the most rows that fit there, Qwen2.5-VL and
Qwen3-VL, prompts of 4k to 128k, 1 and 8 rows, for an hour or more. On a processor: a decoder of 100 M parameters, where
LOOKM_BENCH_COMPILE=1 adds the compiled caches. LOOKM_KVPRESS_PYTHON=/path/to/python, of an environment with kvpress,
adds its SnapKV, beside the DynamicCache of that environment's transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import timing
import torch
from bench_reference import processor
from pytest_benchmark.fixture import BenchmarkFixture
from targets import CPU_TARGETS
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from work import Work

from lookm.bench import COMPILED, FIXED, FULL, PREFILLS, STATIC, Variant, compressed, measure, random_prompt, variants
from lookm.speed import Result, pairwise
from lookm_kernels import use_backend

FOLDER = Path(__file__).parent
BUDGETS = (0.2, 0.05)
COMPILES = timing.ON_GPU or os.environ.get("LOOKM_BENCH_COMPILE") == "1"
KVPRESS = os.environ.get("LOOKM_KVPRESS_PYTHON")
SWEEP = os.environ.get("LOOKM_BENCH_SWEEP") == "1"
NEW_TOKENS = 4 if timing.SMALL else 32
BUFFER_BYTES = 1 << 22 if timing.SMALL else 1 << 30
# what the targets are for
BEST, SMALLEST = (compressed(budget) + FIXED + (COMPILED if timing.ON_GPU else "") for budget in BUDGETS)
# a head stays 128 wide, or the sections of the rotary embedding would not fit
SMALL = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}
VLMS = ("llava-1.5-7b", "qwen2.5-vl-7b", "qwen3-vl-8b")
DECODER = "decoder-100m"


class Cell(NamedTuple):
    """A shape of configs/ and a prompt."""

    model: str
    batch: int
    tokens: int


TARGET = Cell(DECODER, 1, 8 << 10)
CELLS = [TARGET]
if timing.ON_GPU:
    TARGET = Cell(VLMS[0], 1, 32 << 10)
    CELLS = [TARGET]
if timing.ON_GPU and SWEEP:
    EVERY = [Cell(name, batch, k << 10) for name in VLMS for batch in (1, 8) for k in (4, 16, 32, 128)]
    CELLS += [cell for cell in EVERY if cell != TARGET]
if timing.SMALL:
    CELLS = [Cell(name, 2, 96) for name in (*VLMS, DECODER)]


def shape_of(name: str) -> dict[str, Any]:
    """The fields of a configuration, and where they are from."""
    fields: dict[str, Any] = json.loads((FOLDER / "configs" / f"{name}.json").read_text())
    if timing.SMALL:
        fields.get("text_config", fields).update(SMALL)
    return fields


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    """The model of a shape, with random weights made on the device."""
    fields = shape_of(request.param)
    fields.pop("source")
    config = AutoConfig.for_model(**fields)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device(timing.DEVICE):
        return kind.from_config(config, dtype=timing.DTYPE).eval()


@pytest.fixture(scope="module")
def record() -> Iterator[timing.Record]:
    """The rows of this file, on a processor too."""
    with use_backend(timing.BACKEND):
        made = timing.Record("generate")
        if not timing.ON_GPU:
            state = {"cpu": processor(), "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
            made.content |= state
        yield made


def timed(model: Any, batch: int, tokens: int, chosen: list[Variant], prefills: int = PREFILLS) -> Result:
    """One prompt through the chosen caches; each must give the full one's logits until something was evicted."""
    result = measure(model, random_prompt(model, batch, tokens, NEW_TOKENS), chosen, BUFFER_BYTES, prefills)
    limit = 1e-3 if timing.DTYPE.itemsize == 4 else 5e-2
    for row in result.rows:
        assert row.prompt_error is None or row.prompt_error < limit, row
        assert row.last_error is None or not row.variant.startswith(STATIC) or row.last_error < limit, row
    return result


def write(record: timing.Record, benchmark: BenchmarkFixture, name: str, result: Result, what: str = "decode") -> None:
    """A row a cache."""
    shape = {"batch": result.batch, "tokens": result.prompt_tokens}
    for row in result.rows:
        if row.missing is not None or row.step_s is None:
            record.missing(f"{what}, {name}", row.variant, shape, row.missing or "")
            continue
        weights = result.weight_bytes or 0
        done = Work(2 * result.batch * weights / timing.DTYPE.itemsize, weights + (row.cache_bytes or 0))
        measured = {"seconds": row.step_s, "fastest": row.fastest_s, "rounds": len(row.steps), "sets": 1}
        measured["timed_with"] = "host clock"
        more = {name: value for name, value in asdict(row).items() if name not in ("missing", "variant", "prefills")}
        more["memory_bytes_per_s"] = result.bytes_per_s
        record.add(benchmark, f"{what}, {name}", row.variant, shape, done, measured, **more)


@pytest.mark.parametrize(
    ("model", "cell"), [(cell.model, cell) for cell in CELLS], indirect=["model"], ids=map(str, range(len(CELLS)))
)
def test_generate(benchmark: BenchmarkFixture, record: timing.Record, model: Any, cell: Cell) -> None:
    chosen = variants(BUDGETS, compiled=COMPILES)
    result = benchmark.pedantic(timed, (model, cell.batch, cell.tokens, chosen), rounds=1)
    full, least = result.row(FULL), result.row(compressed(BUDGETS[0]))
    if full.cache_bytes and least.cache_bytes:
        assert least.cache_bytes < 1.1 * BUDGETS[0] * full.cache_bytes
    write(record, benchmark, cell.model, result)
    print(f"\n{cell.model}: {result}")
    if cell == TARGET:
        set_targets(record, result)


def set_targets(record: timing.Record, result: Result) -> None:
    """Target beside measured, where there is a measured value; on a processor copies may not come back."""
    rows = {row.variant: row for row in result.rows}
    best = rows.get(BEST)

    def over(name: str) -> float | None:
        return None if best is None or name not in rows else pairwise(rows[name], best)

    floor = None if best is None else best.over_floor
    if timing.ON_GPU:
        record.target("decode_dynamic", over(FULL))
        record.target("decode_static", over(STATIC + COMPILED))
        record.target("decode_floor", floor)
        return
    grown = over(compressed(BUDGETS[0]))
    record.target("decode_grown", None if grown is None else 1 / grown, CPU_TARGETS)
    record.target("decode_floor", floor, CPU_TARGETS)
    record.target("decode_full", over(FULL), CPU_TARGETS)
    # the other two depend on how fast torch reads the weights, too
    assert timing.SMALL or grown is None or grown >= 1


def rows_that_fit(total: int, peak: int, weights: int) -> int:
    """How many rows a device of so many bytes holds, from the peak of one row; a twentieth is left for fragments."""
    return max(1, int((0.95 * total - weights) // (peak - weights)))


def largest(model: Any, variant: Variant, tokens: int) -> Result:
    """The most rows that fit, from the peak of one and then fewer, a tenth at a time."""
    one = timed(model, 1, tokens, [variant], 1).rows[0]
    total = torch.cuda.get_device_properties(timing.DEVICE).total_memory
    weights = sum(weight.nbytes for weight in model.parameters())
    rows = rows_that_fit(total, one.peak_bytes or total, weights)
    while True:
        result = timed(model, rows, tokens, [variant], 1)
        if result.rows[0].missing is None or rows == 1:
            return result
        rows = min(rows - 1, int(0.9 * rows))


@pytest.mark.parametrize("model", [TARGET.model], indirect=True)
def test_largest_batch(benchmark: BenchmarkFixture, record: timing.Record, model: Any) -> None:
    """Tokens a second of the most rows that fit, the full cache and the smallest one."""
    if not (timing.ON_GPU and SWEEP):
        pytest.skip("what fits is counted on a GPU, with LOOKM_BENCH_SWEEP=1")
    chosen = [variant for variant in variants(BUDGETS, compiled=True) if variant.name in (FULL, SMALLEST)]
    found = benchmark.pedantic(lambda: [largest(model, each, TARGET.tokens) for each in chosen], rounds=1)
    for result in found:
        write(record, benchmark, TARGET.model, result, "decode, most rows that fit")
    full, ours = (result.rows[0].tokens_per_s for result in found)
    record.target("decode_batch", timing.ratio(ours, full))


def test_snapkv(benchmark: BenchmarkFixture, record: timing.Record, tmp_path: Path) -> None:
    """kvpress's SnapKV, whose transformers is too old for this package, timed by a process of its own environment."""
    cell = CELLS[-1] if timing.SMALL else TARGET
    what, shape = f"decode, {cell.model}", {"batch": cell.batch, "tokens": cell.tokens}
    if KVPRESS is None:
        reason = "not asked for by LOOKM_KVPRESS_PYTHON"
        record.missing(what, "kvpress SnapKV", shape, reason)
        pytest.skip(reason)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(shape_of(cell.model)))
    numbers = [str(number) for number in (cell.batch, cell.tokens, NEW_TOKENS)]
    command = [KVPRESS, str(FOLDER / "peer_snapkv.py"), str(config), *numbers, str(timing.DTYPE).removeprefix("torch.")]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = benchmark.pedantic(
        subprocess.run, (command,), {"check": True, "stdout": subprocess.PIPE, "text": True, "env": own}, rounds=1
    )
    found = json.loads(done.stdout)
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    full = found["rows"][FULL]
    for name, row in found["rows"].items():
        steps = row["steps"]
        added = median(ours - theirs for ours, theirs in zip(row["prefills"], full["prefills"], strict=True))
        measured = {"seconds": median(steps), "fastest": min(steps), "rounds": len(steps), "sets": 1}
        more = {"prefill_s": median(row["prefills"]), "compression_s": None if row is full else added}
        more |= {"step_s": median(steps), "tokens_per_s": cell.batch / median(steps), "cache_bytes": row["cache_bytes"]}
        more |= {"faster": None if row is full else median(a / b for a, b in zip(full["steps"], steps, strict=True))}
        more |= dict.fromkeys(("floor_s", "over_floor", "peak_bytes"))
        measured["timed_with"] = "host clock"
        record.add(benchmark, what, f"{name}, {versions}", shape, Work(0, row["cache_bytes"]), measured, **more)
