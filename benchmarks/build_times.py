"""How long the CUDA extension takes to build and what it weighs: python benchmarks/build_times.py

Writes results/build.json. Every build starts from nothing, in a folder of its own, by the commands that setup.py runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_reference import processor

ROOT = Path(__file__).parent.parent


def timed(command: list[str], **variables: str) -> dict[str, float]:
    """Wall time and processor time of a command that must succeed; the second hardly depends on what else runs."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | variables)
    spent, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(spent, 1), "processor_s": round(busy, 1)}


def load_setup() -> Any:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("lookm_setup", ROOT / "setup.py")
    if spec is None or spec.loader is None:
        raise SystemExit("setup.py was not found")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_build(setup: Any, nvcc: str, archs: list[str]) -> dict[str, Any]:
    """Configure and compile for some architectures."""
    with tempfile.TemporaryDirectory() as folder:
        configure = setup.cmake_command(nvcc, archs, Path(folder))
        return {
            "archs": archs,
            "configure": timed(configure),
            "compile": timed([configure[0], "--build", folder]),
            "bytes": next(Path(folder).glob("_C.*")).stat().st_size,
        }


def measure_wheel(mode: str) -> dict[str, Any]:
    """The wheel from an sdist, as pip would build it where the build tools are installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, str(ROOT)]
        spent = timed(command, LOOKM_BUILD_CUDA=mode)
        (wheel,) = Path(folder).glob("*.whl")
        (sdist,) = Path(folder).glob("*.tar.gz")
        tag = wheel.stem.split("-", 2)[2]
        return {"tag": tag, "build": spent, "bytes": wheel.stat().st_size, "sdist_bytes": sdist.stat().st_size}


def main() -> None:
    """Measure and write."""
    setup = load_setup()
    nvcc, record = setup.plan()
    if nvcc is None:
        raise SystemExit(record["reason"])
    result = {
        "cpu": processor(),
        "threads": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "cuda": record["cuda"],
        "builds": [
            measure_build(setup, nvcc, archs) for archs in ([[arch] for arch in record["archs"]] + [record["archs"]])
        ],
        "wheels": [measure_wheel(mode) for mode in ("0", "1")],
    }
    path = ROOT / "benchmarks" / "results" / "build.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
