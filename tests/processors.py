"""Real processors for the tiny models of families.py: the library's classes around a tokenizer of words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from families import END_ID, FIRST_SPECIAL, IMAGE_ID, PAD, START_ID, VIDEO_ID, VOCAB
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

BOS_ID, EOS_ID = 1, 2
SPECIAL = {BOS_ID: "<bos>", EOS_ID: "<end>", PAD: "<pad>", IMAGE_ID: "<image>", VIDEO_ID: "<video>"}
SPECIAL |= {START_ID: "<start>", END_ID: "<stop>"}
MEDIA = {"image_token": "<image>", "video_token": "<video>", "start_token": "<start>", "stop_token": "<stop>"}
# as most templates: turns open with a word of their role and close with the token that ends an answer
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}{{ 'w90 ' if message['role'] == 'user' else 'w91 ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ 'PLACEHOLDER ' if part['type'] == 'image' else '<start><video><stop> ' if part['type'] == 'video' "
    "else part['text'] }}"
    "{% endfor %}{% endif %}<end> {% endfor %}{% if add_generation_prompt %}w91 {% endif %}"
)


def tokenizer(**names: str) -> Any:
    """Words w3 to w99 by their ids, and the special tokens of families.py; `names`: attributes of the tokenizer."""
    words = {f"w{index}": index for index in range(3, VOCAB)} | {word: index for index, word in SPECIAL.items()}
    for index in SPECIAL:
        words.pop(f"w{index}", None)
    model = Tokenizer(WordLevel(words, unk_token="w3"))
    model.pre_tokenizer = WhitespaceSplit()
    special = {"bos_token": "<bos>", "eos_token": "<end>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        **special,
        extra_special_tokens=MEDIA | names,
    )


def _chat(placeholder: str) -> str:
    return CHAT_TEMPLATE.replace("PLACEHOLDER", placeholder)


def _llava() -> Any:
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    return transformers.LlavaProcessor(
        images,
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat("<start><image><stop>"),
    )


def _qwen(kind: str) -> Callable[[], Any]:
    def build() -> Any:
        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
        pixels = {"shortest_edge": 64, "longest_edge": 1024}
        videos = f"{'Qwen3VL' if kind == 'Qwen3VL' else 'Qwen2VL'}VideoProcessor"
        return getattr(transformers, f"{kind}Processor")(
            transformers.Qwen2VLImageProcessor(size=pixels, **sizes),
            tokenizer(vision_start_token="<start>", vision_end_token="<stop>"),
            getattr(transformers, videos)(size={"shortest_edge": 64, "longest_edge": 4096}, **sizes),
            chat_template=_chat("<start><image><stop>"),
        )

    return build


def _gemma3() -> Any:
    images = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32}, image_seq_length=16)
    words = tokenizer(boi_token="<start>", eoi_token="<stop>")
    return transformers.Gemma3Processor(images, words, _chat("<start>"), image_seq_length=16)


def _mistral3() -> Any:
    size = {"longest_edge": 32}
    images = transformers.PixtralImageProcessor(size=size, patch_size={"height": 4, "width": 4})
    return transformers.PixtralProcessor(
        images,
        tokenizer(),
        patch_size=4,
        spatial_merge_size=2,
        chat_template=_chat("<image>"),
        image_token="<image>",
        image_break_token="w98",
        image_end_token="<stop>",
    )


def _llava_next() -> Any:
    return transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 8},
            crop_size={"height": 8, "width": 8},
            image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
        ),
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat("<image>"),
    )


def _internvl() -> Any:
    size = {"height": 32, "width": 32}
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokenizer(start_image_token="<start>", end_image_token="<stop>", context_image_token="<image>"),
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=_chat("<image>"),
    )


# those whose classes need no torchvision first
PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen("Qwen2VL"),
    "qwen2_5_vl": _qwen("Qwen2_5_VL"),
    "qwen3_vl": _qwen("Qwen3VL"),
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "internvl": _internvl,
}
assert FIRST_SPECIAL < IMAGE_ID
