"""The trained demo models and their processors, shipped with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, LlavaForConditionalGeneration

MODEL = Path(__file__).parent / "model"
# trained on from MODEL, to read small digits in large pictures
DETAIL = Path(__file__).parent / "detail"


def load(folder: Path = MODEL) -> tuple[Any, Any]:
    """(model in evaluation mode, processor), through from_pretrained."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)
