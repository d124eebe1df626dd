"""What the kernels of csrc/ take of a multiprocessor, by nvcc's report: no more than data/resources.json says.

`python tests/test_resources.py` measures anew and writes that file.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BOUNDS = Path(__file__).parent / "data" / "resources.json"
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
THREADS = {"select_kernel": 1024, "compact_kernel": 512, "merge_kernel": 256, "tile_kernel": 256}
Report = dict[str, dict[str, int]]


def nvcc_release() -> str:
    """Such as "13.0": another compiler hands out registers in another way."""
    said = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release ([\d.]+)", said)[0]


def why_not_comparable() -> str | None:
    if NVCC is None:
        return "nvcc is not installed"
    if shutil.which("c++filt") is None:
        return "c++filt, which reads the names of kernels, is not installed"
    bound = json.loads(BOUNDS.read_text())["nvcc"] if BOUNDS.exists() else None
    return None if nvcc_release() == bound else f"the bounds hold for nvcc {bound}, this is {nvcc_release()}"


def compiled(source: Path, arch: str) -> Report:
    """Registers of a thread, bytes of its stack and of its spills, and static shared memory, of each of our kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(NVCC), "-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-cubin", "-o", f"{folder}/cubin"]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=True)
    said = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
    report: Report = {}
    for part in said.split("Compiling entry function ")[1:]:
        name = re.match(r"'(?:void )?lookm::\(anonymous namespace\)::(\w+(?:<[^(]*>)?)", part)
        # the others are CUB's
        if name is None:
            continue
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)[:3])
        shared = re.search(r"(\d+) bytes smem", part)
        report[name[1]] = {
            "registers": int(re.findall(r"Used (\d+) registers", part)[0]),
            "stack": stack,
            "spills": stores + loads,
            "shared": int(shared[1]) if shared else 0,
        }
    return report


def measured() -> dict[str, Report]:
    """Every kernel of csrc/, by architecture."""
    jobs = [(source, arch) for arch in ARCHS for source in sorted((ROOT / "csrc").glob("*.cu"))]
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda job: compiled(*job), jobs))
    found: dict[str, Report] = {arch: {} for arch in ARCHS}
    for (_, arch), report in zip(jobs, reports, strict=True):
        found[arch] |= report
    return found


def over(found: dict[str, int], bound: dict[str, int]) -> dict[str, Any]:
    return {what: (found[what], bound[what]) for what in bound if found[what] > bound[what]}


@pytest.mark.skipif(why_not_comparable() is not None, reason=str(why_not_comparable()))
def test_no_kernel_takes_more_than_its_bound() -> None:
    bounds, found = json.loads(BOUNDS.read_text())["kernels"], measured()
    assert {arch: set(report) for arch, report in found.items()} == {arch: set(bounds[arch]) for arch in bounds}
    more = {
        f"{kernel} on {arch}": over(found[arch][kernel], bounds[arch][kernel])
        for arch in ARCHS
        for kernel in found[arch]
    }
    assert not {kernel: what for kernel, what in more.items() if what}


@pytest.mark.parametrize("arch", ARCHS)
def test_the_bounds_let_a_kernel_run_at_all(arch: str) -> None:
    """65,536 registers of a multiprocessor, handed out in eights a thread, and 48 KiB of static shared memory."""
    bounds = json.loads(BOUNDS.read_text())["kernels"][arch]
    assert {kernel.partition("<")[0] for kernel in bounds} >= set(THREADS)
    for kernel, bound in bounds.items():
        threads = THREADS.get(kernel.partition("<")[0], 256)
        assert -(-bound["registers"] // 8) * 8 * threads <= 65536
        assert bound["shared"] <= 48 * 1024
        assert bound["spills"] <= 128


if __name__ == "__main__":
    if NVCC is None:
        sys.exit("nvcc is not installed")
    BOUNDS.write_text(json.dumps({"nvcc": nvcc_release(), "kernels": measured()}, indent=1, sort_keys=True) + "\n")
