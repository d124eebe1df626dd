"""Which backend runs an op, and how an op is registered with torch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

BACKENDS = ("cuda", "triton", "reference")
_library = torch.library.Library("lookm", "DEF")


def why_missing(backend: str) -> str | None:
    """None when the backend can run here, else the reason why it cannot."""
    if importlib.util.find_spec(f"lookm_kernels.{backend}") is None:
        return "not part of this version of lookm-kernels"
    return None


def implementation(op: str, module: str) -> Callable[..., Any]:
    """The function `op` of the backend's file `module`; the reference backend runs on every device torch knows."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"lookm_kernels.reference.{module}"), op)
    return function


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `lookm::<schema>` with its implementation for all devices and its shape function for tracing."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lookm::{name}", fake, lib=_library)
