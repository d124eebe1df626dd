"""Pairs in buffers of a fixed size: a step writes its own in place, and a compiled graph never sees a size change.

A prompt grows while it is read; what stays of it goes straight into buffers with `slots` free places behind it. Where
the free places begin is a tensor, as a captured graph cannot read a number of the host; the host in turn reads what
graphs have stored from there, when it is asked next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lookm.store.growing import Growing

FULL = (
    "lookm: {free} of the cache's {slots} slots for new tokens are left, and {queries} more came; nothing was changed. "
    "Give LookMCache(..., max_new_tokens=) room for all that is generated and said later, or when_full='double'"
)


class Steps:
    """How many tokens compiled graphs have stored since the last reset: one count for all layers of a cache.

    tensors: the count by device, int64 [1], which graphs add to; stale: one has, since the host last read it.
    stores: those of all layers. steady: all of them are settled, so that a graph may run.
    """

    def __init__(self, doubles: bool) -> None:
        self.doubles = doubles
        self.tensors: dict[torch.device, Tensor] = {}
        self.stores: list[Fixed] = []
        self.stale = self.steady = False
        self._count = 0

    @property
    def count(self) -> int:
        """Read from a device only where a graph has run since: that waits for it."""
        if self.stale:
            self._count, self.stale = int(next(iter(self.tensors.values()))), False
        return self._count

    def tensor(self, device: torch.device) -> Tensor:
        """The count on a device."""
        if device not in self.tensors:
            self.tensors[device] = static(torch.full((1,), self.count, dtype=torch.int64, device=device))
        return self.tensors[device]

    def make_room(self, queries: int) -> None:
        """Before a forward of so many tokens: ValueError where a layer has no slots for them and may not grow."""
        settled = [store for store in self.stores if store.settled]
        for store in settled:
            if store.free < queries and not self.doubles:
                raise ValueError(FULL.format(free=store.free, slots=store.slots, queries=queries))
        for store in settled:
            while store.free < queries:
                store.double()

    def settle(self) -> None:
        """After a forward: whether a graph may run next, and which store of a device counts its tokens: the last."""
        self.steady = all(store.settled for store in self.stores)
        last = {store.device: store for store in self.stores if store.settled}
        for store in self.stores:
            store.counts = last.get(store.device) is store

    def clear(self) -> None:
        """Nothing was stored yet."""
        for tensor in self.tensors.values():
            tensor.zero_()
        self.stale, self.steady, self._count = False, False, 0


class Fixed(Growing):
    """Growing while a prompt is read; once settled, views of buffers [B, H, places, D] that stay where they are.

    slots: places for what comes after the prompt. limit: places that may be used; free: those that are left.
    key_start [B] int32: empty places before each row's first. key_bias [B, H, places] float32: what is added to the
    logits, minus infinity for empty places among others; None: nothing.
    counts: whether this layer tells the others what a graph has stored, being the last of its device.
    _end [B] int32, _seen [1] int64: places in use and tokens read, without those that graphs stored (_in_graphs).
    """

    def __init__(self, slots: int, steps: Steps) -> None:
        self.slots, self.steps = slots, steps
        steps.stores.append(self)
        self.settled = self.counts = False
        self.device: torch.device | None = None
        self._buffers: Any = None
        self._end = self._seen = self._in_graphs = self.key_start = torch.empty(0)
        self.key_bias: Tensor | None = None
        self._bias_buffer: Tensor | None = None
        self.limit = self._length = 0

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, places, D], free places included."""
        keys, values = self._buffers
        return keys, values

    @property
    def in_graphs(self) -> int:
        """Pairs stored by compiled graphs."""
        return self.steps.count

    @property
    def stored(self) -> int:
        """Places in use."""
        return self._length + self.steps.count if self.settled else super().stored

    @property
    def nbytes(self) -> int:
        """Memory of the buffers, places that are free included."""
        return sum(buffer.nbytes for buffer in self._buffers) if self.settled else super().nbytes

    @property
    def free(self) -> int:
        """Slots for new tokens that are left."""
        return self.limit - self.stored

    @property
    def keys(self) -> Any:
        """[B, H, stored, D]; None before the first pair."""
        return self._buffers[0][:, :, : self.stored] if self.settled else super().keys

    @property
    def values(self) -> Any:
        """[B, H, stored, D]; None before the first pair."""
        return self._buffers[1][:, :, : self.stored] if self.settled else super().values

    def append(self, keys: Tensor, values: Tensor, reading: bool) -> None:
        """New pairs [B, H, q, D]: into their slots, or behind all others where a prompt is read."""
        if reading:
            if self.settled:
                self.whole, self.settled = (self.keys, self.values), False
            super().append(keys, values, reading)
            return
        new, stored = keys.shape[2], self.stored
        if self.free < new:
            self.steps.make_room(new)
        for buffer, rows in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, stored : stored + new] = rows
        self._set_length(stored + new)

    def append_in_graph(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same without a number of the host: the whole buffers, and [B] int32, the places in use then."""
        new = keys.shape[2]
        first = self.end()
        place = first[:1].long() + torch.arange(new, device=keys.device)
        for buffer, rows in zip(self._buffers, (keys, values), strict=True):
            buffer.index_copy_(2, place, rows)
        return *self._buffers, first + new

    def count_in_graph(self, new: int) -> None:
        """Every layer of this device has stored the new tokens of the forward under way."""
        self._in_graphs.add_(new)
        self.steps.stale = True

    def room(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """The buffers' first start + size places; the first `start` hold what is stored there."""
        places = start + size + self.slots
        kept = self.keys, self.values
        if not self._fit(places):
            self._buffers = tuple(
                static(torch.zeros((*rows.shape[:2], places, rows.shape[3]), dtype=rows.dtype, device=rows.device))
                for rows in kept
            )
        made = tuple(buffer[:, :, : start + size] for buffer in self._buffers)
        for out, rows in zip(made, kept, strict=True):
            out[:, :, :start] = rows[:, :, :start].detach()
        return made[0], made[1]

    def _fit(self, places: int) -> bool:
        return self._buffers is not None and all(
            buffer.shape[2] >= places
            and (*buffer.shape[:2], buffer.shape[3]) == (*rows.shape[:2], rows.shape[3])
            and buffer.dtype == rows.dtype
            and buffer.device == rows.device
            for buffer, rows in zip(self._buffers, (self.keys, self.values), strict=True)
        )

    def keep(self, keys: Tensor, values: Tensor) -> None:
        """From now on these are stored, and slots are free behind them."""
        size = keys.shape[2]
        if keys is self.keys:
            for out, rows in zip(self.room(0, size), (keys, values), strict=True):
                out.copy_(rows.detach())
        self.whole = None
        self.settled, self.limit = True, size + self.slots
        if self.device != keys.device or len(self._end) != len(keys):
            self.device = keys.device
            self._end, self.key_start = (static(keys.new_zeros(len(keys), dtype=torch.int32)) for _ in range(2))
            self._seen, self._in_graphs = static(keys.new_zeros(1, dtype=torch.int64)), self.steps.tensor(keys.device)
        self._set_length(size)

    def _set_length(self, stored: int) -> None:
        self._seen.add_(stored - self.stored)
        self._length = stored - self.steps.count
        self._end.fill_(self._length)

    def note(
        self, seen: int, valid: Tensor | None, key_start: Callable[[], Tensor | None], key_bias: Tensor | None
    ) -> None:
        """What a layer knows of its tokens: how many were read, and of its places.

        valid [B, stored] bool: those that are no padding, None: all; key_start: makes its left_padding [B] int32, which
        waits for the device; key_bias [B, H, P] float32: added to the logits of the first P places, None: nothing.
        """
        start = key_start()
        self._seen.fill_(seen - self.steps.count)
        if start is not None:
            self.key_start.copy_(start)
        else:
            self.key_start.zero_()
        between = valid is not None and start is None
        if key_bias is None and not between:
            self.key_bias = None
            return
        batch, heads, places = self._buffers[0].shape[:3]
        if self._bias_buffer is None or self._bias_buffer.shape != (batch, heads, places):
            self._bias_buffer = static(self._buffers[0].new_zeros((batch, heads, places), dtype=torch.float32))
        self.key_bias = self._bias_buffer.zero_()
        if key_bias is not None:
            self.key_bias[:, :, : key_bias.shape[2]] = key_bias
        if between and valid is not None:
            self.key_bias[:, :, : valid.shape[1]].masked_fill_(~valid[:, None], float("-inf"))

    def seen_in_graph(self) -> Tensor:
        """int64 without dimensions: tokens read."""
        return (self._seen + self._in_graphs)[0]

    def end(self) -> Tensor:
        """[B] int32: places in use."""
        return self._end + self._in_graphs.int()

    def double(self) -> None:
        """Twice as many slots, in new buffers."""
        self.limit, self.slots = self.limit + self.slots, 2 * self.slots
        if self.limit <= self._buffers[0].shape[2]:
            return
        self._buffers = tuple(self._grown(buffer) for buffer in self._buffers)
        if self.key_bias is not None:
            self.key_bias = self._bias_buffer = self._grown(self.key_bias)

    def _grown(self, buffer: Tensor) -> Tensor:
        grown = buffer.new_zeros((*buffer.shape[:2], self.limit, *buffer.shape[3:]))
        grown[:, :, : buffer.shape[2]] = buffer
        return static(grown)

    def drop(self, removed: int) -> None:
        """The last pairs' places are free again."""
        self._set_length(self.stored - removed)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor [B, ...] by change(tensor), in place where its shape stays."""
        if not self.settled:
            super().map_rows(change)
            return
        self._buffers = tuple(_changed(self._buffers, change))
        self._end, self.key_start = _changed((self._end, self.key_start), change)
        if self.key_bias is not None:
            (self.key_bias,) = _changed((self.key_bias,), change)
            self._bias_buffer = self.key_bias

    def clear(self) -> None:
        """Nothing is stored; the buffers stay for the next prompt."""
        super().clear()
        self.settled = False
        self.limit = self._length = 0


def static(tensor: Tensor) -> Tensor:
    """A tensor that graphs of torch.compile may hold the address of; another one in its place is no reason to trace."""
    torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


def _changed(tensors: Sequence[Tensor], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    results = []
    for tensor in tensors:
        changed = change(tensor)
        results.append(tensor.copy_(changed) if changed.shape == tensor.shape else static(changed))
    return results
