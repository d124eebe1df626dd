"""Attention over what one layer holds, computed here: pairs with votes, and layers that keep numbers of their own.

transformers makes one mask for all layers and adds nothing to single logits of single heads, so such a layer leaves the
model's attention function aside: lookm_kernels.kept_attention does the work, whatever the implementation is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import lookm_kernels
from lookm.forward import Forward
from lookm.masks import causal_without_mask, is_4d, padding_mask, visible
from lookm.store.fixed import Fixed
from lookm_kernels import QuantizedPairs

DROPOUT = "lookm: attention with dropout ({}) over pairs with votes is not supported: call model.eval()"
NOT_ALIKE = (
    "lookm: `attention_mask` in 4D lets queries see different parts of what is stored in few bits: not supported; give "
    "a 2D mask over all tokens"
)
WIDTH = (
    "`attention_mask` in 4D must be as wide as what each layer holds, got {got} where this one has {stored} places: "
    "give a 2D mask over all tokens, read and new ones"
)


@dataclass(frozen=True)
class Held:
    """What a layer holds, the new tokens included: `pairs` and, behind them, keys, values [B, H, whole, D].

    pairs: those in few bits; None: all are whole.
    valid [B, stored] bool: places that are no padding, None: all. hidden [B, H, stored] bool: places that this
    forward's mask hides besides, None: none. key_bias [B, H, P] float32: log votes of the first P places, None: 0.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None
    hidden: Tensor | None
    key_bias: Tensor | None
    pairs: QuantizedPairs | None = None

    @property
    def coded(self) -> int:
        """Places in few bits."""
        return 0 if self.pairs is None else int(self.pairs.key.shape[2])

    @property
    def stored(self) -> int:
        """All places."""
        return self.coded + int(self.keys.shape[2])

    def bias(self) -> Tensor | None:
        """What is added to the logits, minus infinity for what is hidden."""
        if self.hidden is None:
            return self.key_bias
        bias = torch.zeros(self.hidden.shape, dtype=torch.float32, device=self.hidden.device)
        if self.key_bias is not None:
            bias[:, :, : self.key_bias.shape[2]] = self.key_bias
        return bias.masked_fill_(self.hidden, float("-inf"))


def what_is_seen(
    held: Held, forward: Forward, tokens: int, implementation: str, module: Any, query: Tensor, mask: Any,
    arguments: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The arguments causal, key_start and mask of kept_attention and of attention_scores.

    tokens: read so far, those of the query included; arguments: of the attention function, by name. A mask that passed
    the mask overlay was made for the layer that transformers asked: only its columns of new tokens are right for every
    layer, and a sound one shows all that was stored.
    """
    stored, valid, queries = held.stored, held.valid, query.shape[2]
    if not is_4d(mask) or forward.is_plain(mask):
        causal = True if is_4d(mask) else causal_without_mask(implementation, module, arguments.get("is_causal"))
        return {"causal": causal} | padding_mask(valid, forward.start_of(valid), queries)
    shown = visible(mask, implementation, queries, mask.shape[-1])
    if forward.masks(tokens - queries, queries):
        shown = pad(shown[..., -queries:], (stored - queries, 0), value=True)
    elif shown.shape[-1] != stored:
        raise ValueError(WIDTH.format(got=list(mask.shape), stored=stored))
    if valid is not None:
        shown = shown & valid[:, None, None]
    return {"causal": False, "key_start": None, "mask": shown}


def attend(held: Held, query: Tensor, seen: dict[str, Any], arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The output [B, M, Hq, D] as attention functions of transformers give it, and the log-sum-exp [B, Hq, M].

    arguments: what the attention function was called with by name. NotImplementedError for dropout.
    """
    logits, bias = _logits(arguments), held.bias()
    if held.pairs is None:
        output, lse = lookm_kernels.kept_attention(
            query, held.keys, held.values, key_bias=bias, return_lse=True, **logits, **seen
        )
    else:
        output, lse = _attend_to_codes(held, held.pairs, query, bias, seen, logits)
    return output.transpose(1, 2).contiguous(), lse


def _logits(arguments: dict[str, Any]) -> dict[str, Any]:
    """What an attention call's arguments by name do to its logits. NotImplementedError for dropout."""
    if arguments.get("dropout"):
        raise NotImplementedError(DROPOUT.format(arguments["dropout"]))
    return {"scale": arguments.get("scaling"), "softcap": arguments.get("softcap")}


def _attend_to_codes(
    held: Held, pairs: QuantizedPairs, query: Tensor, bias: Tensor | None, seen: dict[str, Any], logits: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Over the pairs in few bits, which all queries see alike, and over the whole ones behind them."""
    coded, mask, start = held.coded, seen["mask"], seen["key_start"]
    if mask is not None:
        hidden = ~mask[:, :1, -1:, :coded]
        if bool((mask[..., :coded] == hidden).any()):
            raise NotImplementedError(NOT_ALIKE)
        if bias is None:
            bias = torch.zeros(pairs.key.shape[:3], dtype=torch.float32, device=query.device)
        bias = pad(bias, (0, max(0, coded - bias.shape[2])))
        bias = torch.cat([bias[:, :, :coded].masked_fill(hidden[:, :, 0], float("-inf")), bias[:, :, coded:]], 2)
    of_codes = lookm_kernels.quantized_attention(
        query, pairs, key_bias=None if bias is None else bias[:, :, :coded], **logits
    )
    of_whole = lookm_kernels.kept_attention(
        query,
        held.keys,
        held.values,
        key_bias=None if bias is None or bias.shape[2] <= coded else bias[:, :, coded:],
        key_start=None if start is None else (start - coded).clamp(min=0),
        mask=None if mask is None else mask[..., coded:],
        causal=seen["causal"],
        return_lse=True,
        **logits,
    )
    return lookm_kernels.combine_attention(*zip(of_codes, of_whole, strict=True))


def attend_to_buffers(store: Fixed, end: Tensor, query: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The output [B, M, Hq, D] for the last M of `end` [B] int32 places in use: no mask, no number of the host."""
    output = lookm_kernels.kept_attention(
        query,
        *store.buffers,
        key_bias=store.key_bias,
        key_start=store.key_start,
        key_end=end,
        return_lse=False,
        **_logits(arguments),
    )
    return output.transpose(1, 2).contiguous()
