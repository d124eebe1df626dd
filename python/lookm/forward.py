"""What the forward under way told the cache: shared by all layers of one cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

NOT_SEEN = (
    "lookm: this forward was not seen by the model the cache was built for, so its image tokens are unknown; call that "
    "model, or pass image_mask= (bool [batch, prompt tokens]) to LookMCache"
)
Made = TypeVar("Made")


@dataclass
class Forward:
    """media [B, q] int8 (None: text) and valid [B, q] bool (None: all) of the q tokens after the first `begun` ones.

    given_image_mask: [B, tokens] bool by the user, instead of what the model's inputs say of these tokens.
    prompt_length: declared length of a prompt that comes in chunks; None: the first forward is the whole prompt.
    model: id of the model whose forward is under way; those of models inside it add nothing.
    complete: the last forward came to its end; begun_at: tokens read before it.
    length: tokens of the last forward that said what it reads; own_mask: it brought a mask in 4D.
    hidden: [B, tokens before] bool, tokens that were read as visible and that this forward's mask hides; None: none.
    hidden_places: [B, stored] bool, the same where all layers and heads store them at one place.
    plain: the mask that the overlay made for this forward, where it is causal and padded and nothing else.
    shared: what the first layer made for all of them (see once).
    """

    given_image_mask: Tensor | None = None
    prompt_length: int | None = None
    model: int | None = None
    complete: bool = True
    begun_at: int = 0
    length: int = 0
    own_mask: bool = False
    begun: int | None = None
    media: Tensor | None = None
    masked: tuple[int, int] | None = None
    valid: Tensor | None = None
    hidden: Tensor | None = None
    hidden_places: Tensor | None = None
    plain: weakref.ref[Any] | None = None
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # a copy makes its own: weak references cannot be copied
        return self.__dict__ | {"shared": {}, "plain": None}

    def begin(self, seen: int, length: int, media: Tensor | None, own_mask: bool = False) -> None:
        """The model is about to read `length` tokens from position `seen` on; media None: all of them are text."""
        self.forget()
        self.begun, self.length, self.media, self.own_mask = seen, length, media, own_mask

    def forget(self) -> None:
        """No forward was seen yet."""
        self.begun = self.media = self.masked = self.valid = self.hidden = self.hidden_places = self.plain = None
        self.length = 0
        self.shared.clear()

    def reset(self) -> None:
        """As new, but for what the user gave."""
        self.forget()
        self.model, self.complete = None, True

    def mask(self, seen: int, length: int, valid: Tensor | None) -> None:
        """The padding mask of the `length` tokens from position `seen` on."""
        self.masked, self.valid = (seen, length), valid
        self.hidden = self.hidden_places = self.plain = None
        self.shared.clear()

    def note_plain(self, mask: Any) -> None:
        """The overlay made this mask: causal and padded, nothing else. None is known by itself."""
        self.plain = None if mask is None else weakref.ref(mask)

    def is_plain(self, mask: Any) -> bool:
        """Whether an attention call got the very mask that the overlay made, and that one is plain."""
        return self.plain is not None and self.plain() is mask

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives the first layer of this forward that asks under this key, for the others too."""
        if key not in self.shared:
            self.shared[key] = make()
        made: Made = self.shared[key]
        return made

    def masks(self, seen: int, length: int) -> bool:
        """Whether the mask of these tokens passed the mask overlay."""
        return self.masked == (seen, length)

    def valid_at(self, seen: int, length: int) -> Tensor | None:
        """[B, length] bool, None where nothing is padding or no mask was made for these tokens."""
        return self.valid if self.masks(seen, length) else None

    def media_at(self, seen: int, keys: Tensor) -> Tensor:
        """[B, q] int8, the medium of each of the q new keys [B, H, q, D] from position `seen` on.

        RuntimeError when neither the model nor the user said.
        """
        batch, length = keys.shape[0], keys.shape[-2]
        if self.given_image_mask is not None and seen < self.given_image_mask.shape[1]:
            media = self.given_image_mask[:, seen : seen + length].to(torch.int8)
            if media.shape[1] != length:
                raise ValueError(
                    f"`image_mask` must cover {seen + length} tokens, got {list(self.given_image_mask.shape)}"
                )
        elif self.begun != seen:
            raise RuntimeError(NOT_SEEN)
        elif self.media is None:
            return keys.new_zeros((batch, length), dtype=torch.int8)
        else:
            media = self.media
        if media.shape[1] != length or batch % media.shape[0]:
            raise RuntimeError(f"lookm: image mask {list(media.shape)} does not fit the new keys {list(keys.shape)}")
        # beam search and num_return_sequences repeat the rows after the user gave a mask
        repeats, device = batch // media.shape[0], keys.device
        return self.once(
            ("media", seen, length, repeats, device), lambda: media.to(device).repeat_interleave(repeats, 0)
        )
