"""Layers of a model in several places (device_map): the same tokens, each layer's cache where the layer runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, IMAGE, Family
from transformers import DynamicCache, PreTrainedModel

from lookm import LookMCache
from lookm.modality import cache_keyword

NAMES = ["llava", "qwen2_5_vl", "qwen3"]
LAYERS = 3
MIDDLE = 1


def placed(family: Family, folder: Path, first: str, middle: str) -> PreTrainedModel:
    """The family's model with one decoder layer in another place than the rest."""
    model = family.model()
    model.save_pretrained(folder / "model")
    (decoder,) = (name for name, module in model.named_modules() if name.endswith("layers") and len(module) == LAYERS)
    ancestors = {decoder.rsplit(".", count)[0] for count in range(decoder.count(".") + 1)}
    # the decoder's layers, and whatever stands beside them and the modules they are in
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[0] in ancestors | {""}]
    places = {name: first for name in names if name and name not in ancestors}
    places[f"{decoder}.{MIDDLE}"] = middle
    loaded = getattr(transformers, family.model_class).from_pretrained(
        folder / "model", device_map=places, offload_folder=folder / "offloaded"
    )
    return loaded.eval()


def answers(family: Family, model: PreTrainedModel, cache: DynamicCache) -> torch.Tensor:
    """Greedy tokens of two rows, one of them padded on the left."""
    prompts = [family.prompt((20, IMAGE, 9, IMAGE, 4), seed=1), family.prompt((4, IMAGE, 7), seed=2)]
    inputs = {name: tensor.to(model.device) for name, tensor in family.inputs(prompts).items()}
    return model.generate(**inputs, **{cache_keyword(model): cache}, max_new_tokens=12, do_sample=False).cpu()


@pytest.mark.parametrize("policy", ["auto", "lookm"])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_on_disk(name: str, policy: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    whole, parts = family.model(), placed(family, tmp_path, "cpu", "disk")
    held = {parameter.device.type for parameter in parts.parameters()}
    assert held == {"cpu", "meta"}, "the layer is read from disk whenever it runs"
    goal = answers(family, whole, LookMCache(whole, 0.3, policy))
    assert torch.equal(answers(family, parts, LookMCache(parts, 0.3, policy)), goal)
    ordinary = answers(family, whole, DynamicCache(config=whole.config))
    assert torch.equal(answers(family, parts, LookMCache(parts, 1.0, policy)), ordinary)
    assert not torch.equal(goal, ordinary)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["auto", "lookm"])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_on_another_gpu(name: str, policy: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, there are {torch.cuda.device_count()}")
    family = FAMILIES[name]
    parts = placed(family, tmp_path, "cuda:0", "cuda:1")
    cache = LookMCache(parts, 0.3, policy)
    tokens = answers(family, parts, cache)
    assert [layer.keys.device.index for layer in cache.layers] == [0, 1, 0]
    whole = family.model()
    try:
        assert torch.equal(tokens, answers(family, whole.to("cuda:0"), LookMCache(whole, 0.3, policy)))
    finally:
        whole.to("cpu")
