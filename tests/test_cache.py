"""LookMCache as a transformers cache: what it says of itself, and what generate does with it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE, Prompt, full_layers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import lookm
from lookm import LookMCache

LLAVA, QWEN, GEMMA = (FAMILIES[name] for name in ("llava", "qwen3", "gemma3"))
ROWS = [(9, IMAGE, 12), (5, IMAGE, 4), (21,)]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def model():
    return LLAVA.model()


def prompts(rows=ROWS, family=LLAVA) -> list[Prompt]:
    return [family.prompt(layout, seed) for seed, layout in enumerate(rows)]


@torch.no_grad()
def read(model, cache: Cache, rows=ROWS, family=LLAVA, **arguments) -> Tensor:
    return model(**family.inputs(prompts(rows, family)), past_key_values=cache, **arguments).logits


@torch.no_grad()
def decode(model, cache: Cache, mask: Tensor, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of the tokens [B, T], fed one at a time after a prompt with this mask."""
    logits = []
    for token in tokens.unbind(1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = mask.cumsum(1)[:, -1:] - 1
        step = {"input_ids": token[:, None], "attention_mask": mask, "position_ids": positions}
        logits.append(model(**step, past_key_values=cache).logits)
    return torch.cat(logits, 1)


def generate(model, cache: Cache, inputs: dict[str, Tensor] | None = None) -> Tensor:
    inputs = LLAVA.inputs(prompts()) if inputs is None else inputs
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**inputs, past_key_values=cache, **options).logits, 1)


def tokens(batch: int, count: int, seed: int = 7) -> Tensor:
    return torch.randint(3, 100, (batch, count), generator=torch.Generator().manual_seed(seed))


def test_length_counts_the_tokens_seen(model):
    cache = LookMCache(model, budget=5)
    assert cache.get_seq_length() == 0
    read(model, cache)
    assert cache.get_seq_length() == 39
    decode(model, cache, LLAVA.inputs(prompts())["attention_mask"], tokens(3, 2))
    assert [cache.get_seq_length(layer) for layer in range(3)] == [41] * 3
    assert [layer.keys.shape[2] for layer in cache.layers] == [7] * 3


@pytest.mark.parametrize("family", [LLAVA, GEMMA], ids=lambda family: family.name)
def test_kept_positions_say_where_the_keys_come_from(family):
    model, full = family.model(), DynamicCache(config=family.model().config)
    cache = LookMCache(model, budget=0.3, rule="none")
    mask = family.inputs(prompts(family=family))["attention_mask"]
    for state in (cache, full):
        read(model, state, family=family)
    # later layers read what the compressed ones say, so only the prompt is comparable
    for index in full_layers(model):
        positions = cache.kept_positions(index)
        place = positions.clamp(min=0).long()[..., None].expand_as(cache.layers[index].keys)
        ours, theirs = cache.layers[index].keys, full.layers[index].keys.gather(2, place)
        there = (positions >= 0)[..., None]
        assert torch.equal(ours * there, theirs * there)
        assert mask[torch.arange(3)[:, None, None], positions.clamp(min=0).long()][positions >= 0].all()
        lengths = mask.sum(1)
        assert torch.equal((positions >= 0).sum(-1), (lengths * 3 // 10)[:, None].expand(-1, 2))
    with pytest.raises(ValueError, match="`layer` must be a full-attention layer"):
        cache.kept_positions(99)
    if family is GEMMA:
        with pytest.raises(ValueError, match="`layer` must be a full-attention layer"):
            cache.kept_positions(0)
    with pytest.raises(ValueError, match="that has read a prompt, got 1"):
        LookMCache(model).kept_positions(1)


def test_kept_positions_go_on_with_the_tokens_after_the_prompt(model):
    cache = LookMCache(model, budget=5, policy="streaming", sinks=0)
    read(model, cache)
    decode(model, cache, LLAVA.inputs(prompts())["attention_mask"], tokens(3, 2))
    assert (cache.kept_positions(2) == torch.arange(34, 41)).all()


def test_a_copy_is_independent(model):
    cache = LookMCache(model, budget=0.3)
    read(model, cache)
    twin, mask = copy.deepcopy(cache), LLAVA.inputs(prompts())["attention_mask"]
    before = [layer.keys.clone() for layer in cache.layers]
    first = decode(model, twin, mask, tokens(3, 3))
    assert all(map(torch.equal, before, (layer.keys for layer in cache.layers)))
    assert cache.get_seq_length() == 39
    assert torch.equal(decode(model, cache, mask, tokens(3, 3)), first)


@pytest.mark.parametrize("enabled", [False, True])
def test_the_cache_holds_no_model(enabled: bool):
    model = copy.deepcopy(QWEN.model())
    inputs = QWEN.inputs(prompts([(30,)], QWEN))
    if enabled:
        lookm.enable(model, budget=0.3)
        cache = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    else:
        cache = LookMCache(model, budget=0.3)
        generate(model, cache, inputs)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert len(pickle.dumps(cache)) < size / 4
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert isinstance(cache, LookMCache)


def test_reset_forgets_everything(model):
    fresh, used = LookMCache(model, budget=0.3), LookMCache(model, budget=0.3)
    generate(model, used, LLAVA.inputs(prompts([(4, IMAGE, 17), (4, IMAGE, 2), (39,)])))
    used.reset()
    assert used.get_seq_length() == 0
    assert used.report().mean()["seen"] == 0
    with pytest.raises(RuntimeError, match="image_mask="):  # of the same shape as the prompt before, but not the same
        model.model.language_model(inputs_embeds=torch.randn(3, 39, 64), past_key_values=used)
    used.reset()
    assert torch.equal(generate(model, used), generate(model, fresh))
    assert all(torch.equal(used.kept_positions(layer), fresh.kept_positions(layer)) for layer in range(3))


@pytest.mark.parametrize("crop", [-2, 41])  # a number of tokens, or the length before transformers 5.18
def test_crop_takes_back_tokens_after_the_prompt(model, crop: int):
    mask, fed, other = LLAVA.inputs(prompts())["attention_mask"], tokens(3, 4), tokens(3, 3, 8)
    cache, straight = LookMCache(model, budget=0.3), LookMCache(model, budget=0.3)
    for state in (cache, straight):
        read(model, state)
        decode(model, state, mask, fed[:, :2])
    longer = torch.nn.functional.pad(mask, (0, 2), value=1)
    decode(model, cache, longer, fed[:, 2:])
    cache.crop(crop)
    assert cache.get_seq_length() == 41
    assert cache.report() == straight.report()
    assert torch.equal(decode(model, cache, longer, other), decode(model, straight, longer, other))


@pytest.mark.parametrize("family", [LLAVA, GEMMA], ids=lambda family: family.name)
def test_crop_into_the_prompt_changes_nothing(family):
    model, cache = family.model(), LookMCache(family.model(), budget=4)
    read(model, cache, [(14,)], family)
    before = [layer.keys.clone() for layer in cache.layers]
    for removed in (-1, -14, 13):
        with pytest.raises(RuntimeError, match="it ends at position 14 and the crop at"):
            cache.crop(removed)
    cache.crop(0)
    assert all(map(torch.equal, before, (layer.keys for layer in cache.layers)))
    assert cache.get_seq_length() == 14


def test_crop_where_a_sliding_layer_has_forgotten_changes_nothing():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    layers = {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2, "sliding_window": 8}
    config = Qwen2Config(**sizes, **layers, use_sliding_window=True, vocab_size=64)
    model = Qwen2ForCausalLM._from_config(config).eval()
    cache = LookMCache(model, budget=5)
    with torch.no_grad():
        for ids in (torch.arange(3, 23), torch.tensor([4])):
            model(input_ids=ids[None], past_key_values=cache)
    with pytest.raises((RuntimeError, ValueError), match="sliding"):
        cache.crop(-1)
    assert cache.get_seq_length() == 21
    assert cache.layers[0].keys.shape[2] == 6


ROW_CHANGES: dict[str, tuple[Callable, list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
}


@pytest.mark.parametrize("change", ROW_CHANGES)
def test_rows_move_with_all_their_state(model, change: str):
    apply, order = ROW_CHANGES[change]
    cache, still = LookMCache(model, budget=0.3), LookMCache(model, budget=0.3)
    mask = LLAVA.inputs(prompts())["attention_mask"]
    for state in (cache, still):
        read(model, state)
    apply(cache)
    assert torch.equal(cache.kept_positions(1), still.kept_positions(1)[order])
    assert cache.report().mean()["seen"] == sum([39, 27, 21][row] for row in order)
    moved = decode(model, cache, mask[order], tokens(3, 3)[order])
    torch.testing.assert_close(moved, decode(model, still, mask, tokens(3, 3))[order], **CLOSE)


@pytest.mark.parametrize("change", ROW_CHANGES)
def test_rows_move_in_the_middle_of_a_prompt(change: str):
    model, apply, order = QWEN.model(), *ROW_CHANGES[change]
    whole = QWEN.inputs(prompts([(30,), (25,), (20,)], QWEN))
    cache, ordered = (LookMCache(model, budget=0.3, prompt_length=30) for _ in range(2))
    parts = [{name: x[:, :18] for name, x in whole.items()}, {"input_ids": whole["input_ids"][:, 18:]}]
    parts[1]["attention_mask"] = whole["attention_mask"]
    with torch.no_grad():
        model(**parts[0], past_key_values=cache)
        apply(cache)
        moved = {name: x[order] for name, x in parts[1].items()}
        model(**moved, past_key_values=cache)
        for part in parts:
            model(**{name: x[order] for name, x in part.items()}, past_key_values=ordered)
    assert torch.equal(cache.kept_positions(2), ordered.kept_positions(2))
    torch.testing.assert_close(cache.layers[2].keys, ordered.layers[2].keys, **CLOSE)


def test_the_same_bits_twice_and_an_untouched_prefill(model):
    caches = [LookMCache(model, budget=0.2) for _ in range(2)]
    assert torch.equal(read(model, caches[0]), read(model, DynamicCache(config=model.config)))
    read(model, caches[1])
    for layer, again in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(layer.keys, again.keys)
        assert torch.equal(layer.values, again.values)


def test_models_without_a_lookm_cache_keep_their_bits(model, monkeypatch: pytest.MonkeyPatch):
    generate(model, LookMCache(model, budget=0.2))
    overlaid = generate(model, DynamicCache(config=model.config))
    for registry in (AttentionInterface, AttentionMaskInterface):
        function = registry._global_mapping["sdpa"]
        monkeypatch.setitem(registry._global_mapping, "sdpa", function.__wrapped__)
    assert torch.equal(generate(model, DynamicCache(config=model.config)), overlaid)


def test_two_conversations_at_once(model):
    other, budget = QWEN.model("eager"), 0.3
    rows = [(30,), (20,)]
    masks = [LLAVA.inputs(prompts())["attention_mask"], QWEN.inputs(prompts(rows, QWEN))["attention_mask"]]
    alone = [LookMCache(model, budget), LookMCache(other, budget)]
    read(model, alone[0])
    expected = [decode(model, alone[0], masks[0], tokens(3, 3))]
    read(other, alone[1], rows, QWEN)
    expected.append(decode(other, alone[1], masks[1], tokens(2, 3)))
    mixed = [LookMCache(model, budget), LookMCache(other, budget)]
    read(model, mixed[0])
    read(other, mixed[1], rows, QWEN)
    for step in range(3):
        for k, (vlm, batch) in enumerate(((model, 3), (other, 2))):
            mask = torch.nn.functional.pad(masks[k], (0, step), value=1)
            logits = decode(vlm, mixed[k], mask, tokens(batch, 3)[:, step : step + 1])
            assert torch.equal(logits[:, 0], expected[k][:, step])


def test_the_attention_implementation_may_change_after_the_cache_is_built(monkeypatch: pytest.MonkeyPatch):
    model = copy.deepcopy(LLAVA.model())
    expected = generate(model, LookMCache(model, budget=0.3))
    cache = LookMCache(model, budget=0.3)
    for registry in (AttentionInterface, AttentionMaskInterface):  # under a name that no cache has met
        monkeypatch.setitem(registry._global_mapping, "sdpa_anew", registry._global_mapping["sdpa"].__wrapped__)
    model.config.get_text_config()._attn_implementation = "sdpa_anew"
    assert torch.equal(generate(model, cache), expected)
    cache = LookMCache(model, budget=0.3)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(generate(model, cache), expected, **CLOSE)
    assert cache.layers[0].keys.shape[2] < 39


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_a_dropped_cache_frees_its_memory_at_once(budget: float):
    model = QWEN.model()
    cache = LookMCache(model, budget=budget)
    read(model, cache, [(30,)], QWEN)
    alive = weakref.ref(cache.layers[1])
    gc.disable()  # without waiting for the collector: the layers are in no reference cycle
    try:
        del cache
        assert alive() is None
    finally:
        gc.enable()


def test_a_compiled_model_decodes_from_it():
    model = FAMILIES["qwen3"].model()
    inputs = FAMILIES["qwen3"].inputs([FAMILIES["qwen3"].prompt((30,))])
    step = {"input_ids": torch.tensor([[7]])}
    logits = []
    for run in (model, torch.compile(model, backend="eager")):
        cache = LookMCache(model, budget=0.3)
        with torch.no_grad():
            run(**inputs, past_key_values=cache)
            logits.append(run(**step, past_key_values=cache).logits)
        assert cache.get_seq_length() == 31
    torch._dynamo.reset()
    torch.testing.assert_close(*logits)


def test_a_prefill_can_be_differentiated():
    family = FAMILIES["qwen3"]
    model, inputs = family.model(), family.inputs([family.prompt((30,))])
    gradients = []
    for cache in (None, LookMCache(model, budget=0.3)):
        model.zero_grad()
        model(**inputs, past_key_values=cache).logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    model.zero_grad()
    assert torch.equal(*gradients)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
def test_on_a_gpu_a_whole_budget_changes_no_bit():
    model = copy.deepcopy(LLAVA.model()).to("cuda")
    inputs = {name: x.to("cuda") for name, x in LLAVA.inputs(prompts()).items()}
    caches = (DynamicCache(config=model.config), LookMCache(model, budget=1.0))
    assert torch.equal(*[generate(model, cache, inputs) for cache in caches])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
def test_on_a_gpu_a_padded_row_says_what_it_says_alone():
    model = copy.deepcopy(LLAVA.model()).to("cuda")

    def said(rows: list[Prompt]) -> Tensor:
        inputs = {name: x.to("cuda") for name, x in LLAVA.inputs(rows).items()}
        return generate(model, LookMCache(model, budget=0.2), inputs).argmax(-1)

    together = said(prompts())
    for row, prompt in enumerate(prompts()):
        assert torch.equal(together[row], said([prompt])[0])
