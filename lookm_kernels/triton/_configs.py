"""Block sizes: what a configuration is, and which one a chip and a head size get."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def block_and_row(blocks):
    """This program's block and its (row, head) as int64: one grid axis, as the others end at 65,535 programs."""
    return tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)


class Config(NamedTuple):
    """Rows and columns of a tile, warps of a program, stages of the software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


Table = dict[str, dict[int, Config]]
# float32 is multiplied without the matrix units, out of registers: small tiles, of every kernel and on every chip
FLOAT32 = {
    128: Config(64, 32, 4, 2),
    256: Config(32, 32, 4, 2),
    512: Config(32, 32, 4, 2),
    1024: Config(16, 32, 4, 1),
    2048: Config(16, 16, 4, 1),
}
Run = Callable[[Config], None]
_fastest: dict[tuple[object, ...], Config] = {}


def padded_width(width: int, dtype: torch.dtype) -> int:
    """Head dimension rounded up to a power of two that the matrix units take: 32 bytes at least."""
    return max(32 if dtype.itemsize == 1 else 16, 1 << (width - 1).bit_length())


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Bytes of a padded row, at least 128: what the tables of tiles are keyed by."""
    return max(128, padded_width(width, dtype) * dtype.itemsize)


def launch(
    kernel: str,
    table: Table,
    candidates: Sequence[Config],
    tensor: Tensor,
    sizes: tuple[int, ...],
    run: Run,
    float32: dict[int, Config] = FLOAT32,
) -> None:
    """Run a kernel, `run(config)`, with the tile for `tensor` [..., D]: for its head size, dtype and chip.

    With LOOKM_AUTOTUNE=1 with the fastest of that tile and the candidates, timed once for every dtype and `sizes`: what
    the time of a row depends on, not how many rows there are, which would let the batch decide a row's bits. Timing
    waits for the device, and must not happen in the capture of a graph. Only for kernels that write nothing they read,
    as they run many times then. Tiles add in different orders: a process that measures another winner gives other
    last bits.
    """
    tiles = float32 if tensor.dtype == torch.float32 else table[chip(tensor.device)]
    fixed = tiles[row_bytes(tensor.shape[-1], tensor.dtype)]
    if os.environ.get("LOOKM_AUTOTUNE") != "1":
        return run(fixed)
    key = (kernel, tensor.device, tensor.dtype, tensor.shape[-1], *sizes)
    if key not in _fastest:
        times = {config: _time(run, config) for config in dict.fromkeys((fixed, *candidates))}
        _fastest[key] = min(times, key=lambda config: times[config])
    return run(_fastest[key])


def _time(run: Run, config: Config) -> float:
    """Milliseconds, infinity for a tile that the chip has no room for."""
    try:
        return float(triton.testing.do_bench(lambda: run(config), return_mode="median"))
    except triton.runtime.errors.OutOfResources:
        return math.inf


@functools.cache
def chip(device: torch.device) -> str:
    """The line of a table: the newest chip that is not newer than the device's. Off a GPU (interpreted): sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    # 8.6, 8.9 and 12 have the shared memory of a small chip
    if major == 12 or (major == 8 and minor in (6, 9)):
        return "sm_86"
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")
