"""Every configuration that ships, compiled for four chips without a GPU: shared memory, registers and spills."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from inputs import INTERPRETED
from packaging.version import Version
from torch import Tensor

if INTERPRETED:
    pytest.skip("a process either interprets or compiles", allow_module_level=True)
triton = pytest.importorskip("triton", reason="the package triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402

from lookm_kernels._checks import FP8  # noqa: E402
from lookm_kernels._dispatch import WIDEST_HEAD  # noqa: E402
from lookm_kernels.triton import _configs, _lse, compact, merge, nearest, scores, select  # noqa: E402
from lookm_kernels.triton._configs import row_bytes  # noqa: E402

# the most shared memory that a block can have
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_86": (GPUTarget("cuda", 89, 32), 99 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
# bytes a thread may spill with float32 or with a mask, else none; older releases of Triton spill more
MOST_SPILLED = 384
BOUND_HOLDS = Version(triton.__version__) >= Version("3.9")
WIDTHS = {
    torch.float16: [128],
    torch.bfloat16: [64, 128, 256, 512],
    torch.float32: [32, 64, 128, 256, 512],
    FP8: [128, 256, 512],
}
# float8_e4m3fn came with 8.9; gfx942 has another format
FLOAT8_CHIPS = ("sm_86", "sm_90", "sm_100")
BATCH, HEADS, TOKENS, KEPT = 2, 8, 32768, 6560


class Launch(NamedTuple):
    """A kernel with the arguments of one launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def __str__(self) -> str:
        width, dtype = self.arguments.get("D", self.arguments.get("DK", "")), ""
        for name in ("x_ptr", "key_ptr"):
            dtype = TYPES[self.arguments[name].dtype][1:] if name in self.arguments else dtype
        flags = [name for name, value in self.arguments.items() if value is True]
        return "-".join(str(part) for part in (self.kernel.__name__, dtype, width, *flags) if part != "")

    def compiled(self, target: GPUTarget) -> CompiledKernel:
        """As Triton would specialise it: 1 and None are constants, multiples of 16 are known to be."""
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
            if self.kernel.params[place].is_constexpr or value is None or (type(value) is int and value == 1):
                signature[name], constants[place,] = "constexpr", value
            elif isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
                attributes[place,] = [["tt.divisibility", 16]]
        return triton.compile(ASTSource(self.kernel, signature, constants, attributes), target, self.options)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_all(float8: bool) -> None:
    """Every kernel of every launcher, on tensors without memory; each configuration with every flag that adds code."""
    start, weight = empty(BATCH, dtype=torch.int32), empty(BATCH, TOKENS)
    mask, lse = empty(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool), empty(BATCH, 4 * HEADS, TOKENS)
    position, head_scale = empty(BATCH, TOKENS, dtype=torch.int32), empty(BATCH, 4 * HEADS)
    every_flag = (0.1, True, None, weight, start, mask, 50.0, position, head_scale)
    kept, evicted = (empty(BATCH, HEADS, size, dtype=torch.int32) for size in (KEPT, TOKENS - KEPT))
    for dtype, width in ((dtype, width) for dtype, widths in WIDTHS.items() for width in widths):
        query, key = (empty(BATCH, heads, TOKENS, width, dtype=dtype) for heads in (4 * HEADS, HEADS))
        if dtype == FP8:
            if float8:
                scores.attention_scores(query, key, *every_flag)
                scores.attention_scores(query, key, 0.1, False, lse, *[None] * 5, head_scale)
            continue
        nearest.nearest_kept(key, kept, evicted)
        merge.merge_(key, key, kept, evicted, evicted, evicted.float(), kept.float())
        compact.compact_(key, key, kept)
        if dtype != torch.float16:
            scores.attention_scores(query, key, *every_flag)
        if dtype != torch.float32:
            scores.attention_scores(query, key, 0.1, True, *[None] * 7)
    for keep in ([KEPT], [KEPT] * BATCH):
        select.select_tokens(empty(BATCH, HEADS, TOKENS), empty(BATCH, TOKENS, dtype=torch.int32), keep)
    # sizes of 1 become constants
    one, place = empty(1, 1, 1, 1), empty(1, 1, 1, dtype=torch.int32)
    scores.attention_scores(one, one, 0.1, True, *[None] * 7)
    select.select_tokens(one[0], place[0], [1])
    nearest.nearest_kept(one, place, place)
    merge.merge_(one, one, place, place, place, one[0], one[0])
    compact.compact_(one, one, place)


def launches() -> list[Any]:
    """What `launch_all` launches on every chip, each once."""
    found: dict[str, Any] = {}
    for chip in TARGETS:

        def record(kernel: Any, grid: tuple[int, ...], chip: str = chip) -> Any:
            def note(*arguments: Any, **options: Any) -> None:
                rest = {name: options.pop(name) for name in kernel.arg_names if name in options}
                launch = Launch(kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | rest, options)
                name = f"{launch}-{chip}"
                found.setdefault(name, pytest.param(launch, chip, id=name))

            return note

        with patch.object(triton.JITFunction, "__getitem__", record), patch.object(_configs, "chip", lambda _: chip):  # noqa: B023
            launch_all(chip in FLOAT8_CHIPS)
    return list(found.values())


def spilled(kernel: CompiledKernel, folder: Path) -> int:
    """Bytes a thread keeps in memory for want of registers."""
    if "amdgcn" in kernel.asm:
        return 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])[1])
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(folder / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.mark.parametrize(("launch", "chip"), launches())
def test_fits(launch: Launch, chip: str, tmp_path: Path) -> None:
    target, shared = TARGETS[chip]
    kernel = launch.compiled(target)
    assert kernel.metadata.shared <= shared
    demanding = launch.arguments.get("HAS_MASK") or "-fp32-" in str(launch)
    assert not BOUND_HOLDS or spilled(kernel, tmp_path) <= (MOST_SPILLED if demanding else 0)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("tables", [_lse.CONFIGS, scores.CONFIGS, nearest.CONFIGS])
def test_every_head_has_a_configuration(tables: dict[str, dict[int, Any]], dtype: torch.dtype) -> None:
    assert set(tables) == set(TARGETS)
    needed = {row_bytes(width, dtype) for width in range(1, WIDEST_HEAD + 1)}
    for table in [_configs.FLOAT32] if dtype == torch.float32 else tables.values():
        assert needed <= set(table)
    assert needed == {row_bytes(width, dtype) for width in WIDTHS[dtype]} or dtype == torch.float16
