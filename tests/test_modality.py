"""Which tokens are images: from the ids, the token types, the placeholders' embeddings, or the user."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from families import FAMILIES, IMAGE, IMAGE_ID, PAD, VIDEO, VIDEO_ID, image_mask

from lookm import LookMCache
from lookm.modality import find_media, media_token_ids, outermost

LLAVA, QWEN_VL, QWEN = (FAMILIES[name] for name in ("llava", "qwen2_vl", "qwen3"))
PROMPTS = [LLAVA.prompt((9, IMAGE, 12)), LLAVA.prompt((5, IMAGE, 4), 1)]
INPUTS = LLAVA.inputs(PROMPTS)
MASK = image_mask(INPUTS["input_ids"])
OPTIONS = {"budget": 0.3, "policy": "text_prior_h2o"}


@torch.no_grad()
def merged() -> Tensor:
    """The embeddings of INPUTS with the image features in their places, as the decoder of the model reads them."""
    seen, decoder = [], LLAVA.model().model.language_model
    hook = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    LLAVA.model()(**INPUTS)
    hook.remove()
    return seen[0]


@torch.no_grad()
def reference() -> LookMCache:
    cache = LookMCache(LLAVA.model(), **OPTIONS)
    LLAVA.model()(**INPUTS, past_key_values=cache)
    return cache


def assert_same(cache: LookMCache) -> None:
    expected = reference()
    for layer in range(3):
        assert torch.equal(cache.kept_positions(layer), expected.kept_positions(layer))
    assert cache.report() == expected.report()
    assert cache.report().layers[0].seen_image == 32


def test_placeholder_ids_of_the_configuration():
    assert media_token_ids(LLAVA.model().config) == {IMAGE_ID: 1}
    assert media_token_ids(QWEN_VL.model().config) == {IMAGE_ID: 1, VIDEO_ID: 2}
    assert media_token_ids(QWEN.model().config) == {}


def test_ids_images_and_videos():
    ids = QWEN_VL.inputs([QWEN_VL.prompt((3, IMAGE, 4, VIDEO, 2)), QWEN_VL.prompt((8,))])["input_ids"]
    found = find_media(QWEN_VL.model(), {"input_ids": ids})
    media = {IMAGE_ID: 1, VIDEO_ID: 2}
    assert found.tolist() == [[media.get(token, 0) for token in row] for row in ids.tolist()]
    assert {IMAGE_ID, VIDEO_ID, PAD} <= set(ids.flatten().tolist())


def test_a_text_model_has_no_images():
    assert find_media(QWEN.model(), {"input_ids": torch.full((1, 5), IMAGE_ID)}) is None


def test_a_text_model_that_is_fed_embeddings_cannot_tell():
    """The decoder of a vision-language model, called directly, looks the same: its images are merged in already."""
    embeddings = {"inputs_embeds": torch.zeros(1, 9, 64)}
    with pytest.raises(ValueError, match="image_mask="):
        QWEN.model()(**embeddings, past_key_values=LookMCache(QWEN.model(), 0.5))
    cache = LookMCache(QWEN.model(), 0.5, image_mask=torch.zeros(1, 9, dtype=torch.bool))
    with torch.no_grad():
        QWEN.model()(**embeddings, past_key_values=cache)
    assert cache.report().layers[0].seen_text == 9


def test_ids_may_stand_in_the_vision_configuration():
    vision = SimpleNamespace(image_token_id=7)
    assert media_token_ids(SimpleNamespace(vision_config=vision, image_token_index=None)) == {7: 1}


def test_images_that_no_token_stands_for_are_refused():
    with pytest.raises(ValueError, match=r"images \('image_pixel_values'\).* names no token for it.*image_mask="):
        find_media(QWEN.model(), {"input_ids": torch.ones(1, 5), "image_pixel_values": torch.zeros(1, 3, 8, 8)})


def test_token_types_beside_embeddings():
    types = torch.tensor([[0, 1, 1, 2, 0]])
    arguments = {"inputs_embeds": torch.randn(1, 5, 64), "mm_token_type_ids": types}
    assert find_media(QWEN_VL.model(), arguments).tolist() == [[0, 1, 1, 2, 0]]


def test_placeholders_among_embeddings():
    table = LLAVA.model().get_input_embeddings().weight
    embeddings = table[INPUTS["input_ids"]]
    found = find_media(LLAVA.model(), {"inputs_embeds": embeddings, "mm_token_type_ids": torch.zeros(1, 3)})
    assert torch.equal(found > 0, MASK)


def test_merged_features_need_an_image_mask():
    embeddings, model = merged(), LLAVA.model()
    arguments = {"inputs_embeds": embeddings, "attention_mask": INPUTS["attention_mask"]}
    with torch.no_grad(), pytest.raises(ValueError, match=r"merged into them already .*image_mask=bool"):
        model(**arguments, past_key_values=LookMCache(model, **OPTIONS))
    cache = LookMCache(model, image_mask=MASK, **OPTIONS)
    with torch.no_grad():
        model(**arguments, past_key_values=cache)
    assert_same(cache)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_generate_from_merged_features(mode: dict):
    model, results = LLAVA.model(), []
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True} | mode
    embedded = {"inputs_embeds": merged(), "attention_mask": INPUTS["attention_mask"]}
    for inputs, mask in ((INPUTS, None), (embedded, MASK)):
        torch.manual_seed(0)
        cache = LookMCache(model, image_mask=mask, **OPTIONS)
        results.append(torch.stack(model.generate(**inputs, past_key_values=cache, **options).logits))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_an_inner_model_called_directly():
    inner = LLAVA.model().model.language_model
    arguments = {"inputs_embeds": merged(), "attention_mask": INPUTS["attention_mask"]}
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"call that model, or pass image_mask="):
        inner(**arguments, past_key_values=LookMCache(LLAVA.model(), **OPTIONS))
    cache = LookMCache(LLAVA.model(), image_mask=MASK, **OPTIONS)
    with torch.no_grad():
        inner(**arguments, past_key_values=cache)
    assert_same(cache)


def test_turns_after_the_image_mask_are_read_from_their_ids():
    model, cache = LLAVA.model(), LookMCache(LLAVA.model(), image_mask=MASK, later_turns="segment", **OPTIONS)
    turn = [LLAVA.prompt((4, IMAGE, 3), seed) for seed in (5, 6)]
    inputs = LLAVA.inputs(turn)
    inputs["attention_mask"] = torch.cat([INPUTS["attention_mask"], inputs["attention_mask"]], 1)
    with torch.no_grad():
        model(**INPUTS, past_key_values=cache)
        model(**inputs, past_key_values=cache)
    assert cache.report().layers[0].seen_image == 4 * 16


def test_an_image_mask_that_ends_within_the_prompt():
    cache = LookMCache(LLAVA.model(), image_mask=MASK[:, :30], **OPTIONS)
    with torch.no_grad(), pytest.raises(ValueError, match=r"`image_mask` must cover 39 tokens, got \[2, 30\]"):
        LLAVA.model()(**INPUTS, past_key_values=cache)


def test_an_image_mask_for_another_batch():
    cache = LookMCache(LLAVA.model(), image_mask=MASK.repeat(2, 1)[:3], **OPTIONS)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"image mask \[3, 39\] does not fit the new keys \[2, 2"):
        LLAVA.model()(**INPUTS, past_key_values=cache)


@pytest.mark.parametrize("mask", [MASK.int(), MASK[0], MASK.tolist(), 5], ids=["int", "1D", "list", "number"])
def test_what_is_no_image_mask(mask):
    with pytest.raises(ValueError, match=r"`image_mask` must be a bool tensor \[batch, tokens\], got"):
        LookMCache(LLAVA.model(), image_mask=mask)


class Wrapper(nn.Module):
    """As PEFT and torch.compile wrap a model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def forward(self, *args, **kwargs):
        return self.base_model["model"](*args, **kwargs)


def test_a_wrapped_model_and_positional_arguments():
    wrapper = Wrapper(LLAVA.model())
    assert outermost(wrapper) is LLAVA.model()
    wrapped, positional = LookMCache(wrapper, **OPTIONS), LookMCache(LLAVA.model(), **OPTIONS)
    with torch.no_grad():
        wrapper(**INPUTS, past_key_values=wrapped)
        arguments = [INPUTS[name] for name in ("input_ids", "pixel_values", "attention_mask")]
        LLAVA.model()(*arguments, None, positional)
    assert_same(wrapped)
    assert_same(positional)
