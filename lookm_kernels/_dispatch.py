"""Which backend runs an op, and how an op is registered with torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lookm_kernels import _native
from lookm_kernels._ambient import without_autocast
from lookm_kernels._checks import FP8

BACKENDS = ("cuda", "triton", "reference")
# what the tables of configurations in triton/ cover
WIDEST_HEAD = 512
# Where a backend was measured to be faster than Triton: (file of the op, compute capability) to (backend, file with the
# figure). Empty, so Triton is preferred everywhere: no CUDA C++ kernel was timed on a GPU yet.
FASTER: dict[tuple[str, tuple[int, int]], tuple[str, str]] = {}
_library = torch.library.Library("lookm", "DEF")
_forced: str | None = None


def why_missing(backend: str) -> str | None:
    """None when the backend can run here, else the reason why it cannot."""
    if backend == "cuda":
        reason = _native.why_missing()
        if reason is not None or _native.device_type() == "cpu":
            return reason
        if torch.version.hip is not None:
            return "the GPU is not NVIDIA's"
        return _why_no_gpu() or _native.why_not_on(torch.cuda.current_device())
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if _interpreted():
            return None
        return _why_no_gpu()
    return None


def _interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every op inside the `with` block on one backend, on tensors of any device.

    Without it every op runs on the backend that was measured to be the fastest on the GPU, which is Triton's for all
    that no other was measured for. What that does not take (float64, heads of more than 512, bfloat16 in Triton's
    interpreter) and everything on a CPU runs on the reference. The environment variable LOOKM_BACKEND, read when an op
    is called first, does the same for a whole process.

    "cuda", the extension in CUDA C++, has selection, merge and compaction only: attention_scores and nearest_kept run
    on the default backend of the device then.

    ValueError for an unknown backend, RuntimeError with the reason for one that is missing here; an op raises
    ValueError for tensors that the backend does not take.
    """
    global _forced
    _check_backend("backend", backend)
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


def why_no_float8(device: torch.device) -> str | None:
    """None when the matrix units of a device multiply float8_e4m3fn (or it is no GPU), else the reason why not."""
    if device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)):
        return None
    return "float8_e4m3fn needs a GPU of compute capability 8.9 or newer"


@functools.cache
def default_backend(device: str) -> str:
    """The backend of a type of device: Triton on a GPU, else the reference. Warns once of a GPU that has no Triton."""
    if device != "cuda":
        return "reference"
    reason = why_missing("triton")
    if reason is not None:
        warnings.warn(f"lookm_kernels: the slow reference runs, backend triton is missing: {reason}", stacklevel=2)
    return "triton" if reason is None else "reference"


def _check_backend(argument: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"`{argument}` must be one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_missing(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend} is missing: {reason}")


@functools.cache
def backend_of_process() -> str | None:
    """What LOOKM_BACKEND says, with the errors of use_backend; None where it is not set or empty."""
    backend = os.environ.get("LOOKM_BACKEND") or None
    if backend is not None:
        _check_backend("LOOKM_BACKEND", backend)
    return backend


@functools.cache
def has_op(backend: str, module: str) -> bool:
    """Whether a backend has the op of a file: the one in CUDA C++ has some only."""
    return importlib.util.find_spec(f"lookm_kernels.{backend}.{module}") is not None


def preferred_backend(module: str, device: torch.device) -> str:
    """The backend that runs the op of a file on a device when none is asked for."""
    default = default_backend(device.type)
    if device.type != "cuda":
        return default
    backend, _ = FASTER.get((module, torch.cuda.get_device_capability(device)), (default, ""))
    if default == "reference" and has_op("cuda", module):
        backend = "cuda"
    return backend if backend == default or why_missing(backend) is None else default


def implementation(op: str, module: str, first: Tensor, *others: Tensor | None) -> Callable[..., Any]:
    """The function `op` of file `module` of the backend for these tensors; None: one that was left out.

    The one that use_backend or LOOKM_BACKEND chose, ValueError for tensors it does not take; else the preferred one, or
    the reference for what that does not take. RuntimeError for float8 on a GPU that does not multiply it: it would only
    be slower.
    """
    device, tensors = first.device, [first, *(tensor for tensor in others if tensor is not None)]
    chosen = _forced or backend_of_process()
    if chosen is not None and not has_op(chosen, module):
        chosen = None
    backend = chosen or preferred_backend(module, device)
    reason = None if backend == "reference" else why_only_reference(*tensors)
    if backend == "cuda" and reason is None and device.type != _native.device_type():
        reason = f"it has no kernels for tensors on {device}"
    if backend == "triton" and any(tensor.dtype == torch.bfloat16 for tensor in tensors) and _interpreted():
        reason = "bfloat16, which its interpreter multiplies and rounds wrongly (TRITON_INTERPRET=1)"
    if reason is not None and chosen:
        raise ValueError(f"backend {backend}: {reason}")
    backend = backend if reason is None else "reference"
    no_float8 = why_no_float8(device) if backend != "reference" and first.dtype == FP8 else None
    if no_float8 is not None:
        raise RuntimeError(f"{no_float8} (or backend reference)")
    function: Callable[..., Any] = getattr(importlib.import_module(f"lookm_kernels.{backend}.{module}"), op)
    # kernels are launched on the current device, which need not be that of the tensors
    return functools.partial(_on_device, device, function) if device.type == "cuda" else function


def _on_device(device: torch.device, function: Callable[..., Any], *arguments: Any) -> Any:
    with torch.cuda.device(device):
        return function(*arguments)


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `lookm::<schema>` with its implementation for all devices and its shape function for tracing."""
    name = schema.partition("(")[0]

    def alone(*arguments: Any) -> Any:
        # None instead of a tensor is for the checks of `run` to refuse
        with without_autocast(arguments[0].device) if arguments[0] is not None else nullcontext():
            return run(*arguments)

    _library.define(schema)
    _library.impl(name, alone, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lookm::{name}", fake, lib=_library)


def register_backward(name: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Give `lookm::<name>` a derivative: `save(ctx, inputs, output)` at the call, `backward(ctx, *gradients)` later."""
    torch.library.register_autograd(f"lookm::{name}", backward, setup_context=save, lib=_library)


def register_in_place(
    name: str, arguments: str, returns: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Define `lookm::<name>`, which modifies key and value, and its overload `out`: out_key and out_value instead.

    Not optional arguments of one schema: it would say that key and value are modified whether they are or not, and a
    compiled graph would write to a model's tensors, or copy them first.
    """
    register(f"{name}(Tensor(a!) key, Tensor(b!) value, {arguments}) -> {returns}", run, fake)
    outs = "Tensor(a!) out_key, Tensor(b!) out_value"
    register(f"{name}.out(Tensor key, Tensor value, {arguments}, {outs}) -> {returns}", run, fake)
