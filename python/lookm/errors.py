"""What an error says, in one line; needs neither torch nor transformers."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec


def reason(error: BaseException) -> str:
    """The first line of an error that says something, and what to install where that is missing."""
    lines = (line.strip() for line in str(error).splitlines())
    said = next(filter(None, lines), type(error).__name__)
    if isinstance(error, ImportError) and "pip install" not in said:
        library = re.search(r"requires the (\w+) library", said)
        missing = library[1].lower() if library else error.name
        if missing:
            return f"{said.split('. ')[0].rstrip('.')}: pip install {missing}"
    return said


def check_torchvision() -> None:
    """ImportError where torchvision is installed but does not import: transformers then says anything but that."""
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except Exception as error:
        torch = version("torch")
        raise ImportError(
            f"torchvision is broken ({reason(error)}): install the release that belongs to torch {torch}, or none"
        ) from error
