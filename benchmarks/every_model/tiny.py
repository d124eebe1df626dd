"""Tiny random models: a configuration class of transformers with its sizes made small, and seeded weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto

PAD, FIRST_TEXT, FIRST_SPECIAL, VOCAB = 0, 3, 110, 128
START_ID, END_ID, IMAGE_ID, VIDEO_ID, AUDIO_ID = 118, 119, 120, 121, 122
LAYERS = 4
MOST_PARAMETERS = 30_000_000

DECODERS = {"text_config", "llm_config", "language_config", "decoder", "thinker_config", "dlm_config"}
IDS = {
    "image_token_id": IMAGE_ID,
    "image_token_index": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "video_token_index": VIDEO_ID,
    "audio_token_id": AUDIO_ID,
    "audio_token_index": AUDIO_ID,
    "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
    "image_start_token_id": START_ID,
    "image_end_token_id": END_ID,
    "boi_token_id": 116,
    "eoi_token_id": 117,
    "boi_token_index": 116,
    "eoi_token_index": 117,
    "video_start_token_id": 114,
    "video_end_token_id": 115,
    "audio_start_token_id": 112,
    "audio_end_token_id": 113,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": VOCAB,
}
# fields of many configuration classes; a class gets those it has
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "d_model": 32,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "is_decoder": True,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "query_pre_attn_scalar": 8,
    "num_global_key_value_heads": 2,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "laurel_rank": 4,
    # mixtures of experts
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    # multi-head latent attention and indexed attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    # linear attention, state spaces and convolutions
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "conv_L_cache": 3,
    "block_ff_dim": 48,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_heads": 2,
    "attention_heads": 2,
    "depth": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
    "embed_dim": 16,
    "mlp_dim": 32,
    "out_hidden_size": 32,
    "vocab_size": VOCAB,
    "num_position_embeddings": 16,
    "max_position_embeddings": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
    "window_size": 16,
    "num_global_layers": 1,
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
}
# where the class leaves them out, the architecture has no such thing
OPTIONAL = ("q_lora_rank", "sliding_window", "num_key_value_heads")
PER_LAYER = ("layer_types", "mlp_layer_types", "indexer_types")


def tiny_config(model_type: str, model_class: str, changes: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a model type with small sizes; changes: values by dotted field name."""
    name = configuration_auto.CONFIG_MAPPING_NAMES[model_type]
    config = _shrink(getattr(transformers, name), changes, DECODER | IDS)
    text = config.get_text_config(decoder=True)
    # as AutoModelForCausalLM does for a class that is the decoder of a larger model
    return text if type(config) is not getattr(transformers, model_class).config_class is type(text) else config


def _shrink(config_class: type[PreTrainedConfig], changes: dict[str, Any], sizes: dict[str, Any]) -> PreTrainedConfig:
    default = config_class()
    parts = {}
    for name in config_class.sub_configs or {}:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            inner = {key.partition(".")[2]: value for key, value in changes.items() if key.startswith(f"{name}.")}
            parts[name] = _shrink(type(part), inner, DECODER if name in DECODERS else TOWER)
    if sizes is not TOWER and not DECODERS.isdisjoint(parts):
        sizes = IDS
    fields = {name: size for name, size in sizes.items() if _has(default, name)}
    layers = sizes.get("num_hidden_layers", LAYERS)
    fields |= {name: _every_kind(getattr(default, name), layers) for name in PER_LAYER if _has(default, name)}
    if "kv_lora_rank" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        fields["rope_parameters"] = rope | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    fields |= parts | {name: value for name, value in changes.items() if "." not in name}
    return config_class(**fields)


def _has(config: PreTrainedConfig, name: str) -> bool:
    """Whether a default configuration has a field, and not as something left out."""
    # not getattr: some fields may not be asked for where they vary by layer
    name = config.attribute_map.get(name, name)
    return name in vars(config) and not (vars(config)[name] is None and name in OPTIONAL + PER_LAYER)


def _every_kind(kinds: list[str], layers: int) -> list[str]:
    return (list(dict.fromkeys(kinds)) * layers)[:layers]


def tiny_model(model_class: str, config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode and float32 with the library's default attention. ValueError where it is not tiny."""
    cls = getattr(transformers, model_class)
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in cls._from_config(copy.deepcopy(config)).named_parameters()}
    if sum(sizes.values()) > MOST_PARAMETERS:
        largest = sorted(sizes, key=sizes.__getitem__)[-3:]
        raise ValueError(f"{model_class} is not tiny, it has {sum(sizes.values())} parameters, most in {largest}")
    torch.manual_seed(seed)
    model = cls._from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():  # unit gain, so that attention is not uniform
            fan_in = parameter[0].numel() if parameter.dim() > 3 else parameter.shape[-1]
            parameter.data.normal_(0, fan_in**-0.5, generator=generator)
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = 1, None, PAD
        settings.suppress_tokens = list(range(FIRST_SPECIAL, VOCAB))  # a generated placeholder would want an image
    return model
