"""Makes any configuration of transformers tiny, with at least one layer of each kind left.

The sizes follow from the fields' names; what doesn't follow is in a table by model type.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .shrink_exceptions import EXCEPTIONS, ONLY_SHALLOW

VOCABULARY, WINDOW, POSITIONS = 96, 8, 128
# Most kinds of layers that are kept of one model; any more would only repeat what they show.
_MOST_LAYERS = 6

# The first pattern that matches a field's whole name gives its size.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size|num_token_types", 2),
    (r"(encoder_hash|ngram)_.*vocab.*", 64),
    (r".*vocab_size.*|n_vocab|num_text_tokens", VOCABULARY),
    (r"(sliding|local|attention|keep|swa)?_?window(_size)?(_len)?|sliding_window_size", WINDOW),
    (r"attention_window_size|local_attention(_window_len)?|attention_chunk_size", WINDOW),
    (r"index_topk|index_block_size|block_size", 8),
    (r"(mamba_)?chunk_size|chunk_length|chunk_size_feed_forward", 8),
    (r"max_(source_|target_)?position(_embedding)?s|n_positions|n_ctx|max_seq_len|max_length", 128),
    (r"model_max_length|seq_length|context_length|original_max_position_embeddings", POSITIONS),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|laurel_rank|hc_lowrank|adapter_rank|.*_rank", 16),
    (r"qk_nope_head_dim|v_head_dim|linear_(key|value)_head_dim|index_head_dim", 8),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_head_dim", 12),
    (r"(.*_)?head_(dim|size)|d_kv|kv_channels|dim_head|d_head|.*_head_dim|head_dim_.*", 8),
    (r"(.*_)?n(um)?_?(_kv_heads?|_key_value_heads?)(_.*)?|n_head_kv|linear_num_key_heads", 2),
    (r"linear_num_value_heads|.*(num|n)_(.*_)?heads?|n_?heads?|(.*_)?attention_heads", 4),
    (r"num_query_groups|n_groups?|num_expert_group|topk_group|o_groups", 2),
    (r"state_size|mamba_d_state|ssm_state_size|(mamba_)?dt_rank|time_step_rank|ssm_.*_dim", 8),
    (r"moe_intermediate_size|(.*_)?shared_.*intermediate_size|expert_ffn_hidden_size", 32),
    (
        r"(.*_)?intermediate_(size|dim)(_mlp)?|(.*_)?ffn_(hidden_size|dim)|d_ff|dff|dim_ff|n_inner",
        64,
    ),
    (
        r"feed_forward_size|(.*_)?ffn_hidden_(dim|size)|dim_feedforward|mlp_(hidden_)?dim|d_inner",
        64,
    ),
    (
        r"(.*_)?hidden_(size|dim)(s)?(_per_layer_input)?|d_model|n_embd|dim|(.*_)?embed(ding)?_dim",
        32,
    ),
    (
        r"(.*_)?embedding_size|embed_dims?|emb_dim|lru_width|word_embed_proj_dim|(.*_)?projection_dim",
        32,
    ),
    (r"(.*_)?num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_(selected_)?experts_per_tok(en)?|moe_k|moe_topk|(.*_)?top_?k(_experts?)?", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"(num_|n_)?(.*_)?layers?|num_(.*_)?blocks|depth|num_.*_layers", 2),
    (r"num_mel_bins|num_mels|input_feat_per_channel", 16),
    (r"mem_len", 0),
    (r"num_labels|num_classes|num_queries", 5),
    (r"image_size|img_size|input_size", 64),
    (r"num_frames|frames_per_clip", 4),
)
# How long those lists are.
_STAGES = ("num_encoder_blocks", "num_stages")
# Lists with a number for each stage of a pyramid: depths, heads, widths.
_DEPTHS = re.compile(r"(.*_)?depths?|num_.*_layers|num_blocks|(.*_)?layers|num_encoder_blocks")
_HEADS = re.compile(r"(.*_)?num_(attention_)?heads?|(.*_)?heads")
_WIDTHS = re.compile(
    r"(.*_)?(hidden|embedding)_sizes?|(.*_)?(embed_)?dims?|(.*_)?widths?|(.*_)?channels|conv_dim"
    r"|(.*_)?filters|(.*_)?hidden_dims?"
)
# Dropout stays out of models whose bits are compared with eager ones; idioms have it.
_OFF = re.compile(
    r".*dropout.*|.*drop_rate|.*layer_?drop|drop_path.*|.*jitter.*|mask_(time|feature)_prob|.*_drop"
    r"|apply_spec_augment|attn_pdrop|embd_pdrop|resid_pdrop"
)
_TOKEN = re.compile(r".*(_token_(id|index)|token_id|_index|_idx|_ids?)")
_SEPARATE = {
    "pad": 0,
    "bos": 1,
    "eos": 2,
    "decoder_start": 1,
    "sep": 3,
    "cls": 4,
    "mask": 5,
    "unk": 6,
}


def shrunk(config_class: type[Any], **overrides: Any) -> Any:
    """Return a tiny configuration of a class."""
    return config_class(**tiny_fields(config_class(), config_class), **overrides)


def tiny_fields(config: Any, config_class: type[Any] | None = None) -> dict[str, Any]:
    """Return the arguments for a tiny configuration like this one, without those that stay."""
    config_class = config_class or type(config)
    fields = {f.name for f in dataclasses.fields(config_class) if f.init}
    # Not by getattr: a field that differs from layer to layer refuses to be asked for.
    known, names = vars(config), config.attribute_map
    values = {n: known[names.get(n, n)] for n in fields if names.get(n, n) in known}
    found = {name: _tiny(name, value) for name, value in values.items()}
    found = {name: value for name, value in found.items() if value is not _SAME}
    found |= _layers(config, found)
    if values.get("kv_lora_rank") and "num_key_value_heads" in found:
        found["num_key_value_heads"] = 4  # latent attention has a key for each query
    if config.model_type in ONLY_SHALLOW:
        found = {name: value for name, value in found.items() if _is_depth(name, value)}
    own = EXCEPTIONS.get(config.model_type, {})
    return {**found, **own}


_SAME = object()


def _is_depth(name: str, value: Any) -> bool:
    """Tell whether a field's tiny value changes no width."""
    if isinstance(value, (list, tuple)):
        return bool(_DEPTHS.fullmatch(name))
    return name == "image_size" or bool(_OFF.fullmatch(name))


# Fields that most models work out themselves, and some don't.
_UNSET = {"head_dim": 8, "num_key_value_heads": 2}


def _tiny(name: str, value: Any) -> Any:
    """Return a field's tiny value, or `_SAME`."""
    from transformers import PreTrainedConfig

    if isinstance(value, PreTrainedConfig):
        return type(value)(**tiny_fields(value))
    if name == "apply_spec_augment":
        return False
    if name in _STAGES:
        return _SAME
    if value is None:
        return _UNSET.get(name, _SAME)
    if isinstance(value, (bool, str)):
        return _SAME
    if _OFF.fullmatch(name) and isinstance(value, (int, float)):
        return type(value)(0)
    if _TOKEN.fullmatch(name):
        return _token(name, value)
    if isinstance(value, (list, tuple)):
        return _stages(name, value)
    if name in ("patch_size", "vision_patch_size") and isinstance(value, int):
        return min(value, 16) if value < 14 else 16
    if not isinstance(value, int) or value <= 1:
        return _SAME
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
    return _SAME if size is None else size


def _stages(name: str, values: Sequence[Any]) -> Any:
    """Return a pyramid's small numbers: one layer a stage, widths that double, a head for 8 of them."""
    if not values or not all(type(value) is int for value in values):
        return _SAME
    if name in ("image_size", "img_size", "input_size"):
        return type(values)([64] * len(values))
    if _DEPTHS.fullmatch(name):
        return type(values)([1] * len(values))
    if _HEADS.fullmatch(name):
        return type(values)(min(value, 8) if value & (value - 1) == 0 else 2 for value in values)
    if _WIDTHS.fullmatch(name) and max(values) > 16:
        ranks = {value: rank for rank, value in enumerate(sorted(set(values)))}
        return type(values)(3 if value == 3 else 8 << min(ranks[value], 4) for value in values)
    return _SAME


def _token(name: str, value: Any) -> Any:
    """Return a special token's number inside the tiny vocabulary, other ones for other tokens."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value):
        return [2] if value and max(value) >= VOCABULARY else _SAME
    if not isinstance(value, int) or value < 7:
        return _SAME
    for kind, number in _SEPARATE.items():
        if name.startswith(kind):
            return number
    return VOCABULARY - 1 - sum(map(ord, name)) % 20


def _layers(config: Any, tiny: Mapping[str, Any]) -> dict[str, Any]:
    """Choose one layer of each kind, and cut all lists that have an entry for each layer."""
    count = vars(config).get("num_hidden_layers")
    if not isinstance(count, int) or count < 2:
        return {}
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == count and not name.endswith("_ids")
    }
    fields = {f.name for f in dataclasses.fields(config) if f.init}
    lists = {name: value for name, value in lists.items() if name in fields}
    if not lists:
        return {}
    chosen = _one_of_each(list(zip(*map(_kinds, lists.values()), strict=True)))
    found: dict[str, Any] = {name: [_cut(name, v[i]) for i in chosen] for name, v in lists.items()}
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if name in fields:
            found[name] = len(chosen)
            break
    return found


def _kinds(values: Sequence[Any]) -> list[str]:
    return [str(value) for value in values]


def _cut(name: str, value: Any) -> Any:
    small = _tiny(name, value)
    return value if small is _SAME else small


def _one_of_each(kinds: Sequence[Any]) -> list[int]:
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())[:_MOST_LAYERS]
    for index in range(len(kinds)):
        if len(chosen) >= 2:
            break
        if index not in chosen:
            chosen.append(index)
    return sorted(chosen)
