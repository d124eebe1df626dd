"""The inputs of a later turn of a conversation, for a cache that has read the turns before."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

MASKS_LATER_PICTURES = (5, 23)
# private characters, which a chat template hands on as they are
MARK = "\ue000\ue001\ue000"


def next_turn(
    model: Any,
    processor: Any,
    messages: Sequence[dict[str, Any]],
    sequences: Tensor,
    cache: Any,
    **processor_kwargs: Any,
) -> Any:
    """The inputs of the newest turn, for generate with a cache that has read all turns before.

    >>> sequences = model.generate(**inputs, past_key_values=cache)
    >>> messages += [{"role": "assistant", "content": [...]}, {"role": "user", "content": [...]}]
    >>> inputs = lookm.next_turn(model, processor, messages, sequences, cache)
    >>> sequences = model.generate(**inputs, past_key_values=cache)

    input_ids are `sequences`, token for token as the cache has seen them, and the newly templated text; generate skips
    what the cache holds. Pictures and videos are those of the new turn alone. A model that places pictures in space
    (M-RoPE) gets position_ids too, for which the processor reads all pictures once more.

    Args:
        processor: the model's processor, or the tokenizer of a model of text; its chat template is used.
        messages: the whole conversation; after the last answer comes the new turn.
        sequences: [1, tokens], what generate returned for the turn before.
        cache: any transformers cache.
        processor_kwargs: for the processor, as at the first turn; video_metadata=[[...]] has all videos of `messages`.

    ValueError where messages, sequences and cache do not fit together, or the template cannot be continued.
    NotImplementedError for a picture that this release of transformers would mask wrongly in a later turn, on any
    cache: Gemma 3, before 5.23.
    """
    if not (isinstance(sequences, Tensor) and sequences.ndim == 2 and len(sequences) == 1):
        got = list(sequences.shape) if isinstance(sequences, Tensor) else type(sequences).__name__
        raise ValueError(f"`sequences` must be what generate returned for one conversation, [1, tokens], got {got}")
    read, tokens = int(cache.get_seq_length()), sequences.shape[1]
    # generate returns the last token without reading it
    if read not in (tokens - 1, tokens):
        raise ValueError(f"`cache` has read {read} tokens, `sequences` holds {tokens}: it is not of the turn before")
    last = max((index for index, each in enumerate(messages) if each["role"] == "assistant"), default=None)
    if last is None or last == len(messages) - 1:
        raise ValueError("`messages` must hold the answer of the turn before, and then the new turn")

    tokenizer = getattr(processor, "tokenizer", processor)
    rest = _without_end(tokenizer, int(sequences[0, -1]), _after_answer(processor, messages, last))
    # tokenized behind a special token: at the start of a text some tokenizers add a space
    anchor = tokenizer.bos_token or tokenizer.eos_token or ""
    template = "{{ " + json.dumps(anchor + rest, ensure_ascii=False) + " }}"
    inputs = _template(processor, messages[last + 1 :], _of_last(processor_kwargs, messages[last + 1 :]), template)
    own = inputs["input_ids"]
    if anchor:
        place = (own[0] == tokenizer.convert_tokens_to_ids(anchor)).nonzero()
        own = own[:, int(place[0]) + 1 :]
    ids = torch.cat([sequences.to(own.device), own], 1)
    for name, value in inputs.items():
        if name in ("token_type_ids", "mm_token_type_ids"):
            inputs[name] = torch.nn.functional.pad(value[:, -own.shape[1] :], (tokens, 0))
    if "token_type_ids" in inputs and bool(inputs["token_type_ids"].any()) and _version() < MASKS_LATER_PICTURES:
        raise NotImplementedError(
            f"lookm: transformers {transformers.__version__} masks a picture of a later turn of this model wrongly, "
            f"with every cache; {'.'.join(map(str, MASKS_LATER_PICTURES))} and newer do not"
        )
    inputs["input_ids"], inputs["attention_mask"] = ids, torch.ones_like(ids)
    rope_index = getattr(getattr(model, "model", None), "get_rope_index", None)
    if rope_index is not None:
        whole = _template(processor, messages, processor_kwargs)
        inputs["position_ids"] = _positions(rope_index, processor, ids, whole)
    return inputs


def _after_answer(processor: Any, messages: Sequence[dict[str, Any]], last: int) -> str:
    """The template's text from the end of the last answer on."""
    content = MARK if isinstance(messages[last]["content"], str) else [{"type": "text", "text": MARK}]
    marked = [dict(message) for message in messages]
    marked[last]["content"] = content
    text = processor.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)
    _, found, rest = text.rpartition(MARK)
    if not found:
        raise ValueError("the chat template of this model leaves answers out: its conversation cannot be continued")
    return str(rest)


def _without_end(tokenizer: Any, token: int, rest: str) -> str:
    """The text after an answer, without the token that ends it where the model has written that itself."""
    end = tokenizer.decode([token], skip_special_tokens=False)
    if token in tokenizer.added_tokens_decoder and rest.lstrip().startswith(end):
        return rest.lstrip().removeprefix(end)
    return rest


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def _of_last(processor_kwargs: dict[str, Any], messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The arguments with the metadata of these last messages' videos alone."""
    if "video_metadata" not in processor_kwargs:
        return processor_kwargs
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    videos = sum(part["type"] == "video" for part in parts)
    (metadata,) = processor_kwargs["video_metadata"]
    rest = {name: value for name, value in processor_kwargs.items() if name != "video_metadata"}
    return {**rest, "video_metadata": [metadata[-videos:]]} if videos else rest


def _template(
    processor: Any, messages: Sequence[dict[str, Any]], processor_kwargs: dict[str, Any], template: str | None = None
) -> Any:
    return processor.apply_chat_template(
        [dict(message) for message in messages],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **({"processor_kwargs": processor_kwargs} if processor_kwargs else {}),
    )


def _positions(rope_index: Any, processor: Any, ids: Tensor, whole: Any) -> Tensor:
    """[4, 1, tokens]: place in the text, in time, height and width, as one forward over everything has them."""
    text = torch.arange(ids.shape[1], device=ids.device)[None, None]
    known = inspect.signature(rope_index).parameters
    grids = {name: whole[name] for name in whole if name in known and name not in ("input_ids", "attention_mask")}
    if not any(name.endswith("grid_thw") for name in grids):
        return text.expand(4, 1, -1)
    if "mm_token_type_ids" in known:
        grids["mm_token_type_ids"] = torch.tensor(processor.create_mm_token_type_ids(ids.tolist()))
    return torch.cat([text, rope_index(input_ids=ids, attention_mask=torch.ones_like(ids), **grids)[0].to(text)])
