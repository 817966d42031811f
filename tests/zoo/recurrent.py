"""Small models with recurrent layers of every kind that is served."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers as hf

_BASE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
_SIZES = {
    **_BASE,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA = {
    **_LAYERS,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_KIMI = {
    **_LAYERS,
    **_EXPERTS,
    "num_key_value_heads": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_MAMBA = {"state_size": 8, "time_step_rank": 4}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}

_SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mamba": ("MambaForCausalLM", "MambaConfig", {**_BASE, **_MAMBA}),
    "falcon_mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", {**_BASE, **_MAMBA}),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**_BASE, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**_SIZES, **_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {**_SIZES, **_DELTA}),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        {**_SIZES, **_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "olmo_hybrid": (
        "OlmoHybridForCausalLM",
        "OlmoHybridConfig",
        {**_SIZES, **_DELTA, "linear_num_key_heads": 4},
    ),
    "bamba": (
        "BambaForCausalLM",
        "BambaConfig",
        {**_SIZES, **_MAMBA2, "attn_layer_indices": [1]},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_SIZES,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **_SIZES,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "hybrid_override_pattern": "M*-E",
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **_SIZES,
            **_MAMBA2,
            **_LOCAL_EXPERTS,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 32,
        },
    ),
    "zamba": (
        "ZambaForCausalLM",
        "ZambaConfig",
        {
            **_SIZES,
            "num_hidden_layers": 6,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
        },
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **_SIZES,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
            "hybrid_layer_ids": [1, 3],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {**_SIZES, **_MAMBA2, "mamba_d_ssm": 64},
    ),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**_SIZES, **_CONVOLUTION}),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {**_SIZES, **_CONVOLUTION, **_EXPERTS, "num_dense_layers": 1},
    ),
    "lfm3": ("Lfm3ForCausalLM", "Lfm3Config", {**_SIZES, **_CONVOLUTION}),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            **_SIZES,
            "num_hidden_layers": 3,
            "lru_width": 32,
            "head_dim": 8,
            "sliding_window": 16,
        },
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {**_SIZES, **_LAYERS, **_LOCAL_EXPERTS, "head_dim": 8, "block_size": 8},
    ),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {**_SIZES, **_KIMI, "q_lora_rank": None},
    ),
    "bailing_hybrid": (
        "BailingHybridForCausalLM",
        "BailingHybridConfig",
        {**_SIZES, **_KIMI, "n_group": 1, "topk_group": 1},
    ),
    "rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {**_BASE, "attention_hidden_size": 32, "intermediate_size": 64, "rescale_every": 1},
    ),
    "xlstm": (
        "xLSTMForCausalLM",
        "xLSTMConfig",
        {**_BASE, "hidden_size": 128, "embedding_dim": 128, "num_blocks": 2, "num_heads": 2},
    ),
    "zaya": ("ZayaForCausalLM", "ZayaConfig", {**_SIZES, "head_dim": 8}),
}


def recurrent_model(family: str, **changes: Any) -> Any:
    """Return a model of a family, with other settings if wanted."""
    model, config, settings = _SETTINGS[family]
    return getattr(hf, model)(getattr(hf, config)(**{**settings, **changes}))


RECURRENT: dict[str, Callable[[], Any]] = {
    family: partial(recurrent_model, family) for family in _SETTINGS
}
