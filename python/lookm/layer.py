"""One full-attention layer of a LookMCache: stores the prompt while its attention runs, then compresses it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

import lookm_kernels
from lookm.forward import Forward
from lookm.lse import LogSumExp
from lookm.masks import is_4d, scoring_mask, stored_mask
from lookm.observe import offset_of, tag
from lookm.plan import Plan, Settings, make_plan
from lookm.policy import Attention

UNSUPPORTED_ARGUMENTS = {"s_aux": "attention sinks (learned extra logits)", "position_bias": "a position bias"}
NOT_INTERCEPTED = (
    "lookm: the attention call that followed Cache.update was not intercepted, so the prompt could not be scored. The "
    "model uses an attention function of its own, or changes the keys between update and attention: not supported."
)
NOT_CROPPABLE = (
    "lookm: only tokens after the compressed prompt can be cropped, it ends at position {floor} and the crop at {end}"
)
NO_ASSISTANT = (
    "lookm: assisted (speculative) decoding is not supported: its draft tokens arrive with the prompt and would be "
    "compressed with it. (A prompt read with logits_to_keep > 1 looks the same; read it with 0 or 1.)"
)


class LookMLayer(DynamicLayer):
    """A DynamicLayer that holds K of a prompt's N tokens.

    keys, values [B, H, stored, D]; valid [B, stored] bool or None: stored places that may be attended (a shorter row
    has empty places first); kept [B, H, k] int32: original positions of the first k stored places, -1 for an empty one;
    image [B, <= seen] bool: image tokens among all tokens seen (later ones are text); seen: tokens read so far, padding
    included.
    """

    keys: Any
    values: Any
    image: Any
    scores: Any
    is_croppable = False  # not as a whole: see crop
    _row_tensors = ("keys", "values", "valid", "kept", "image", "scores", "padding")

    def __init__(self, settings: Settings, forward: Forward) -> None:
        super().__init__()
        self.settings, self.forward = settings, forward
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.valid: Tensor | None = None
        self.kept: Tensor | None = None
        self.image = self.scores = None
        self.padding: Tensor | None = None
        self.seen = 0
        self.compressed = False
        self.pending = False
        self.segment_start = 0
        self.compressed_at = 0

    @property
    def stored(self) -> int:
        """Places in the cache now, empty ones included."""
        return int(self.keys.shape[-2]) if self.is_initialized else 0

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
        return self.stored + query_length, offset_of(self, self.seen - self.stored)

    def rewrite_mask(self, mask: Tensor | None, batch: int, queries: int, plain: bool) -> Tensor | None:
        """Called by the mask overlay: the 2D padding mask of the forward, made true for what is stored.

        mask: [B, tokens] bool over all tokens seen and the queries, or None. Returns None where nothing is masked.
        """
        new = None
        if mask is not None:
            new = mask[:, self.seen : self.seen + queries]
            new = (new if new.shape[1] == queries else mask[:, -queries:]).bool()
            new = None if bool(new.all()) else new
        self.forward.mask(self.seen, queries, new, plain)
        if not self.compressed:
            return mask
        if self.valid is None and new is None:
            return None
        return stored_mask(self.valid, new, self.seen - self.stored, self.stored, batch, queries)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, H, q, D]; while a prompt is read, the keys returned carry this layer."""
        if self.pending:
            raise NotImplementedError(NOT_INTERCEPTED)
        new = key_states.shape[-2]
        reading = not self.compressed or (new > 1 and self.settings.later_turns == "segment")
        self._note_padding(self.forward.valid_at(self.seen, new), key_states)
        if reading or new > 1:
            self._note_image(self.forward.image_at(self.seen, key_states))
        if self.is_initialized:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        else:
            self.keys, self.values = key_states, value_states
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        self.seen += new
        if not reading:
            return self.keys, self.values
        if self.compressed:
            self.compressed, self.segment_start = False, self.stored - new
        self.pending = True
        return tag(self.keys, self), self.values

    def _note_padding(self, valid: Tensor | None, keys: Tensor) -> None:
        if valid is None and self.valid is None:
            return
        new = keys.new_ones(keys.shape[0], keys.shape[-2], dtype=torch.bool) if valid is None else valid.to(keys.device)
        old = self.valid if self.valid is not None else new.new_ones(new.shape[0], self.stored)
        self.valid = torch.cat([old, new], 1)
        self.padding = (~new).sum(1) if self.padding is None else self.padding + (~new).sum(1)

    def _note_image(self, image: Tensor) -> None:
        if self.image is None:
            known = image.new_zeros(image.shape[0], self.seen)
        else:
            known = torch.nn.functional.pad(self.image, (0, self.seen - self.image.shape[1]))
        self.image = torch.cat([known, image], 1)

    # a compiled model calls it as it is: it decides by numbers of the host
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(
        self, inner: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Called by the attention overlay: run the backend untouched, score the prompt, compress it once complete."""
        self.pending = False
        for name, meaning in UNSUPPORTED_ARGUMENTS.items():
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"lookm: a model with {meaning} is not supported (argument {name!r})")
        declared = self.forward.prompt_length
        remaining = 0 if declared is None or self.seen > declared else declared - self.seen
        if declared is not None and self.seen > declared and self.segment_start == 0:
            raise ValueError(f"`prompt_length` is {declared}, but the prompt has {self.seen} tokens already")
        plan = self._plan(mask, query.shape[2], remaining)
        observed = LogSumExp()
        free = mask is None and plan.valid is None and plan.evicts and self.settings.policy.looks
        with observed if free else nullcontext():
            output = inner(module, query, key, value, mask, *args, **kwargs)
        with torch.no_grad():
            if plan.evicts:
                self._observe(query, mask, plan, observed, getattr(module, "is_causal", True), **kwargs)
            if remaining == 0:
                self._compress(plan)
        return output

    @torch.no_grad()
    def _plan(self, mask: Any, queries: int, remaining: int) -> Plan:
        """The plan of this forward, made by its first layer; all that waits for the device, before the attention."""
        unknown = self.valid is None and is_4d(mask) and not self.forward.masks(self.seen - queries, queries)
        own_mask = mask if unknown else None
        key = (
            "plan", self.seen, self.stored, self.segment_start, queries, remaining, self.keys.shape[0],
            self.column_bytes, self.keys.device, weakref.ref(mask) if unknown else None,
        )  # fmt: skip
        plan = self.forward.once(key, lambda: make_plan(self, queries, remaining, own_mask))
        if unknown and plan.valid is not None:
            self.valid, self.padding = plan.valid, (~plan.valid).sum(1)
        return plan

    @property
    def column_bytes(self) -> int:
        """Bytes of one token column of this layer: its key and value in all rows and heads."""
        return int((self.keys[:, :, 0].numel() + self.values[:, :, 0].numel()) * self.keys.element_size())

    def _observe(
        self, query: Tensor, mask: Any, plan: Plan, observed: LogSumExp, causal: bool, scaling: float | None = None,
        softcap: float | None = None, is_causal: bool | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """Add this chunk's scores to those of the chunks before."""
        queries = query.shape[2]
        causal = causal if is_causal is None else is_causal
        plain = self.forward.plain_at(self.seen - queries, queries)
        masking = scoring_mask(mask, plain, causal, plan.valid, plan.key_start, queries, self.stored)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        lse = observed.of(query, self.keys, causal, scale) if softcap is None else None
        policy = self.settings.policy
        attention = Attention(
            query, self.keys, plan.prompt, scale, softcap, lse=lse, query_weight=plan.query_weight, picked=plan.picked,
            fp8=policy.fp8, **masking,
        )  # fmt: skip
        scores = policy.score(attention)
        if self.scores is not None:
            scores = scores + torch.nn.functional.pad(self.scores, (0, scores.shape[-1] - self.scores.shape[-1]))
        self.scores = scores

    def _compress(self, plan: Plan) -> None:
        """Replace the prompt, or the segment, by what its budget keeps, in a buffer of its own size."""
        before, prompt = self.kept_positions()[:, :, : self.segment_start], plan.prompt
        first_position = self.seen - (self.stored - self.segment_start)
        if plan.evicts:
            kept = self._evict(plan)
            kept = torch.where(kept < 0, -1, kept + first_position)
        else:
            positions = torch.arange(first_position, self.seen, dtype=torch.int32, device=self.keys.device)
            kept = positions.expand(*self.keys.shape[:2], -1)
            if prompt.valid is not None:
                kept = kept.masked_fill(~prompt.valid[:, None], -1)
        self.kept = torch.cat([before, kept], 2)
        self.valid, self.scores = plan.stored_valid, None
        self.compressed, self.compressed_at = True, self.seen

    def _evict(self, plan: Plan) -> Tensor:
        policy, prompt, start, size = self.settings.policy, plan.prompt, self.segment_start, max(plan.prompt.keep)
        keys, values = _writable(self.keys[:, :, start:]), _writable(self.values[:, :, start:])
        values = values.clone() if values.data_ptr() == keys.data_ptr() else values
        scores = policy.finish(self.scores, prompt)
        kept = lookm_kernels.compress_(keys, values, scores, plan.tiers, prompt.keep, policy.rule, policy.gate)
        self.keys = torch.cat([self.keys[:, :, :start], keys[:, :, :size]], 2)
        self.values = torch.cat([self.values[:, :, :start], values[:, :, :size]], 2)
        return kept

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
        self.forward.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens (a negative number of them; a positive final length before transformers 5.18).

        RuntimeError where that reaches into the compressed prompt: what was merged cannot be taken apart.
        """
        removed = self.check_crop(tokens_to_remove)
        if removed == 0:
            return
        end = self.seen - removed
        self.keys, self.values = self.keys[..., :-removed, :], self.values[..., :-removed, :]
        if self.valid is not None:
            self.padding = self.padding - (~self.valid[:, -removed:]).sum(1) if self.padding is not None else None
            self.valid = self.valid[:, :-removed]
        self.image = None if self.image is None else self.image[:, :end]
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
        for name in self._row_tensors:
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, change(rows))
        self.forward.shared.clear()


def _writable(rows: Tensor) -> Tensor:
    """The model's own tensor, to be compacted in place, or a copy where it shares memory or a gradient needs it."""
    expanded = any(stride == 0 and size > 1 for stride, size in zip(rows.stride(), rows.shape, strict=True))
    if rows.requires_grad:
        return rows.detach().clone()
    return rows.contiguous() if expanded or rows.stride(-1) != 1 else rows
