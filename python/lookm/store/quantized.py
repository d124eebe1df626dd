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
    """Growing while the prompt is read; then `pairs`, and `tail`: keys and values [B, H, *, D] of those behind them."""

    def __init__(self, format: str) -> None:
        self.format = format
        self.pairs: QuantizedPairs | None = None
        self.tail: Any = None
        self._keys: Any = None
        self._values: Any = None

    @property
    def stored(self) -> int:
        """Places in use."""
        if self.pairs is not None:
            return int(self.pairs.key.shape[2] + self.tail[0].shape[2])
        return 0 if self._keys is None else int(self._keys.shape[2])

    @property
    def keys(self) -> Any:
        """[B, H, stored, D], what the codes stand for and the whole ones; None before the first pair."""
        return self._keys if self.pairs is None else self._restored(self.pairs, 0)

    @property
    def values(self) -> Any:
        """[B, H, stored, D], what the codes stand for and the whole ones; None before the first pair."""
        return self._values if self.pairs is None else self._restored(self.pairs, 1)

    def _restored(self, pairs: QuantizedPairs, which: int) -> Tensor:
        whole = self.tail[which]
        return torch.cat([dequantize_pairs(pairs, whole.dtype)[which], whole], 2)

    @property
    def nbytes(self) -> int:
        """Memory of codes, scales and whole pairs."""
        return super().nbytes if self.pairs is None else self.pairs.nbytes + sum(rows.nbytes for rows in self.tail)

    def append(self, keys: Tensor, values: Tensor, reading: bool) -> None:
        """New pairs [B, H, q, D] behind the others; reading: they belong to a prompt that is compressed later."""
        before = self.tail if self.pairs is not None else (self._keys, self._values)
        if self.stored:
            keys, values = (torch.cat(both, 2) for both in zip(before, (keys, values), strict=True))
        if self.pairs is not None:
            self.tail = keys, values
        else:
            self._keys, self._values = keys, values

    def keep(self, keys: Tensor, values: Tensor) -> None:
        """From now on these are stored; `note` quantises them, once their padding is known."""
        self._keys, self._values = keys, values

    def note(
        self, seen: int, valid: Tensor | None, key_start: Callable[[], Tensor | None], key_bias: Tensor | None
    ) -> None:
        """What a layer knows of its places (see Fixed.note). Padding elsewhere than on the left counts as pairs."""
        if self.pairs is not None:
            return
        size = self._keys.shape[2]
        coded = max(1, size - WHOLE)
        whole = self._keys, self._values
        self._keys = self._values = None
        self.tail = tuple(rows[:, :, coded:].clone() for rows in whole)
        key, value = (rows[:, :, :coded].detach() for rows in whole)
        start = key_start()
        first = None if start is None else start.clamp(max=coded)
        self.pairs = quantize_pairs(key, value, self.format, key_start=first)

    def drop(self, removed: int) -> None:
        """Forget the last pairs, which no compression has seen."""
        self.tail = tuple(rows[:, :, :-removed] for rows in self.tail)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor [B, ...] by change(tensor)."""
        if self._keys is not None:
            self._keys, self._values = change(self._keys), change(self._values)
        if self.pairs is not None:
            changed = {name: change(x) for name, x in self.pairs._asdict().items() if x is not None}
            self.pairs = self.pairs._replace(**changed)
            self.tail = tuple(change(rows) for rows in self.tail)

    def clear(self) -> None:
        """Nothing is stored."""
        self._keys = self._values = self.pairs = self.tail = None
