"""`python -m lookm_kernels`: versions, device, the extension's build, and each backend or why it is missing."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import lookm_kernels
from lookm_kernels._build import built_for
from lookm_kernels._dispatch import BACKENDS, why_missing


def main() -> None:
    """Print what a bug report needs."""
    rows = {"lookm-kernels": lookm_kernels.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            rows[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            rows[package] = "not installed"
    rows["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    try:
        rows["CUDA extension"] = f"built for {built_for()}"
    except LookupError as error:
        rows["CUDA extension"] = f"not built: {error}"
    for backend in BACKENDS:
        reason = why_missing(backend)
        rows[f"backend {backend}"] = "available" if reason is None else f"missing: {reason}"
    for name, text in rows.items():
        print(f"{name:<18} {text}")


if __name__ == "__main__":
    main()
