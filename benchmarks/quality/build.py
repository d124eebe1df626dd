"""The demo model before training, and its tokenizer and processor: ordinary transformers classes, made from scratch."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lookm.demo.task import BOS, EOS, IMAGE, IMAGE_SIZE, IMAGE_TOKENS, PAD, PATCH_SIZE, TOKEN, VOCABULARY

WIDTH = 64
LAYERS = 3
HEADS = 4
HEAD_DIM = 32
VISION_LAYERS = 3

CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ ' <image>' if part['type'] == 'image' else ' ' + part['text'] }}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ ' <eos>' }}{% endif %}"
    "{% endfor %}"
)


def build_model() -> LlavaForConditionalGeneration:
    """An untrained model; draws its weights from torch's global generator."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=False,
        # A wide start: from the usual 0.02 the lookup by name is found much later, or not at all.
        initializer_range=0.1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 8
    _start_by_matching(model)
    return model


@torch.no_grad()
def _start_by_matching(model: LlavaForConditionalGeneration) -> None:
    """Let queries and keys begin equal, so that above the first layer equal letters attend to each other at once.

    They are separate weights and soon differ. Without this the lookup by name has to be found by chance, for some seeds
    never.
    """
    for layer in model.model.language_model.layers[1:]:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def build_processor() -> LlavaProcessor:
    """Words split at white space; a picture of 24 x 24 pixels passes unchanged, any other is resized to that."""
    # A word it does not know is read as ".", which in training stood for a token that says nothing.
    words = Tokenizer(WordLevel(TOKEN, unk_token="."))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=4096,
    )
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save(model: LlavaForConditionalGeneration, directory: Path) -> None:
    """`save_pretrained` of model and processor, with weight names that every supported transformers reads.

    Recent versions save the tower as `vision_tower.*` and read `vision_tower.vision_model.*` as well; older ones know
    only the second and would start from a random tower.
    """
    model.save_pretrained(directory)
    build_processor().save_pretrained(directory)
    file = directory / "model.safetensors"
    prefix, old_prefix = "vision_tower.", "vision_tower.vision_model."
    weights = {
        old_prefix + name.removeprefix(old_prefix).removeprefix(prefix) if name.startswith(prefix) else name: tensor
        for name, tensor in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)
