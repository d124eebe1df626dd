"""Which backend runs an op, and how an op is registered with torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lookm_kernels._checks import FP8

BACKENDS = ("cuda", "triton", "reference")
# what the tables of configurations in triton/ cover
WIDEST_HEAD = 512
_library = torch.library.Library("lookm", "DEF")
_forced: str | None = None


def why_missing(backend: str) -> str | None:
    """None when the backend can run here, else the reason why it cannot."""
    if importlib.util.find_spec(f"lookm_kernels.{backend}") is None:
        return "not part of this version of lookm-kernels"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            return "the GPU is older than compute capability 8.0"
    return None


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every op inside the `with` block on one backend, on tensors of any device.

    Without it the Triton kernels run on a GPU, for all they take (not float64, heads of up to 512), and the reference
    for everything else.

    ValueError for an unknown backend, RuntimeError with the reason for one that is missing here; an op raises
    ValueError for tensors that the backend does not take.
    """
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_missing(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend} is missing: {reason}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def why_only_reference(*tensors: Tensor) -> str | None:
    """None when every backend takes these arguments of an op, else the reason why only the reference does."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "float64, which the other backends are tested against, is the reference's alone"
    width = tensors[0].shape[-1] if tensors[0].ndim == 4 else 0
    return f"a head dimension of {width} is above {WIDEST_HEAD}" if width > WIDEST_HEAD else None


def _multiplies_float8(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def default_backend(device: str) -> str:
    """The backend of a type of device: Triton on a GPU, else the reference. Warns once of a GPU that has no Triton."""
    if device != "cuda":
        return "reference"
    reason = why_missing("triton")
    if reason is not None:
        warnings.warn(f"lookm_kernels: the slow reference runs, backend triton is missing: {reason}", stacklevel=2)
    return "triton" if reason is None else "reference"


def implementation(op: str, module: str, *tensors: Tensor) -> Callable[..., Any]:
    """The function `op` of file `module` of the backend for `tensors`.

    The one that use_backend chose, ValueError for tensors it does not take; else the device's default, or the reference
    for what that does not take. RuntimeError for float8 on a GPU that does not multiply it: it would only be slower.
    """
    first = tensors[0]
    backend = _forced or default_backend(first.device.type)
    reason = None if backend == "reference" else why_only_reference(*tensors)
    if reason is not None and _forced:
        raise ValueError(f"backend {backend}: {reason}")
    backend = backend if reason is None else "reference"
    if backend != "reference" and first.dtype == FP8 and not _multiplies_float8(first.device):
        raise RuntimeError("float8_e4m3fn needs a GPU of compute capability 8.9 or newer (or backend reference)")
    function: Callable[..., Any] = getattr(importlib.import_module(f"lookm_kernels.{backend}.{module}"), op)
    # kernels are launched on the current device, which need not be that of the tensors
    return functools.partial(_on_device, first.device, function) if first.device.type == "cuda" else function


def _on_device(device: torch.device, function: Callable[..., Any], *arguments: Any) -> Any:
    with torch.cuda.device(device):
        return function(*arguments)


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `lookm::<schema>` with its implementation for all devices and its shape function for tracing."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lookm::{name}", fake, lib=_library)
