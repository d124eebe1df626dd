"""What the Triton launchers do around their kernels, on tensors without memory: whatever reads one raises an error."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from inputs import INTERPRETED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if INTERPRETED:
    pytest.skip("a process either interprets or compiles", allow_module_level=True)
triton = pytest.importorskip("triton", reason="the package triton is not installed")

from compiled import empty  # noqa: E402

from lookm_kernels import _dispatch, compress, rules, scores  # noqa: E402

TOKENS, HEADS = 32768, 8
# arguments of compress_ behind the gate, as its public function passes them on when they are left out
PLAIN = ("key", None, None, 0, None, None)


@pytest.fixture(autouse=True)
def launches() -> Iterator[list[str]]:
    """The names of the kernels launched by the Triton backend, none of which runs."""
    names: list[str] = []

    def record(kernel: Any, grid: Any) -> Any:
        return lambda *arguments, **options: names.append(kernel.__name__)

    with (
        patch.object(triton.JITFunction, "__getitem__", record),
        patch.object(_dispatch, "_forced", "triton"),
        # all of them are at address 0
        patch.object(compress, "check_apart"),
    ):
        yield names


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors made under it: those alive, and the most at any time."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.alive -= size


@pytest.mark.parametrize("keep", [[6553], [6553, 4000]], ids=["one budget", "two budgets"])
@pytest.mark.parametrize("rule", rules.RULES)
@pytest.mark.parametrize("gate", [None, "mean_similarity"])
def test_compression_never_waits_for_the_device(rule: str, gate: str | None, keep: list[int]) -> None:
    key, value = (empty(2, HEADS, TOKENS, 128, dtype=torch.bfloat16) for _ in range(2))
    tier = empty(2, TOKENS, dtype=torch.int32)
    outs = [empty(2, HEADS, 6553, 128, dtype=torch.bfloat16) for _ in range(2)]
    for into in ([], outs):
        kept = compress._run(key, value, empty(2, HEADS, TOKENS), tier, keep, rule, gate, *PLAIN, *into)
        assert kept.shape == (2, HEADS, 6553)


@pytest.mark.parametrize("rounds", [0, 2])
def test_every_option_of_compression_never_waits_for_the_device(launches: list[str], rounds: int) -> None:
    key, value = (empty(2, HEADS, TOKENS, 128, dtype=torch.bfloat16) for _ in range(2))
    tier, keep = empty(2, TOKENS, dtype=torch.int32), [6553, 4000]
    outs = [empty(2, HEADS, 6553, 128, dtype=torch.bfloat16) for _ in range(2)]
    group, least, votes = empty(2, TOKENS, dtype=torch.int32), empty(2, HEADS), empty(2, HEADS, TOKENS)
    counted = empty(2, HEADS, 6553)
    options = ("key_value", group, least, rounds, votes, counted)
    for into in ([], outs):
        launches.clear()
        kept = compress._run(key, value, empty(2, HEADS, TOKENS), tier, keep, "average", None, *options, *into)
        assert kept.shape == (2, HEADS, 6553)
        assert launches.count("_merge_kernel") == rounds + 1


@pytest.mark.parametrize("rule", rules.RULES)
def test_what_is_written_elsewhere_is_written_once(launches: list[str], rule: str) -> None:
    """Merged rows are not compacted after that."""
    key, value = (empty(1, HEADS, TOKENS, 128, dtype=torch.bfloat16) for _ in range(2))
    outs = [empty(1, HEADS, 6553, 128, dtype=torch.bfloat16) for _ in range(2)]
    given = empty(1, HEADS, TOKENS), empty(1, TOKENS, dtype=torch.int32), [6553], rule, None, *PLAIN
    compress._run(key, value, *given, *outs)
    assert launches.count("_compact_kernel") == (2 if rule == "none" else 0)
    assert launches.count("_merge_kernel") == (0 if rule == "none" else 1)


def test_scoring_never_waits_for_the_device() -> None:
    query, key = (empty(2, heads, TOKENS, 128, dtype=torch.bfloat16) for heads in (32, HEADS))
    rows = {"query_weight": empty(2, TOKENS), "key_start": empty(2, dtype=torch.int32), "mask": None, "softcap": None}
    position = empty(2, TOKENS, dtype=torch.int32)
    found = scores._run(query, key, None, True, None, *rows.values(), position, empty(2, 32))
    assert found.shape == (2, HEADS, TOKENS)


def test_a_known_log_sum_exp_saves_a_pass(launches: list[str]) -> None:
    query, key = (empty(1, heads, TOKENS, 128, dtype=torch.bfloat16) for heads in (32, HEADS))
    scores._run(query, key, None, True, None, *[None] * 6)
    assert launches == ["lse_kernel", "_scores_kernel", "_sum_kernel"]
    launches.clear()
    scores._run(query, key, None, True, empty(1, 32, TOKENS), *[None] * 6)
    assert launches == ["_scores_kernel", "_sum_kernel"]


@pytest.mark.parametrize("rule", rules.RULES)
def test_extra_memory_is_at_most_a_tenth_of_the_cache(rule: str) -> None:
    """All that torch allocates but what its sort needs inside; a budget of 20 %, heads of 128 elements of 16 bits."""
    key, value = (empty(1, HEADS, TOKENS, 128, dtype=torch.bfloat16) for _ in range(2))
    attention, tier = empty(1, HEADS, TOKENS), empty(1, TOKENS, dtype=torch.int32)
    outs = [empty(1, HEADS, TOKENS // 5, 128, dtype=torch.bfloat16) for _ in range(2)]
    for into in ([], outs):
        with Allocations(key, value, attention, tier, *into) as allocations:
            compress._run(key, value, attention, tier, [TOKENS // 5], rule, None, *PLAIN, *into)
        assert 0 < allocations.peak <= (key.nbytes + value.nbytes) / 10
