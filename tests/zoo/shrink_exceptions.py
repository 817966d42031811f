"""What a tiny configuration needs that doesn't follow from its fields' names, by model type.

Patterns of layers that are no list (a period, indices) are here, so that one layer of each kind stays.
"""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_BY_SECTION = {**_ROPE, "mrope_section": [2, 1, 1]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
_SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_hidden_layers": 2,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}

_BY_AXES = {"rope_parameters": _BY_SECTION}
_BY_AXES_OF_HALF = {
    "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
}
_SMALL_WINDOWS = {"window_size": 2}
_SMALL_RESNET = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "out_features": ["stage2"],
    },
}
_SMALL_DINO = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
    "out_features": ["stage1", "stage2"],
    "reshape_hidden_states": False,
}
_DEPTH = {
    "backbone_config": _SMALL_DINO,
    "neck_hidden_sizes": [16, 16],
    "reassemble_factors": [2, 1],
    "reassemble_hidden_size": 32,
    "fusion_hidden_size": 16,
}
_ONE_LAYER_EACH = {"encoder_layers": 1, "decoder_layers": 1, "num_feature_levels": 2}
_RT_DETR = {"encode_proj_layers": [2], "decoder_in_channels": [32, 32, 32]}
_WINDOWS_OF_PATCHES = {"window_size": 64}
_PREDICTS = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3]}

# Pyramids whose widths have to fit each other in ways that no name tells: one layer a stage is enough.
ONLY_SHALLOW = {
    "align_vision_model",
    "bit",
    "cvt",
    "deimv2",
    "efficientnet",
    "glpn",
    "hgnet_v2",
    "levit",
    "poolformer",
    "pvt",
    "sam2_hiera_det_model",
    "textnet",
}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "autoformer": _PREDICTS,
    "informer": _PREDICTS,
    "time_series_transformer": _PREDICTS,
    "donut-swin": _SMALL_WINDOWS,
    "maskformer-swin": _SMALL_WINDOWS,
    "swin": _SMALL_WINDOWS,
    "swinv2": _SMALL_WINDOWS,
    "conditional_detr": _SMALL_RESNET,
    "cvt": {"depth": [1, 2, 3]},
    "detr": _SMALL_RESNET,
    "dpt": {
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [16, 16, 16, 16],
    },
    "table-transformer": _SMALL_RESNET,
    "dab-detr": _SMALL_RESNET,
    "deformable_detr": {**_SMALL_RESNET, "num_feature_levels": 1},
    "depth_anything": _DEPTH,
    "prompt_depth_anything": _DEPTH,
    "upernet": {
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "auxiliary_in_channels": 16,
        "auxiliary_channels": 8,
        "hidden_size": 16,
    },
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "pp_doclayout_v3": _RT_DETR,
    "pp_doclayout_v4": _RT_DETR,
    "qwen2_5_vl_vision": _WINDOWS_OF_PATCHES,
    "exaone4_5_vision": _WINDOWS_OF_PATCHES,
    "sam_vision_model": {"output_channels": 32, "num_pos_feats": 16},
    "sam_hq_vision_model": {"output_channels": 32, "num_pos_feats": 16},
    "mimi": {"upsample_groups": 32},
    "perceiver": {
        "num_latents": 6,
        "d_latents": 32,
        "d_model": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "moonshine": {
        "pad_token_id": 0,
        "encoder_num_key_value_heads": 4,
        "decoder_num_key_value_heads": 4,
    },
    "wav2vec2-bert": {"feature_projection_input_dim": 16, "vocab_size": 96},
    "esm": {"vocab_size": 96, "pad_token_id": 0, "mask_token_id": 5},
    "esmc": {"num_key_value_heads": 4},
    "lilt": {"max_2d_position_embeddings": 128, "hidden_size": 48},
    "bros": {
        "dim_bbox_sinusoid_emb_2d": 32,
        "dim_bbox_sinusoid_emb_1d": 4,
        "dim_bbox_projection": 8,
    },
    "glm4v_text": _BY_AXES,
    "glm4v_moe_text": _BY_AXES_OF_HALF,
    "glm_image_text": _BY_AXES,
    "glm_ocr_text": _BY_AXES,
    "paddleocr_vl_text": _BY_AXES,
    "qwen2_vl_text": _BY_AXES,
    "qwen2_5_vl_text": _BY_AXES,
    "qwen2_5_omni_text": _BY_AXES,
    "hunyuan_vl_text": {"rope_parameters": {**_ROPE, "xdrope_section": [1, 1, 1, 1]}},
    "cosmos3_edge_text": _BY_AXES,
    "grounding-dino": _ONE_LAYER_EACH,
    "mm-grounding-dino": _ONE_LAYER_EACH,
    "funnel": {"block_sizes": [1, 1, 1], "num_decoder_layers": 1},
    "vits": {
        "prior_encoder_num_flows": 1,
        "prior_encoder_num_wavenet_layers": 1,
        "posterior_encoder_num_wavenet_layers": 1,
        "duration_predictor_num_flows": 1,
        "depth_separable_num_layers": 1,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1]],
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
    },
    "udop": {"decoder_start_token_id": 1},
    "glm5_next_text": {"num_key_value_heads": 4},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "blt_local_encoder": {"hidden_size_global": 32},
    "blt_local_decoder": {"hidden_size_global": 32},
    "blt": {"use_cache": False},  # its cache asks the configuration for layers that it doesn't name
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _BY_SECTION, "full_attention": _BY_SECTION},
    },
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 4,
        "swa_v_head_dim": 8,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
    },
    "gemma4_audio": {"num_hidden_layers": 1},
    "gemma4_text": {"global_head_dim": 16, "num_kv_shared_layers": 0},
    "gemma4_unified_text": {"global_head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"]},
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"]},
    "laguna": {"layer_types": ["sliding_attention", "full_attention"]},
    "mellum": {"layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"sliding_window": 8},
    "pegasus_x": {"decoder_layers": 1},  # the encoder's two differ
    "phi3": {"sliding_window": 8},
    "phimoe": {"sliding_window": 8},
    "qwen2": _SLIDING,
    "qwen3": _SLIDING,
    # The first and the last of a text's layers are of another kind than those between.
    "sam3_lite_text_text_model": {"num_hidden_layers": 3},
    "sam3_lite_text_geometry_encoder": {"num_layers": 1},
    "sam3_lite_text_detr_encoder": {"num_layers": 1},
    "sam3_lite_text_detr_decoder": {"num_layers": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 8},
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid"], "sliding_window": 8},
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "deepseek_v4": {
        "hc_sinkhorn_iters": 4,
        "num_hidden_layers": 2,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "deepseek_v3": {"first_k_dense_replace": 1},
    "longcat_flash": {"head_dim": 4},  # of the rotated part alone
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2},
    "olmo_hybrid": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "qwen4_exp_text": {**_INDEXER, "ple_layer_ids": []},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
    },
    "xmod": {"languages": ["en_XX", "fr_XX"], "default_language": "fr_XX"},
    # Its chunks are computed in place, and have no gradients: shorter texts are trained token by token.
    "xlstm": {
        "hidden_size": 128,
        "embedding_dim": 128,
        "num_blocks": 2,
        "num_heads": 2,
        "chunk_size": 64,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_key_value_heads": 4,
        "n_mamba_heads": 4,
    },
}
