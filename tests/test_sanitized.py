"""The kernels of csrc/ in tests/emulator under AddressSanitizer and UndefinedBehaviorSanitizer.

Run as a program it is what the test starts: every op, on inputs of the sizes at which accesses get narrower or a tile,
a step or a warp ends, in tensors of exactly the size they need.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from emulator import Emulator, build, why_not_built
from inputs import INTERPRETED, random, tiers

from lookm_kernels import _native, compact_, merge_, select_tokens, use_backend

SANITIZERS = "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"


def library(name: str) -> str | None:
    """The path of a library of g++; g++ answers with the bare name where it has none."""
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


def why_not() -> str | None:
    reason = why_not_built()
    if reason is None and (library("libasan.so") is None or library("libubsan.so") is None):
        return "g++ has no sanitizers"
    return "a process either interprets or compiles" if INTERPRETED else reason


@pytest.mark.skipif(shutil.which("g++") is None or why_not() is not None, reason="needs g++ and its sanitizers")
def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    build(tmp_path / "built", *SANITIZERS)
    preload = f"{library('libasan.so')}:{library('libubsan.so')}"
    options = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), *sys.path])
    command = [sys.executable, __file__, str(tmp_path / "built")]
    done = subprocess.run(
        command, env={**os.environ, **options, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "all ran\n"


def run_all() -> None:
    for tokens in (1, 4, 31, 257, 1030):
        scores, tier = random(0, 2, 2, tokens), tiers(0, 2, tokens)
        for keep in ([0], [tokens // 3], [tokens], [tokens // 2, tokens]):
            kept, evicted = select_tokens(scores, tier, keep)
            for dtype, width in ((torch.float32, 3), (torch.bfloat16, 8), (torch.float16, 66), (torch.float32, 132)):
                key, value = (random(seed, 2, 2, tokens, width, dtype=dtype) for seed in (0, 1))
                pivot = torch.where(evicted >= 0, kept.shape[2] - 1, -1).int()
                weights = random(2, *evicted.shape), random(3, *kept.shape)
                for values in (value, value.half()):
                    outs = (torch.empty(2, 2, kept.shape[2], width, dtype=x.dtype) for x in (key, values))
                    given = dict(zip(("out_key", "out_value"), outs, strict=True))
                    counted = {"votes": random(4, 2, 2, tokens).abs(), "out_votes": torch.empty(kept.shape)}
                    merge_(key, values, kept, evicted, pivot, *weights, **given, **counted)
                    compact_(key, values, kept, **given)
                    merge_(key, values, kept, evicted, pivot, *weights)
                    compact_(key, values, kept)


if __name__ == "__main__":
    emulator = Emulator(Path(sys.argv[1]))
    with patch.object(_native, "load", lambda: emulator.module), use_backend("cuda"):
        for shared_memory in (227 * 1024, 24 * 1024):
            emulator.configure(1, shared_memory)
            run_all()
    print("all ran")
