"""One layer's prompt under way: run its attention untouched, score it as attended, and say what stays of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lookm.attention import Attention, Pairs
from lookm.compression import compress_pairs
from lookm.forward import Forward
from lookm.lse import LogSumExp
from lookm.masks import causal_without_mask, is_4d, left_padding, padding_mask, visible
from lookm.own_attention import Held, attend, what_is_seen
from lookm.plan import Ledger, Plan, Settings, Stored, make_plan, with_keep

UNSUPPORTED_ARGUMENTS = {
    "s_aux": "attention sinks (learned extra logits)",
    "sinks": "attention sinks (learned extra logits)",
    "position_bias": "a position bias",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}
# of a pair: float32, and its logarithm
BYTES_OF_VOTES = 8
WINDOWED = "lookm: {} attention in a window of {} tokens, over a cache layer that holds all of them: not supported"
OWN_MASKS = (
    "lookm: this model makes its attention masks in a way of its own, without asking the cache what it holds; over a "
    "compressed cache they would not fit: not supported"
)


@dataclass(frozen=True)
class Reading:
    """What a layer stores while it reads a prompt, and what the forward said.

    keys, values [B, H, stored, D]: with the new tokens; valid [B, stored] bool: places that are no padding, None: all.
    image, starts [B, N] bool: image tokens among the N of the prompt, the last of what is stored, and those that begin
        an image right after another. seen: tokens read so far.
    held: what of it the layer attends to by itself (see lookm.own_attention); None: the model's attention does.
    """

    settings: Settings
    forward: Forward
    keys: Tensor
    values: Tensor
    valid: Tensor | None
    image: Tensor
    starts: Tensor
    seen: int
    held: Held | None

    @property
    def stored(self) -> int:
        """Places in the cache, the new tokens included."""
        return self.keys.shape[-2]

    @property
    def start(self) -> int:
        """The first stored place of the prompt; earlier ones belong to turns that were compressed before."""
        return self.stored - self.image.shape[1]

    @property
    def column_bytes(self) -> int:
        """Bytes of one token column of this layer: its key and value, and votes if any, in all rows and heads."""
        pairs = sum(rows[:, :, 0].numel() * rows.element_size() for rows in (self.keys, self.values))
        return pairs + (BYTES_OF_VOTES * self.keys[:, :, 0, 0].numel() if self.settings.policy.votes else 0)

    def masked_by_user(self, mask: Any, queries: int) -> bool:
        """Whether the mask is the user's own: it has never passed the mask overlay."""
        return self.valid is None and is_4d(mask) and not self.forward.masks(self.seen - queries, queries)

    @torch.no_grad()
    def plan(self, mask: Any, implementation: str, queries: int, remaining: int) -> Plan:
        """The plan of this forward, made by its first layer; all that waits for the device, before the attention."""
        own = self.masked_by_user(mask, queries)
        key = (
            "plan", self.seen, self.stored, self.start, queries, remaining, self.keys.shape[0], self.column_bytes,
            self.keys.device, weakref.ref(mask) if own else None,
        )  # fmt: skip

        def make() -> Plan:
            valid = self._visible_to_last(mask, implementation, queries) if own else self.valid
            shown, hidden = valid, self.forward.hidden_places
            if hidden is not None:
                hidden = torch.nn.functional.pad(hidden.to(self.keys.device), (0, self.stored - hidden.shape[1]))
                shown = ~hidden if valid is None else valid & ~hidden
            bytes_per_token = self.column_bytes * self.settings.layers
            stored = Stored(self.image, self.starts, self.stored, valid, shown, bytes_per_token)
            return make_plan(stored, self.settings, queries, remaining)

        return self.forward.once(key, make)

    def attend(
        self, plan: Plan, inner: Callable[..., Any], implementation: str, module: Any, query: Tensor, key: Tensor,
        value: Tensor, mask: Any, *args: Any, **kwargs: Any,
    ) -> tuple[Any, Tensor | None]:  # fmt: skip
        """The attention's own output, and the scores of its queries: [B, any, N], None where they are not needed."""
        self._refuse(plan, implementation, query.shape[2], kwargs)
        if self.held is not None:
            return self._attend_by_itself(self.held, plan, implementation, module, query, mask, kwargs)
        if not plan.evicts:
            return inner(module, query, key, value, mask, *args, **kwargs), None
        causal = causal_without_mask(implementation, module, kwargs.get("is_causal"))
        looks = self.settings.policy.looks
        paid = self._paid(mask, implementation, causal, plan, query.shape[2]) if looks else {}
        observed = LogSumExp()
        free = looks and mask is None and implementation == "sdpa" and not torch.is_autocast_enabled(query.device.type)
        with observed if free else nullcontext():
            output = inner(module, query, key, value, mask, *args, **kwargs)
        with torch.no_grad():
            lse = None
            if kwargs.get("softcap") is None:
                lse = observed.of(query, self.keys, paid.get("causal", True), scale_of(query, kwargs))
            return output, self._score(query, plan, lse, paid, kwargs)

    def _attend_by_itself(
        self, held: Held, plan: Plan, implementation: str, module: Any, query: Tensor, mask: Any,
        arguments: dict[str, Any],
    ) -> tuple[Any, Tensor | None]:  # fmt: skip
        seen = what_is_seen(held, self.forward, self.seen, implementation, module, query, mask, arguments)
        output, lse = attend(held, query, seen, arguments)
        if not plan.evicts:
            return (output, None), None
        with torch.no_grad():
            # the sums behind lse have the votes in them, and tokens under compression have none of their own
            return (output, None), self._score(query, plan, lse.detach(), seen, arguments)

    def _refuse(self, plan: Plan, implementation: str, queries: int, arguments: dict[str, Any]) -> None:
        for name, meaning in UNSUPPORTED_ARGUMENTS.items():
            if arguments.get(name) is not None:
                raise NotImplementedError(f"lookm: a model with {meaning} is not supported (argument {name!r})")
        # elsewhere the mask has the window
        window = arguments.get("sliding_window")
        if window is not None and "flash" in implementation and window < self.stored:
            raise NotImplementedError(WINDOWED.format(implementation, window))
        before, forward = self.seen - queries, self.forward
        if plan.evicts and forward.begun == before and not forward.own_mask and not forward.masks(before, queries):
            raise NotImplementedError(OWN_MASKS)

    def _paid(self, mask: Any, implementation: str, causal: bool, plan: Plan, queries: int) -> dict[str, Any]:
        """What the attention lets each query see, as arguments of attention_scores.

        causal: what the backend does without a mask per query. A mask known to be plain need not be read.
        """
        if mask is None:
            return {"causal": causal, "key_start": None, "mask": None}
        if not is_4d(mask):
            valid = mask[:, -self.stored :].bool()
            start = self.forward.once(("start", weakref.ref(mask), self.stored), lambda: left_padding(valid))
            return {"causal": causal} | padding_mask(valid, start, queries)
        if self.forward.is_plain(mask):
            return {"causal": True} | padding_mask(plan.valid, plan.key_start, queries)
        start = plan.key_start if self.forward.masks(self.seen - queries, queries) else None
        return {"causal": False, "key_start": start, "mask": self._visible(mask, implementation, queries)}

    def _visible(self, mask: Any, implementation: str, queries: int) -> Tensor:
        """See masks.visible; read once for all layers that get this mask."""
        return self.forward.once(
            ("visible", weakref.ref(mask), self.stored), lambda: visible(mask, implementation, queries, self.stored)
        )

    def _visible_to_last(self, mask: Any, implementation: str, queries: int) -> Tensor | None:
        # the last query of a user's own mask sees every token that is not padding
        valid = self._visible(mask, implementation, queries)[:, 0, -1].expand(self.keys.shape[0], -1)
        return None if bool(valid.all()) else valid.contiguous()

    def _score(
        self, query: Tensor, plan: Plan, lse: Tensor | None, paid: dict[str, Any], arguments: dict[str, Any]
    ) -> Tensor:
        policy = self.settings.policy
        attention = Attention(
            query, self.keys, plan.prompt, scale_of(query, arguments), arguments.get("softcap"), lse=lse,
            query_weight=plan.query_weight, picked=plan.picked, fp8=policy.fp8, **paid,
        )  # fmt: skip
        return policy.score(attention)

    def _own_budget(self, plan: Plan, pairs: Pairs) -> Plan:
        """The plan with what the policy gives this layer of the budget that the layers before it left."""
        layers = self.settings.layers
        ledger = self.forward.once(
            ("ledger", self.seen, self.image.shape[1]),
            lambda: Ledger([keep * layers for keep in plan.prompt.keep], layers),
        )
        wanted = self.settings.policy.take(pairs, tuple(ledger.left), ledger.layers)
        return with_keep(plan, ledger.take(wanted, plan.lengths), self.settings.policy)

    @torch.no_grad()
    def compress(self, plan: Plan, sums: Tensor, room: Callable[[int, int], tuple[Tensor, Tensor]]) -> Compressed:
        """What stays of the prompt, in the memory that `room` gives (see lookm.store.growing.Growing.room).

        sums [B, any, N]: of Policy.score over all its queries.
        """
        policy = self.settings.policy
        key, value = (rows.detach() for rows in (self.keys, self.values))
        whole_prompt = key[:, :, self.start :], value[:, :, self.start :]
        pairs = Pairs(plan.prompt, *whole_prompt, sums, sums, self.settings.layers)
        pairs = replace(pairs, scores=policy.finish(pairs))
        if policy.uneven:
            plan = self._own_budget(plan, pairs)
            pairs = replace(pairs, prompt=plan.prompt)
        stays = room(self.start, max(plan.prompt.keep))
        kept, votes = compress_pairs(policy, pairs, plan.tiers, *(rows[:, :, self.start :] for rows in stays))
        return Compressed(*stays, kept, votes, plan.stored_valid)


@dataclass(frozen=True)
class Compressed:
    """keys, values [B, H, stored, D]: what is stored from now on, earlier turns included.

    valid [B, stored] bool: places that are no padding, None: all;
    kept [B, H, K] int32: places of the prompt that stayed, -1 for none; votes [B, H, K] float32, None without votes.
    """

    keys: Tensor
    values: Tensor
    kept: Tensor
    votes: Tensor | None
    valid: Tensor | None


def scale_of(query: Tensor, arguments: dict[str, Any]) -> float:
    """The scale of an attention call with these arguments by name."""
    scaling: float | None = arguments.get("scaling")
    return query.shape[-1] ** -0.5 if scaling is None else scaling
