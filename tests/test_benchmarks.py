"""The benchmarks' own code: floors, targets, tables and plot from made-up results, and the runner of `make gpu`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import bench_generate
import gpu
import pytest
import report
import tables
import timing
import torch
import work
from roofline import roofline
from targets import CPU_TARGETS, GPU_TARGETS, Target
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lookm.speed import Result, Row

ATTENTION = {"batch": 1, "heads": 32, "kv_heads": 8, "tokens": 32768, "width": 128}


def record(rows: list[dict[str, Any]], targets: dict[str, Any], size: str = "full") -> dict[str, Any]:
    """A result file as timing.Record writes it."""
    return {
        "benchmark": "scores",
        "size": size,
        "device": "Made-up GPU",
        "dtype": "bfloat16",
        "versions": {"torch": "9.9", "triton": None},
        "gpu": {"clocks.sm": "1980 MHz"},
        "ceilings": {"bytes_per_s": 4e12, "flops_per_s": 800e12},
        "rows": rows,
        "targets": targets,
    }


def row(what: str, by: str, seconds: float) -> dict[str, Any]:
    """A timed row that does 400 TFLOP/s and half a TB/s."""
    rates = {"bytes": 1.0, "flops_per_s": 400e12, "bytes_per_s": 0.5e12, "flops_share": 0.5, "bytes_share": 0.125}
    return {"what": what, "by": by, "shape": ATTENTION, "seconds": seconds, "timed_with": "graph", "flops": 1.0} | rates


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of results with one GPU that ran one benchmark: a met target, a missed one, a peer that is missing."""
    missing = {"what": "scores, without LSE", "by": "flash-colreduce", "shape": ATTENTION, "missing": "not installed"}
    rows = [row("scores, LSE given", tables.OURS, 0.009), row("attention forward", "SDPA flash", 0.015), missing]
    targets = {name: GPU_TARGETS[name].result(value) for name, value in (("scores_rate", 488), ("scores_sdpa", 0.6))}
    (tmp_path / "made-up").mkdir()
    (tmp_path / "made-up" / "scores.json").write_text(json.dumps(record(rows, targets)))
    (tmp_path / "made-up" / "select.json").write_text(json.dumps(record(rows, targets, "small")))
    steps = {"tests": {"outcome": "ok"}, "memcheck": {"outcome": "failed: 1"}}
    (tmp_path / "made-up" / "gpu.json").write_text(json.dumps({"tests": {"tests": 550, "failures": 0}, "steps": steps}))
    return tmp_path


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_pairs_are_those_a_causal_mask_shows(tokens: int) -> None:
    assert work.causal_pairs(2, 3, tokens) == 6 * sum(query >= key for query in range(tokens) for key in range(tokens))


def test_the_floor_of_scores_is_one_product_a_pass() -> None:
    one, two = (work.scores(**ATTENTION, passes=passes) for passes in (1, 2))
    assert one.flops == 2 * 128 * 32 * 32768 * 32769 // 2
    assert (two.flops, two.exponentials) == (2 * one.flops, 2 * one.exponentials)
    assert work.attention(**ATTENTION).flops == 2 * one.flops
    parts = one.seconds()
    assert parts["matrix"] == pytest.approx(one.flops / 790e12)
    # 2 D = 256 operations an exponential: the matrix units need longer, by this much
    assert parts["matrix"] / parts["exponentials"] == pytest.approx(256 / 790e12 * 16 * 132 * 1.98e9)
    assert max(parts, key=lambda part: parts[part]) == "matrix"


def test_merging_reads_every_row_once_and_writes_the_kept() -> None:
    done = work.merging(batch=2, heads=3, tokens=10, keep=4, width=8)
    assert done.bytes == 2 * (2 * 3 * (10 + 4) * 8) * work.BF16
    assert done.flops == 2 * 3 * (2 * 8 * 4 * 6 + 2 * 8 * 10 * 2)


@pytest.mark.parametrize(("at_most", "met"), [(True, (True, True, False)), (False, (False, True, True))])
def test_a_target_includes_its_limit(at_most: bool, met: tuple[bool, ...]) -> None:
    target = Target("scores", "made up", at_most, 2, "x")
    assert tuple(target.met(value) for value in (1.9, 2, 2.1)) == met
    assert target.result(2.1) == {"target": "<= 2x" if at_most else ">= 2x", "measured": 2.1, "met": met[2]}


def test_targets_of_the_design_are_all_there() -> None:
    assert len(GPU_TARGETS) == 18
    assert {target.benchmark for target in GPU_TARGETS.values()} == set(gpu.BENCHMARKS) - {"kept"}
    measured = {name for name, target in CPU_TARGETS.items() if target.benchmark == "reference"}
    assert measured <= set(report.read("reference.json"))
    assert {target.benchmark for target in CPU_TARGETS.values()} == {"reference", "generate"}


def test_results_of_tiny_shapes_do_not_count(results: Path) -> None:
    assert list(tables.devices(results)[0].records) == ["scores"]


def test_target_table_tells_met_from_missed_and_absent(results: Path) -> None:
    (device,) = tables.devices(results)
    lines = tables.target_table([device]).splitlines()
    assert lines[0] == "| what | target | Made-up GPU |"
    cells = dict(zip(GPU_TARGETS, (line.split(" | ")[-1].removesuffix(" |") for line in lines[2:]), strict=True))
    assert cells["scores_rate"] == "488 TFLOP/s, met"
    assert cells["scores_sdpa"] == "**0.6, missed**"
    assert cells["select_time"] == tables.NOT_YET
    assert tables.NOT_YET in tables.target_table([])


def test_device_tables_show_rates_and_what_is_missing(results: Path) -> None:
    (device,) = tables.devices(results)
    text = tables.device_tables(device)
    assert "torch 9.9; clocks.sm 1980 MHz. Ceilings measured in this run: 4 TB/s, 800 TFLOP/s." in text
    assert "Tests on the GPU: 550 tests, 0 failures. Steps of `make gpu`: tests ok; memcheck failed: 1." in text
    assert "| 9 ms | graph | 400 (50 %) | 0.5 (12 %) |  |" in text
    assert "| flash-colreduce |" in text
    assert "| not installed |" in text


def test_decoding_tables_have_a_row_a_cache() -> None:
    shape = {"batch": 1, "tokens": 8192}
    timed = {
        "what": "decode, decoder",
        "by": "LookMCache 20 %",
        "shape": shape,
        "prefill_s": 2.0,
        "compression_s": 0.25,
    }
    timed |= {"step_s": 0.02, "floor_s": 0.016, "over_floor": 1.251, "tokens_per_s": 50.0, "faster": 4.0}
    timed |= {"cache_bytes": 3 << 20, "peak_bytes": None}
    missing = {"what": "decode, decoder", "by": "StaticCache", "shape": shape, "missing": "out of memory"}
    made = record([timed, missing], {}) | {"cpu": "Made-up CPU", "threads": 2}
    made["versions"]["transformers"] = "5.99"
    lines = tables.decoding([made]).splitlines()
    assert lines[0] == "Made-up CPU, 2 threads, bfloat16, torch 9.9, transformers 5.99:"
    assert lines[4] == (
        "| decode, decoder, batch 1, tokens 8192 | LookMCache 20 % | 2 s | 250 ms | 20 ms | 16 ms | 1.25 | 50 | 4.00x "
        "| 3 MiB |  |"
    )
    assert lines[5].count("|") == lines[4].count("|")
    assert "| StaticCache | out of memory |" in lines[5]


@pytest.mark.parametrize(
    ("name", "billions", "kib_a_token"),
    [("llava-1.5-7b", 6.76, 512), ("qwen2.5-vl-7b", 7.62, 56), ("qwen3-vl-8b", 8.19, 144), ("decoder-100m", 0.098, 36)],
)
def test_shapes_of_whole_models_are_those_of_the_published_ones(name: str, billions: float, kib_a_token: int) -> None:
    fields = json.loads((Path(bench_generate.__file__).parent / "configs" / f"{name}.json").read_text())
    assert fields.pop("source")
    config = AutoConfig.for_model(**fields)
    text = config.get_text_config(decoder=True)
    kind = AutoModelForCausalLM if config is text else AutoModelForImageTextToText
    with torch.device("meta"):
        model = kind.from_config(config, dtype=torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert 2 * text.num_hidden_layers * text.num_key_value_heads * width * 2 == kib_a_token << 10


def in_turn(variant: str, *steps: float, over_floor: float = 1.0) -> Row:
    return Row(variant=variant, steps=list(steps), over_floor=over_floor)


def decoded(*rows: Row) -> Result:
    sizes = {"threads": 1, "batch": 1, "prompt_tokens": 8, "new_tokens": 3, "weight_bytes": 1, "bytes_per_s": 1.0}
    return Result(device="made up", dtype="float32", rows=rows, **sizes)  # type: ignore[arg-type]


def test_decoding_targets_compare_steps_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    met: dict[str, float] = {}
    made = SimpleNamespace(target=lambda name, value, targets=GPU_TARGETS: met.update({targets[name].text: value}))
    # the second round was slow for all: quotients of medians would be 5 and 1.5
    rows = [in_turn("DynamicCache", 4, 40, 5), in_turn("LookMCache 20 %", 1.5, 12, 1)]
    rows.append(in_turn("LookMCache 20 %, fixed size", 1, 10, 1, over_floor=1.2))
    monkeypatch.setattr(bench_generate, "BEST", "LookMCache 20 %, fixed size")
    monkeypatch.setattr(timing, "SMALL", False)
    bench_generate.set_targets(made, decoded(*rows))  # type: ignore[arg-type]
    expected = {"decode_full": 4, "decode_grown": 1 / 1.2, "decode_floor": 1.2}
    assert met == pytest.approx({CPU_TARGETS[name].text: value for name, value in expected.items()})
    slower = [rows[0], in_turn("LookMCache 20 %", 0.9, 9, 0.9), rows[2]]
    with pytest.raises(AssertionError):
        bench_generate.set_targets(made, decoded(*slower))  # type: ignore[arg-type]
    met.clear()
    monkeypatch.setattr(timing, "ON_GPU", True)
    rows.append(in_turn("StaticCache, compiled", 2, 20, 4))
    bench_generate.set_targets(made, decoded(*rows))  # type: ignore[arg-type]
    expected = {"decode_dynamic": 4, "decode_static": 2, "decode_floor": 1.2}
    assert met == pytest.approx({GPU_TARGETS[name].text: value for name, value in expected.items()})


def test_as_many_rows_as_fit() -> None:
    # 14 GB of weights, 3 GB a row: 95 of 100 GB hold 27 rows
    assert bench_generate.rows_that_fit(total=100, peak=17, weights=14) == 27
    assert bench_generate.rows_that_fit(total=15, peak=17, weights=14) == 1


def test_plot_fills_what_is_measured(results: Path, tmp_path: Path) -> None:
    found = tables.devices(results)
    placed = tables.points(found)
    assert {point.label for point in placed if point.measured} == {
        "scores, LSE given (Made-up GPU)",
        "attention forward (Made-up GPU)",
    }
    floor = next(point for point in placed if point.label == "merge")
    assert floor.flops_per_s == pytest.approx(floor.intensity * work.H200_BYTES_PER_S)
    file = tmp_path / "plot.svg"
    file.write_text(roofline(placed, 4e12, 800e12))
    circles = list(ElementTree.parse(file).getroot().iter("{http://www.w3.org/2000/svg}circle"))
    assert [circle.get("fill") == "white" for circle in circles] == [not point.measured for point in placed]
    # both points do the same rate: the same height, inside the frame
    heights = {circle.get("cy") for circle in circles if circle.get("fill") != "white"}
    assert len(heights) == 1
    assert all(70 <= float(circle.get("cx", 0)) <= 550 for circle in circles)


class MadeUpGpu:
    """Stands for torch.cuda where there is none: `now` is its clock, which calls and replays move on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, captures: bool = True) -> None:
        self.now, self.captures, self.replays = 0.0, captures, 0
        monkeypatch.setattr(timing, "ON_GPU", True)
        monkeypatch.setattr(timing, "ROUNDS", (3, 50))
        for name, stand_in in (("Event", self.event), ("CUDAGraph", self.new_graph), ("graph", self.capture)):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def new_graph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=self.replay)

    def replay(self) -> None:
        self.replays += 1
        self.now += 8e-6

    @contextmanager
    def capture(self, graph: SimpleNamespace) -> Iterator[None]:
        yield
        if not self.captures:
            raise RuntimeError("operation not permitted\nwhen capturing")

    def call(self, seconds: float) -> Callable[[], None]:
        return lambda: setattr(self, "now", self.now + seconds)


class MadeUpBenchmark:
    """What timing.measure uses of pytest-benchmark."""

    def pedantic(self, target: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        seconds = []
        for _ in range(rounds):
            setup()
            before = timing.device_clock()
            target()
            seconds.append(timing.device_clock() - before)
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=median(seconds), min=min(seconds)))


def measure(seconds: float, gpu: MadeUpGpu) -> tuple[dict[str, Any], int]:
    """Two calls of that length, and how often they were restored; restoring takes a second that must not count."""
    restored = []
    calls, lasting = [gpu.call(seconds)] * 2, gpu.call(1.0)
    measured = timing.measure(MadeUpBenchmark(), calls, lambda: (restored.append(1), lasting()))  # type: ignore[arg-type]
    return measured, len(restored)


def test_a_short_call_is_timed_from_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = MadeUpGpu(monkeypatch)
    measured, restored = measure(2e-3, gpu)
    # a replay of both calls lasts 8 us
    assert measured["seconds"] == pytest.approx(4e-6)
    assert (measured["timed_with"], measured["sets"]) == ("graph", 2)
    assert measured["rounds"] == 50
    assert gpu.replays == measured["rounds"] + 1
    assert restored == measured["rounds"] + 4


def test_a_long_call_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = MadeUpGpu(monkeypatch)
    measured, restored = measure(0.2, gpu)
    assert measured["seconds"] == pytest.approx(0.2)
    assert (measured["timed_with"], gpu.replays) == ("events", 0)
    assert restored == measured["rounds"] + 2


def test_what_cannot_be_captured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, _ = measure(2e-3, MadeUpGpu(monkeypatch, captures=False))
    assert measured["seconds"] == pytest.approx(2e-3)
    assert measured["timed_with"] == "events, as it cannot be captured: operation not permitted"


def group_exists(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_failed_step_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(name: str, code: str, limit: int = 20, missing: str | None = None) -> gpu.Step:
        return gpu.Step(name, [sys.executable, "-c", code], limit, {"GIVEN": "yes"}, missing)

    child = (
        "import os, signal, subprocess; signal.signal(signal.SIGINT, lambda *_: print('told', flush=True));"
        "print(os.getpid(), flush=True); subprocess.run(['sleep', '60'])"
    )
    planned = [
        step("breaks", "raise SystemExit(3)"),
        step("finds", f"raise SystemExit({gpu.FINDINGS})"),
        step("hangs", child, limit=2),
        step("absent", "", missing="no such tool"),
        step("works", "import os, lookm_kernels; print('hello', os.environ['GIVEN'])"),
    ]
    monkeypatch.setattr(gpu, "GRACE", 1)
    monkeypatch.setattr(gpu, "steps", lambda folder: planned)
    start = time.monotonic()
    assert gpu.main(tmp_path) == 1
    assert time.monotonic() - start < 30
    outcomes = {
        name: result["outcome"] for name, result in json.loads((tmp_path / "gpu.json").read_text())["steps"].items()
    }
    assert outcomes == {
        "breaks": "failed: 3",
        "finds": "failed: the sanitizer found something",
        "hangs": "failed: longer than 2 s",
        "absent": "missing: no such tool",
        "works": "ok",
    }
    log = (tmp_path / "gpu.log").read_text()
    assert "hello yes" in log
    hung = int(log.split("===== hangs")[1].splitlines()[1])
    # what was killed is there until its new parent has asked for it
    end = time.monotonic() + 20
    while group_exists(hung) and time.monotonic() < end:
        time.sleep(0.05)
    assert not group_exists(hung)
    assert "told" in log
    assert "failed: breaks, finds, hangs; see" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "steps", lambda folder: planned[-2:])
    assert gpu.main(tmp_path) == 0


def test_no_step_starts_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TOTAL", 2 * gpu.GRACE)
    monkeypatch.setattr(gpu, "steps", lambda folder: [gpu.Step("late", ["false"], 60)])
    assert gpu.main(tmp_path) == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"]["late"]["outcome"] == f"failed: {gpu.OUT_OF_TIME}"


def test_steps_are_there_and_leave_few_files(tmp_path: Path) -> None:
    planned = gpu.steps(tmp_path)
    every_op = [f"every_op {backend}" for backend in gpu.KERNELS]
    sanitized = [f"{tool} {backend}" for tool, backend in gpu.SANITIZED]
    assert [step.name for step in planned] == ["extension", "tests", *gpu.BENCHMARKS, *every_op, *sanitized]
    assert gpu.TOTAL < 9 * 60
    assert len({"gpu.json", "gpu.log", "gpu-tests.xml"} | {f"{name}.json" for name in gpu.BENCHMARKS}) <= 9
    for step in planned:
        scripts = [part for part in step.command if part.endswith(".py")]
        assert all((gpu.ROOT / script).exists() for script in scripts), step.name


def test_counts_of_the_tests(tmp_path: Path) -> None:
    assert gpu.test_counts(tmp_path / "none.xml") == {}
    file = tmp_path / "gpu-tests.xml"
    file.write_text('<testsuites><testsuite tests="7" failures="1" errors="0" skipped="2"/></testsuites>')
    assert gpu.test_counts(file) == {"tests": 7, "failures": 1, "errors": 0, "skipped": 2}
