"""Attention over stored pairs, a block of queries at a time, its products a block of keys at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from lookm_kernels._ambient import whole_products
from lookm_kernels._checks import accumulation_dtype
from lookm_kernels.reference._blocks import rows_per_block

# 1 MiB of float32: stays in a core's cache, and is taken from memory that the process has already
PART_ELEMENTS = 1 << 18
LINE = 64


class Rows(Protocol):
    """Keys or values [H, N, D] of one row, in whatever form; every result in the dtype of the other factor."""

    @property
    def shape(self) -> Sequence[int]: ...

    def logits(self, query: Tensor, scale: float) -> Tensor:
        """scale * query . key for query [H, R, D]: [H, R, N], new."""

    def weighted(self, attention: Tensor) -> Tensor:
        """The sums [H, R, D] over the rows with the weights [H, R, N], which may be overwritten."""


# (row, first token, token behind the last) to the keys and the values
Read = Callable[[int, int, int], tuple[Rows, Rows]]


def kept_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See lookm_kernels.kept_attention."""

    def read(row: int, start: int, end: int) -> tuple[Rows, Rows]:
        return Whole(key[row, :, start:end]), Whole(value[row, :, start:end])

    out = query.new_zeros((*query.shape[:3], value.shape[3]))
    return attend_rows(out, read, key.shape[2], query, key_bias, key_start, key_end, mask, causal, scale, softcap)


def attend_rows(
    out: Tensor,
    read: Read,
    keys: int,
    query: Tensor,
    key_bias: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Into out [B, Hq, M, Dv], zeros, row by row over its valid tokens: padding and other rows change no bit."""
    batch, heads, queries, _ = query.shape
    lse = query.new_full((batch, heads, queries), float("-inf"), dtype=accumulation_dtype(query.dtype))
    starts = [0] * batch if key_start is None else key_start.tolist()
    ends = [keys] * batch if key_end is None else key_end.tolist()
    for row, (start, tokens) in enumerate(zip(starts, ends, strict=True)):
        first = max(0, start - (tokens - queries)) if causal else 0
        if start >= tokens:
            continue
        seen = mask if mask is None else mask[row if mask.shape[0] > 1 else 0, :, first:, start:tokens]
        bias = key_bias if key_bias is None else key_bias[row, :, start:tokens].to(lse.dtype)
        block = rows_per_block(heads * (tokens - start))
        with whole_products(query.device):
            for begin in range(first, queries, block):
                rows = slice(begin, min(begin + block, queries))
                here = slice(rows.start - first, rows.stop - first)
                last = tokens - start - (queries - rows.stop) if causal else tokens - start
                out[row, :, rows], lse[row, :, rows] = _attend(
                    query[row, :, rows],
                    *read(row, start, start + last),
                    bias,
                    None if seen is None else seen[:, here, :last],
                    causal,
                    scale,
                    softcap,
                )
    return out, lse


def _attend(
    query: Tensor,
    key: Rows,
    value: Rows,
    bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """query [Hq, M, D], key [H, N, D], value [H, N, Dv], bias [H, P], mask [Hq or 1, M, N] -> [Hq, M, Dv], [Hq, M].

    Query i stands at the key i + N - M under a causal mask.
    """
    (heads, queries, width), (kv_heads, tokens, _) = query.shape, key.shape
    dtype = accumulation_dtype(query.dtype)
    plain = queries == 1 and mask is None and softcap is None
    if plain and isinstance(key, Whole) and isinstance(value, Whole) and query.device.type == "cpu":
        return _attend_fused(query, key.x, value.x, bias, scale)
    # the queries of all heads of a KV head are rows of one product: no key is expanded
    packed = query.to(dtype).reshape(kv_heads, -1, width)
    packed_logits = key.logits(packed, scale)
    if softcap is not None:
        packed_logits.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        biased = min(bias.shape[1], tokens)
        packed_logits[:, :, :biased] += bias[:, None, :biased]
    logits = packed_logits.view(heads, queries, tokens)
    if causal and queries > 1:
        unseen = torch.ones(queries, queries - 1, dtype=torch.bool, device=query.device).triu()
        logits[:, :, tokens - queries + 1 :].masked_fill_(unseen, float("-inf"))
    if mask is not None:
        logits.masked_fill_(~mask, float("-inf"))
    top = packed_logits.amax(-1, keepdim=True)
    # 0 where nothing is seen: the exponentials are 0 then, not NaN
    top.masked_fill_(top == float("-inf"), 0.0)
    attention = packed_logits.sub_(top).exp_()
    total = attention.sum(-1, keepdim=True)
    out = value.weighted(attention)
    out.div_(total.masked_fill(total == 0, 1.0))
    return out.view(heads, queries, -1), top.add_(total.log()).view(heads, queries)


def _attend_fused(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """_attend for one query, in torch's own kernel for a CPU, which reads keys and values once and as they are."""
    (heads, _, width), kv_heads = query.shape, key.shape[0]
    # the heads of a group are the queries of one head: no key is expanded
    packed = query.reshape(1, kv_heads, -1, width)
    value_width = value.shape[2]
    if value_width != width:
        packed, key, value = (pad(x, (0, max(value_width, width) - x.shape[-1])) for x in (packed, key, value))
    added = None
    if bias is not None:
        added = pad(bias, (0, key.shape[1] - bias.shape[1]))[None, :, None].expand(-1, -1, packed.shape[2], -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        packed, key[None], value[None], attn_mask=added, scale=scale
    )
    out, lse = out.reshape(heads, 1, -1)[..., :value_width], lse.reshape(heads, 1)
    if added is not None:
        # where every key is hidden it has no number
        blind = (added.amax(-1) == float("-inf")).reshape(heads, 1)
        out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, float("-inf"))
    return out, lse


def product_of_parts(query: Tensor, parts: Iterable[Tensor], scale: float) -> Tensor:
    """scale * query . key, for keys that come in parts [H, n, D] of all."""
    logits = [torch.baddbmm(query.new_empty(()), query, part.mT, beta=0, alpha=scale) for part in parts]
    return logits[0] if len(logits) == 1 else torch.cat(logits, -1)


def sum_of_parts(attention: Tensor, parts: Iterable[Tensor], width: int) -> Tensor:
    """The sums with the weights `attention` over values that come in parts [H, n, D] of all."""
    out = attention.new_zeros(*attention.shape[:2], width)
    begin = 0
    for part in parts:
        out.baddbmm_(attention[:, :, begin : begin + part.shape[1]], part)
        begin += part.shape[1]
    return out


class Whole(NamedTuple):
    """x [H, N, D] as it is."""

    x: Tensor

    @property
    def shape(self) -> Sequence[int]:
        return self.x.shape

    def logits(self, query: Tensor, scale: float) -> Tensor:
        return product_of_parts(query, _parts(self.x, query.dtype), scale)

    def weighted(self, attention: Tensor) -> Tensor:
        return sum_of_parts(attention, _parts(self.x, attention.dtype), self.x.shape[2])


def tokens_of_part(heads: int, tokens: int, width: int) -> int:
    """How many tokens of [H, N, D] are converted at once."""
    return min(tokens, max(16, PART_ELEMENTS // (heads * width)))


def _parts(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of x [H, N, D] in order, in a dtype; each part is valid until the next.

    All at once where x has that dtype, as they are if they lie at multiples of a cache line: products of what lies
    otherwise would have other bits. Else some at a time, as converting all would cost more than the products.
    """
    heads, tokens, width = x.shape
    if x.dtype == dtype:
        places = (x.data_ptr(), *(stride * x.element_size() for stride in (*x.stride()[:2], width)))
        yield x if all(place % LINE == 0 for place in places) else x.clone(memory_format=torch.contiguous_format)
        return
    size = tokens_of_part(heads, tokens, width)
    buffer = x.new_empty((heads, size, width), dtype=dtype)
    for part in torch.split(x, size, 1):
        yield buffer[:, : part.shape[1]].copy_(part)
