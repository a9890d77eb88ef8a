"""What config.json of every model in conf/model says, as its checkpoint on the hub has it, and what follows from it.

The larger Gemma 3 leave most of their text part to transformers' defaults, and all state rotary embeddings as transformers
4 did, so these are also what a new version of transformers has to go on understanding. Sizes are those of public copies of
the files; parameter counts are the hub's own, of the safetensors. It knows nothing of `conf/`.
"""

from __future__ import annotations

from typing import Any

SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
GEMMA3_TEXT = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-06,
    "vocab_size": 262144,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "cache_implementation": "hybrid",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-06,
    "vocab_size": 256000,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
LARGE_QWEN2_5 = QWEN2_5 | {"tie_word_embeddings": False, "vocab_size": 152064}


def _sizes(layers: int, hidden: int, intermediate: int, heads: int = 0, kv_heads: int = 0) -> dict[str, Any]:
    """The sizes under the names of config.json; 0 is not written there."""
    named = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    return {name: value for name, value in named.items() if value}


def _multimodal(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "eos_token_id": [1, 106],
        "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            **text,
        },
        "vision_config": dict(SIGLIP),
    }


def _layer_types(layers: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(layers)]


CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3_270m": GEMMA3_TEXT
    | _sizes(18, 640, 2048)
    | {"_sliding_window_pattern": 6, "layer_types": _layer_types(18)},
    "gemma3_1b": GEMMA3_TEXT | _sizes(26, 1152, 6912) | {"sliding_window_pattern": 6},
    "gemma3_4b": _multimodal(_sizes(34, 2560, 10240)),
    "gemma3_12b": _multimodal(_sizes(48, 3840, 15360, 16, 8)),
    "gemma3_27b": _multimodal(_sizes(62, 5376, 21504, 32, 16) | {"head_dim": 128, "query_pre_attn_scalar": 168}),
    "gemma2_2b": GEMMA2 | _sizes(26, 2304, 9216, 8, 4),
    "gemma2_9b": GEMMA2 | _sizes(42, 3584, 14336, 16, 8),
    "gemma2_27b": GEMMA2 | _sizes(46, 4608, 36864, 32, 16) | {"head_dim": 128, "query_pre_attn_scalar": 144},
    "qwen2_5_0_5b": QWEN2_5 | _sizes(24, 896, 4864, 14, 2),
    "qwen2_5_1_5b": QWEN2_5 | _sizes(28, 1536, 8960, 12, 2),
    "qwen2_5_3b": QWEN2_5 | _sizes(36, 2048, 11008, 16, 2),
    "qwen2_5_7b": LARGE_QWEN2_5 | _sizes(28, 3584, 18944, 28, 4),
    "qwen2_5_14b": LARGE_QWEN2_5 | _sizes(48, 5120, 13824, 40, 8),
    "qwen2_5_32b": LARGE_QWEN2_5 | _sizes(64, 5120, 27648, 40, 8),
}
"""Option of the group `model` -> config.json."""

GEMMA3 = tuple(name for name in CONFIGS if name.startswith("gemma3"))

PARAMETERS = {
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 4_300_079_472,
    "gemma3_12b": 12_187_325_040,
    "gemma3_27b": 27_432_406_640,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
}
"""Parameters of the whole checkpoint; a tied head counts once."""

TEXT_PARAMETERS = {
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_263_168,
    "gemma3_12b": 11_766_034_176,
    "gemma3_27b": 27_009_346_304,
}
"""The same without the vision tower and its projector."""

GEMMA3_SHAPES = {
    # layers, hidden, heads, key-value heads, head_dim, intermediate, vocabulary, window, query_pre_attn_scalar, positions
    "gemma3_270m": (18, 640, 4, 1, 256, 2048, 262144, 512, 256, 32768),
    "gemma3_1b": (26, 1152, 4, 1, 256, 6912, 262144, 512, 256, 32768),
    "gemma3_4b": (34, 2560, 8, 4, 256, 10240, 262208, 1024, 256, 131072),
    "gemma3_12b": (48, 3840, 16, 8, 256, 15360, 262208, 1024, 256, 131072),
    "gemma3_27b": (62, 5376, 32, 16, 128, 21504, 262208, 1024, 168, 131072),
}
"""What the whole text config has to come to, whether a file states it or leaves it to transformers."""
