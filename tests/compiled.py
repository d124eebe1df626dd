"""Triton's kernels as a GPU would get them, compiled without one: what is launched, machine code and its resources."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from lookm_kernels.triton import _configs

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
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Launch(NamedTuple):
    """A kernel with the arguments of one launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def __str__(self) -> str:
        width = next((self.arguments[name] for name in ("D", "DK", "HALF") if name in self.arguments), "")
        tensors = [self.arguments[name] for name in ("x_ptr", "query_ptr", "key_ptr") if name in self.arguments]
        dtypes = dict.fromkeys(TYPES[tensor.dtype][1:] for tensor in tensors)
        flags = [name for name, value in self.arguments.items() if value is True]
        return "-".join(str(part) for part in (self.kernel.__name__, *dtypes, width, *flags) if part != "")

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
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def recorded(call: Callable[[], object], chip: str) -> list[Launch]:
    """What `call` launches, on tensors without memory, with the tiles of a chip; nothing runs."""
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...]) -> Any:
        def note(*arguments: Any, **options: Any) -> None:
            rest = {name: options.pop(name) for name in kernel.arg_names if name in options}
            found.append(Launch(kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | rest, options))

        return note

    with patch.object(triton.JITFunction, "__getitem__", record), patch.object(_configs, "chip", lambda _: chip):
        call()
    return found


def cuobjdump(kernel: CompiledKernel, option: str) -> str:
    """What the wheel's cuobjdump prints of a kernel for an NVIDIA chip."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(kernel: CompiledKernel) -> tuple[int, int]:
    """(registers of a thread, bytes a thread keeps in memory for want of registers)."""
    if "amdgcn" in kernel.asm:
        counts = [re.search(rf"\.vgpr_{name}:\s*(\d+)", kernel.asm["amdgcn"]) for name in ("count", "spill_count")]
        registers, spilled = (int(count[1]) for count in counts)
        return registers, 4 * spilled
    usage = cuobjdump(kernel, "--dump-resource-usage")
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])
