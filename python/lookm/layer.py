"""One full-attention layer of a LookMCache: stores the prompt while its attention runs, then compresses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lookm.forward import Forward
from lookm.masks import causal_without_mask, hide_places, is_4d, stored_mask, visible
from lookm.observe import offset_of, tag
from lookm.own_attention import Held, attend, what_is_seen
from lookm.plan import Plan, Settings
from lookm.reading import Reading
from lookm.refusals import (
    HIDES_CHUNK,
    HIDES_MERGED,
    MASK_TOO_SHORT,
    MASKED_PAST,
    NO_ASSISTANT,
    NOT_CROPPABLE,
    NOT_INTERCEPTED,
    SHOWS_PADDING,
    STORED_TWICE,
    TWICE,
)


class LookMLayer(DynamicLayer):
    """A DynamicLayer that holds K of a prompt's N tokens.

    keys, values [B, H, stored, D]; valid [B, stored] bool or None: stored places that are no padding (a shorter row has
    empty places first); kept [B, H, k] int32: original positions of the first k stored places, -1 for an empty one;
    media [B, <= seen] int8: the medium of each token seen (later ones are text); shown [B, <= seen] bool or None:
    tokens that were no padding when they were read (later ones were not); seen: tokens read so far, padding included;
    starts [B, <= seen] bool: tokens that begin an image right after another one; votes [B, H, k] float32 or None: how
    many tokens each of the first k stored pairs stands for (later ones: 1), key_bias: their logarithm; evicted:
    positions of the prompts of which a part was evicted.
    """

    keys: Any
    values: Any
    media: Any
    starts: Any
    scores: Any
    is_croppable = False  # not as a whole: see crop
    _row_tensors = (
        "keys", "values", "valid", "kept", "media", "starts", "scores", "shown", "votes", "key_bias",
    )  # fmt: skip

    def __init__(self, settings: Settings, forward: Forward) -> None:
        super().__init__()
        self.settings, self.forward = settings, forward
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.valid: Tensor | None = None
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
    def stored(self) -> int:
        """Places in the cache now, empty ones included."""
        return int(self.keys.shape[-2]) if self.is_initialized else 0

    @property
    def image(self) -> Any:
        """[B, <= seen] bool: tokens that stand for an image, a video or audio; None before any was read."""
        return None if self.media is None else self.media > 0

    @property
    def attends_by_itself(self) -> bool:
        """Whether transformers' attention cannot do it: pairs have votes, or layers keep numbers of their own."""
        return self.votes is not None or (self.settings.policy.uneven and bool(self.evicted))

    @property
    def padding(self) -> Tensor | None:
        """[B]: padding among the tokens seen; None where there is none."""
        return None if self.shown is None else (~self.shown).sum(1)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: positions and slices of later inputs depend on it, not on what is stored."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: grows without limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.15

    # torch.compile cannot trace an int that carries a layer
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(stored + q, offset): stored tokens stand right before the query, whatever their original position."""
        if self.pending:
            raise NotImplementedError(NOT_INTERCEPTED)
        return self.stored + query_length, offset_of(self.make_mask, self.seen - self.stored)

    def make_mask(self, make: Callable[..., Any], plain: bool, arguments: dict[str, Any]) -> Any:
        """Called by the mask overlay: make the mask of a forward from a 2D mask that is true for what is stored.

        plain: the mask function is causal, nothing else.
        """
        given: Tensor | None = arguments.get("attention_mask")
        batch, queries = arguments["batch_size"], arguments["q_length"]
        visible_places, new = self._note_mask(given, queries)
        if self.compressed:
            unmasked = visible_places is None and new is None
            offset = self.seen - self.stored
            given = None if unmasked else stored_mask(visible_places, new, offset, self.stored, batch, queries)
        mask = make(**arguments | {"attention_mask": given})
        sound = plain or self.stored == self.seen or not is_4d(mask)
        if not sound:
            past = visible(mask, "", queries, self.stored + queries)[..., : self.stored]
            expected = past.new_ones(()) if visible_places is None else visible_places[:, None, None]
            sound = bool((past == expected).all())
        self.forward.note(mask, plain, sound)
        return mask

    def _note_mask(self, mask: Tensor | None, queries: int) -> tuple[Tensor | None, Tensor | None]:
        """Which stored places and which of the new tokens a 2D mask shows: [B, stored] and [B, q] bool, None for all.

        mask: [B, tokens] bool over all tokens seen and the queries, or None, which hides nothing but padding.
        """
        if mask is None:
            self.forward.mask(self.seen, queries, None)
            return self.valid, None
        total = self.seen + queries
        if mask.shape[1] < total:
            raise ValueError(MASK_TOO_SHORT.format(seen=self.seen, queries=queries, total=total, got=list(mask.shape)))
        mask = mask[:, :total].bool()
        everything = bool(mask.all())
        new = None if everything or bool(mask[:, self.seen :].all()) else mask[:, self.seen :]
        self.forward.mask(self.seen, queries, new)
        if everything and self.shown is None:
            return self.valid, new
        before = mask[:, : self.seen]
        shown = torch.ones_like(before)
        if self.shown is not None:
            shown[:, : self.shown.shape[1]] = self.shown
        if torch.equal(before, shown):
            return self.valid, new
        if bool((before & ~shown).any()):
            raise ValueError(SHOWS_PADDING)
        return self._hide(shown & ~before), new

    def _hide(self, hidden: Tensor) -> Tensor | None:
        """The stored places that stay visible where tokens hidden [B, seen] are not: [B, stored] bool.

        Tokens of a prompt some of which was evicted stand at other places in every head: see _follow.
        """
        if not self.compressed:
            raise ValueError(HIDES_CHUNK)
        reaches = any(bool(hidden[:, tokens.start : tokens.stop].any()) for tokens in self.evicted)
        if reaches and self.settings.policy.rule != "none":
            raise ValueError(HIDES_MERGED)
        if reaches or self.attends_by_itself:
            self.forward.hidden = hidden
            return self.valid
        places = self._places_of(hidden)[:, 0]
        self.forward.hidden_places = places
        return ~places if self.valid is None else self.valid & ~places

    def _places_of(self, tokens: Tensor) -> Tensor:
        """[B, H, stored] bool: the places that hold one of the tokens [B, <= seen] bool."""
        positions = self.kept_positions()
        tokens = torch.nn.functional.pad(tokens.to(positions.device), (0, self.seen - tokens.shape[1]))
        held = tokens[:, None].expand(-1, positions.shape[1], -1).gather(2, positions.clamp(min=0).long())
        return held & (positions >= 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, H, q, D]; while a prompt is read, the keys returned lead to `attend`."""
        if self.pending:
            raise NotImplementedError(NOT_INTERCEPTED)
        if self.forward.model is not None and self.seen > self.forward.begun_at:
            raise NotImplementedError(STORED_TWICE)
        new = key_states.shape[-2]
        reading = not self.compressed or (new > 1 and self.settings.later_turns == "segment")
        self._note_padding(self.forward.valid_at(self.seen, new), key_states)
        if reading or new > 1:
            self.media = _grown(self.media, self.forward.media_at(self.seen, key_states), self.seen, 0)
            self.starts = _grown(self.starts, self.forward.starts_at(self.seen, key_states), self.seen, 0)
        if self.is_initialized:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        else:
            if value_states.dtype != key_states.dtype:
                # as DynamicLayer holds them, which changed in transformers 5.24
                plain = DynamicLayer()
                plain.lazy_initialization(key_states, value_states)
                value_states = value_states.to(torch.promote_types(plain.values.dtype, value_states.dtype))
            self.keys, self.values = key_states, value_states
            self.device = key_states.device
            self.is_initialized = True
        self.seen += new
        if not reading:
            unusual = self.attends_by_itself or (self.forward.masks(self.seen - new, new) and self.forward.unusual)
            return tag(self.keys, self.follow) if unusual else self.keys, self.values
        if self.compressed:
            self.compressed, self.segment_start = False, self.stored - new
        self.pending = True
        return tag(self.keys, self.attend), self.values

    def _note_padding(self, valid: Tensor | None, keys: Tensor) -> None:
        if valid is None and self.valid is None:
            return
        new = keys.new_ones(keys.shape[0], keys.shape[-2], dtype=torch.bool) if valid is None else valid.to(keys.device)
        self.valid = _grown(self.valid, new, self.stored, 1)
        if valid is not None:
            self.shown = _grown(self.shown, new, self.seen, 1)

    # a compiled model calls it as it is: it decides by numbers of the host
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(
        self, inner: Callable[..., Any], implementation: str, module: Any, query: Tensor, key: Tensor, value: Tensor,
        mask: Any, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Called by the attention overlay: run the backend untouched, score the prompt, compress it once complete."""
        if not self.pending:
            raise NotImplementedError(TWICE)
        self.pending = False
        mask = self._follow(implementation, module, query, mask, kwargs)
        declared = self.forward.prompt_length
        remaining = 0 if declared is None or self.seen > declared else declared - self.seen
        if declared is not None and self.seen > declared and self.segment_start == 0:
            raise ValueError(f"`prompt_length` is {declared}, but the prompt has {self.seen} tokens already")
        prompt = slice(self.seen - (self.stored - self.segment_start), None)
        held = self._held() if self.attends_by_itself else None
        reading = Reading(
            self.settings, self.forward, self.keys, self.values, self.valid, self.image[:, prompt],
            self.starts[:, prompt], self.seen, held,
        )  # fmt: skip
        queries = query.shape[2]
        plan = reading.plan(mask, implementation, queries, remaining)
        if reading.masked_by_user(mask, queries) and plan.valid is not None:
            self.valid, new = plan.valid, plan.valid[:, -queries:]
            self.shown = _grown(self.shown, new, self.seen - queries, 1)
        output, scores = reading.attend(plan, inner, implementation, module, query, key, value, mask, *args, **kwargs)
        if scores is not None and self.scores is not None:
            scores = scores + torch.nn.functional.pad(self.scores, (0, scores.shape[-1] - self.scores.shape[-1]))
        self.scores = scores
        if remaining == 0:
            self._compress(reading, plan)
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def follow(
        self, inner: Callable[..., Any], implementation: str, module: Any, query: Tensor, key: Tensor, value: Tensor,
        mask: Any, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Called by the attention overlay over what was compressed before, where that is not the model's own affair."""
        mask = self._follow(implementation, module, query, mask, kwargs)
        if not self.attends_by_itself:
            return inner(module, query, key, value, mask, *args, **kwargs)
        held = self._held()
        seen = what_is_seen(held, self.forward, self.seen, implementation, module, query, mask, kwargs)
        return attend(held, query, seen, kwargs)[0], None

    def _held(self) -> Held:
        hidden = self.forward.hidden
        return Held(
            self.keys, self.values, self.valid, None if hidden is None else self._places_of(hidden), self.key_bias
        )

    def _follow(self, implementation: str, module: Any, query: Tensor, mask: Any, arguments: dict[str, Any]) -> Any:
        """The mask of an attention call, made true for what this layer holds."""
        queries = query.shape[2]
        if not (self.forward.masks(self.seen - queries, queries) and self.forward.unusual):
            return mask
        if not self.forward.is_sound(mask):
            raise NotImplementedError(MASKED_PAST)
        if self.forward.hidden is None or self.attends_by_itself:
            return mask
        causal = causal_without_mask(implementation, module, arguments.get("is_causal"))
        return hide_places(mask, self._places_of(self.forward.hidden), implementation, query, causal)

    def _compress(self, reading: Reading, plan: Plan) -> None:
        """Replace the prompt, or the segment, by what its budget keeps, in a buffer of its own size."""
        before = self.kept_positions()[:, :, : self.segment_start]
        first_position = self.seen - (self.stored - self.segment_start)
        self.valid = plan.stored_valid
        if plan.evicts:
            stays = reading.compress(plan, self.scores)
            self.keys, self.values, self.valid = stays.keys, stays.values, stays.valid
            kept = torch.where(stays.kept < 0, -1, stays.kept + first_position)
            self._add_votes(stays.votes)
            self.evicted = [*self.evicted, range(first_position, self.seen)]
        else:
            positions = torch.arange(first_position, self.seen, dtype=torch.int32, device=self.keys.device)
            kept = positions.expand(*self.keys.shape[:2], -1)
            if plan.prompt.valid is not None:
                kept = kept.masked_fill(~plan.prompt.valid[:, None], -1)
        self.kept = torch.cat([before, kept], 2)
        self.scores = None
        self.compressed, self.compressed_at = True, self.seen

    def _add_votes(self, votes: Tensor | None) -> None:
        """Votes of the last places; those before it that have none stand for one token each."""
        if votes is None:
            return
        all_votes = votes.new_ones(*votes.shape[:2], self.stored)
        if self.votes is not None:
            all_votes[:, :, : self.votes.shape[2]] = self.votes
        all_votes[:, :, self.stored - votes.shape[2] :] = votes
        self.votes = all_votes
        self.key_bias = self.votes.log()

    def kept_positions(self) -> Tensor:
        """[B, H, stored] int32: the original position of every stored place, -1 for an empty one."""
        known = 0 if self.kept is None else self.kept.shape[2]
        tail = torch.arange(
            self.seen - (self.stored - known), self.seen, dtype=torch.int32, device=self.keys.device
        ).expand(*self.keys.shape[:2], -1)
        if self.valid is not None:
            tail = tail.masked_fill(~self.valid[:, None, known:], -1)
        return tail.contiguous() if self.kept is None else torch.cat([self.kept, tail], 2)

    def reset(self) -> None:
        """Forget everything, and what the last forward said."""
        self._clear()
        self.forward.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens (a negative number of them; a positive final length before transformers 5.18).

        RuntimeError where that reaches into the compressed prompt: what was merged cannot be taken apart.
        """
        removed = self.check_crop(tokens_to_remove)
        if removed == 0:
            return
        end = self.seen - removed
        self.keys, self.values = self.keys[..., :-removed, :], self.values[..., :-removed, :]
        self.valid = None if self.valid is None else self.valid[:, :-removed]
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
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows `indices`."""
        self._map_rows(lambda rows: rows[indices, ...])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.forward.tokens = None
        for name in self._row_tensors:
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, change(rows))
        self.forward.shared.clear()


def _grown(known: Tensor | None, new: Tensor, before: int, fill: int) -> Tensor:
    """What is known [B, <= before] of earlier tokens, `fill` for the rest, then the new ones: [B, before + q]."""
    grown = torch.cat([new.new_full((new.shape[0], before), fill), new], 1)
    if known is not None:
        grown[:, : known.shape[1]] = known
    return grown
