"""What one layer stores and remembers of its tokens, row by row: the part that does not depend on how it attends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from lookm.forward import Forward
from lookm.refusals import NO_ASSISTANT, NOT_CROPPABLE
from lookm.store.growing import Growing


class StoringLayer(DynamicLayer):
    """A DynamicLayer whose stored places stand for some of the tokens that were read.

    keys, values [B, H, stored, D]; valid [B, stored] bool or None: stored places that are no padding (a shorter row has
    empty places first); kept [B, H, k] int32: original positions of the first k stored places, -1 for an empty one;
    media [B, <= seen] int8: the medium of each token seen (later ones are text); shown [B, <= seen] bool or None:
    tokens that were no padding when they were read (later ones were not); seen: tokens read so far, padding included;
    starts [B, <= seen] bool: tokens that begin an image right after another one; votes [B, H, k] float32 or None: how
    many tokens each of the first k stored pairs stands for (later ones: 1), key_bias: their logarithm; evicted:
    positions of the prompts of which a part was evicted.
    """

    media: Any
    starts: Any
    scores: Any
    is_croppable = False  # not as a whole: see crop
    _row_tensors = (
        "_valid", "kept", "media", "starts", "scores", "shown", "votes", "key_bias",
    )  # fmt: skip

    def __init__(self, forward: Forward, store: Growing) -> None:
        self.forward, self.store = forward, store
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.store.clear()
        self.is_initialized = False
        self._valid: Tensor | None = None
        self.kept: Tensor | None = None
        self.media = self.starts = self.scores = None
        self.votes: Tensor | None = None
        self.key_bias: Tensor | None = None
        self.shown: Tensor | None = None
        self.seen = 0
        self.compressed = False
        self.evicted: list[range] = []
        self.pending = False
        self.segment_start = 0
        self.compressed_at = 0

    @property
    def keys(self) -> Any:
        """[B, H, stored, D]; None before the first token."""
        return self.store.keys

    @keys.setter
    def keys(self, keys: None) -> None:
        """For transformers, which says so where nothing is stored."""

    @property
    def values(self) -> Any:
        """[B, H, stored, D]; None before the first token."""
        return self.store.values

    @values.setter
    def values(self, values: None) -> None:
        """As for keys."""

    @property
    def stored(self) -> int:
        """Places in the cache now, empty ones included."""
        return self.store.stored

    @property
    def seen(self) -> int:
        """Tokens read so far, padding included."""
        return self._seen + self.store.in_graphs

    @seen.setter
    def seen(self, seen: int) -> None:
        self._seen = seen - self.store.in_graphs

    @property
    def valid(self) -> Tensor | None:
        """[B, stored] bool, places that are no padding; None: all."""
        if self._valid is None or self._valid.shape[1] == self.stored:
            return self._valid
        return pad(self._valid, (0, self.stored - self._valid.shape[1]), value=True)

    @valid.setter
    def valid(self, valid: Tensor | None) -> None:
        self._valid = valid

    @property
    def image(self) -> Any:
        """[B, <= seen] bool: tokens that stand for an image, a video or audio; None before any was read."""
        return None if self.media is None else self.media > 0

    @property
    def padding(self) -> Tensor | None:
        """[B]: padding among the tokens seen; None where there is none."""
        return None if self.shown is None else (~self.shown).sum(1)

    def get_max_length(self) -> int:
        """-1: no limit to the tokens read."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.15

    def note_padding(self, valid: Tensor | None, keys: Tensor) -> None:
        """Which of the new tokens are no padding, [B, q] bool, before they are stored; None: all."""
        if valid is not None:
            new = valid.to(keys.device)
            self._valid = grown(self._valid, new, self.stored, 1)
            self.shown = grown(self.shown, new, self.seen, 1)

    def kept_positions(self) -> Tensor:
        """[B, H, stored] int32: the original position of every stored place, -1 for an empty one."""
        known = 0 if self.kept is None else self.kept.shape[2]
        like = self.keys if self.kept is None else self.kept
        tail = torch.arange(self.seen - (self.stored - known), self.seen, dtype=torch.int32, device=like.device).expand(
            *like.shape[:2], -1
        )
        valid = self.valid
        if valid is not None:
            tail = tail.masked_fill(~valid[:, None, known:], -1)
        return tail.contiguous() if self.kept is None else torch.cat([self.kept, tail], 2)

    def places_of(self, tokens: Tensor) -> Tensor:
        """[B, H, stored] bool: the places that hold one of the tokens [B, <= seen] bool."""
        return self.at(tokens, self.kept_positions())

    def at(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """places_of where the positions [B, H, stored] that the places hold are known."""
        tokens = pad(tokens.to(positions.device), (0, self.seen - tokens.shape[1]))
        return by_place(tokens, positions) & (positions >= 0)

    def add_votes(self, votes: Tensor | None) -> None:
        """Votes of the last places; those before it that have none stand for one token each."""
        if votes is None:
            return
        all_votes = votes.new_ones(*votes.shape[:2], self.stored)
        if self.votes is not None:
            all_votes[:, :, : self.votes.shape[2]] = self.votes
        all_votes[:, :, self.stored - votes.shape[2] :] = votes
        self.votes = all_votes
        self.key_bias = self.votes.log()

    def reset(self) -> None:
        """Forget everything, and what the last forward said."""
        self.forward.reset()
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens (a negative number of them; a positive final length before transformers 5.18).

        RuntimeError where that reaches into the compressed prompt: what was merged cannot be taken apart.
        """
        removed = self.check_crop(tokens_to_remove)
        if removed == 0:
            return
        end, places = self.seen - removed, self.stored - removed
        self.store.drop(removed)
        self._valid = None if self._valid is None else self._valid[:, :places]
        self.shown = None if self.shown is None else self.shown[:, :end]
        self.media = None if self.media is None else self.media[:, :end]
        self.starts = None if self.starts is None else self.starts[:, :end]
        self.seen = end
        self.forward.shared.clear()

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens a crop drops. RuntimeError where it may not."""
        removed = self.seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if removed <= 0 or not self.is_initialized:
            return 0
        end = self.seen - removed
        if not self.compressed or end < self.compressed_at:
            floor = self.compressed_at if self.compressed else self.seen
            raise RuntimeError(NOT_CROPPABLE.format(floor=floor, end=end))
        return removed

    def activate_past_recording(self) -> None:
        """NotImplementedError: transformers calls this for assisted decoding."""
        raise NotImplementedError(NO_ASSISTANT)

    def offload(self) -> None:
        """NotImplementedError: the compressed cache stays on its device."""
        raise NotImplementedError("lookm: offloading is not supported; what is left of the cache stays on its device")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of beam_idx [B]."""
        self.map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows `indices`."""
        self.map_rows(lambda rows: rows[indices, ...])

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace everything that has rows by change(tensor)."""
        self.forward.tokens = None
        self.store.map_rows(change)
        for name in self._row_tensors:
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, change(rows))
        self.forward.shared.clear()


def by_place(x: Tensor, positions: Tensor) -> Tensor:
    """[B, H, stored] of x [B, seen]: that of the token at each of the positions, the first one's at an empty place."""
    return x[:, None].expand(-1, positions.shape[1], -1).gather(2, positions.clamp(min=0).long())


def grown(known: Tensor | None, new: Tensor, before: int, fill: int) -> Tensor:
    """What is known [B, <= before] of earlier tokens, `fill` for the rest, then the new ones: [B, before + q]."""
    whole = torch.cat([new.new_full((new.shape[0], before), fill), new], 1)
    if known is not None:
        whole[:, : known.shape[1]] = known
    return whole
