"""What the forward under way told the cache: shared by all layers of one cache."""

from __future__ import annotations

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
    """image [B, q] bool and valid [B, q] bool (None: all) of the q tokens after the first `begun` ones.

    given_image_mask: [B, tokens] bool by the user, instead of what the model's inputs say of these tokens.
    prompt_length: declared length of a prompt that comes in chunks; None: the first forward is the whole prompt.
    plain: the mask of this forward is causal and padded, nothing else.
    shared: what the first layer made for all of them (see once).
    """

    given_image_mask: Tensor | None = None
    prompt_length: int | None = None
    begun: int | None = None
    image: Tensor | None = None
    masked: tuple[int, int] | None = None
    valid: Tensor | None = None
    plain: bool = False
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # a copy makes its own: keys may hold weak references
        return self.__dict__ | {"shared": {}}

    def begin(self, seen: int, image: Tensor | None) -> None:
        """The model is about to read tokens from position `seen` on; image None: none of them is an image token."""
        self.forget()
        self.begun, self.image = seen, image

    def forget(self) -> None:
        """No forward was seen yet."""
        self.begun = self.image = self.masked = self.valid = None
        self.shared.clear()

    def mask(self, seen: int, length: int, valid: Tensor | None, plain: bool) -> None:
        """The mask of the `length` tokens from position `seen` on."""
        self.masked, self.valid, self.plain = (seen, length), valid, plain
        self.shared.clear()

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

    def plain_at(self, seen: int, length: int) -> bool:
        """Whether the mask of these tokens is known to be causal and padded, nothing else."""
        return self.masks(seen, length) and self.plain

    def image_at(self, seen: int, keys: Tensor) -> Tensor:
        """[B, q] bool, image tokens among the q new keys [B, H, q, D] from position `seen` on.

        RuntimeError when neither the model nor the user said.
        """
        batch, length = keys.shape[0], keys.shape[-2]
        if self.given_image_mask is not None and seen < self.given_image_mask.shape[1]:
            image = self.given_image_mask[:, seen : seen + length]
            if image.shape[1] != length:
                raise ValueError(
                    f"`image_mask` must cover {seen + length} tokens, got {list(self.given_image_mask.shape)}"
                )
        elif self.begun != seen:
            raise RuntimeError(NOT_SEEN)
        elif self.image is None:
            return keys.new_zeros((batch, length), dtype=torch.bool)
        else:
            image = self.image
        if image.shape[1] != length or batch % image.shape[0]:
            raise RuntimeError(f"lookm: image mask {list(image.shape)} does not fit the new keys {list(keys.shape)}")
        # beam search and num_return_sequences repeat the rows after the user gave a mask
        repeats, device = batch // image.shape[0], keys.device
        return self.once(
            ("image", seen, length, repeats, device), lambda: image.to(device).repeat_interleave(repeats, 0)
        )
