"""Bad input gets one clear error each: the argument, what was expected, what came. Nothing is modified.

All calls are those of inputs.arguments: 2 rows, 6 query heads, 3 KV heads, 9 queries, 13 tokens, 5 and 6 of them kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from inputs import IN_PLACE, INTERPRETED, OPS, arguments, copied, memory, new_outs, public, same_bits, tensors_of

from lookm_kernels._checks import FP8

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Bad(NamedTuple):
    """One argument of one op replaced by what `change` makes of it.

    reads: found in the values of a tensor; named: the argument that the error names, if another.
    """

    op: str
    argument: str
    change: Callable[[Any], Any]
    error: type[Exception]
    expected: str
    came: str
    reads: bool = False
    named: str = ""


def first_set_to(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A copy whose last element along every dimension is `number`."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = number
        return tensor

    return change


def constant(value: object) -> Callable[[Any], Any]:
    return lambda _: value


def every_second_column(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :1].expand(tensor.shape)


BAD = (
    [
        Bad("attention_scores", "query", lambda x: x[0], ValueError, "[B, Hq, M, D]", "[6, 9, 8]"),
        Bad(
            "attention_scores", "query", torch.Tensor.int, TypeError, "float16 or bfloat16", "torch.int32 [2, 6, 9, 8]"
        ),
        Bad("attention_scores", "query", lambda x: x[:, :, :0], ValueError, "without an empty dim", "[2, 6, 0, 8]"),
        Bad(
            "attention_scores", "query", lambda x: x.repeat(1, 1, 2, 1), ValueError, "at most as many", "[2, 6, 18, 8]"
        ),
        Bad("attention_scores", "query", every_second_column, ValueError, "unit-stride in its last", "2)"),
        Bad(
            "attention_scores",
            "key",
            lambda x: x.to(FP8),
            ValueError,
            "float8_e4m3fn where `query` is",
            "float8_e4m3fn",
        ),
        Bad(
            "attention_scores", "query", lambda x: x.to(FP8), ValueError, "float8_e4m3fn where", "float32", named="key"
        ),
        Bad("attention_scores", "key", torch.Tensor.int, TypeError, "float16 or bfloat16", "torch.int32 [2, 3, 13, 8]"),
        Bad("attention_scores", "key", lambda x: x[:, [0, 1, 2, 2]], ValueError, "divides the 6", "[2, 4, 13, 8]"),
        Bad("attention_scores", "key", lambda x: x[:1], ValueError, "batch size 2", "[1, 3, 13, 8]"),
        Bad("attention_scores", "key", lambda x: x[..., :7], ValueError, "head dimension 8", "[2, 3, 13, 7]"),
        Bad("attention_scores", "lse", lambda _: torch.zeros(2, 6, 8), ValueError, "[2, 6, 9]", "[2, 6, 8]"),
        Bad("attention_scores", "lse", lambda _: torch.zeros(2, 6, 9).half(), TypeError, "float32", "float16"),
        Bad("attention_scores", "query_weight", lambda x: x[:, :8], ValueError, "[2, 9]", "[2, 8]"),
        Bad("attention_scores", "query_weight", lambda x: x[:, None, :8], ValueError, "[2, 1, 9]", "[2, 1, 8]"),
        Bad("attention_scores", "query_weight", lambda x: x[:, None][:, :0], ValueError, "[2, 1, 9]", "[2, 0, 9]"),
        Bad("attention_scores", "query_weight", torch.Tensor.bool, TypeError, "float32", "torch.bool [2, 9]"),
        Bad("attention_scores", "key_start", torch.Tensor.long, TypeError, "int32", "torch.int64 [2]"),
        Bad("attention_scores", "key_start", lambda x: x[:1], ValueError, "[B] = [2]", "[1]"),
        Bad("attention_scores", "key_start", first_set_to(-1), ValueError, "from 0 to 13", "[0, -1]", reads=True),
        Bad("attention_scores", "key_start", first_set_to(14), ValueError, "from 0 to 13", "[0, 14]", reads=True),
        Bad("attention_scores", "mask", torch.Tensor.float, TypeError, "bool", "torch.float32 [2, 1, 9, 13]"),
        Bad("attention_scores", "mask", lambda x: x[..., :12], ValueError, "[2, 6, 9, 13]", "[2, 1, 9, 12]"),
        Bad("attention_scores", "query_position", torch.Tensor.long, TypeError, "int32", "torch.int64 [2, 9]"),
        Bad("attention_scores", "query_position", lambda x: x[:, :8], ValueError, "[2, 9]", "[2, 8]"),
        Bad("attention_scores", "query_position", lambda x: x.flip(1), ValueError, "ascending", "[2, 9]", reads=True),
        Bad("attention_scores", "query_position", first_set_to(13), ValueError, "-1 to 12", "13", reads=True),
        Bad("attention_scores", "head_scale", torch.Tensor.half, TypeError, "float32", "torch.float16 [2, 6]"),
        Bad("attention_scores", "head_scale", lambda x: x[:, :3], ValueError, "[B, Hq] = [2, 6]", "[2, 3]"),
        Bad("attention_scores", "head_scale", first_set_to(0), ValueError, "positive", "0.0", reads=True),
        Bad("attention_scores", "scale", constant(0.0), ValueError, "positive or None", "0.0"),
        Bad("attention_scores", "softcap", constant(0.0), ValueError, "positive or None", "0.0"),
    ]
    + [
        Bad(op, *rest)
        for op in ("select_tokens", "compress_")
        for rest in (
            ("scores", torch.Tensor.half, TypeError, "float32 or float64", "torch.float16 [2, 3, 13]"),
            ("scores", lambda x: x[0], ValueError, "[B, H, N]", "[3, 13]"),
            ("tier", torch.Tensor.long, TypeError, "int32", "torch.int64 [2, 13]"),
            ("tier", lambda x: x[:1], ValueError, "[B, N] = [2, 13]", "[1, 13]"),
            ("tier", first_set_to(4), ValueError, "from 0 to 3", "[0, 4]", True),
            ("tier", first_set_to(-1), ValueError, "from 0 to 3", "[-1, 3]", True),
            ("keep", constant(-1), ValueError, "from 0 to N = 13", "[-1]"),
            ("keep", constant([5, 14]), ValueError, "from 0 to N = 13", "[5, 14]"),
            ("keep", constant([1, 2, 3]), ValueError, "one per row (2)", "[1, 2, 3]"),
            ("keep", constant([]), ValueError, "one per row (2)", "[]"),
            ("keep", constant(0.2), TypeError, "an int or a sequence of ints", "0.2"),
            ("keep", constant([2.0, 3.0]), TypeError, "an int or a sequence of ints", "[2.0, 3.0]"),
            ("keep", constant(True), TypeError, "an int or a sequence of ints", "True"),
            ("keep", constant(None), TypeError, "an int or a sequence of ints", "None"),
        )
    ]
    + [
        Bad(op, argument, *rest)
        for op, arguments_ in {
            "nearest_kept": ("kept", "evicted"),
            "merge_": ("kept", "evicted", "pivot"),
            "compact_": ("kept",),
        }.items()
        for argument in arguments_
        for rest in (
            (torch.Tensor.long, TypeError, "int32", "torch.int64 [2, 3, "),
            (lambda x: x[0], ValueError, "[B, H, ", "int32 [3, "),
            (lambda x: x[:1], ValueError, "like `key`", "int32 [1, 3, "),
            (lambda x: x.repeat(1, 1, 9), ValueError, "at most 13", "int32 [2, 3, "),
            (first_set_to(-2), ValueError, "indices from -1 to", "[-2, ", True),
            (first_set_to(99), ValueError, "indices from -1 to", ", 99]", True),
        )
    ]
    + [
        Bad(op, argument, *rest)
        for op in ("merge_", "compact_", "compress_")
        for argument in ("key", "value")
        for rest in (
            (lambda x: x[0], ValueError, "[B, H, N, D", "float32 [3, 13, "),
            (torch.Tensor.int, TypeError, "float", "torch.int32 [2, 3, 13, "),
            (lambda x: x[..., :0], ValueError, "without an empty dimension", "[2, 3, 13, 0]"),
            (every_second_column, ValueError, "unit-stride", "2)"),
            (expanded, ValueError, "not expanded", "float32 [2, 3, 13, "),
        )
    ]
    + [
        Bad(f"{op}.out", argument, *rest)
        for op in IN_PLACE
        for argument in ("out_key", "out_value")
        for rest in (
            (lambda x: x[0], ValueError, "[B, H, K, D", "float32 [3, 6, "),
            (torch.Tensor.half, TypeError, "float32", "torch.float16 [2, 3, 6, "),
            (lambda x: x[:, :, 1:], ValueError, "] = [2, 3, 6, ", "float32 [2, 3, 5, "),
            (every_second_column, ValueError, "unit-stride", "2)"),
            (expanded, ValueError, "not expanded", "float32 [2, 3, 6, "),
            (constant(None), ValueError, "given where `out_", "None"),
        )
    ]
    + [
        Bad(op, argument, *rest)
        for op, arguments_ in {
            "nearest_kept": ("group", "min_similarity"),
            "merge_": ("votes", "out_votes"),
            "compress_": ("group", "min_similarity", "votes", "out_votes"),
        }.items()
        for argument in arguments_
        for rest in {
            "group": (
                (torch.Tensor.long, TypeError, "int32", "torch.int64 [2, 13]"),
                (lambda x: x[:, 1:], ValueError, "[B, N] = [2, 13]", "int32 [2, 12]"),
                (lambda x: x[:, None], ValueError, "[B, N]", "int32 [2, 1, 13]"),
            ),
            "min_similarity": (
                (torch.Tensor.double, TypeError, "float32", "torch.float64 [2, 3]"),
                (lambda x: x[:, 1:], ValueError, "[B, H] = [2, 3]", "[2, 2]"),
                (lambda x: x[0], ValueError, "[B, H]", "[3]"),
                (constant("high"), TypeError, "None, a number or a tensor [B, H]", "str"),
                (constant(True), TypeError, "None, a number or a tensor [B, H]", "bool"),
                (constant(float("nan")), ValueError, "a number", "nan"),
            ),
            "votes": (
                (torch.Tensor.int, TypeError, "float32", "torch.int32 [2, 3, 13]"),
                (torch.Tensor.double, TypeError, "float32", "torch.float64 [2, 3, 13]"),
                (lambda x: x[:, :, 1:], ValueError, "[B, H, N] = [2, 3, 13]", "[2, 3, 12]"),
                (lambda x: x[0], ValueError, "[B, H, N]", "float32 [3, 13]"),
            ),
            "out_votes": (
                (torch.Tensor.half, TypeError, "float32", "torch.float16 [2, 3, 6]"),
                (lambda x: x[:, :, 1:], ValueError, "[B, H, K] = [2, 3, 6]", "[2, 3, 5]"),
                (lambda x: x[0], ValueError, "[B, H, K]", "float32 [3, 6]"),
                (every_second_column, ValueError, "contiguous", "float32 [2, 3, 6]"),
            ),
        }[argument]
    ]
    + [
        Bad("nearest_kept", argument, *rest)
        for argument in ("kept_key", "kept_value")
        for rest in (
            (torch.Tensor.half, TypeError, "float32", "torch.float16 [2, 3, 6, "),
            (lambda x: x[0], ValueError, "[B, H, K, D]", "float32 [3, 6, "),
            (lambda x: x[:, :, 1:], ValueError, "] = [2, 3, 6, ", "[2, 3, 5, "),
            (lambda x: x[..., 1:], ValueError, "] = [2, 3, 6, ", "[2, 3, 6, "),
            (every_second_column, ValueError, "unit-stride", "2)"),
        )
    ]
    + [
        Bad("nearest_kept", "value", lambda x: x[:, :, 1:], ValueError, "[2, 3, 13] like `key`", "[2, 3, 12, 5]"),
        Bad("nearest_kept", "value", torch.Tensor.int, TypeError, "float16 or bfloat16", "torch.int32"),
        Bad("nearest_kept", "value", every_second_column, ValueError, "unit-stride", "2)"),
        Bad("nearest_kept", "value", constant(None), ValueError, "None where", "[2, 3, 6, 5]", named="kept_value"),
        Bad("compress_", "similarity", constant("value"), ValueError, "one of ['key', 'key_value']", "'value'"),
        Bad("compress_", "refine", constant(-1), ValueError, "a number of rounds, 0 or more", "-1"),
        Bad("compress_", "refine", constant(1.5), ValueError, "a number of rounds, 0 or more", "1.5"),
        Bad("compress_", "refine", constant(True), ValueError, "a number of rounds, 0 or more", "True"),
        Bad("nearest_kept", "key", lambda x: x[0], ValueError, "[B, H, N, D]", "[3, 13, 8]"),
        Bad("nearest_kept", "key", lambda x: x[..., :0], ValueError, "without an empty dimension", "[2, 3, 13, 0]"),
        Bad("nearest_kept", "key", torch.Tensor.bool, TypeError, "float16 or bfloat16", "torch.bool"),
        Bad("merge_", "value", lambda x: x[:, :, :12], ValueError, "[2, 3, 13] like `key`", "[2, 3, 12, 5]"),
        Bad("merge_", "pivot", lambda x: x[..., 1:], ValueError, "[B, H, E]", "int32 [2, 3, 7]"),
        Bad("merge_", "kept", lambda x: x.flip(-1), ValueError, "strictly ascending", "int32 [2, 3, 6]", reads=True),
        Bad("compact_", "kept", lambda x: x.flip(-1), ValueError, "strictly ascending", "int32 [2, 3, 6]", reads=True),
        Bad("merge_", "evicted_weight", torch.Tensor.half, TypeError, "float32", "torch.float16"),
        Bad("merge_", "evicted_weight", lambda x: x[..., 1:], ValueError, "[B, H, E]", "[2, 3, 7]"),
        Bad("merge_", "kept_weight", torch.Tensor.double, TypeError, "float32", "torch.float64"),
        Bad("merge_", "kept_weight", lambda x: x[..., 1:], ValueError, "[B, H, K]", "[2, 3, 5]"),
        Bad("kept_attention", "query", lambda x: x.int(), TypeError, "float16 or bfloat16", "torch.int32"),
        Bad("kept_attention", "query", lambda x: x.repeat(1, 1, 2, 1), ValueError, "at most as many tokens", "18, 8]"),
        Bad("kept_attention", "query", every_second_column, ValueError, "unit-stride", "(864, 144, 16, 2)"),
        Bad("kept_attention", "key", lambda x: x[:1], ValueError, "batch size 2", "[1, 3, 13, 8]"),
        Bad("kept_attention", "key", lambda x: x[..., :4], ValueError, "head dimension 8", "13, 4]"),
        Bad("kept_attention", "key", lambda x: x.repeat(1, 2, 1, 1)[:, :4], ValueError, "divides the 6", "[2, 4, 13"),
        Bad("kept_attention", "value", lambda x: x[:, :, :9], ValueError, "[2, 3, 13]", "[2, 3, 9, 5]"),
        Bad("kept_attention", "key_bias", lambda x: x.half(), TypeError, "float32 or float64", "torch.float16"),
        Bad("kept_attention", "key_bias", lambda x: x.repeat(1, 1, 2), ValueError, "at most 13", "[2, 3, 20]"),
        Bad("kept_attention", "key_bias", lambda x: x[:, :1], ValueError, "[2, 3, at most 13]", "[2, 1, 10]"),
        Bad("kept_attention", "key_start", lambda x: x.long(), TypeError, "int32", "torch.int64"),
        Bad("kept_attention", "key_start", first_set_to(14), ValueError, "from 0 to 13", "[0, 14]", reads=True),
        Bad("kept_attention", "key_end", lambda x: x.long(), TypeError, "int32", "torch.int64"),
        Bad("kept_attention", "key_end", lambda x: x[:1], ValueError, "[B] = [2]", "[1]"),
        Bad("kept_attention", "key_end", first_set_to(14), ValueError, "from 0 to 13", "[13, 14]", reads=True),
        Bad("kept_attention", "mask", lambda x: x.float(), TypeError, "bool", "torch.float32"),
        Bad("kept_attention", "mask", lambda x: x[..., 1:], ValueError, "[2, 6, 9, 13]", "[2, 1, 9, 12]"),
        Bad("kept_attention", "scale", constant(0.0), ValueError, "positive", "0.0"),
        Bad("kept_attention", "softcap", constant(-1.0), ValueError, "positive", "-1.0"),
        Bad("quantize_pairs", "key", lambda x: x.int(), TypeError, "float16 or bfloat16", "torch.int32"),
        Bad("quantize_pairs", "key", lambda x: x[..., :7], ValueError, "of an even width for int4", "[2, 3, 13, 7]"),
        Bad("quantize_pairs", "key", every_second_column, ValueError, "unit-stride", "2)"),
        Bad("quantize_pairs", "value", lambda x: x[..., :3], ValueError, "of an even width for int4", "[2, 3, 13, 3]"),
        Bad("quantize_pairs", "value", lambda x: x[:, :, 1:], ValueError, "[2, 3, 13] like `key`", "[2, 3, 12, 4]"),
        Bad("quantize_pairs", "format", constant("int2"), ValueError, "one of ['int8', 'fp8', 'int4']", "'int2'"),
        Bad("quantize_pairs", "key_start", lambda x: x[:1], ValueError, "[B] = [2]", "[1]"),
        Bad("quantize_pairs", "key_start", lambda x: x.long(), TypeError, "int32", "torch.int64"),
        Bad("quantize_pairs", "key_start", first_set_to(14), ValueError, "from 0 to 13", "[0, 14]", reads=True),
        Bad("quantized_attention", "query", lambda x: x.int(), TypeError, "float16 or bfloat16", "torch.int32"),
        Bad("quantized_attention", "query", every_second_column, ValueError, "unit-stride", "(864, 144, 16, 2)"),
        Bad("quantized_attention", "key", lambda x: x.float(), TypeError, "int8 or float8_e4m3fn or uint8", "float32"),
        Bad("quantized_attention", "key", lambda x: x[:1], ValueError, "batch size 2", "[1, 3, 13, 4]"),
        Bad("quantized_attention", "key", lambda x: x[..., :3], ValueError, "head dimension 8", "[2, 3, 13, 3]"),
        Bad(
            "quantized_attention",
            "key",
            lambda x: x.repeat(1, 1, 1, 2).char(),
            ValueError,
            "torch.int8",
            "uint8",
            named="value",
        ),
        Bad("quantized_attention", "value", lambda x: x[:, :, :9], ValueError, "[2, 3, 13]", "[2, 3, 9, 2]"),
        Bad("quantized_attention", "key_scale", lambda x: x[..., 1:], ValueError, "[2, 3, 1, 8]", "[2, 3, 1, 7]"),
        Bad("quantized_attention", "key_scale", torch.Tensor.int, TypeError, "float16 or bfloat16", "torch.int32"),
        Bad("quantized_attention", "key_zero", constant(None), ValueError, "a tensor with codes of uint8", "None"),
        Bad("quantized_attention", "value_scale", lambda x: x[0], ValueError, "[B, H, N, groups]", "[3, 13, 2]"),
        Bad("quantized_attention", "value_zero", lambda x: x[..., :1], ValueError, "[2, 3, 13, 2]", "[2, 3, 13, 1]"),
        Bad("quantized_attention", "key_bias", lambda x: x.repeat(1, 1, 2), ValueError, "at most 13", "[2, 3, 20]"),
        Bad("quantized_attention", "key_start", first_set_to(14), ValueError, "from 0 to 13", "[0, 14]", reads=True),
        Bad("quantized_attention", "key_end", first_set_to(14), ValueError, "from 0 to 13", "[13, 14]", reads=True),
        Bad("quantized_attention", "scale", constant(0.0), ValueError, "positive", "0.0"),
        Bad("quantized_attention", "softcap", constant(-1.0), ValueError, "positive", "-1.0"),
        Bad("compress_", "scores", lambda x: x[:, :2], ValueError, "[B, H, N] = [2, 3, 13]", "[2, 2, 13]"),
        Bad("compress_", "rule", constant("mean"), ValueError, "one of ['average', ", "'mean'"),
        Bad("compress_", "gate", constant("median"), ValueError, "None or one of ['mean_similarity']", "'median'"),
    ]
)


TENSORS = [(op, argument) for op in OPS for argument in tensors_of(arguments(op))]
FLOATS = [(op, argument) for op, argument in TENSORS if arguments(op)[argument].is_floating_point()]
DIFFERENTIABLE = [("kept_attention", argument) for argument in ("query", "key", "value")]


def check(op: str, given: dict[str, Any], error: type[Exception], argument: str, expected: str, came: str) -> None:
    """The error says it all, and every tensor of the call is as it was, bit for bit."""
    before = {name: memory(x).clone() for name, x in tensors_of(given).items() if x.device.type != "meta"}
    with pytest.raises(error, match=f"`{argument}` must .*{re.escape(expected)}.*, got .*{re.escape(came)}"):
        public(op)(**given)
    for name, was in before.items():
        assert same_bits(memory(given[name]), was)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.op}-{bad.argument}-{bad.came}")
def test_wrong_argument(device: torch.device, bad: Bad) -> None:
    if bad.reads and device.type != "cpu":
        pytest.skip("values on a device are not read: that would wait for it")
    given = arguments(bad.op, device)
    wrong = bad.change(given[bad.argument])
    given[bad.argument] = wrong.to(device) if isinstance(wrong, torch.Tensor) else wrong
    check(bad.op, given, bad.error, bad.named or bad.argument, bad.expected, bad.came)


@pytest.mark.parametrize(("op", "argument"), TENSORS)
def test_not_a_tensor(device: torch.device, op: str, argument: str) -> None:
    given = arguments(op, device)
    given[argument] = given[argument].cpu().numpy()
    check(op, given, TypeError, argument, "a tensor", "ndarray")


@pytest.mark.parametrize("op", ["merge_", "compact_", "compress_"])
def test_one_tensor_for_key_and_value(device: torch.device, op: str) -> None:
    given = arguments(op, device)
    check(op, given | {"value": given["key"]}, ValueError, "value", "in other memory than `key`", "torch.float32")


@pytest.mark.parametrize("op", [f"{op}.out" for op in IN_PLACE])
@pytest.mark.parametrize("begin", [0, 3, 7])
@pytest.mark.parametrize("out", ["out_key", "out_value"])
@pytest.mark.parametrize("read", ["key", "value"])
def test_outs_in_the_memory_of_what_is_read(device: torch.device, op: str, read: str, out: str, begin: int) -> None:
    given = arguments(op, device)
    given["value"] = given["value"].repeat(1, 1, 1, 2)[..., : given["key"].shape[3]].contiguous()
    given |= new_outs(given, 6)
    given[out] = given[read][:, :, begin : begin + 6]
    check(op, given, ValueError, out, f"in other memory than `{read}`", "torch.float32 [2, 3, 6, 8]")


@pytest.mark.parametrize("op", [f"{op}.out" for op in IN_PLACE])
def test_one_tensor_for_both_outs(device: torch.device, op: str) -> None:
    given = arguments(op, device)
    given["value"] = given["key"]
    given["out_value"] = given["out_key"]
    check(op, given, ValueError, "out_value", "in other memory than `out_key`", "torch.float32")


@pytest.mark.parametrize("op", [op for op in OPS if "out_votes" in arguments(op)])
def test_votes_written_over_those_that_are_read(device: torch.device, op: str) -> None:
    given = arguments(op, device)
    both = torch.ones(2 * given["votes"].numel(), device=device)
    given["votes"] = both[: given["votes"].numel()].view(given["votes"].shape)
    size = given["out_votes"].numel()
    given["out_votes"] = both[given["votes"].numel() - 1 :][:size].view(given["out_votes"].shape)
    check(op, given, ValueError, "out_votes", "in other memory than `votes`", "torch.float32 [2, 3, 6]")


@pytest.mark.parametrize("op", OPS)
def test_none_for_a_tensor(device: torch.device, op: str) -> None:
    given = arguments(op, device)
    first = next(iter(given))
    check(op, given | {first: None}, TypeError, first, "a tensor", "NoneType")


@pytest.mark.parametrize(("op", "argument"), TENSORS)
def test_another_device(device: torch.device, op: str, argument: str) -> None:
    """The first argument sets the device: where it is the odd one, the second is named."""
    given = arguments(op, device)
    given[argument] = given[argument].to("meta")
    first, second = list(tensors_of(given))[:2]
    named, expected, came = (second, "meta", str(device)) if argument == first else (argument, str(device), "meta")
    check(op, given, ValueError, named, f"on {expected}", came)


@pytest.mark.parametrize(("op", "argument"), [pair for pair in FLOATS if pair not in DIFFERENTIABLE])
def test_a_gradient(device: torch.device, op: str, argument: str) -> None:
    given = arguments(op, device)
    given[argument].requires_grad_()
    check(op, given, ValueError, argument, "not require a gradient", "requires_grad=True")


@pytest.mark.skipif(not INTERPRETED, reason="a process either interprets or compiles")
@pytest.mark.parametrize(("op", "argument"), [pair for pair in FLOATS if pair[1] in ("key", "value")])
def test_bfloat16_in_the_interpreter_of_triton(device: torch.device, op: str, argument: str) -> None:
    """Its products of bfloat16 are garbage."""
    given = arguments(op, device)
    alike = ("query", argument, f"out_{argument}", f"kept_{argument}")
    given |= {name: x.bfloat16() for name, x in given.items() if name in alike}
    before = copied(given)
    with pytest.raises(ValueError, match="backend triton: bfloat16, which its interpreter multiplies and rounds"):
        public(op)(**given)
    assert all(same_bits(x, before[name]) for name, x in tensors_of(given).items())
