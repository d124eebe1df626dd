"""Pairs in tensors of just their number: every step copies them into new ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Growing:
    """whole: keys and values [B, H, *, D] in tensors of their own, here all of them; None before the first pair.

    settled: whether the pairs lie in buffers of fixed size: never here.
    """

    settled = False
    whole: tuple[Tensor, Tensor] | None = None

    @property
    def in_graphs(self) -> int:
        """Tokens stored by compiled graphs, which the host has not counted itself: none here."""
        return 0

    @property
    def stored(self) -> int:
        """Places in use."""
        return 0 if self.whole is None else int(self.whole[0].shape[2])

    @property
    def keys(self) -> Any:
        """[B, H, stored, D]; None before the first pair."""
        return None if self.whole is None else self.whole[0]

    @property
    def values(self) -> Any:
        """[B, H, stored, D]; None before the first pair."""
        return None if self.whole is None else self.whole[1]

    @property
    def nbytes(self) -> int:
        """Memory of the pairs, places that are free included."""
        return 0 if self.whole is None else sum(rows.nbytes for rows in self.whole)

    def append(self, keys: Tensor, values: Tensor, reading: bool) -> None:
        """New pairs [B, H, q, D] behind the others; reading: they belong to a prompt that is compressed later."""
        if self.whole is not None:
            keys, values = (torch.cat(both, 2) for both in zip(self.whole, (keys, values), strict=True))
        self.whole = keys, values

    def room(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Memory of its own for `start + size` pairs [B, H, *, D]; the first `start` are those that are stored."""
        made = []
        for rows in (self.keys, self.values):
            made.append(rows.new_empty((*rows.shape[:2], start + size, rows.shape[3])))
            made[-1][:, :, :start] = rows[:, :, :start].detach()
        return made[0], made[1]

    def keep(self, keys: Tensor, values: Tensor) -> None:
        """From now on these are stored: what `room` gave, filled, or all that was stored before."""
        self.whole = keys, values

    def note(
        self, seen: int, valid: Tensor | None, key_start: Callable[[], Tensor | None], key_bias: Tensor | None
    ) -> None:
        """What the layer knows of its places, where the store is attended to as it is (see Fixed.note): not here."""

    def drop(self, removed: int) -> None:
        """Forget the last pairs."""
        self._change(lambda rows: rows[:, :, :-removed])

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor [B, ...] by change(tensor)."""
        self._change(change)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.whole is not None:
            self.whole = change(self.whole[0]), change(self.whole[1])

    def clear(self) -> None:
        """Nothing is stored."""
        self.whole = None
