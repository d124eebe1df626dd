"""Tables and points of what GPUs measured, from the result files of `make gpu`, and of what each kernel must do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import work
from roofline import Point, roofline
from targets import GPU_TARGETS, OURS
from work import Work

from lookm.report import format_bytes

RESULTS = Path(__file__).parent / "results"
CPU = RESULTS / "cpu"
FAMILIES = RESULTS / "families"
NOT_YET = "not measured yet: `make gpu BIN=/path/to/bin`"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Device(NamedTuple):
    """The result files of one GPU: what it is called, a record a benchmark, and the steps of `make gpu`."""

    name: str
    records: dict[str, dict[str, Any]]
    steps: dict[str, Any]

    def row(self, what: str, by: str, shape: dict[str, int]) -> dict[str, Any] | None:
        """The timed row of these names and this shape."""
        for record in self.records.values():
            for row in record["rows"]:
                if (row["what"], row["by"], row["shape"]) == (what, by, shape) and "seconds" in row:
                    return dict(row)
        return None


def devices(results: Path = RESULTS) -> list[Device]:
    """Every folder of results but the processor's and that of the model families; tiny shapes do not count."""
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir() and path not in (CPU, FAMILIES)):
        files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        steps = files.pop("gpu", {})
        records = {name: record for name, record in files.items() if record["size"] == "full"}
        if records:
            found.append(Device(next(iter(records.values()))["device"], records, steps))
    return found


def target_table(found: Sequence[Device]) -> str:
    """A row a target, a column a device."""
    rows = []
    for name, target in GPU_TARGETS.items():
        cells = []
        for device in found:
            result = device.records.get(target.benchmark, {}).get("targets", {}).get(name)
            cells.append(NOT_YET if result is None else outcome(target.value(result["measured"]), result["met"]))
        rows.append([target.text, target.shown(), *(cells or [NOT_YET])])
    return markdown(["what", "target", *([device.name for device in found] or ["NVIDIA H200"])], rows)


def outcome(value: str, met: bool) -> str:
    """A measured value, missed ones in bold."""
    return f"{value}, met" if met else f"**{value}, missed**"


def format_seconds(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def format_shape(shape: dict[str, int]) -> str:
    """Name and size of every dimension."""
    return ", ".join(f"{name} {size}" for name, size in shape.items())


def device_tables(device: Device) -> str:
    """What the machine was, then every row of every benchmark."""
    parts = [f"### {device.name}"]
    if device.steps:
        tests = device.steps.get("tests", {})
        counts = ", ".join(f"{number} {name}" for name, number in tests.items())
        outcomes = "; ".join(f"{name} {step['outcome']}" for name, step in device.steps["steps"].items())
        parts.append(f"Tests on the GPU: {counts}. Steps of `make gpu`: {outcomes}.")
    for record in device.records.values():
        versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
        ceiling = record["ceilings"]
        state = ", ".join(f"{name} {value}" for name, value in (record["gpu"] or {}).items())
        parts.append(
            f"**{record['benchmark']}**, {record['dtype']}: {versions}; {state}. Ceilings measured in this run: "
            f"{ceiling['bytes_per_s'] / 1e12:.3g} TB/s, {ceiling['flops_per_s'] / 1e12:.3g} TFLOP/s."
        )
        header = ["what", "by", "shape", "time", "timed with", "TFLOP/s", "TB/s", "added"]
        parts.append(markdown(header, [cells(row) for row in record["rows"]]))
    return "\n\n".join(parts)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of a device's table: rates with their share of the measured ceiling."""
    start = [row["what"], row["by"], format_shape(row["shape"])]
    if "missing" in row:
        return [*start, row["missing"], "", "", "", ""]
    rates = [
        f"{row[f'{unit}_per_s'] / 1e12:.3g} ({100 * row[f'{unit}_share']:.0f} %)" if row[unit] else ""
        for unit in ("flops", "bytes")
    ]
    time = [format_seconds(row["seconds"]), row["timed_with"]]
    shares = (("peak_extra_share", "of the KV in memory"), ("added_share", "of the prefill's time"))
    added = [f"{100 * row[name]:.1f} % {meaning}" for name, meaning in shares if row.get(name) is not None]
    return [*start, *time, *rates, ", ".join(added)]


def decoding(records: Sequence[dict[str, Any]]) -> str:
    """Every cache of every prompt that bench_generate.py timed: a table a machine, a row a cache."""
    parts = []
    for record in records:
        threads = f", {record['threads']} threads" if "threads" in record else ""
        versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "transformers"))
        header = ["what", "cache", "prefill", "compression", "a step", "floor", "over floor", "tokens/s", "faster"]
        rows = [decoding_cells(row) for row in record["rows"]]
        parts.append(
            f"{record.get('cpu', record['device'])}{threads}, {record['dtype']}, {versions}:\n\n"
            + markdown([*header, "bytes", "peak"], rows)
        )
    return "\n\n".join(parts) or "Nothing was measured yet."


def decoding_cells(row: dict[str, Any]) -> list[str]:
    """One cache and one prompt; what is not known is left empty."""
    start = [f"{row['what']}, {format_shape(row['shape'])}", row["by"]]
    if "missing" in row:
        return [*start, row["missing"], *[""] * 8]
    times = (row["prefill_s"], row["compression_s"], row["step_s"], row["floor_s"])
    return [
        *start,
        *("" if seconds is None else format_seconds(seconds) for seconds in times),
        "" if row["over_floor"] is None else f"{row['over_floor']:.2f}",
        f"{row['tokens_per_s']:.3g}",
        "" if row["faster"] is None else f"{row['faster']:.2f}x",
        *("" if row[name] is None else format_bytes(row[name]) for name in ("cache_bytes", "peak_bytes")),
    ]


def measured() -> str:
    """All rows of all GPUs."""
    return "\n\n".join(device_tables(device) for device in devices()) or "No GPU has run these benchmarks yet."


class Kernel(NamedTuple):
    """A row of the benchmarks at a target's shape, and the work it is."""

    what: str
    by: str
    work: Work
    shape: dict[str, int]


def kernels() -> list[Kernel]:
    """The shapes of the targets."""
    attention = {"batch": 1, "heads": 32, "kv_heads": 8, "tokens": 32 << 10, "width": 128}
    rows = {"batch": 4, "heads": 8, "tokens": 32 << 10}
    layer = {"batch": 1, "heads": 8, "tokens": 32 << 10, "keep": (32 << 10) // 5, "width": 128}
    return [
        Kernel("scores, LSE given", OURS, work.scores(**attention, passes=1), attention),
        Kernel("scores, without LSE", OURS, work.scores(**attention, passes=2), attention),
        Kernel("attention forward", "SDPA flash", work.attention(**attention), attention),
        Kernel("select", OURS, work.select(**rows), rows),
        Kernel("nearest", OURS, work.nearest(**layer), layer),
        Kernel("merge", OURS, work.merge(**layer), layer),
        Kernel("compact", OURS, work.compact(**layer), layer),
        Kernel("nearest + merge + compact", OURS, work.merging(**layer), layer),
    ]


def floors() -> str:
    """What each kernel must do at least at the target's shape, and how long each part takes on an H200 alone."""
    rows = []
    for kernel in kernels():
        parts = kernel.work.seconds()
        amounts = [f"{kernel.work.flops:.3g}", f"{kernel.work.bytes:.3g}", f"{kernel.work.exponentials:.3g}"]
        times = [format_seconds(seconds) if seconds else "" for seconds in parts.values()]
        found = [device.row(kernel.what, kernel.by, kernel.shape) for device in devices()]
        runs = [format_seconds(row["seconds"]) if row else "not measured yet" for row in found] or ["not measured yet"]
        bound = max(parts, key=lambda part: parts[part])
        floor = f"{format_seconds(parts[bound])} ({bound})"
        rows.append([kernel.what, *amounts, *times, floor, format_seconds(sum(parts.values())), *runs])
    names = [device.name for device in devices()] or ["NVIDIA H200"]
    header = ["kernel", "FLOPs", "bytes", "exponentials", "matrix", "moving bytes", "exp", "floor", "nothing overlaps"]
    return (
        f"Assumed of an H200 until it is measured: {work.H200_FLOPS_PER_S / 1e12:.0f} TFLOP/s, "
        f"{work.H200_BYTES_PER_S / 1e12:.1f} TB/s, {work.H200_EXPONENTIALS_PER_S / 1e12:.2f}e12 exponentials/s.\n\n"
        + markdown([*header, *names], rows)
    )


def disassembly() -> str:
    """The inner loops of the compiled kernels, and the time they predict."""
    result = json.loads((RESULTS / "disassembly.json").read_text())
    header = ["kernel", "tile", "warps", "registers", "shared", "programs", "instructions"]
    header += ["cycles: issue", "matrix", "exp", "overlapped", "in turn"]
    rows = []
    for kernel in result["kernels"]:
        cycles = [f"{kernel['cycles'][part]:.0f}" for part in ("issue", "matrix", "exponentials")]
        times = [format_seconds(kernel[f"seconds_{how}"]) for how in ("overlapped", "in_turn")]
        counts = [str(kernel[name]) for name in ("warps", "registers")]
        shared, programs = f"{kernel['shared_bytes'] >> 10} KiB", str(kernel["programs"])
        tile, total = " x ".join(map(str, kernel["tile"])), str(sum(kernel["instructions"].values()))
        rows.append([kernel["what"], tile, *counts, shared, programs, total, *cycles, *times])
    return f"Compiled for {result['chip']} by Triton {result['triton']}:\n\n{markdown(header, rows)}"


def points(found: Sequence[Device]) -> list[Point]:
    """Measured rows at the targets' shapes where there are any, else what the ceilings allow."""
    placed = []
    for kernel in kernels():
        if not kernel.work.flops:
            continue
        intensity = kernel.work.flops / kernel.work.bytes
        rows = [(device, device.row(kernel.what, kernel.by, kernel.shape)) for device in found]
        runs = [
            Point(f"{kernel.what} ({device.name})", intensity, row["flops_per_s"], True) for device, row in rows if row
        ]
        attainable = min(work.H200_FLOPS_PER_S, intensity * work.H200_BYTES_PER_S)
        placed += runs or [Point(kernel.what, intensity, attainable, False)]
    return placed


def draw() -> str:
    """The plot of what is measured; ceilings of the last device measured, else those of an H200."""
    found = devices()
    ceiling = next(iter(found[-1].records.values()))["ceilings"] if found else {}
    bytes_per_s = ceiling.get("bytes_per_s", work.H200_BYTES_PER_S)
    return roofline(points(found), bytes_per_s, ceiling.get("flops_per_s", work.H200_FLOPS_PER_S))
