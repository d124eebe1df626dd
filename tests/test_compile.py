"""Every configuration that ships, compiled for five chips without a GPU: shared memory, registers and spills."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from inputs import INTERPRETED
from packaging.version import Version
from torch import Tensor

if INTERPRETED:
    pytest.skip("a process either interprets or compiles", allow_module_level=True)
triton = pytest.importorskip("triton", reason="the package triton is not installed")

import disassembly  # noqa: E402
from compiled import TARGETS, Launch, empty, recorded, resources  # noqa: E402

from lookm_kernels._checks import FP8  # noqa: E402
from lookm_kernels._dispatch import WIDEST_HEAD  # noqa: E402
from lookm_kernels._formats import CODES, new_codes  # noqa: E402
from lookm_kernels.triton import (  # noqa: E402
    _configs,
    _lse,
    compact,
    kept_attention,
    merge,
    nearest,
    quantize,
    quantized_attention,
    scores,
    select,
)
from lookm_kernels.triton._configs import row_bytes  # noqa: E402

# bytes a thread may spill with float32 or with a mask, else none; older releases of Triton spill more
MOST_SPILLED = 2048
BOUND_HOLDS = Version(triton.__version__) >= Version("3.9")
WIDTHS = {
    torch.float16: [128],
    torch.bfloat16: [64, 128, 256, 512],
    torch.float32: [32, 64, 128, 256, 512],
    FP8: [16, 128, 256, 512],
}
# float8_e4m3fn came with 8.9; gfx942 has another format
FLOAT8_CHIPS = ("sm_86", "sm_90", "sm_100")
BATCH, HEADS, TOKENS, KEPT = 2, 8, 32768, 6560


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
        out = empty(BATCH, HEADS, KEPT, width, dtype=dtype)
        if dtype != torch.float16:
            group = empty(BATCH, TOKENS, dtype=torch.int32)
            nearest.nearest_kept(key, kept, evicted, None, group)
            nearest.nearest_kept(key, kept, evicted, key, group, None, out, out)
        for outs in ((), (out, out)):
            merge.merge_(key, key, kept, evicted, evicted, evicted.float(), kept.float(), None, None, *outs)
            compact.compact_(key, key, kept, *outs)
        if dtype != torch.float16:
            scores.attention_scores(query, key, *every_flag)
            votes, some = empty(BATCH, HEADS, KEPT), query[:, :, :300]
            kept_attention.kept_attention(some, key, key, votes, start, start, mask[:, :, :300], True, 0.1, 50.0)
            kept_attention.kept_attention(some[:, :, :1], key, key, votes, start, start, None, True, 0.1, None)
        if dtype != torch.float32:
            scores.attention_scores(query, key, 0.1, True, *[None] * 7)
        if dtype != torch.float32 or width >= 128:
            launch_quantized(dtype, width, start)
    # as torch.autocast gives them
    key, value = empty(BATCH, HEADS, TOKENS, 80), empty(BATCH, HEADS, TOKENS, 80, dtype=torch.bfloat16)
    merge.merge_(key, value, kept, evicted, evicted, evicted.float(), kept.float())
    for votes in (None, empty(BATCH, HEADS, TOKENS)):
        counted = votes, empty(BATCH, HEADS, KEPT)
        merge.merge_(key, value, kept, evicted, evicted, evicted.float(), kept.float(), *counted)
    for keep in ([KEPT], [KEPT] * BATCH):
        select.select_tokens(empty(BATCH, HEADS, TOKENS), empty(BATCH, TOKENS, dtype=torch.int32), keep)
    # sizes of 1 become constants
    one, place = empty(1, 1, 1, 1), empty(1, 1, 1, dtype=torch.int32)
    scores.attention_scores(one, one, 0.1, True, *[None] * 7)
    select.select_tokens(one[0], place[0], [1])
    nearest.nearest_kept(one, place, place)
    kept_attention.kept_attention(one, one, one, None, None, None, None, True, 0.1, None)
    merge.merge_(one, one, place, place, place, one[0], one[0])
    compact.compact_(one, one, place)


def launch_quantized(dtype: torch.dtype, width: int, start: Tensor) -> None:
    """int8 and int4 for many queries; at 128 channels also fp8, which is int8 but for its codes, and one query."""
    x, votes = empty(BATCH, HEADS, KEPT, width, dtype=dtype), empty(BATCH, HEADS, KEPT)
    for format in CODES if width == 128 else ("int8", "int4"):
        codes = new_codes(x, format, True, False), new_codes(x, format, False, False)
        for of_keys, outs in zip((True, False), codes, strict=True):
            quantize.quantize_pairs(x, *outs, format, of_keys, start)
        pairs = [None if tensor.numel() == 0 else tensor for outs in codes for tensor in outs]
        for queries, softcap in ((300, 50.0), (1, None))[: 2 if width == 128 else 1]:
            query = empty(BATCH, 4 * HEADS, queries, width, dtype=dtype)
            quantized_attention.quantized_attention(query, *pairs, votes, start, start, 0.1, softcap)


def launches() -> dict[str, tuple[Launch, str]]:
    """What `launch_all` launches on every chip, each once, with the chip."""
    found: dict[str, tuple[Launch, str]] = {}
    for chip in TARGETS:
        for launch in recorded(lambda chip=chip: launch_all(chip in FLOAT8_CHIPS), chip):
            found.setdefault(f"{launch}-{chip}", (launch, chip))
    return found


LAUNCHES = launches()


@pytest.mark.parametrize(("launch", "chip"), LAUNCHES.values(), ids=list(LAUNCHES))
def test_fits(launch: Launch, chip: str) -> None:
    target, shared = TARGETS[chip]
    kernel = launch.compiled(target)
    # what is fused by default changes with Triton's releases, and would change the bits
    assert launch.options["enable_fp_fusion"] is False
    assert kernel.metadata.shared <= shared
    demanding = any(launch.arguments.get(flag) for flag in ("HAS_MASK", "HAS_VALUE")) or "-fp32-" in str(launch)
    # a head of 512 in 4 bits
    demanding |= bool(launch.arguments.get("PACKED")) and launch.arguments["D"] == 256
    assert not BOUND_HOLDS or resources(kernel)[1] <= (MOST_SPILLED if demanding else 0)


def multiplies_on_hopper(launch: Launch) -> bool:
    """Whether a kernel multiplies matrices of 16 or 8 bits whose rows are at most 512 bytes."""
    tensor = launch.arguments.get("key_ptr")
    multiplies = launch.kernel.__name__ in ("lse_kernel", "_scores_kernel", "_nearest_kernel")
    return multiplies and tensor.dtype != torch.float32 and row_bytes(tensor.shape[-1], tensor.dtype) <= 512


HOPPER = [launch for launch, chip in LAUNCHES.values() if chip == "sm_90"]


@pytest.mark.parametrize("launch", [*filter(multiplies_on_hopper, HOPPER)], ids=str)
def test_hopper_multiplies_with_its_own_instruction(launch: Launch) -> None:
    """Which takes tiles of 64 rows or more; what is smaller runs at a fraction of the speed."""
    assert "wgmma.mma_async" in launch.compiled(TARGETS["sm_90"][0]).asm["ptx"]


def test_the_committed_predictions_are_of_these_kernels() -> None:
    """benchmarks/disassembly.py, run again with the compiler it was run with."""
    committed = json.loads(disassembly.OUT.read_text())
    if triton.__version__ != committed["triton"]:
        pytest.skip(f"they are of Triton {committed['triton']}")
    assert disassembly.predictions() == committed


def test_the_main_loop_is_the_shortest_that_multiplies() -> None:
    assembly = """
        /*0000*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24 ;
        /*0010*/              @!P0 FADD R1, R2, R3 ;
        /*0020*/                   MUFU.EX2 R4, R4 ;
        /*0030*/              @P1  BRA 0x10 ;
        /*0040*/                   FMUL R1, R2, R3 ;
        /*0050*/              @P2  BRA 0x0 ;
        /*0060*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24 ;
        /*0070*/              @P2  BRA 0x0 ;
        /*0080*/                   BRA 0x90 ;
    """
    assert disassembly.main_loop(assembly) == {"HGMMA": 1, "FADD": 1, "MUFU": 1, "BRA": 2, "FMUL": 1}


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize(
    "tables",
    [
        *(_lse.CONFIGS, scores.CONFIGS, nearest.CONFIGS, nearest.GROUP_CONFIGS, kept_attention.CONFIGS),
        quantized_attention.CONFIGS,
    ],
)
def test_every_head_has_a_configuration(tables: dict[str, dict[int, Any]], dtype: torch.dtype) -> None:
    assert set(tables) == set(TARGETS)
    needed = {row_bytes(width, dtype) for width in range(1, WIDEST_HEAD + 1)}
    for table in [_configs.FLOAT32] if dtype == torch.float32 else tables.values():
        assert needed <= set(table)
    assert needed == {row_bytes(width, dtype) for width in WIDTHS[dtype]} or dtype == torch.float16
