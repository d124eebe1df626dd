"""`python -m lookm_kernels`: versions, the device, the extension's build, and every backend or why it is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lookm_kernels
from lookm_kernels import _build
from lookm_kernels._build import built_for
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
    assert rows["CUDA extension"].startswith(("built for sm_", "not built: "))
    for backend in BACKENDS:
        reason = why_missing(backend)
        assert rows[f"backend {backend}"] == ("available" if reason is None else f"missing: {reason}")


def test_what_the_extension_was_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "__file__", str(tmp_path / "_build.py"))
    with pytest.raises(LookupError, match=r"this is a checkout that was not installed \(pip install -e \.\)"):
        built_for()
    record = tmp_path / "_build.json"
    record.write_text(json.dumps({"archs": [], "reason": "nvcc was not found"}))
    with pytest.raises(LookupError, match="nvcc was not found"):
        built_for()
    record.write_text(json.dumps({"archs": ["80", "120"], "cuda": "13.0"}))
    assert built_for() == "sm_80, sm_120 with CUDA 13.0"
