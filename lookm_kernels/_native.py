"""The CUDA extension, lookm_kernels._C: loaded when it is first asked for, with the reason when that fails."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lookm_kernels._build import built_for

# the tags of csrc/lookm.h
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@functools.cache
def load() -> ModuleType | str:
    """The extension, or why there is none. Needs neither a driver nor a GPU."""
    if importlib.util.find_spec("lookm_kernels._C") is None:
        try:
            return f"the CUDA extension for {built_for()} is not there for this Python"
        except LookupError as reason:
            return f"the CUDA extension was not built: {reason}"
    try:
        return importlib.import_module("lookm_kernels._C")
    except ImportError as error:
        return f"the CUDA extension does not load: {error}"


def why_missing() -> str | None:
    """None when the extension loads, else the reason why it does not."""
    extension = load()
    return extension if isinstance(extension, str) else None


@functools.cache
def why_not_on(device: int) -> str | None:
    """None when the kernels run on a GPU, else CUDA's reason, such as a driver that is too old or no code for it."""
    try:
        with torch.cuda.device(device):
            _extension().can_run()
    except RuntimeError as error:
        return str(error)
    return None


def device_type() -> str:
    """The type of device its kernels run on: "cuda", or "cpu" where the tests run them without one."""
    return str(_extension().device_type)


def call(launcher: str, *arguments: Any) -> Any:
    """Run a launcher of csrc/bindings.cpp on the current device; a stream is the last of its arguments.

    RuntimeError with the kernel, the shapes and CUDA's message when the launch fails.
    """
    return getattr(_extension(), launcher)(*arguments)


def stream(device: torch.device) -> int:
    """The current stream of a device, as an address."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def rows(tensor: Tensor) -> tuple[int, tuple[int, int, int], int, int]:
    """A tensor [B, H, N, D] with a unit last stride as the launchers take it: address, strides, D, tag of the dtype."""
    strides = tensor.stride(0), tensor.stride(1), tensor.stride(2)
    return tensor.data_ptr(), strides, tensor.shape[3], DTYPES[tensor.dtype]


def _extension() -> ModuleType:
    extension = load()
    if isinstance(extension, str):
        raise RuntimeError(f"backend cuda is missing: {extension}")
    return extension
