"""The trained demo model and its processor, shipped with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, LlavaForConditionalGeneration

MODEL = Path(__file__).parent / "model"


def load(folder: Path = MODEL) -> tuple[Any, Any]:
    """(model in evaluation mode, processor), through from_pretrained."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)
