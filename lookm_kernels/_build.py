"""What setup.py left in the package about the build of the CUDA extension."""

from __future__ import annotations

import json
from pathlib import Path


def built_for() -> str:
    """Architectures and CUDA of the extension, such as "sm_80, sm_90 with CUDA 13.0".

    LookupError with the reason when it was not built.
    """
    try:
        record = json.loads((Path(__file__).parent / "_build.json").read_text())
    except FileNotFoundError:
        raise LookupError("this is a checkout that was not installed (pip install -e .)") from None
    if not record["archs"]:
        raise LookupError(record["reason"])
    return f"{', '.join(f'sm_{arch}' for arch in record['archs'])} with CUDA {record['cuda']}"
