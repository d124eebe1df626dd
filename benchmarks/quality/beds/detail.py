"""Beds of small digits in pictures four times as large: an even grid over a picture, or its mean, misses them."""

from __future__ import annotations

from lookm.demo import checkpoint
from lookm.demo.task import DETAIL as SCENE

from .demo import DialogueBed

DETAIL = DialogueBed("detail", checkpoint.DETAIL, SCENE, frames=1)
# Sixteen pictures, two under each name, the digit in one of the two; for budgets of few percent.
DETAIL16 = DialogueBed("detail16", checkpoint.DETAIL, SCENE, frames=2)
