"""Argument checks shared by the ops: one clear error that names the argument, what was expected and what came."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCORE_DTYPES = (torch.float32, torch.float64)
FP8 = torch.float8_e4m3fn


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64 (the oracle of the tests); everything else accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(value: object) -> str:
    """How an argument is shown in an error: shape and dtype of a tensor, the repr of anything else."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def require(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise ValueError("`argument` must be ..., got ...") unless the condition holds."""
    if not condition:
        raise ValueError(f"`{argument}` must be {expected}, got {describe(got)}")


def check_tensor(argument: str, tensor: Tensor, dims: str, dtypes: Sequence[torch.dtype]) -> None:
    """A non-empty tensor with the dimensions `dims` ("B H N D") and one of `dtypes`; TypeError for another type."""
    names = dims.split()
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{argument}` must be a tensor [{', '.join(names)}], got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"`{argument}` must be {accepted}, got {describe(tensor)}")
    require(tensor.ndim == len(names), argument, f"[{', '.join(names)}]", tensor)


def check_rows(argument: str, tensor: Tensor, dims: str, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """A query, key or value tensor: four dimensions, none empty, unit last stride."""
    check_tensor(argument, tensor, dims, dtypes)
    require(all(size > 0 for size in tensor.shape), argument, "without an empty dimension", tensor)
    check_unit_stride(argument, tensor)


def check_unit_stride(argument: str, tensor: Tensor) -> None:
    """The elements of a row lie side by side."""
    require(
        tensor.shape[-1] == 1 or tensor.stride(-1) == 1, argument, "unit-stride in its last dimension", tensor.stride()
    )


def check_in_place(argument: str, tensor: Tensor) -> None:
    """A tensor about to be written must not be expanded: two of its elements would be one in memory."""
    expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    require(not expanded, argument, "a tensor with memory of its own (not expanded), as it is modified", tensor)


def overlap(left: Tensor, right: Tensor) -> bool:
    """Whether the memory from the first to the last element of one tensor meets that of the other."""
    (begin, end), (other_begin, other_end) = (_extent(tensor) for tensor in (left, right))
    return begin < other_end and other_begin < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_shape(argument: str, tensor: Tensor, shape: Sequence[int], dims: str) -> None:
    """Exactly the given shape, explained by the names of its dimensions."""
    require(
        tuple(tensor.shape) == tuple(shape),
        argument,
        f"[{', '.join(dims.split())}] = {list(shape)}",
        tensor,
    )


def check_device(reference_argument: str, reference: Tensor, **tensors: Tensor | None) -> None:
    """All tensors on the device of the reference tensor."""
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"`{argument}` must be on {reference.device} like `{reference_argument}`, got {tensor.device}"
            )


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that holds the numbers of all."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def check_attention(
    query: Tensor,
    key: Tensor,
    key_start: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    right_aligned: bool = True,
    key_dtypes: Sequence[torch.dtype] | None = None,
    channels: int = 1,
) -> None:
    """query [B, Hq, M, D] over key [B, H, N, D], the keys that it may see, and what is done to the logits.

    right_aligned: the queries stand at the last of the keys, so there are not more of them.
    key_dtypes: those of the keys, if others. channels: how many of them one element of a key holds.
    """
    check_rows("query", query, "B Hq M D", dtypes)
    check_rows("key", key, "B H N D", dtypes if key_dtypes is None else key_dtypes)
    batch, heads, queries, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    require(key.shape[0] == batch, "key", f"of batch size {batch} like `query`", key)
    require(key.shape[3] * channels == width, "key", f"of head dimension {width} like `query`", key)
    require(heads % kv_heads == 0, "key", f"of a number of heads that divides the {heads} of `query`", key)
    require(queries <= keys or not right_aligned, "query", f"of at most as many tokens as `key` ({keys})", query)
    check_device("query", query, key=key, mask=mask)
    check_row_positions("key_start", key_start, query)
    if mask is not None:
        check_tensor("mask", mask, "B Hq M N", (torch.bool,))
        fits = mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads) and mask.shape[2:] == (queries, keys)
        require(fits, "mask", f"[B or 1, Hq or 1, M, N] = [{batch}, {heads}, {queries}, {keys}]", mask)
    require(scale is None or scale > 0, "scale", "positive or None", scale)
    require(softcap is None or softcap > 0, "softcap", "positive or None", softcap)


def check_key_bias(key_bias: Tensor | None, query: Tensor, key: Tensor) -> None:
    """A number for each of the first keys, or None."""
    if key_bias is not None:
        check_device("query", query, key_bias=key_bias)
        check_tensor("key_bias", key_bias, "B H P", SCORE_DTYPES)
        batch, heads, keys, _ = key.shape
        fits = key_bias.shape[:2] == (batch, heads) and key_bias.shape[2] <= keys
        require(fits, "key_bias", f"[B, H, P] = [{batch}, {heads}, at most {keys}]", key_bias)


def check_row_positions(argument: str, positions: Tensor | None, rows: Tensor, rows_argument: str = "query") -> None:
    """One int32 position for each row of another argument, or None."""
    if positions is not None:
        check_device(rows_argument, rows, **{argument: positions})
        check_tensor(argument, positions, "B", (torch.int32,))
        check_shape(argument, positions, rows.shape[:1], "B")


def check_inside(argument: str, positions: Tensor | None, keys: int) -> None:
    """Positions [B] between keys, 0 to all. Values of other devices are not read: that would wait for them."""
    if positions is not None and positions.device.type == "cpu":
        inside = int(positions.min()) >= 0 and int(positions.max()) <= keys
        require(inside, argument, f"positions from 0 to {keys}", positions.tolist())


def check_indices(argument: str, indices: Tensor, limit: int) -> None:
    """Indices in [-1, limit), -1 for an empty place. Values of other devices are not read: that would wait for them."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        require(low >= -1 and high < limit, argument, f"indices from -1 to {limit - 1}", [low, high])


def check_ascending(argument: str, indices: Tensor) -> None:
    """Right-aligned and strictly ascending after the leading empty places (-1), as select_tokens gives them."""
    if indices.device.type == "cpu" and indices.shape[-1] > 1:
        left, right = indices[..., :-1], indices[..., 1:]
        ordered = bool(((left < right) | ((left == -1) & (right == -1))).all())
        require(ordered, argument, "strictly ascending with empty places (-1) first", indices)


def check_tensors(**tensors: Tensor | None) -> None:
    """Before torch's dispatcher, whose own error names no argument: tensors, or None for one that may be left out."""
    for argument, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"`{argument}` must be a tensor, got {type(tensor).__name__}")


def check_call(**tensors: Tensor | None) -> None:
    """Before torch's dispatcher: tensors, and none that needs a derivative, rather than cut a graph silently."""
    check_tensors(**tensors)
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"`{argument}` must not require a gradient (the op has none), got requires_grad=True; "
                "detach it or call the op under torch.no_grad()"
            )
