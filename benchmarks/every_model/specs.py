"""What single model types need beyond tiny.py's sizes: fields of the configuration, and the arrays of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from every_model.tiny import END_ID, IMAGE_ID, START_ID, UNCHANGED, VIDEO_ID
from torch import Tensor

Draw = Callable[[torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Spec:
    """changes: fields of the configuration, dotted. image: the arrays of one image, None: placeholder ids alone.

    tokens: its placeholders; before, after: ids around them; placeholder: their id where no usual field names it.
    types: arguments that mark image tokens with 1, where forward takes them.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    image: Draw | None = None
    tokens: int = 16
    before: Sequence[int] = ()
    after: Sequence[int] = ()
    placeholder: int | None = None
    types: Sequence[str] = ("mm_token_type_ids",)


def pixels(*shape: int, name: str = "pixel_values", **constants: Any) -> Draw:
    """Random pixels [1, *shape], and constant arrays with them."""

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.randn(1, *shape, generator=generator)} | {
            key: torch.tensor([value]) for key, value in constants.items()
        }

    return draw


def patches(generator: torch.Generator) -> dict[str, Tensor]:
    """The flattened 4 x 4 patches of an image of 8 x 8 patches, two frames each."""
    grid = torch.tensor([[1, 8, 8]])
    return {"pixel_values": torch.randn(64, 3 * 2 * 4 * 4, generator=generator), "image_grid_thw": grid}


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = ROPE | {"mrope_section": [2, 1, 1]}
INTERLEAVED = MROPE | {"mrope_interleaved": True}
PARTIAL = MROPE | {"partial_rotary_factor": 1.0}
SQUARE = pixels(3, 32, 32)
ONE_TILE = pixels(1, 3, 32, 32)
SIZED = pixels(3, 32, 32, image_sizes=[32, 32])
ANYRES = pixels(2, 3, 32, 32, image_sizes=[32, 32])
ANYRES_TOKENS = 16 + 4 * (4 + 1)
LAST_LAYER = {"vision_feature_layer": -1}


def _qwen(rope: dict[str, Any] | None, **vision: int) -> Spec:
    """Qwen2-VL's patches, and those who took them over."""
    changes: dict[str, Any] = {"vision_config.patch_size": 4}
    changes |= {f"vision_config.{name}": value for name, value in vision.items()}
    changes |= {} if rope is None else {"text_config.rope_parameters": rope}
    return Spec(changes, patches, before=(START_ID,), after=(END_ID,))


def _anyres() -> Spec:
    return Spec(LAST_LAYER | {"image_grid_pinpoints": [[32, 32]]}, ANYRES, ANYRES_TOKENS)


def _former(video: bool = False, **arrays: Any) -> Spec:
    """A querying transformer between tower and decoder."""
    changes = {"num_query_tokens": 4} | {
        f"qformer_config.{name}": 16 for name in ("encoder_hidden_size", "hidden_size", "intermediate_size")
    }
    changes |= {"qformer_config.vocab_size": 16} if arrays else {}
    shape = (1, 3, 32, 32) if video else (3, 32, 32)
    return Spec(changes, pixels(*shape, **arrays), 4, placeholder=VIDEO_ID if video else IMAGE_ID)


SPECS = {
    "qwen2_vl": _qwen(MROPE, embed_dim=16, hidden_size=32),
    "qwen2_5_vl": _qwen(MROPE),
    "qwen3_vl": _qwen(INTERLEAVED),
    "qwen3_vl_moe": _qwen(INTERLEAVED),
    "qwen3_5": _qwen(INTERLEAVED | PARTIAL),
    "qwen3_5_moe": _qwen(INTERLEAVED | PARTIAL),
    "glm4v": _qwen(PARTIAL, hidden_size=32, out_hidden_size=32),
    "glm46v": _qwen(PARTIAL, hidden_size=32, out_hidden_size=32),
    "glmga": _qwen(PARTIAL, hidden_size=32, out_hidden_size=32),
    "glm4v_moe": _qwen(PARTIAL, hidden_size=32, out_hidden_size=32),
    "glm_ocr": _qwen(PARTIAL, hidden_size=32, out_hidden_size=32),
    "exaone4_5": _qwen(None),
    "llava": Spec(LAST_LAYER, SQUARE),
    "vipllava": Spec({"vision_feature_layers": [-1]}, SQUARE),
    "llava_next": _anyres(),
    "llava_next_video": _anyres(),
    "llava_onevision": _anyres(),
    "internvl": Spec(
        LAST_LAYER
        | {
            "vision_config.image_size": (32, 32),
            "vision_config.patch_size": (4, 4),
            "image_seq_length": 16,
            "downsample_ratio": 0.5,
        },
        SQUARE,
    ),
    "idefics2": Spec(
        {
            "text_config.sliding_window": None,
            "perceiver_config.resampler_n_latents": 4,
            "perceiver_config.resampler_depth": 1,
            "perceiver_config.resampler_n_heads": 2,
            "perceiver_config.num_key_value_heads": 1,
            "perceiver_config.resampler_head_dim": 8,
        },
        ONE_TILE,
        4,
    ),
    "idefics3": Spec({"scale_factor": 1}, ONE_TILE),
    "smolvlm": Spec({"scale_factor": 1}, ONE_TILE),
    "aya_vision": Spec(LAST_LAYER | {"downsample_factor": 1}, SQUARE),
    "cohere2_vision": Spec({"downsample_factor": 1}, SQUARE),
    "mistral3": Spec(LAST_LAYER | {"text_config.sliding_window": None, "spatial_merge_size": 1}, SIZED),
    "lighton_ocr": Spec({"spatial_merge_size": 1}, SIZED),
    "gemma3": Spec({"mm_tokens_per_image": 16}, SQUARE, types=("token_type_ids",)),
    "shieldgemma2": Spec({"mm_tokens_per_image": 16}, SQUARE, types=("token_type_ids",)),
    "paligemma": Spec({"projection_dim": 32, "hidden_size": 32}, SQUARE),
    "fuyu": Spec({"patch_size": 8}, pixels(16, 192, name="image_patches")),
    "video_llava": Spec(
        LAST_LAYER | {"vision_feature_select_strategy": "full"}, pixels(3, 32, 32, name="pixel_values_images"), 17
    ),
    "blip-2": _former(),
    "instructblip": _former(qformer_input_ids=[1, 1, 1]),
    "instructblipvideo": _former(video=True, qformer_input_ids=[1, 1, 1]),
    "qwen2_5_omni_thinker": _qwen(MROPE),
    "qwen3_omni_moe_thinker": _qwen(INTERLEAVED),
    "kimi_k25": Spec({"text_config.num_key_value_heads": 4}),
    "mistral4": Spec(
        {
            "text_config.num_key_value_heads": 4,
            "num_key_value_heads": 4,
            "rope_parameters": ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16},
        }
    ),
    "minimax_m3_vl": Spec(
        {
            "text_config.index_block_size": 4,
            "text_config.index_topk_blocks": 2,
            "text_config.index_head_dim": 8,
            "text_config.index_n_heads": 2,
        }
    ),
    "ernie4_5_vl_moe": Spec(
        {
            "text_config.moe_intermediate_size": [16, 16],
            "text_config.head_dim": 16,
            "text_config.rope_parameters": ROPE | {"mrope_section": [2, 2, 4]},
        }
    ),
    "hunyuan_vl": Spec({"text_config.rope_parameters": ROPE | {"mrope_section": [1, 1, 1, 1]}}),
    "cohere_compass": _qwen({"sliding_attention": MROPE, "full_attention": MROPE}),
    "granite4_vision": Spec({"deepstack_layer_map": [[-1, 0]]}),
    "paddleocr_vl": Spec({"text_config.rope_parameters": MROPE}),
    "florence2": Spec({"vision_config.patch_size": UNCHANGED}),
    "molmo2": Spec({"image_patch_id": IMAGE_ID, "vision_config.image_size": UNCHANGED}, placeholder=IMAGE_ID),
    "glm5_next": Spec(
        {"text_config.num_key_value_heads": 4, "text_config.index_topk": 16, "text_config.qk_rope_head_dim": 0}
    ),
    "qwen4_exp": Spec(
        {
            "text_config.indexer_n_heads": 2,
            "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": 8,
            "text_config.indexer_budget": 8,
            "text_config.indexer_compress_ratio": 4,
            "text_config.ngram_vocab_size_base": 100,
        }
    ),
    "dots3_note": Spec(
        {"text_config.num_attention_heads": UNCHANGED, "text_config.num_key_value_heads": UNCHANGED}
    ),
    "muse_glimmer": Spec({"projector_hidden_size": 16, "out_hidden_size": 32}),
}
