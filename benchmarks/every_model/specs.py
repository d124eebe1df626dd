"""What single model types need beyond tiny.py's sizes: fields of the configuration, and the arrays of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
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
# in the place of a tower that needs the timm library
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 100,
}
DOTS = {"head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4}
GEMMA3N = {"num_kv_shared_layers": 2}


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
    "florence2": Spec(
        {
            "vision_config.patch_size": (7, 3),
            "vision_config.patch_stride": (4, 2),
            "vision_config.patch_padding": (3, 1),
            "vision_config.patch_prenorm": (False, True),
            "vision_config.depths": (1, 1),
            "vision_config.embed_dim": (8, 16),
            "vision_config.num_heads": (1, 2),
            "vision_config.num_groups": (1, 2),
        }
    ),
    "molmo2": Spec(
        {
            "image_patch_id": IMAGE_ID,
            "vision_config.image_size": UNCHANGED,
            "adapter_config.vision_feature_layer": [-1, -2],
            "adapter_config.text_hidden_size": 32,
        },
        placeholder=IMAGE_ID,
    ),
    "glm5_next": Spec({"text_config.index_topk": 16, "text_config.qk_rope_head_dim": 0}),
    "qwen4_exp": Spec({f"text_config.{name}": value for name, value in INDEXER.items()}),
    "qwen4_exp_text": Spec(INDEXER),
    "dots3_note": Spec(
        {f"text_config.{name}": value for name, value in DOTS.items()}
        | {
            "vision_config.adapter_in_dim": 16,
            "vision_config.adapter_out_dim": 32,
            "audio_config.adapter_input_size": 16,
            "audio_config.adapter_output_size": 32,
        }
    ),
    "dots3_note_text": Spec(DOTS),
    "muse_glimmer": Spec({"projector_hidden_size": 16, "out_hidden_size": 32}),
    "muse_spark": Spec(
        {
            "audio_config.patch_sizes": (16, 6),
            "audio_config.hidden_sizes": (8, 16),
            "audio_config.depths": (1, 1),
        }
    ),
    "chameleon": Spec({"vocabulary_map": {"<image>": IMAGE_ID, "IMGIMGA": 124}}, placeholder=IMAGE_ID),
    "emu3": Spec(
        {
            "vocabulary_map": {"<image>": IMAGE_ID, "<|extra_200|>": 125, "<|visual token 000000|>": 124},
            "vq_config.base_channels": 32,
            "vq_config.codebook_size": 64,
            "vq_config.hidden_size": 32,
        },
        placeholder=IMAGE_ID,
    ),
    "deepseek_ocr2": Spec({"text_config.mlp_layer_types": ["dense"] * 4}),
    "fast_vlm": Spec({"vision_config": CLIP}),
    "gemma3n": Spec({"vision_config": transformers.CLIPVisionConfig(**CLIP), **{f"text_config.{name}": value for name, value in GEMMA3N.items()}}),
    "gemma3n_text": Spec(GEMMA3N),
    "perception_lm": Spec({"vision_config": CLIP | {"model_args": {"embed_dim": 16}}}),
    "inkling2": Spec({"vision_config.text_hidden_size": 32}),
    "inkling2_loop": Spec({"vision_config.text_hidden_size": 32}),
    "janus": Spec(
        {
            "vq_config.base_channels": 32,
            "vq_config.latent_channels": 32,
            "vq_config.projection_dim": 32,
            "vq_config.image_token_embed_dim": 32,
            "vq_config.num_embeddings": 64,
        }
    ),
    "granite4_vision": Spec({"deepstack_layer_map": [[-1, 0]], "vision_config.hidden_size": 64}),
    "nemotron_h_omni": Spec({"vision_config.video_temporal_patch_size": 2}),
    "fun_asr_nano": Spec({"adaptor_config.hidden_size": 32, "adaptor_config.intermediate_size": 8}),
    "kyutai_speech_to_text": Spec({"audio_pad_token_id": 124, "audio_bos_token_id": 125, "codebook_vocab_size": 127}),
    "cohere_compass_text": Spec({"rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE}}),
    "bamba": Spec({"mamba_n_heads": 4, "mamba_d_state": 8, "attn_layer_indices": [1, 3]}),
    "granitemoehybrid": Spec(
        {"mamba_n_heads": 4, "mamba_d_state": 8, "layer_types": ["linear_attention", "full_attention"] * 2}
    ),
    "falcon_h1": Spec({"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 8}),
    "lfm2_moe": Spec({"layer_types": ["conv", "full_attention"] * 2}),
    "mamba2": Spec({"num_heads": 8, "head_dim": 8, "state_size": 8}),
    "nemotron": Spec({"num_key_value_heads": 2}),
    "gpt_neo": Spec({"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 8}),
    "reformer": Spec({"axial_pos_embds": False, "attention_head_size": 8, "max_position_embeddings": 512}),
    "xlnet": Spec({"d_head": 8}),
    "apertus1p5": Spec(
        {
            "vision_config.codebook_size": 8,
            "image_token_offset": 100,
            "audio_token_offset": 108,
            "audio_config.codebook_size": 8,
            "audio_config.codebook_dim": 16,
        }
    ),
    "nemo_speechlm": Spec(
        {
            "audio_config.diarization_config.head_config.audio_hidden_size": 16,
            "audio_config.diarization_config.head_config.hidden_size": 16,
        }
    ),
    "qwen2_5_omni": Spec({"enable_audio_output": False}),
    "qwen3_omni_moe": Spec({"enable_audio_output": False}),
    "vibevoice_asr": Spec(
        {
            f"{part}_tokenizer_encoder_config.{name}": value
            for part in ("acoustic", "semantic")
            for name, value in (("num_filters", 1), ("depths", (1, 1, 1, 1, 1, 1, 1)))
        }
    ),
    "blt": Spec({"encoder_hash_byte_group_vocab": 64}),
    "dbrx": Spec({"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}}),
    "gemma4_assistant": Spec(
        {
            "text_config.hidden_size_per_layer_input": 0,
            "text_config.vocab_size_per_layer_input": 0,
            "text_config.num_kv_shared_layers": 4,
        }
    ),
    "zaya": Spec({"num_experts_per_tok": 1}),
    "gptj": Spec({"rotary_dim": 4}),
    "codegen": Spec({"rotary_dim": 4}),
    "step3p7": Spec({"text_config.sliding_window": 8}),
    "mistral": Spec({"sliding_window": None}),
    "ministral": Spec({"layer_types": ["sliding_attention", "full_attention"] * 2}),
}
