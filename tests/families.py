"""Tiny random models of every supported family, and prompts for them.

A prompt is described by a layout, for example `(6, IMAGE, 9, TALL, 4)`: six text tokens, an image, nine text tokens, an
image of another shape, four text tokens. Text-only families read text where the layout has an image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, cache_utils

IMAGE, TALL, VIDEO = "image", "tall", "video"
Layout = Sequence[int | str]

VOCAB, PAD, FIRST_TEXT, FIRST_SPECIAL = 128, 0, 3, 100
IMAGE_ID, VIDEO_ID, START_ID, END_ID = 120, 121, 122, 123
WIDTH, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16


@dataclass(frozen=True)
class Image:
    """One image or video: the tokens that stand for it and the arrays the vision tower reads."""

    ids: tuple[int, ...]
    arrays: dict[str, Tensor]


@dataclass(frozen=True)
class Prompt:
    """One row: token ids and the images they stand for, in order. Prompts add up to conversations."""

    ids: tuple[int, ...]
    images: tuple[Image, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: "Prompt") -> "Prompt":
        return Prompt(self.ids + other.ids, self.images + other.images)


def said(ids: Tensor) -> list[Prompt]:
    """Generated ids [B, T] as prompts, to be added to the prompts they continue."""
    return [Prompt(tuple(row)) for row in ids.tolist()]


@dataclass(frozen=True)
class Family:
    """How to build a model of one family and how to feed it."""

    name: str
    model_class: str
    config: Callable[[], PreTrainedConfig]
    draw: Callable[[str, torch.Generator], Image] | None = None
    stack: Callable[[list[tuple[Image, ...]]], dict[str, Tensor]] | None = None
    types: str | None = None  # the argument that marks image tokens with 1 and video tokens with 2
    whole_types: bool = False  # the types cover the cached tokens too
    mrope: bool = False
    hybrid: bool = False

    @cache  # noqa: B019  (families live as long as the process)
    def model(self, attention: str = "sdpa") -> PreTrainedModel:
        """The model, seeded, in eval mode and float32; one per attention implementation."""
        torch.manual_seed(0)
        model = getattr(transformers, self.model_class)._from_config(self.config(), attn_implementation=attention)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # unit gain, so that attention is not uniform and greedy tokens vary
                fan_in = parameter[0].numel() if parameter.dim() > 3 else parameter.shape[-1]
                parameter.data.normal_(0, fan_in**-0.5, generator=generator)
        settings = model.generation_config
        settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = None, None, PAD
        settings.suppress_tokens = list(range(FIRST_SPECIAL, VOCAB))  # a generated placeholder would want an image
        return model.eval()

    @property
    def later_images(self) -> bool:
        """Whether a DynamicCache takes an image after the first turn.

        Gemma 3 of transformers 5.13 to 5.16 then sizes the mask of the sliding layers by a full layer.
        """
        return not self.whole_types or not Version("5.13") <= Version(transformers.__version__) < Version("5.17")

    @property
    def dynamic(self) -> bool:
        """Whether this transformers keeps the family's state in a DynamicCache (older ones have a class per hybrid)."""
        return not self.hybrid or hasattr(cache_utils, "LinearAttentionLayer")

    def prompt(self, layout: Layout, seed: int = 0) -> Prompt:
        """A random prompt of that layout; equal seeds give equal prompts."""
        generator = torch.Generator().manual_seed(seed)
        prompt = Prompt(())
        for item in layout:
            if isinstance(item, str) and self.draw is not None:
                image = self.draw(item, generator)
                prompt += Prompt(image.ids, (image,))
            else:
                count = 12 if isinstance(item, str) else item
                ids = torch.randint(FIRST_TEXT, FIRST_SPECIAL, (count,), generator=generator)
                prompt += Prompt(tuple(ids.tolist()))
        return prompt

    def inputs(self, prompts: Sequence[Prompt], shown: Sequence[Prompt] | None = None) -> dict[str, Tensor]:
        """Arguments of `model(...)` and `model.generate(...)`; shorter rows are padded on the left.

        `shown` are the prompts whose images to give, where a cache has read those of the others; by default all.
        """
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[PAD] * pad + list(prompt.ids) for pad, prompt in zip(pads, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
        inputs = {"input_ids": ids, "attention_mask": mask}
        images = [prompt.images for prompt in (prompts if shown is None else shown)]
        if self.types is not None and (shown is None or any(images)):
            inputs[self.types] = (ids == IMAGE_ID).long() + 2 * (ids == VIDEO_ID).long()
        return inputs | ((self.stack or _concatenate)(images) if any(images) else {})

    def turn(self, model: PreTrainedModel, seen: Sequence[Prompt], new: Sequence[Prompt]) -> dict[str, Tensor]:
        """Arguments of a forward over `new` alone, with a cache that has read `seen`; pads come before `seen`."""
        whole = self.inputs([old + turn for old, turn in zip(seen, new, strict=True)])
        inputs = self.inputs(new, shown=new) | {"attention_mask": whole["attention_mask"]}
        inputs["position_ids"] = self.positions(model, whole)[..., -inputs["input_ids"].shape[1] :]
        if self.whole_types and self.types in inputs:
            inputs[self.types] = whole[self.types]
        return inputs

    def positions(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """Position ids of `inputs`: [B, N], or [3, B, N] in the families with a multimodal rotary embedding."""
        if self.mrope:
            return self._mrope(model, inputs)[0]
        return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def resumes(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
        """Whether generate starts a second turn at the position after the first, as one forward over both does.

        Qwen2.5-VL of transformers 5.4 starts it after the largest position, which can be an image's.
        """
        if not self.mrope:
            return True
        positions, deltas = self._mrope(model, inputs)
        return torch.equal(positions[0, :, -1] + 1, inputs["attention_mask"].sum(-1) + deltas[:, 0])

    def _mrope(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        rest = {name: inputs[name] for name in ("input_ids", "mm_token_type_ids", "attention_mask")}
        return model.model.get_rope_index(**rest, **grids)


def image_mask(input_ids: Tensor) -> Tensor:
    """[B, N] bool: image and video placeholders."""
    return (input_ids == IMAGE_ID) | (input_ids == VIDEO_ID)


def full_layers(model: PreTrainedModel) -> list[int]:
    """The decoder layers with full attention, the ones that are compressed."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [index for index, kind in enumerate(kinds) if kind == "full_attention"]


def _concatenate(rows: list[tuple[Image, ...]]) -> dict[str, Tensor]:
    arrays: dict[str, list[Tensor]] = {}
    for image in (image for row in rows for image in row):
        for name, array in image.arrays.items():
            arrays.setdefault(name, []).append(array)
    return {name: torch.cat(_same_shape(parts)) for name, parts in arrays.items()}


def _same_shape(parts: list[Tensor]) -> list[Tensor]:
    """Zero-pads at the end of every dimension but the first, as the processors do."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = [part.new_zeros(part.shape[0], *shape) for part in parts]
    for target, part in zip(padded, parts, strict=True):
        target[tuple(slice(size) for size in part.shape)] = part
    return padded


def _by_row(rows: list[tuple[Image, ...]]) -> dict[str, Tensor]:
    """[B, most images, 3, H, W]: absent images are zero."""
    first = next(row[0] for row in rows if row).arrays["pixel_values"]
    pixels = first.new_zeros(len(rows), max(map(len, rows)), *first.shape[1:])
    for row, images in zip(pixels, rows, strict=True):
        for target, image in zip(row, images, strict=False):
            target.copy_(image.arrays["pixel_values"][0])
    return {"pixel_values": pixels}


def _text(name: str, **changes) -> PreTrainedConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return getattr(transformers, name)(**sizes | changes)


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}


def _square(side: int, patch: int, merge: int = 1) -> Callable[[str, torch.Generator], Image]:
    """Images of one fixed size."""

    def draw(kind: str, generator: torch.Generator) -> Image:
        count = (side // patch // merge) ** 2
        pixels = torch.randn(1, 3, side, side, generator=generator)
        return Image((START_ID, *[IMAGE_ID] * count, END_ID), {"pixel_values": pixels})

    return draw


def _llava() -> PreTrainedConfig:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=16, projection_dim=32),
        text_config=_text("LlamaConfig"),
        image_token_index=IMAGE_ID,
        image_seq_length=16,
    )


ANYRES = [[8, 16], [16, 8], [16, 16]]


def _llava_next() -> PreTrainedConfig:
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=8, projection_dim=32),
        text_config=_text("LlamaConfig"),
        image_token_index=IMAGE_ID,
        image_grid_pinpoints=ANYRES,
        image_seq_length=4,
    )


def _llava_onevision() -> PreTrainedConfig:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=8, vision_use_head=False),
        text_config=_text("Qwen2Config"),
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        image_grid_pinpoints=ANYRES,
    )


def _anyres(kind: str, generator: torch.Generator) -> Image:
    """8x8 tiles of four tokens: the whole image, then its tiles with a newline token after every row."""
    height, width = (16, 8) if kind == TALL else (16, 16)
    tiles = 1 + (height // 8) * (width // 8)
    pixels = torch.randn(1, tiles, 3, 8, 8, generator=generator)
    count = 4 + (height // 4) * (width // 4 + 1)
    return Image((IMAGE_ID,) * count, {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])})


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": WIDTH}
QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _qwen2_vl() -> PreTrainedConfig:
    text = _text("Qwen2VLTextConfig", rope_parameters=dict(MROPE))
    vision = dict(**QWEN_TOWER, embed_dim=32, hidden_size=WIDTH, mlp_ratio=2)
    return transformers.Qwen2VLConfig(text_config=text.to_dict(), vision_config=vision, **QWEN_IDS)


def _qwen2_5_vl() -> PreTrainedConfig:
    text = _text("Qwen2_5_VLTextConfig", rope_parameters=dict(MROPE))
    vision = dict(**QWEN_TOWER, **WIDTHS, window_size=16, fullatt_block_indexes=[1])
    return transformers.Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=vision, **QWEN_IDS)


QWEN3_TOWER = QWEN_TOWER | WIDTHS | {"num_position_embeddings": 16}


def _qwen3_vl() -> PreTrainedConfig:
    text = _text("Qwen3VLTextConfig", rope_parameters=dict(MROPE, mrope_interleaved=True))
    vision = dict(**QWEN3_TOWER, deepstack_visual_indexes=[0, 1])
    return transformers.Qwen3VLConfig(text_config=text.to_dict(), vision_config=vision, **QWEN_IDS)


def _qwen3_vl_moe() -> PreTrainedConfig:
    text = _text(
        "Qwen3VLMoeTextConfig",
        rope_parameters=dict(MROPE, mrope_interleaved=True),
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    )
    vision = dict(**QWEN3_TOWER, deepstack_visual_indexes=[0, 1])
    return transformers.Qwen3VLMoeConfig(text_config=text.to_dict(), vision_config=vision, **QWEN_IDS)


def _qwen3_5() -> PreTrainedConfig:
    text = _text(
        "Qwen3_5TextConfig",
        rope_parameters=dict(MROPE, mrope_interleaved=True, partial_rotary_factor=1.0),
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    return transformers.Qwen3_5Config(text_config=text.to_dict(), vision_config=dict(QWEN3_TOWER), **QWEN_IDS)


def _qwen_image(videos: bool) -> Callable[[str, torch.Generator], Image]:
    def draw(kind: str, generator: torch.Generator) -> Image:
        video = kind == VIDEO and videos
        frames, height, width = (2, 4, 4) if video else (1, 8, 4) if kind == TALL else (1, 8, 8)
        pixels = torch.randn(frames * height * width, 3 * 2 * 4 * 4, generator=generator)
        placeholders = [VIDEO_ID if video else IMAGE_ID] * (frames * height * width // 4)
        names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
        arrays = dict(zip(names, (pixels, torch.tensor([[frames, height, width]])), strict=True))
        return Image((START_ID, *placeholders, END_ID), arrays)

    return draw


def _internvl() -> PreTrainedConfig:
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**TOWER | {"image_size": (32, 32), "patch_size": (4, 4)}),
        text_config=_text("Qwen2Config"),
        image_token_id=IMAGE_ID,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _idefics(prefix: str) -> PreTrainedConfig:
    vision = getattr(transformers, f"{prefix}VisionConfig")(**TOWER, image_size=32).to_dict()
    text = _text("LlamaConfig").to_dict()
    config = getattr(transformers, f"{prefix}Config")
    return config(vision_config=vision, text_config=text, image_token_id=IMAGE_ID, scale_factor=2)


def _idefics3() -> PreTrainedConfig:
    return _idefics("Idefics3")


def _smolvlm() -> PreTrainedConfig:
    return _idefics("SmolVLM")


def _mistral3() -> PreTrainedConfig:
    return transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**TOWER, image_size=32),
        text_config=_text("MistralConfig", sliding_window=None),
        image_token_index=IMAGE_ID,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _pixtral_image(kind: str, generator: torch.Generator) -> Image:
    height, width = (32, 16) if kind == TALL else (32, 32)
    pixels = torch.randn(1, 3, height, width, generator=generator)
    placeholders = (IMAGE_ID,) * (height * width // 64)
    return Image((*placeholders, END_ID), {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])})


def _gemma3() -> PreTrainedConfig:
    text = _text(
        "Gemma3TextConfig",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=20,
        query_pre_attn_scalar=HEAD_DIM,
    )
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**TOWER, image_size=32, vision_use_head=False),
        mm_tokens_per_image=16,
        image_token_index=IMAGE_ID,
        boi_token_index=START_ID,
        eoi_token_index=END_ID,
        tie_word_embeddings=False,
    )


def _mllama() -> PreTrainedConfig:
    return transformers.MllamaConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "cross_attention_layers": [1],
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_size": 48,
            "vision_output_dim": 64,
            "image_size": 16,
            "patch_size": 4,
            "max_num_tiles": 1,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=IMAGE_ID,
    )


def _qwen(name: str, model_class: str, config: Callable[[], PreTrainedConfig], videos: bool = False, **flags) -> Family:
    return Family(name, model_class, config, _qwen_image(videos), types="mm_token_type_ids", mrope=True, **flags)


FAMILIES = {
    family.name: family
    for family in (
        Family("llava", "LlavaForConditionalGeneration", _llava, _square(16, 4)),
        Family("llava_next", "LlavaNextForConditionalGeneration", _llava_next, _anyres),
        Family("llava_onevision", "LlavaOnevisionForConditionalGeneration", _llava_onevision, _anyres),
        _qwen("qwen2_vl", "Qwen2VLForConditionalGeneration", _qwen2_vl, videos=True),
        _qwen("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, videos=True),
        _qwen("qwen3_vl", "Qwen3VLForConditionalGeneration", _qwen3_vl),
        _qwen("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", _qwen3_vl_moe),
        _qwen("qwen3_5", "Qwen3_5ForConditionalGeneration", _qwen3_5, hybrid=True),
        Family("internvl", "InternVLForConditionalGeneration", _internvl, _square(32, 4, 2)),
        Family("idefics3", "Idefics3ForConditionalGeneration", _idefics3, _square(32, 4, 2), stack=_by_row),
        Family("smolvlm", "SmolVLMForConditionalGeneration", _smolvlm, _square(32, 4, 2), stack=_by_row),
        Family("mistral3", "Mistral3ForConditionalGeneration", _mistral3, _pixtral_image),
        Family(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            _gemma3,
            _square(32, 4, 2),
            types="token_type_ids",
            whole_types=True,
        ),
        Family("qwen3", "Qwen3ForCausalLM", lambda: _text("Qwen3Config")),
    )
}

MLLAMA = Family("mllama", "MllamaForConditionalGeneration", _mllama)  # only to be refused
