"""lookm.next_turn: a conversation turn by turn on one cache is the conversation read at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, FIRST_SPECIAL, FIRST_TEXT, VOCAB
from packaging.version import Version
from PIL import Image
from processors import EOS_ID, PROCESSORS, tokenizer
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.utils import is_torchvision_available

import lookm
from lookm import LookMCache

NEW_TOKENS = 5
needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="its processor needs torchvision")
NAMES = [name if name == "llava" else pytest.param(name, marks=needs_torchvision) for name in PROCESSORS]


class Words(LogitsProcessor):
    """Answers are words, which the tokenizer reads as it wrote them; at `end` tokens the answer ends by itself."""

    def __init__(self, end: int | None) -> None:
        self.end = end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.zeros(VOCAB, dtype=torch.bool)
        if input_ids.shape[1] + 1 == self.end:
            allowed[EOS_ID] = True
        else:
            allowed[FIRST_TEXT:FIRST_SPECIAL] = True
        return scores.masked_fill(~allowed, -torch.inf)


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(text: str, *images: Image.Image) -> dict[str, Any]:
    return {"role": "user", "content": [*({"type": "image", "image": each} for each in images), words(text)]}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def read_whole(processor: Any, messages: list[dict[str, Any]], **extra: Any) -> Any:
    """The obvious inputs: everything templated again, all pictures."""
    return processor.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **extra,
    )


def generate(model: Any, inputs: Any, cache: Any, ends: bool) -> Any:
    end = inputs["input_ids"].shape[1] + NEW_TOKENS if ends else None
    return model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        logits_processor=LogitsProcessorList([Words(end)]),
        output_logits=True,
        return_dict_in_generate=True,
    )


def answered(processor: Any, inputs: Any, sequences: torch.Tensor) -> dict[str, Any]:
    text = processor.tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"role": "assistant", "content": [words(text)]}


@pytest.mark.parametrize("name", NAMES)
def test_turn_by_turn_is_all_at_once(name: str) -> None:
    family, processor = FAMILIES[name], PROCESSORS[name]()
    if name == "gemma3" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("refused: test_a_picture_that_would_be_masked_wrongly")
    model = family.model()
    messages = [user("w5 w6 w7", picture(0), picture(1, 16, 32))]
    later = [user("w20 w9", picture(5, 32, 16)), user("w21 w9"), user("w22", picture(6), picture(7))]
    cache = DynamicCache(config=model.config.get_text_config())
    inputs = read_whole(processor, messages)
    for turn, following in enumerate([*later, None]):
        ends = turn % 2 == 0
        ours = generate(model, inputs, cache, ends)
        # a conversation in between, which leaves its own position offsets in the model
        generate(model, read_whole(processor, [user("w8", picture(8, 16, 16))]), None, ends)
        truth = generate(model, read_whole(processor, messages), None, ends)
        assert torch.equal(ours.sequences, truth.sequences)
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(truth.logits), rtol=0, atol=2e-5)
        if following is not None:
            messages += [answered(processor, inputs, ours.sequences), following]
            inputs = lookm.next_turn(model, processor, messages, ours.sequences, cache)


@pytest.mark.parametrize("name", NAMES)
def test_on_a_lookm_cache_that_keeps_all(name: str) -> None:
    family, processor = FAMILIES[name], PROCESSORS[name]()
    if name == "gemma3" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("refused: test_a_picture_that_would_be_masked_wrongly")
    model = family.model()
    logits = []
    for cache in (LookMCache(model, 1.0, later_turns="dense"), DynamicCache(config=model.config.get_text_config())):
        messages = [user("w5 w6 w7", picture(0))]
        inputs = read_whole(processor, messages)
        first = generate(model, inputs, cache, ends=True)
        messages += [answered(processor, inputs, first.sequences), user("w20", picture(5, 32, 16))]
        inputs = lookm.next_turn(model, processor, messages, first.sequences, cache)
        logits.append(torch.stack(generate(model, inputs, cache, ends=False).logits))
    assert torch.equal(*logits)


@needs_torchvision
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_videos_in_two_turns(name: str) -> None:
    processor, model = PROCESSORS[name](), FAMILIES[name].model()
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), dtype=np.uint8)
    metadata = [{"total_num_frames": 8, "fps": fps, "frames_indices": [0, 2, 4, 6]} for fps in (2.0, 4.0)]
    told = [{"do_sample_frames": False, "video_metadata": [metadata[:count]]} for count in (1, 2, 2)]
    messages = [user("w5 w6"), user("w20"), user("w21")]
    for message, video in zip(messages, frames, strict=False):
        message["content"].insert(0, {"type": "video", "video": video})
    cache = DynamicCache(config=model.config.get_text_config())
    said, sequences = [], None
    for message, extra in zip(messages, told, strict=True):
        said.append(message)
        whole = read_whole(processor, said, processor_kwargs=extra)
        inputs = whole if sequences is None else lookm.next_turn(model, processor, said, sequences, cache, **extra)
        ours = generate(model, inputs, cache, ends=True)
        truth = generate(model, whole, None, ends=True)
        assert torch.equal(ours.sequences, truth.sequences)
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(truth.logits), rtol=0, atol=2e-5)
        sequences = ours.sequences
        said.append(answered(processor, inputs, sequences))


@needs_torchvision
@pytest.mark.skipif(Version(transformers.__version__) >= Version("5.23"), reason="masked rightly")
def test_a_picture_that_would_be_masked_wrongly() -> None:
    processor, model = PROCESSORS["gemma3"](), FAMILIES["gemma3"].model()
    messages = [user("w5 w6", picture(0))]
    inputs = read_whole(processor, messages)
    cache = DynamicCache(config=model.config.get_text_config())
    sequences = generate(model, inputs, cache, ends=True).sequences
    messages.append(answered(processor, inputs, sequences))
    assert "pixel_values" not in lookm.next_turn(model, processor, [*messages, user("w7")], sequences, cache)
    with pytest.raises(NotImplementedError, match=r"masks a picture of a later turn .* 5\.23 and newer"):
        lookm.next_turn(model, processor, [*messages, user("w7", picture(1))], sequences, cache)


def test_answers_stay_as_they_were_generated() -> None:
    processor, model = PROCESSORS["llava"](), FAMILIES["llava"].model()
    messages = [user("w5 w6", picture(0))]
    inputs = read_whole(processor, messages)
    # what the template would drop or write otherwise: a special token inside of the answer, no end
    sequences = torch.cat([inputs["input_ids"], torch.tensor([[7, 1, 8, 9]])], 1)
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**{**inputs, "input_ids": sequences[:, :-1], "attention_mask": None}, past_key_values=cache)
    messages += [{"role": "assistant", "content": "w50"}, user("w20", picture(1))]
    turn = lookm.next_turn(model, processor, messages, sequences, cache)
    assert torch.equal(turn["input_ids"][:, : sequences.shape[1]], sequences)
    assert turn["attention_mask"].shape == turn["input_ids"].shape
    assert turn["pixel_values"].shape[0] == 1
    rest = processor.decode(turn["input_ids"][0, sequences.shape[1] :]).replace(" <image>" * 15, "")
    assert rest == "<end> w90 <start> <image> <stop> w20 <end> w91"


def test_a_tokenizer_alone() -> None:
    model, reader = FAMILIES["qwen3"].model(), tokenizer()
    reader.chat_template = PROCESSORS["llava"]().chat_template
    messages: list[dict[str, Any]] = [{"role": "user", "content": "w5 w6 w7"}]
    cache = DynamicCache(config=model.config)
    inputs = read_whole(reader, messages)
    first = generate(model, inputs, cache, ends=True)
    answer = reader.decode(first.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "w8"}]
    inputs = lookm.next_turn(model, reader, messages, first.sequences, cache)
    truth = generate(model, read_whole(reader, messages), None, ends=False)
    ours = generate(model, inputs, cache, ends=False)
    assert torch.equal(ours.sequences, truth.sequences)


def test_mistakes_are_named() -> None:
    processor, model = PROCESSORS["llava"](), FAMILIES["llava"].model()
    messages = [user("w5 w6", picture(0))]
    inputs = read_whole(processor, messages)
    cache = DynamicCache(config=model.config.get_text_config())
    sequences = generate(model, inputs, cache, ends=True).sequences
    answer = {"role": "assistant", "content": "w7"}
    good = [*messages, answer, user("w8")]
    for wrong in (messages, [*messages, answer], []):
        with pytest.raises(ValueError, match="`messages` must hold the answer of the turn before"):
            lookm.next_turn(model, processor, wrong, sequences, cache)
    for wrong in (sequences[0], sequences.expand(2, -1), "text"):
        with pytest.raises(ValueError, match="`sequences` must be what generate returned"):
            lookm.next_turn(model, processor, good, wrong, cache)
    with pytest.raises(ValueError, match=r"`cache` has read \d+ tokens, `sequences` holds \d+"):
        lookm.next_turn(model, processor, good, sequences[:, :-2], cache)
    processor.chat_template = "{% for message in messages %}{% if message['role'] == 'user' %}w5{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="leaves answers out"):
        lookm.next_turn(model, processor, good, sequences, cache)
