"""What the inner loops cost a Hopper multiprocessor, without having one: python benchmarks/disassembly.py

Compiles the kernels that multiply, at the shapes of the targets, and counts the instructions of their main loop, the
shortest one with a matrix instruction, in the machine code. From these and from what a multiprocessor starts in a cycle
(four instructions, 16 exponentials, 4096 bf16 or 8192 8-bit operations of a product) follow the cycles of a tile, and
from the number of tiles the times that results/disassembly.json holds: predictions, no measurements.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import work

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from compiled import TARGETS, Launch, cuobjdump, empty, recorded, resources

from lookm_kernels._checks import FP8
from lookm_kernels.triton import nearest, scores

OUT = Path(__file__).parent / "results" / "disassembly.json"
CHIP = "sm_90"
MULTIPROCESSORS, HERTZ = 132, 1.98e9
ISSUED, EXPONENTIALS, PRODUCTS = 4, 16, {2: 4096, 1: 8192}
REGISTERS, WARPS = 65536, 64
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_E", "BLOCK_K")
HEADS, KV_HEADS, TOKENS, KEPT, WIDTH = 32, 8, 32768, 6553, 128


def main_loop(assembly: str) -> Counter[str]:
    """Instructions of the shortest loop with a matrix instruction, by name."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*?);"
    code = [(int(found[1], 16), found[2], found[3]) for found in re.finditer(pattern, assembly)]
    loops = []
    for address, name, operands in code:
        back = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if back and int(back[1], 16) < address:
            body = Counter(each.split(".")[0] for place, each, _ in code if int(back[1], 16) <= place <= address)
            if body["HGMMA"] + body["QGMMA"]:
                loops.append(body)
    return min(loops, key=lambda body: body.total())


def predicted(what: str, launch: Launch, pairs: float) -> dict[str, Any]:
    """Resources of a kernel and the time of its `pairs` (query or evicted token, key), from its main loop."""
    kernel = launch.compiled(TARGETS[CHIP][0])
    registers, spilled = resources(kernel)
    loop = main_loop(cuobjdump(kernel, "-sass"))
    warps, shared = launch.options["num_warps"], kernel.metadata.shared
    rows, columns = (
        launch.arguments[name] for name in launch.arguments if name in ("BLOCK_M", "BLOCK_E", "BLOCK_N", "BLOCK_K")
    )
    tile, itemsize = rows * columns, launch.arguments["key_ptr"].dtype.itemsize
    cycles = {
        "issue": loop.total() * warps / ISSUED,
        "matrix": 2 * WIDTH * tile / PRODUCTS[itemsize],
        "exponentials": 32 * warps * loop["MUFU"] / EXPONENTIALS,
    }
    second = pairs / tile / MULTIPROCESSORS / HERTZ
    overlapped, others = max(cycles.values()), max(cycles["issue"], cycles["exponentials"])
    return {
        "what": what,
        "kernel": launch.kernel.__name__,
        "tile": [rows, columns],
        "warps": warps,
        "stages": launch.options["num_stages"],
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": shared,
        "programs": min(REGISTERS // (registers * 32 * warps), TARGETS[CHIP][1] // (shared + 1024), WARPS // warps),
        "instructions": dict(loop.most_common()),
        "cycles": cycles,
        "seconds_overlapped": overlapped * second,
        "seconds_in_turn": (cycles["matrix"] + others) * second,
    }


def launches(dtype: torch.dtype) -> list[Launch]:
    """The log-sum-exp pass, the scores and the nearest kept key of one layer."""
    query, key = (empty(1, heads, TOKENS, WIDTH, dtype=dtype) for heads in (HEADS, KV_HEADS))
    scale = None if dtype != FP8 else empty(1, HEADS)
    lists = (empty(1, KV_HEADS, size, dtype=torch.int32) for size in (KEPT, TOKENS - KEPT))
    calls: list[Callable[[], object]] = [
        lambda: scores.attention_scores(query, key, WIDTH**-0.5, True, *[None] * 6, scale),
        lambda: nearest.nearest_kept(key, *lists),
    ]
    found = [launch for call in calls[: 1 if dtype == FP8 else 2] for launch in recorded(call, CHIP)]
    return [launch for launch in found if launch.kernel.__name__ in ("lse_kernel", "_scores_kernel", "_nearest_kernel")]


def predictions() -> dict[str, Any]:
    """Of every kernel, with the compiler they come from."""
    pairs = work.causal_pairs(1, HEADS, TOKENS)
    amounts = {"lse_kernel": pairs, "_scores_kernel": pairs, "_nearest_kernel": KV_HEADS * KEPT * (TOKENS - KEPT)}
    names = {"lse_kernel": "log-sum-exp", "_scores_kernel": "scores, LSE given", "_nearest_kernel": "nearest"}
    rows = []
    for dtype, suffix in ((torch.bfloat16, ""), (FP8, ", float8")):
        for launch in launches(dtype):
            name = launch.kernel.__name__
            rows.append(predicted(names[name] + suffix, launch, amounts[name]))
    return {"chip": CHIP, "triton": triton.__version__, "kernels": rows}


if __name__ == "__main__":
    OUT.write_text(json.dumps(predictions(), indent=1) + "\n")
