"""`python -m lookm_kernels`: versions, the device, and every backend with the reason when it is missing."""

from __future__ import annotations

import subprocess
import sys

import torch

import lookm_kernels
from lookm_kernels._dispatch import BACKENDS, why_missing


def test_versions_device_and_backends() -> None:
    command = [sys.executable, "-m", "lookm_kernels"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = {line[:18].strip(): line[18:].strip() for line in lines}
    assert rows["lookm-kernels"] == lookm_kernels.__version__
    assert rows["torch"] == torch.__version__
    assert rows["transformers"]
    assert rows["device"]
    assert rows["backend reference"] == "available"
    for backend in BACKENDS:
        reason = why_missing(backend)
        assert rows[f"backend {backend}"] == ("available" if reason is None else f"missing: {reason}")
