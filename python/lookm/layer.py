"""One full-attention layer of a LookMCache: stores the prompt while its attention runs, then compresses it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lookm.forward import Forward
from lookm.masks import (
    causal_without_mask,
    hide_places,
    is_4d,
    is_step_mask,
    step_mask,
    stored_mask,
    visible,
)
from lookm.observe import offset_of, tag
from lookm.own_attention import Held, attend, attend_to_buffers, what_is_seen
from lookm.plan import Plan, Settings
from lookm.reading import Reading, scale_of
from lookm.refusals import (
    HIDES_CHUNK,
    HIDES_MERGED,
    MASK_TOO_SHORT,
    MASKED_PAST,
    NOT_A_STEP,
    NOT_INTERCEPTED,
    SHOWS_PADDING,
    STORED_TWICE,
    TWICE,
    UNUSUAL_WINDOW,
)
from lookm.rows import StoringLayer, grown
from lookm.store.fixed import Fixed
from lookm.store.growing import Growing
from lookm.store.quantized import Quantized
from lookm.window import Window, held_rows


class LookMLayer(StoringLayer):
    """A layer that holds K of a prompt's N tokens (see StoringLayer)."""

    def __init__(self, settings: Settings, forward: Forward, store: Growing) -> None:
        self.settings = settings
        self.window = None if settings.compress_every is None else Window(settings.compress_every)
        super().__init__(forward, store)

    @property
    def is_compileable(self) -> bool:
        """Whether generate may compile its decoding: nothing changes its size then."""
        return isinstance(self.store, Fixed)

    @property
    def attends_by_itself(self) -> bool:
        """Whether transformers' attention cannot do it: votes, layers with numbers of their own, buffers not full."""
        uneven = self.settings.policy.uneven and bool(self.evicted)
        streams = self.window is not None and self.compressed
        return self.votes is not None or uneven or streams or self.store.settled or self._coded is not None

    @property
    def _coded(self) -> Quantized | None:
        """The store where it holds pairs in few bits."""
        return self.store if isinstance(self.store, Quantized) and self.store.pairs is not None else None

    def _slots_for(self, queries: int) -> Fixed | None:
        """The store where the next tokens find slots in buffers that are attended to as they are."""
        dense = queries == 1 or self.settings.later_turns == "dense"
        return self.store if dense and isinstance(self.store, Fixed) and self.store.settled else None

    def get_seq_length(self) -> Any:
        """Tokens seen, padding included: positions and slices of later inputs depend on it, not on what is stored.

        An int; in a compiled graph over buffers of fixed size an int64 tensor.
        """
        if torch.compiler.is_compiling() and isinstance(self.store, Fixed) and self.store.settled:
            return self.store.seen_in_graph()
        return self.seen

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
        store = self._slots_for(queries)
        if store is not None:
            store.steps.make_room(queries)
            # a graph could not hide more than the future and padding
            store.steps.steady = False
            if new is None and self.forward.hidden is None and (plain or self._sees_all(make, arguments, queries)):
                store.steps.steady = True
                self.forward.note(made := step_mask(queries, arguments.get("device")), True, True)
                return made
        if self.compressed:
            unmasked = visible_places is None and new is None
            offset = self.seen - self.stored
            given = None if unmasked else stored_mask(visible_places, new, offset, self.stored, batch, queries)
        mask = make(**arguments | {"attention_mask": given})
        if self.is_compileable and isinstance(mask, Tensor):
            # generate would make it so, and it could not be told from others then
            mask = mask.contiguous()
        sound = plain or self.stored == self.seen or self._shows(mask, queries, visible_places)
        self.forward.note(mask, plain, sound)
        return mask

    def _sees_all(self, make: Callable[..., Any], arguments: dict[str, Any], queries: int) -> bool:
        """Whether a mask function that is not causal alone lets one new token see all that is stored."""
        return queries == 1 and self._shows(make(**arguments | {"attention_mask": None}), queries, None)

    def _shows(self, mask: Any, queries: int, places: Tensor | None) -> bool:
        """Whether a mask lets every new token see the places [B, stored] of what is stored, and no other; None: all."""
        if not is_4d(mask):
            return True
        past = visible(mask, "", queries, self.stored + queries)[..., : self.stored]
        return bool((past == (past.new_ones(()) if places is None else places[:, None, None])).all())

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
        places = self.places_of(hidden)[:, 0]
        self.forward.hidden_places = places
        return ~places if self.valid is None else self.valid & ~places

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, H, q, D]; while a prompt is read, the keys returned lead to `attend`."""
        new = key_states.shape[-2]
        slots = self._slots_for(new) if torch.compiler.is_compiling() else None
        if slots is not None and slots.steps.steady:
            keys, values, end = slots.append_in_graph(key_states, value_states)
            return tag(keys, functools.partial(self.attend_in_graph, slots, end)), values
        if self.pending:
            raise NotImplementedError(NOT_INTERCEPTED)
        if self.forward.model is not None and self.seen > self.forward.begun_at:
            raise NotImplementedError(STORED_TWICE)
        segment = new > 1 and self.settings.later_turns == "segment" and self.window is None
        reading = not self.compressed or segment
        if self.window is not None and self.compressed:
            self._expect(self.window, new)
        padded = self.forward.valid_at(self.seen, new)
        self.note_padding(padded, key_states)
        if reading or new > 1:
            self.media = grown(self.media, self.forward.media_at(self.seen, key_states), self.seen, 0)
            self.starts = grown(self.starts, self.forward.starts_at(self.seen, key_states), self.seen, 0)
        if not self.is_initialized:
            if value_states.dtype != key_states.dtype:
                # as DynamicLayer holds them, which changed in transformers 5.24
                plain = DynamicLayer()
                plain.lazy_initialization(key_states, value_states)
                value_states = value_states.to(torch.promote_types(plain.values.dtype, value_states.dtype))
            self.device = key_states.device
            self.is_initialized = True
        self.store.append(key_states, value_states, reading)
        self.seen += new
        if not reading:
            if padded is not None:
                self._note_places()
            if self._coded is not None:
                # what the model's attention would get is not made
                return tag(key_states, self.follow), value_states
            unusual = self.attends_by_itself or (self.forward.masks(self.seen - new, new) and self.forward.unusual)
            return tag(self.keys, self.follow) if unusual else self.keys, self.values
        if self.compressed:
            self.compressed, self.segment_start = False, self.stored - new
        self.pending = True
        return tag(self.keys, self.attend), self.values

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
            self.shown = grown(self.shown, new, self.seen - queries, 1)
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
        if isinstance(self.store, Fixed) and is_step_mask(mask):
            return attend_to_buffers(self.store, self.store.end(), query, kwargs), None
        mask = self._follow(implementation, module, query, mask, kwargs)
        if not self.attends_by_itself:
            return inner(module, query, key, value, mask, *args, **kwargs)
        held = self._held()
        seen = what_is_seen(held, self.forward, self.seen, implementation, module, query, mask, kwargs)
        output, lse = attend(held, query, seen, kwargs)
        if self.window is not None:
            self._stream(self.window, query, lse, kwargs)
        return output, None

    def _expect(self, window: Window, new: int) -> None:
        """Before tokens are stored behind what was compressed."""
        if self.forward.masks(self.seen, new) and self.forward.unusual:
            raise NotImplementedError(UNUSUAL_WINDOW)
        if new > 1:
            window.score(self.settings.policy, held_rows(self, window.answers))
        else:
            more = bool(window.answers) and window.answers[-1].stop == self.seen
            begin = window.answers.pop().start if more else self.seen
            window.answers.append(range(begin, self.seen + 1))

    def _stream(self, window: Window, query: Tensor, lse: Tensor, arguments: dict[str, Any]) -> None:
        """After attention to all that is stored: note what was paid, and compress when it is time."""
        window.note(query, lse, scale_of(query, arguments), arguments.get("softcap"))
        if not window.due(self.stored, turn=query.shape[2] > 1):
            return
        rows = held_rows(self, window.answers)
        stays = window.compress(self.settings.policy, rows, self.store.room)
        self.store.keep(stays.keys, stays.values)
        self.kept = rows.positions.gather(2, stays.kept.clamp(min=0).long()).masked_fill(stays.kept < 0, -1)
        self.valid, self.votes = stays.valid, stays.votes
        self.key_bias = None if stays.votes is None else stays.votes.log()
        self.evicted = [range(self.seen)]
        self.compressed_at = self.seen
        self._note_places()

    def attend_in_graph(
        self, store: Fixed, end: Tensor, inner: Callable[..., Any], implementation: str, module: Any, query: Tensor,
        key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Called by the attention overlay in a compiled graph; end [B] int32: places in use, the new ones included."""
        if not is_step_mask(mask):
            raise NotImplementedError(NOT_A_STEP)
        if store.counts:
            store.count_in_graph(query.shape[2])
        return attend_to_buffers(store, end, query, kwargs), None

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """See StoringLayer.map_rows."""
        super().map_rows(change)
        if self.window is not None:
            self.window.map_rows(change)

    def _clear(self) -> None:
        super()._clear()
        if self.window is not None:
            self.window = Window(self.window.every)

    def _held(self) -> Held:
        hidden = self.forward.hidden
        places, coded = None if hidden is None else self.places_of(hidden), self._coded
        if coded is None or coded.whole is None:
            return Held(self.keys, self.values, self.valid, places, self.key_bias)
        keys, values = coded.whole
        return Held(keys, values, self.valid, places, self.key_bias, coded.pairs)

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
        return hide_places(mask, self.places_of(self.forward.hidden), implementation, query, causal)

    def _compress(self, reading: Reading, plan: Plan) -> None:
        """Replace the prompt, or the segment, by what its budget keeps, in a buffer of its own size."""
        before = self.kept_positions()[:, :, : self.segment_start]
        first_position = self.seen - (self.stored - self.segment_start)
        self.valid = plan.stored_valid
        if plan.evicts:
            stays = reading.compress(plan, self.scores, self.store.room)
            if self.window is not None:
                self.window.carry(self.scores, stays.kept)
            self.store.keep(stays.keys, stays.values)
            self.valid = stays.valid
            kept = torch.where(stays.kept < 0, -1, stays.kept + first_position)
            self.add_votes(stays.votes)
            self.evicted = [*self.evicted, range(first_position, self.seen)]
        else:
            self.store.keep(self.keys, self.values)
            positions = torch.arange(first_position, self.seen, dtype=torch.int32, device=self.keys.device)
            kept = positions.expand(*self.keys.shape[:2], -1)
            if plan.prompt.valid is not None:
                kept = kept.masked_fill(~plan.prompt.valid[:, None], -1)
        self.kept = torch.cat([before, kept], 2)
        if self.window is not None:
            keep = plan.prompt.keep
            limits = [self.settings.budget.limit(own, reading.column_bytes * self.settings.layers) for own in keep]
            self.window.begin(limits, plan.prompt, self.settings.policy)
        self.scores = None
        self.compressed, self.compressed_at = True, self.seen
        self._note_places()

    def _note_places(self) -> None:
        """Tell the store what it cannot know of its places."""
        valid = self.valid

        self.store.note(self.seen, valid, lambda: self.forward.start_of(valid), self.key_bias)
