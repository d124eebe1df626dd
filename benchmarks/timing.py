"""How the benchmarks time, and the record they leave.

On a GPU: device events around the region, replays of a captured graph where a call is short, the median of several
rounds, several input sets in turn where one would stay in the cache. On a processor the clock is the host's.
LOOKM_BENCH_SIZE=small runs tiny shapes, also without a GPU; LOOKM_BENCH_RESULTS=FOLDER writes a JSON file for each
benchmark there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from targets import GPU_TARGETS, OURS, Target
from torch import Tensor
from work import Work

import lookm_kernels
from lookm_kernels._dispatch import why_missing

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BACKEND = "reference" if why_missing("triton") else "triton"
SMALL = os.environ.get("LOOKM_BENCH_SIZE", "full") == "small"
RESULTS = os.environ.get("LOOKM_BENCH_RESULTS")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

# a call shorter than this is replayed from a graph: launching its kernels from Python may take as long
GRAPH_BELOW = 5e-3
SECONDS_A_ROW = 0.3
ROUNDS = (3, 50) if ON_GPU else (2, 2)
MOST_SETS = 1024
Call = Callable[[], Any]
# rows of the ops that are written in CUDA C++
CUDA = f"{OURS}, CUDA C++"

_worked = 0.0


def device_clock() -> float:
    """Seconds the device has worked in timed regions: the timer of pytest-benchmark."""
    return _worked


def timed(call: Call) -> float:
    """Seconds of one call on the device."""
    if not ON_GPU:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def input_sets(bytes_of_one: int) -> int:
    """How many input sets are twice the cache; 1 where one is, 2 on a processor."""
    if not ON_GPU:
        return 2
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return min(MOST_SETS, max(1, -(-2 * cache // bytes_of_one)))


def captured(call: Call) -> tuple[Call, str]:
    """A call as the replay of a CUDA graph, and how it is timed; the call itself, with the reason, where that fails."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return call, f"events, as it cannot be captured: {str(error).splitlines()[0]}"
    return graph.replay, "graph"


def measure(
    benchmark: BenchmarkFixture, calls: Sequence[Call], restore: Call | None = None, warm: bool = False
) -> dict[str, Any]:
    """Median seconds of one of `calls`, which run in turn; `restore` resets what they modify, outside the clock.

    They run once before the clock starts, unless they are `warm` already.
    """

    def one_pass() -> None:
        for call in calls:
            call()

    def prepare() -> None:
        if restore is not None:
            restore()

    if not warm:
        prepare()
        one_pass()
    prepare()
    estimate = timed(one_pass)
    region, how = one_pass, "events" if ON_GPU else "host clock"
    if ON_GPU and estimate / len(calls) < GRAPH_BELOW:
        prepare()
        region, how = captured(one_pass)
        prepare()
        estimate = timed(region)

    def one_round() -> None:
        global _worked
        _worked += timed(region) / len(calls)

    least, most = ROUNDS
    rounds = max(least, min(most, int(SECONDS_A_ROW / estimate)))
    benchmark.pedantic(one_round, setup=prepare, rounds=rounds)
    stats = benchmark.stats.stats
    return {"seconds": stats.median, "fastest": stats.min, "rounds": rounds, "sets": len(calls), "timed_with": how}


def peak_extra_bytes(call: Call) -> int | None:
    """Bytes a call needs at its peak beyond what was allocated before; None on a processor."""
    if not ON_GPU:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_cuda(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call with the ops that are written in CUDA C++ on that backend."""

    def run(*arguments: Any) -> Any:
        with lookm_kernels.use_backend("cuda"):
            return call(*arguments)

    return run


def why_no_cuda(by: str) -> str | None:
    """Why a row by CUDA C++ cannot be timed here; None for the others."""
    return why_missing("cuda") if by == CUDA else None


def relative_error(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected||; NaN is no number below any limit."""
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def ceilings() -> dict[str, float]:
    """What this machine reaches: a large copy, counting bytes read and written, and a large matrix product."""
    copied, side = (2 << 30, 8192) if ON_GPU and not SMALL else (4 << 20, 256)
    source = torch.randn(copied // DTYPE.itemsize, device=DEVICE, dtype=DTYPE)
    target = torch.empty_like(source)
    copy_seconds = _median(lambda: target.copy_(source))
    left, right = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product_seconds = _median(lambda: left @ right)
    return {"bytes_per_s": 2 * copied / copy_seconds, "flops_per_s": 2 * side**3 / product_seconds}


def _median(call: Call) -> float:
    for _ in range(3):
        call()
    return median(timed(call) for _ in range(20))


def gpu_state() -> dict[str, str]:
    """Name, driver, clocks and temperature as nvidia-smi reads them now; nothing is set."""
    fields = ["name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu"]
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"no answer: {error}"}
    return dict(zip(fields, (field.strip() for field in answer.strip().split(",")), strict=True))


def version(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Record:
    """The rows of one benchmark file, written after every row, so that a run cut short leaves what it has."""

    def __init__(self, benchmark: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "size": "small" if SMALL else "full",
            "device": torch.cuda.get_device_name() if ON_GPU else platform.machine(),
            "backend": BACKEND,
            "dtype": str(DTYPE).removeprefix("torch."),
            # fresh inputs every run
            "seed": torch.seed(),
            "versions": {
                "lookm_kernels": lookm_kernels.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                **{name: version(name) for name in ("triton", "transformers", "flash-colreduce")},
            },
            "ceilings": ceilings(),
            "gpu": gpu_state() if ON_GPU else None,
            "rows": self.rows,
            "targets": {},
        }

    def add(
        self, benchmark: BenchmarkFixture, what: str, by: str, shape: dict[str, int], work: Work,
        measured: dict[str, Any], **more: Any,
    ) -> None:  # fmt: skip
        """One timed row: rates, and their shares of the ceilings measured in this run."""
        seconds, ceiling = measured["seconds"], self.content["ceilings"]
        figures = {
            **measured,
            "flops": work.flops,
            "bytes": work.bytes,
            "flops_per_s": work.flops / seconds,
            "bytes_per_s": work.bytes / seconds,
            "flops_share": work.flops / seconds / ceiling["flops_per_s"],
            "bytes_share": work.bytes / seconds / ceiling["bytes_per_s"],
            **more,
        }
        benchmark.extra_info.update(figures)
        self.rows.append({"what": what, "by": by, "shape": shape, **figures})
        self.write()

    def missing(self, what: str, by: str, shape: dict[str, int], reason: str) -> None:
        """A row that says why it is not there."""
        self.rows.append({"what": what, "by": by, "shape": shape, "missing": reason})
        self.write()

    def value(self, what: str, by: str, shape: dict[str, int], field: str = "seconds") -> float | None:
        """A figure of a row, None where there is none."""
        for row in self.rows:
            if (row["what"], row["by"], row["shape"]) == (what, by, shape):
                return row.get(field)  # type: ignore[no-any-return]
        return None

    def target(self, name: str, measured: float | None, targets: Mapping[str, Target] = GPU_TARGETS) -> None:
        """Target beside measured; nothing where there is no measured value."""
        if measured is not None:
            self.content["targets"][name] = targets[name].result(measured)
            self.write()

    def check_targets(self, *excused: str) -> None:
        """Every target of this benchmark has a measured value, met or not, but for those that cannot have one here."""
        wanted = {name for name, target in GPU_TARGETS.items() if target.benchmark == self.content["benchmark"]}
        lacking = wanted - set(self.content["targets"]) - set(excused)
        assert not lacking, f"no measured value for {', '.join(sorted(lacking))}"

    def write(self) -> None:
        """The whole record to RESULTS."""
        if RESULTS is not None:
            folder = Path(RESULTS)
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{self.content['benchmark']}.json"
            file.write_text(json.dumps(self.content, indent=1) + "\n")


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """A quotient of two figures, None where one is missing."""
    return None if numerator is None or denominator is None else numerator / denominator
