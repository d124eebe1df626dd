"""What the forward under way told the cache: shared by all layers of one cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lookm.masks import left_padding

NOT_SEEN = (
    "lookm: this forward was not seen by the model the cache was built for, so its image tokens are unknown; call that "
    "model, or pass image_mask= (bool [batch, prompt tokens]) to LookMCache"
)
Made = TypeVar("Made")


@dataclass
class Forward:
    """media [B, q] int8 (None: text), starts [B, q] bool (None: unknown, see lookm.segments) and valid [B, q] bool
        (None: all) of the q tokens after the first `begun` ones.

    given_image_mask: [B, tokens] bool by the user, instead of what the model's inputs say of these tokens.
    prompt_length: declared length of a prompt that comes in chunks; None: the first forward is the whole prompt.
    model: id of the model whose forward is under way; those of models inside it add nothing.
    complete: the last forward came to its end; begun_at: tokens read before it.
    length: tokens of the last forward that said what it reads; own_mask: it brought a mask in 4D.
    tokens: ids [B, n] of the tokens read, in parts, token_count in all; None: unknown.
    hidden: [B, tokens before] bool, tokens that were read as visible and that this forward's mask hides; None: none.
    hidden_places: [B, stored] bool, the same where all layers and heads store them at one place.
    plain: masks that the overlay made for this forward, causal and padded and nothing else.
    sound: masks that let every new token see all that is stored; restricted: some made for this forward do not.
    shared: what the first layer made for all of them (see once).
    """

    given_image_mask: Tensor | None = None
    prompt_length: int | None = None
    model: int | None = None
    complete: bool = True
    begun_at: int = 0
    length: int = 0
    own_mask: bool = False
    tokens: list[Tensor] | None = field(default_factory=list)
    token_count: int = 0
    begun: int | None = None
    media: Tensor | None = None
    starts: Tensor | None = None
    masked: tuple[int, int] | None = None
    valid: Tensor | None = None
    hidden: Tensor | None = None
    hidden_places: Tensor | None = None
    plain: list[weakref.ref[Any]] = field(default_factory=list)
    sound: list[weakref.ref[Any]] = field(default_factory=list)
    restricted: bool = False
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # a copy makes its own: weak references cannot be copied
        return self.__dict__ | {"shared": {}, "plain": [], "sound": []}

    def begin(
        self, seen: int, length: int, media: Tensor | None, starts: Tensor | None = None, own_mask: bool = False,
        prepared: bool = False,
    ) -> None:  # fmt: skip
        """The model is about to read `length` tokens from position `seen` on; media None: all of them are text.

        prepared: its masks were made before.
        """
        if not prepared:
            self.forget()
        self.begun, self.length, self.media, self.starts, self.own_mask = seen, length, media, starts, own_mask

    def forget(self) -> None:
        """No forward was seen yet."""
        self.begun = self.media = self.starts = self.masked = None
        self.length = 0
        self._forget_masks()

    def _forget_masks(self) -> None:
        self.valid = self.hidden = self.hidden_places = None
        self.plain, self.sound, self.restricted = [], [], False
        self.shared.clear()

    def reset(self) -> None:
        """As new, but for what the user gave."""
        self.forget()
        self.model, self.complete, self.tokens, self.token_count = None, True, [], 0

    def note_tokens(self, seen: int, ids: Tensor | None) -> None:
        """The ids [B, q] of the tokens from position `seen` on; None where they are unknown."""
        before = self.tokens_read(seen) if self.token_count != seen else None
        if before is not None:  # some were cropped
            self.tokens, self.token_count = [before], seen
        known = self.tokens is not None and self.token_count == seen
        if ids is None or not known or (self.tokens and self.tokens[0].shape[0] != ids.shape[0]):
            self.tokens = None
        elif self.tokens is not None:
            # a copy: the caller may use its tensor again; in few parts
            self.tokens = [torch.cat([*self.tokens, ids], 1)] if len(self.tokens) > 99 else [*self.tokens, ids.clone()]
            self.token_count = seen + ids.shape[1]

    def tokens_read(self, seen: int) -> Tensor | None:
        """[B, seen], the ids of the first `seen` tokens; None where they are unknown."""
        if not self.tokens or self.token_count < seen:
            return None
        return torch.cat(self.tokens, 1)[:, :seen]

    def mask(self, seen: int, length: int, valid: Tensor | None) -> None:
        """The padding mask of the `length` tokens from position `seen` on; a model may ask for several masks."""
        if self.masked != (seen, length):
            self._forget_masks()
        self.masked, self.valid = (seen, length), valid
        self.shared.clear()

    def note(self, mask: Any, plain: bool, sound: bool) -> None:
        """The overlay made this mask."""
        self.restricted |= not sound
        if mask is not None:
            self.plain += [weakref.ref(mask)] if plain else []
            self.sound += [weakref.ref(mask)] if sound else []

    @property
    def unusual(self) -> bool:
        """Whether this forward's masks hide more of what is stored than the future and padding."""
        return self.restricted or self.hidden is not None

    def is_plain(self, mask: Any) -> bool:
        """Whether an attention call got a very mask that the overlay made, and that one is plain."""
        return any(made() is mask for made in self.plain)

    def made(self, mask: Any) -> bool:
        """Whether the overlay made this mask for the forward under way."""
        return mask is not None and any(made() is mask for made in (*self.plain, *self.sound))

    def is_sound(self, mask: Any) -> bool:
        """Whether an attention call over a compressed cache lets its queries see all of it."""
        return not self.restricted or mask is None or any(made() is mask for made in self.sound)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives the first layer of this forward that asks under this key, for the others too."""
        if key not in self.shared:
            self.shared[key] = make()
        made: Made = self.shared[key]
        return made

    def start_of(self, valid: Tensor | None) -> Tensor | None:
        """[B] int32: left_padding of places [B, N] that are no padding, found once for all layers."""
        if valid is None:
            return None
        return self.once(("start", weakref.ref(valid)), lambda: left_padding(valid))

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
        return self._for_rows("media", media, seen, keys)

    def starts_at(self, seen: int, keys: Tensor) -> Tensor:
        """[B, q] bool, whether each of the q new keys begins an image right after another one."""
        if self.begun != seen or self.starts is None or self.starts.shape[1] != keys.shape[-2]:
            return keys.new_zeros((keys.shape[0], keys.shape[-2]), dtype=torch.bool)
        return self._for_rows("starts", self.starts, seen, keys)

    def _for_rows(self, name: str, noted: Tensor, seen: int, keys: Tensor) -> Tensor:
        # beam search and num_return_sequences repeat the rows after the user gave a mask
        repeats, device = keys.shape[0] // noted.shape[0], keys.device
        return self.once(
            (name, seen, noted.shape[1], repeats, device), lambda: noted.to(device).repeat_interleave(repeats, 0)
        )
