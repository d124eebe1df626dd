"""Which backend runs an op, and how an op is registered with torch."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "torch sees no GPU"
    return None


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every op inside the `with` block on one backend, on tensors of any device.

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


def implementation(op: str, module: str, *tensors: Tensor) -> Callable[..., Any]:
    """The function `op` of file `module` of the backend for `tensors`.

    The reference unless use_backend chose another: the Triton kernels are not yet proved on a GPU. ValueError for
    tensors the chosen backend does not take.
    """
    backend = _forced or "reference"
    reason = None if backend == "reference" else why_only_reference(*tensors)
    if reason is not None:
        raise ValueError(f"backend {backend}: {reason}")
    function: Callable[..., Any] = getattr(importlib.import_module(f"lookm_kernels.{backend}.{module}"), op)
    return function


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `lookm::<schema>` with its implementation for all devices and its shape function for tracing."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lookm::{name}", fake, lib=_library)
