"""At most one layer holds its whole prompt at a time, and what stays owns no more memory than it needs."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

pytest.importorskip("transformers")

from families import FAMILIES, HEAD_DIM, IMAGE, KV_HEADS, full_layers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lookm import POLICIES, LookMCache
from lookm.reading import Reading
from lookm_kernels import rules

ROWS = [(9, IMAGE, 112), (5, IMAGE, 4)]
LENGTH, KEEP = 139, 13
FULL = 2 * 2 * KV_HEADS * LENGTH * HEAD_DIM * 4  # bytes of one layer: keys and values, 2 rows, float32


def owned(cache: LookMCache, layers: list[int]) -> list[int]:
    """Bytes of the storages that each layer keeps alive."""
    sizes = []
    for index in layers:
        tensors = [x for x in (cache.layers[index].keys, cache.layers[index].values) if x is not None]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        sizes.append(sum(storages.values()))
    return sizes


def whole_prompts_alive(cache: LookMCache) -> int:
    """Memories anywhere in the process that hold the keys or values [B, H, N, D] of the whole prompt.

    Without those of transformers' sliding layers, which store a window as a view of the whole.
    """
    shape = (2, KV_HEADS, LENGTH, HEAD_DIM)
    found = {x.untyped_storage().data_ptr() for x in gc.get_objects() if type(x) is Tensor and x.shape == shape}
    sliding = [layer for layer in cache.layers if layer.is_sliding and layer.is_initialized]
    return len(found - {x.untyped_storage().data_ptr() for layer in sliding for x in (layer.keys, layer.values)})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_one_whole_layer_at_a_time(name: str, attention: str):
    family = FAMILIES[name]
    model: PreTrainedModel = copy.deepcopy(family.model(attention))
    cache, layers, live = LookMCache(model, budget=KEEP), full_layers(family.model()), []
    attentions = [m for m in model.modules() if type(m).__name__ in ("LlamaAttention", "Gemma3Attention")]

    def count(*_) -> None:
        live.append((owned(cache, layers), whole_prompts_alive(cache)))

    for index in layers:
        attentions[index].register_forward_pre_hook(count)
        attentions[index].register_forward_hook(count)
    inputs = family.inputs([family.prompt(layout, seed) for seed, layout in enumerate(ROWS)])
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    small = FULL * KEEP // LENGTH
    for step, (sizes, whole) in enumerate(live):
        done = (step + 1) // 2  # layers whose attention has run
        assert sizes == [small] * done + [0] * (len(layers) - done)
        assert whole == 0
    assert len(live) == 2 * len(layers)


def test_inside_an_attention_call_one_layer_is_whole(monkeypatch: pytest.MonkeyPatch):
    family = FAMILIES["llava"]
    model, live = family.model(), []
    cache = LookMCache(model, budget=KEEP)
    for layer in cache.layers:
        # after the backend and the scores, right before the prompt is given up
        compress = layer._compress
        monkeypatch.setattr(layer, "_compress", lambda *p, c=compress: (live.append(owned(cache, [0, 1, 2])), c(*p)))
    inputs = family.inputs([family.prompt(layout, seed) for seed, layout in enumerate(ROWS)])
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    small = FULL * KEEP // LENGTH
    assert live == [[FULL, 0, 0], [small, FULL, 0], [small, small, FULL]]


def rows(seed: int, heads: int = KV_HEADS) -> Tensor:
    return torch.randn(2, heads, 30, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


NOT_ONES_OWN = {
    "keys that are the values": lambda key, value: (key, key),
    "heads that are one head": lambda key, value: (key[:, :1].expand_as(key), value[:, :1].expand_as(value)),
    "values by column": lambda key, value: (key, value.mT.contiguous().mT),
    "parts of one projection": lambda key, value: torch.stack([key, value], 3).unbind(3),
}


@pytest.mark.parametrize("layout", NOT_ONES_OWN)
def test_memory_that_cannot_be_compacted_in_place(layout: str):
    results = []
    for own in (False, True):
        key, value = NOT_ONES_OWN[layout](rows(0), rows(1))
        layer = LookMCache(FAMILIES["qwen3"].model(), budget=7, rule="average").layers[0]
        layer.forward.begin(0, 30, None)
        layer.forward.mask(0, 30, None)
        given = (key.clone(), value.clone()) if own else (key, value)
        layer.attend(lambda *_, **__: None, "sdpa", None, rows(2, 4), *layer.update(*given), None)
        results.append((layer.keys, layer.values))
    assert all(map(torch.equal, *results))


class Sizes(TorchDispatchMode):
    """The most elements of a tensor that was made under it, floating point only."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.is_floating_point() and x.untyped_storage()._cdata not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("rule", rules.RULES)
def test_no_copy_of_the_whole_prompt_is_made(rule: str, monkeypatch: pytest.MonkeyPatch):
    """Of what compression makes nothing is as large as the keys, beside those of the layer themselves."""
    family, made = FAMILIES["llava"], []
    model = family.model()
    cache = LookMCache(model, budget=KEEP, rule=rule)
    compress = Reading.compress

    def watched(self: Reading, *arguments: object) -> object:
        with Sizes(self.keys, self.values) as sizes:
            result = compress(self, *arguments)
        made.append((sizes.largest, self.keys.numel()))
        return result

    monkeypatch.setattr(Reading, "compress", watched)
    inputs = family.inputs([family.prompt(layout, seed) for seed, layout in enumerate(ROWS)])
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    assert len(made) == 3
    assert all(0 < largest < whole for largest, whole in made)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_stays_is_all_that_is_owned(policy: str):
    model = FAMILIES["qwen3"].model()
    cache = LookMCache(model, budget=KEEP, policy=policy)
    with torch.no_grad():
        model(**FAMILIES["qwen3"].inputs([FAMILIES["qwen3"].prompt((LENGTH,))]), past_key_values=cache)
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    votes = [tensor for layer in cache.layers for tensor in (layer.votes, layer.key_bias) if tensor is not None]
    assert sum(owned(cache, [0, 1, 2])) + sum(tensor.untyped_storage().nbytes() for tensor in votes) == (
        cache.report().bytes
    )
    for layer in cache.layers:
        assert layer.scores is None
        assert layer.keys.shape[2] == (LENGTH if policy == "full" else KEEP) + 1
