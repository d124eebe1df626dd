"""What holds for every op: torch's own checks, compilation, independence of the batch, the same bits every time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inputs import (
    INTERPRETED,
    LOW_PRECISION,
    OPS,
    PLACE_MATTERS,
    arguments,
    call,
    copied,
    overload,
    public,
    random,
    same_bits,
    tensors_of,
    tiers,
)
from torch import Tensor

from lookm_kernels import attention_scores, compress_, nearest_kept, rules, select_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def as_in_production() -> Iterator[None]:
    """Several threads, and neither deterministic algorithms nor the poison that comes with them."""
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


def row_of(given: dict[str, Any], row: int) -> dict[str, Any]:
    """The arguments of one row alone, in memory of its own."""
    own = {name: value[row : row + 1].clone() if isinstance(value, Tensor) else value for name, value in given.items()}
    if "keep" not in given:
        return own
    keep = given["keep"][row]
    return own | {"keep": keep} | {name: own[name][:, :, :keep].clone() for name in own if name.startswith("out_")}


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """The last entries of an index list that is longer in a batch, all of it else."""
    return tensor[:, :, tensor.shape[2] - like.shape[2] :]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(device: torch.device, op: str) -> None:
    given = arguments(op, device)
    torch.library.opcheck(overload(op), tuple(given.values()))


@pytest.mark.parametrize(
    ("op", "other"),
    [
        ("attention_scores", "query"),
        *((op, "value") for op in OPS if "value" in arguments(op) and op != "quantized_attention"),
    ],
)
def test_opcheck_of_two_dtypes(device: torch.device, op: str, other: str) -> None:
    given = arguments(op, device)
    given |= {
        name: given[name].to(LOW_PRECISION[-1]) for name in (other, f"out_{other}", f"kept_{other}") if name in given
    }
    torch.library.opcheck(overload(op), tuple(given.values()))


DEFAULTS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "attention_scores": (2, (None, True, *[None] * 7)),
    "nearest_kept": (3, (None,) * 5),
    "merge_": (7, (None, None)),
    "compress_": (5, ("pivotal", None, "key", None, None, 0, None, None)),
}


@pytest.mark.parametrize("op", DEFAULTS)
def test_opcheck_of_the_defaults(device: torch.device, op: str) -> None:
    """The first arguments as ever, the others as the public function passes them on when they are left out."""
    needed, rest = DEFAULTS[op]
    given = list(arguments(op, device).values())
    torch.library.opcheck(overload(op), (*given[:needed], *rest))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", OPS)
def test_compiles_to_one_graph(device: torch.device, op: str, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(public(op), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        given = arguments(op, device, batch)
        for ours, goal in zip(call(op, given, compiled), call(op, given), strict=True):
            assert same_bits(ours, goal)


def test_compiles_within_a_model(device: torch.device) -> None:
    """Under the default compiler, which may reorder and copy: a window of a buffer is mutated, then read."""

    def step(query: Tensor, key: Tensor, value: Tensor, tier: Tensor) -> Tensor:
        scores = attention_scores(query, key)
        compress_(key[:, :, 1:], value[:, :, 1:], scores[..., 1:], tier[:, 1:], 5, rule="pivotal")
        return key[:, :, 1:6] + value[:, :, 1:6]

    torch.compiler.reset()
    inputs = [random(seed, 2, heads, 13, 8, device=device) for seed, heads in enumerate((6, 3, 3))]
    inputs.append(tiers(0, 2, 13, device))
    eager, compiled = [x.clone() for x in inputs], [x.clone() for x in inputs]
    goal, result = step(*eager), torch.compile(step, fullgraph=True)(*compiled)
    torch.testing.assert_close(result, goal)
    torch.testing.assert_close(compiled[1], eager[1])


@pytest.mark.parametrize("op", OPS)
def test_a_row_is_the_same_alone(device: torch.device, op: str) -> None:
    """Bit for bit, with other budgets and other padding in the batch."""
    if INTERPRETED and op.startswith("compress_"):
        pytest.skip(PLACE_MATTERS)
    for seed in range(4 if INTERPRETED else 20):
        given = arguments(op, device, batch=3, seed=seed)
        together = call(op, given)
        for row in range(3):
            for whole, alone in zip(together, call(op, row_of(given, row)), strict=True):
                assert same_bits(cut(whole[row : row + 1], alone), alone)


@pytest.mark.parametrize(("rule", "gate"), [("none", None), ("pivotal", None), ("weighted", "mean_similarity")])
@pytest.mark.parametrize("tokens", [17, 255, 507])
def test_a_layer_is_the_same_alone(device: torch.device, tokens: int, rule: str, gate: str | None) -> None:
    """Scores and compression of three prompts, left-padded in a batch, and each without padding on its own."""
    if INTERPRETED and rule == "weighted":
        pytest.skip(PLACE_MATTERS)
    lengths, width = (tokens, tokens // 2, tokens // 3), 32
    starts = torch.tensor([tokens - length for length in lengths], dtype=torch.int32, device=device)
    query, key, value = (random(seed, 3, heads, tokens, width, device=device) for seed, heads in enumerate((4, 2, 2)))
    tier = (torch.arange(tokens, device=device) >= starts[:, None]).int()
    keep = [max(1, length // 5) for length in lengths]
    scores = attention_scores(query, key, key_start=starts)
    whole = key.clone(), value.clone()
    kept = compress_(*whole, scores, tier, keep, rule, gate)
    for row, (length, stay) in enumerate(zip(lengths, keep, strict=True)):
        pad, empty = tokens - length, kept.shape[2] - stay
        alone = [x[row : row + 1, :, pad:].clone() for x in (query, key, value)]
        own_scores = attention_scores(alone[0], alone[1])
        assert same_bits(own_scores, scores[row : row + 1, :, pad:])
        own = compress_(*alone[1:], own_scores, tier[row : row + 1, pad:].contiguous(), stay, rule, gate)
        assert same_bits(own + pad, kept[row : row + 1, :, empty:])
        for mine, batched in zip(alone[1:], whole, strict=True):
            assert same_bits(mine[:, :, :stay], batched[row : row + 1, :, empty : kept.shape[2]])


@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_twice(device: torch.device, op: str) -> None:
    given = arguments(op, device)
    for first, second in zip(call(op, given), call(op, given), strict=True):
        assert same_bits(first, second)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after the other")
@pytest.mark.usefixtures("as_in_production")
@pytest.mark.parametrize("dtype", [LOW_PRECISION[-1], torch.float32])
def test_a_large_layer_gives_the_same_bits_twice(device: torch.device, dtype: torch.dtype) -> None:
    """Several blocks, several threads, and one hub that most tokens merge into."""
    query = random(0, 1, 32, 700, 32, dtype=dtype, device=device)
    key, value = (random(seed, 1, 8, 700, 32, dtype=dtype, device=device) for seed in (1, 2))
    key += 2 * key[:, :, :1]
    runs = []
    for _ in range(3):
        own = key.clone(), value.clone()
        scores = attention_scores(query, own[0])
        kept = compress_(*own, scores, torch.ones(1, 700, dtype=torch.int32, device=device), 100, "average")
        runs.append([scores, kept, *(x[:, :, :100] for x in own)])
    for other in runs[1:]:
        assert all(same_bits(left, right) for left, right in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_not_modified(device: torch.device, op: str) -> None:
    """All but key and value of an in-place op, or its outs, and the votes; nor does autograd take them for modified."""
    given = arguments(op, device)
    before, versions = copied(given), {name: x._version for name, x in tensors_of(given).items()}
    public(op)(**given)
    written = (*(("key", "value") if op.endswith("_") else ("out_key", "out_value")), "out_votes")
    for name, tensor in tensors_of(given).items():
        assert name in written or (same_bits(tensor, before[name]) and tensor._version == versions[name])


def test_no_gradient_is_refused_under_no_grad(device: torch.device) -> None:
    """Models call the ops under no_grad with parameters that require gradients."""
    given = arguments("attention_scores", device)
    goal = attention_scores(**given)
    with torch.no_grad():
        assert same_bits(attention_scores(**given | {"query": given["query"].requires_grad_()}), goal)


@pytest.mark.skipif(INTERPRETED, reason="float64 is the reference's alone")
def test_float64_runs_in_float64(device: torch.device) -> None:
    query, key = (random(seed, 1, 2, 9, 4, dtype=torch.float64, device=device) for seed in (0, 1))
    scores = attention_scores(query, key)
    kept, evicted = select_tokens(scores, torch.ones(1, 9, dtype=torch.int32, device=device), 3)
    pivot, similarity = nearest_kept(key, kept, evicted)
    weights = rules.merge_weights("weighted", similarity, pivot, kept)
    assert {x.dtype for x in (scores, similarity, *weights)} == {torch.float64}
