"""What single model types need beyond tiny.py's sizes: fields of the configuration, and the arrays of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from every_model.tiny import AUDIO_ID, END_ID, IMAGE_ID, START_ID, UNCHANGED, VIDEO_ID
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


def two_resolutions(generator: torch.Generator) -> dict[str, Tensor]:
    """The same square image twice."""
    image = torch.randn(1, 3, 32, 32, generator=generator)
    return {"pixel_values": image, "high_res_pixel_values": image}


def flat_patches(*shape: int, **constants: Any) -> Draw:
    """64 patches [64, *shape] of one frame, as a grid of 8 x 8."""

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        grid = {"image_grid_thw": torch.tensor([[1, 8, 8]])}
        arrays = {key: torch.tensor([value]) for key, value in constants.items()}
        return {"pixel_values": torch.randn(64, *shape, generator=generator)} | grid | arrays

    return draw


def numbered_patches(generator: torch.Generator) -> dict[str, Tensor]:
    """16 flattened 4 x 4 patches after their row and column, as Pix2Struct's."""
    place = torch.arange(16)
    rows = torch.stack([place // 4 + 1, place % 4 + 1], 1).float()
    return {"flattened_patches": torch.cat([rows, torch.randn(16, 48, generator=generator)], 1)[None]}


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


def _qwen(rope: dict[str, Any] | None, image: Draw = patches, **vision: int) -> Spec:
    """Qwen2-VL's patches, and those who took them over."""
    changes: dict[str, Any] = {"vision_config.patch_size": 4}
    changes |= {f"vision_config.{name}": value for name, value in vision.items()}
    changes |= {} if rope is None else {"text_config.rope_parameters": rope}
    return Spec(changes, image, before=(START_ID,), after=(END_ID,))


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


def _thinker(spec: Spec) -> Spec:
    """With ids that its default configuration leaves out."""
    ids = {"vision_start_token_id": START_ID, "vision_end_token_id": END_ID, "audio_start_token_id": 112}
    return replace(spec, changes=spec.changes | ids)


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
    "qwen2_5_omni_thinker": _thinker(_qwen(MROPE)),
    "qwen3_omni_moe_thinker": _thinker(_qwen(INTERLEAVED)),
    "cosmos3_omni": _qwen(None),
    "cosmos3_edge": _qwen(None, flat_patches(48)),
    "lfm3_vl": _qwen(None),
    "hyperclovax_vision_v2": _qwen(None),
    "video_llama_3": _qwen(None, flat_patches(48, image_merge_sizes=2)),
    "deepseek_vl": Spec(image=SQUARE),
    "deepseek_vl_hybrid": Spec({"high_res_vision_config.global_attn_indexes": [0, 1]}, two_resolutions),
    "blip": Spec(image=SQUARE),
    "git": Spec(image=SQUARE),
    "kosmos-2": Spec(
        {"latent_query_num": 16}, SQUARE, placeholder=IMAGE_ID, types=("image_embeds_position_mask",)
    ),
    "kosmos-2.5": Spec(
        {
            "latent_query_num": 16,
            "vision_config.patch_embed_hidden_size": 48,
            "vision_config.d_ff": 32,
            "vision_config.d_kv": 8,
            "vision_config.max_num_patches": 16,
        },
        numbered_patches,
        placeholder=IMAGE_ID,
        types=("image_embeds_position_mask",),
    ),
    "aria": Spec({"projector_patch_to_query_dict": {16: 4}}, SQUARE, 4),
    "got_ocr2": Spec(image=SQUARE, tokens=1),
    "pp_chart2table": Spec(image=SQUARE, tokens=1),
    "ovis2": Spec({"hidden_size": 32}, SQUARE),
    "qianfan_ocr": Spec(image=SQUARE, tokens=4),
    "step3p7": Spec({"text_config.sliding_window": 8}, SQUARE, 1),
    "hy_v4_vl": replace(_qwen(None, flat_patches(48)), tokens=20),
    "lfm2_vl": Spec(
        {"vision_config.patch_size": 4},
        pixels(64, 48, spatial_shapes=[8, 8], pixel_attention_mask=[1] * 64),
    ),
    "phi4_multimodal": Spec(
        {"vision_config.image_token_id": IMAGE_ID, "audio_config.audio_token_id": AUDIO_ID}, placeholder=IMAGE_ID
    ),
    "gemma4": Spec(
        {
            "text_config.use_bidirectional_attention": "vision",
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "pooling_kernel_size": 2,
                "patch_size": 8,
                "position_embedding_size": 16,
            },
        },
        pixels(64, 192, image_position_ids=[[place // 8, place % 8] for place in range(64)]),
    ),
    "diffusion_gemma": Spec({"text_config.top_k_experts": 2}),
    "zamba2": Spec({"hybrid_layer_ids": [1, 3]}),
    "musicgen": Spec({"decoder.num_codebooks": 1}),
    "musicgen_melody": Spec({"decoder.num_codebooks": 1}),
    "xmod": Spec({"default_language": "en_XX"}),
    "jamba": Spec({"attn_layer_period": 2, "attn_layer_offset": 1}),
    "mistral4": Spec(
        {
            "text_config.num_key_value_heads": 4,
            "num_key_value_heads": 4,
            "rope_parameters": ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16},
        }
    ),
    "minimax_m3_vl": Spec(
        {
            "vision_config.patch_size": 4,
            "text_config.index_block_size": 4,
            "text_config.index_topk_blocks": 2,
            "text_config.index_head_dim": 8,
            "text_config.index_n_heads": 2,
        },
        patches,
    ),
    "ernie4_5_vl_moe": Spec(
        {
            "text_config.moe_intermediate_size": [16, 16],
            "text_config.head_dim": 16,
            "text_config.rope_parameters": ROPE | {"mrope_section": [2, 2, 4]},
            "vision_config.patch_size": 4,
        },
        flat_patches(48),
    ),
    "hunyuan_vl": Spec(
        {"text_config.rope_parameters": ROPE | {"mrope_section": [1, 1, 1, 1]}, "vision_config.patch_size": 4},
        flat_patches(48),
        22,
    ),
    "cohere_compass": _qwen({"sliding_attention": MROPE, "full_attention": MROPE}),
    "granite4_vision": Spec({"deepstack_layer_map": [[-1, 0]]}),
    "paddleocr_vl": Spec(
        {"text_config.rope_parameters": MROPE, "vision_config.patch_size": 4}, flat_patches(3, 4, 4)
    ),
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
    "muse_glimmer": Spec(
        {"projector_hidden_size": 16, "out_hidden_size": 64, "vision_config.patch_size": 4}, patches
    ),
    "muse_spark": Spec(
        {
            "projector_hidden_size": 16,
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
    "perception_lm": Spec({"vision_config": CLIP | {"model_args": {"embed_dim": 16}}}, ONE_TILE),
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
    "granite4_vision": Spec({"deepstack_layer_map": [[-1, 0]], "vision_config.hidden_size": 64, "downsample_rate": "1/2"}),
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
            "audio_config.asr_config.blank_token_id": 3,
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
    "mistral": Spec({"sliding_window": None}),
    "ministral": Spec({"layer_types": ["sliding_attention", "full_attention"] * 2}),
}
