"""Everything a GPU is needed for, in under nine minutes: python benchmarks/gpu.py FOLDER (what `make gpu` runs)

The CUDA extension for this GPU is built in the checkout, then come tests, benchmarks, and every op under
compute-sanitizer. Every step has a time limit, and all together have one; a step that fails does not stop the others;
the exit status says whether any did. FOLDER receives gpu.json (the steps), gpu.log (all they print), gpu-tests.xml and
one JSON file a benchmark. Wheels in wheels/ are unpacked for the run first, without network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "gpu-site"
TOTAL = 530
BENCHMARKS = {"scores": 110, "select": 45, "merge": 80, "kept": 40, "compress": 130, "generate": 150}
# Triton knows no barriers that could diverge
SANITIZED = [
    *((tool, backend) for tool in ("memcheck", "racecheck") for backend in ("triton", "cuda")),
    ("synccheck", "cuda"),
    *(("initcheck", backend) for backend in ("triton", "cuda")),
]
# torch's own kernels have mangled C++ names, those of csrc/ a namespace of their own
KERNELS = {"triton": ["--kernel-name-exclude", "kns=_Z"], "cuda": ["--kernel-name", "kns=5lookm"]}
# memory of the caching allocator looks allocated, and written, past the end of a tensor
NO_CACHING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
FINDINGS = 86
GRACE = 4
OUT_OF_TIME = f"the {TOTAL} s of all steps were over"


class Step(NamedTuple):
    """One command; `limit` in seconds; `missing`: why it cannot run here."""

    name: str
    command: list[str]
    limit: int
    environment: dict[str, str] | None = None
    missing: str | None = None


def steps(folder: Path) -> list[Step]:
    """All commands, the most valuable first."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # compiling takes most of the time
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    tests = Step("tests", [*pytest, *workers, "-m", "gpu", f"--junitxml={folder / 'gpu-tests.xml'}"], 180)
    every_op = [sys.executable, str(ROOT / "benchmarks" / "every_op.py")]
    capability = "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else ""
    extension = {"LOOKM_BUILD_CUDA": "1", "LOOKM_CUDA_ARCHS": capability}
    found = [Step("extension", [sys.executable, "setup.py", "build_ext", "--inplace"], 100, extension), tests]
    for name, limit in BENCHMARKS.items():
        command = [*pytest, f"benchmarks/bench_{name}.py", "--benchmark-disable-gc"]
        found.append(Step(name, command, limit, {"LOOKM_BENCH_RESULTS": str(folder)}))
    found += [Step(f"every_op {backend}", [*every_op, backend], 60) for backend in KERNELS]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    missing = None if sanitizer else "compute-sanitizer is not on this machine"
    for tool, backend in SANITIZED:
        # initcheck must see what torch's kernels write
        kernels = [] if tool == "initcheck" else KERNELS[backend]
        command = [sanitizer or "", "--tool", tool, "--error-exitcode", str(FINDINGS), *kernels, *every_op, backend]
        found.append(Step(f"{tool} {backend}", command, 60, NO_CACHING, missing))
    return found


def environment(extra: dict[str, str] | None) -> dict[str, str]:
    """The package from the checkout, wheels before what is installed."""
    paths = [str(ROOT), str(ROOT / "python"), str(SITE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", **(extra or {})}


def wait(step: Step, output: IO[str]) -> int | None:
    """Exit status of a step's command, None where its time is up; nothing it started stays behind."""
    process = subprocess.Popen(
        step.command, cwd=ROOT, env=environment(step.environment), stdout=output, stderr=output, start_new_session=True
    )
    try:
        return process.wait(step.limit - GRACE)
    except subprocess.TimeoutExpired:
        # as Ctrl-C: pytest then still writes what it has
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(step: Step, log: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run one step; its output goes to the log, its outcome is returned: "ok", "failed ...", "missing ..."."""
    if step.missing:
        outcome = f"{'failed' if step.missing == OUT_OF_TIME else 'missing'}: {step.missing}"
        say(f"{step.name}: {outcome}")
        return {"outcome": outcome, "seconds": 0.0}
    start = time.monotonic()
    with log.open("a") as output:
        output.write(f"\n===== {step.name}: {' '.join(step.command)}\n")
        output.flush()
        status = wait(step, output)
    seconds = time.monotonic() - start
    outcome = "ok" if status == 0 else f"failed: longer than {step.limit} s" if status is None else f"failed: {status}"
    outcome = "failed: the sanitizer found something" if status == FINDINGS else outcome
    say(f"{step.name}: {outcome}, {seconds:.0f} s")
    return {"outcome": outcome, "seconds": seconds}


def test_counts(file: Path) -> dict[str, int]:
    """Totals of a junit file; empty where there is none."""
    if not file.exists():
        return {}
    suites = ElementTree.parse(file).getroot().iter("testsuite")
    names = ("tests", "failures", "errors", "skipped")
    totals = [{name: int(suite.get(name, 0)) for name in names} for suite in suites]
    return {name: sum(total[name] for total in totals) for name in names}


def install_wheels() -> None:
    """wheels/*.whl into a folder of their own, where there are any."""
    wheels = sorted(str(wheel) for wheel in (ROOT / "wheels").glob("*.whl"))
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(SITE), *wheels], check=True)


def main(folder: Path) -> int:
    """Run all steps; 1 where any failed."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "gpu.log"
    log.unlink(missing_ok=True)
    install_wheels()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record: dict[str, Any] = {"device": device, "steps": {}}
    end = time.monotonic() + TOTAL
    for step in steps(folder):
        left = int(end - time.monotonic())
        step = step._replace(
            limit=min(step.limit, left), missing=step.missing or (None if left > 2 * GRACE else OUT_OF_TIME)
        )
        record["steps"][step.name] = run(step, log, lambda text: print(text, flush=True))
        record["tests"] = test_counts(folder / "gpu-tests.xml")
        (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    failed = [name for name, result in record["steps"].items() if result["outcome"].startswith("failed")]
    print(f"failed: {', '.join(failed)}; see {log}" if failed else f"all steps passed; results in {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("make gpu: torch sees no GPU here")
    raise SystemExit(main(Path(sys.argv[1]).resolve()))
