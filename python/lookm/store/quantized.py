"""Pairs in few bits: what a compression keeps is quantised, all but the newest; what follows stays whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lookm.store.growing import Growing
from lookm_kernels import QuantizedPairs, dequantize_pairs, quantize_pairs

# the newest pairs of what a compression keeps, which the next tokens attend to most
WHOLE = 32


class Quantized(Growing):
    """Growing while the prompt is read; then `pairs`, and behind them those that are whole."""

    def __init__(self, format: str) -> None:
        self.format = format
        self.pairs: QuantizedPairs | None = None

    @property
    def stored(self) -> int:
        """Places in use."""
        return super().stored + (0 if self.pairs is None else int(self.pairs.key.shape[2]))

    @property
    def keys(self) -> Any:
        """[B, H, stored, D], what the codes stand for and the whole ones; None before the first pair."""
        return self._restored(0, super().keys)

    @property
    def values(self) -> Any:
        """[B, H, stored, D], what the codes stand for and the whole ones; None before the first pair."""
        return self._restored(1, super().values)

    def _restored(self, which: int, whole: Any) -> Any:
        return whole if self.pairs is None else torch.cat([dequantize_pairs(self.pairs, whole.dtype)[which], whole], 2)

    @property
    def nbytes(self) -> int:
        """Memory of codes, scales and whole pairs."""
        return super().nbytes + (0 if self.pairs is None else self.pairs.nbytes)

    def note(
        self, seen: int, valid: Tensor | None, key_start: Callable[[], Tensor | None], key_bias: Tensor | None
    ) -> None:
        """Quantise what was kept, once its padding is known. Padding elsewhere than on the left counts as pairs."""
        if self.pairs is not None or self.whole is None:
            return
        coded = max(1, self.stored - WHOLE)
        key, value = (rows[:, :, :coded].detach() for rows in self.whole)
        self._change(lambda rows: rows[:, :, coded:].clone())
        start = key_start()
        first = None if start is None else start.clamp(max=coded)
        self.pairs = quantize_pairs(key, value, self.format, key_start=first)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor [B, ...] by change(tensor)."""
        super().map_rows(change)
        if self.pairs is not None:
            changed = {name: change(x) for name, x in self.pairs._asdict().items() if x is not None}
            self.pairs = self.pairs._replace(**changed)

    def clear(self) -> None:
        """Nothing is stored."""
        super().clear()
        self.pairs = None
