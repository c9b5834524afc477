"""One tiny model of each kind that takes images, as config.json, with its tokenizer and its image processor.

LLaVA has a CLIP or a Pixtral tower, Mistral Small 3 a Pixtral tower with merged patches, Idefics3 a SigLIP tower with
tiles, Gemma 3 a SigLIP tower whose rows are averaged, LLaVA-NeXT a CLIP tower with tiles, InternVL a tower of its own
with tiles. "InternVLChat" is InternVL as OpenGVLab publishes the model, "InternVL" as transformers has the model.
Weights are random. The tokens of images are the vocabulary's last ones, which verify's prompts leave out. vLLM needs
torchvision for all of them but Idefics3.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bi_patch.tools.models import quantize, recipes, shapes
from bi_patch.tools.models.families import _NARROW, _TINY, FAMILIES

_VOCAB = 2048
_OWN = 1984  # tokens of text; the rest are tokens of images
_PATCH = 14
_TEXT = dict(_TINY) | _NARROW | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_TOWER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_channels": 3,
    "patch_size": _PATCH,
    "image_size": 8 * _PATCH,
}
_CLIP = _TOWER | {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "projection_dim": 128}
_PIXTRAL = _TOWER | {"model_type": "pixtral", "hidden_act": "silu", "head_dim": 32, "rope_theta": 10000.0}
_SIGLIP = _TOWER | {"model_type": "idefics3_vision", "hidden_act": "gelu_pytorch_tanh"}
_GEMMA_ROWS = 16  # of an image, in the language model


def _model(architecture: str, model_type: str, tower: dict[str, object], **own: object) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": "bfloat16",
        "vision_config": dict(tower),
        "text_config": dict(_TEXT),
        "vocab_size": _VOCAB,
        "tie_word_embeddings": False,
    } | own


_LLAVA = {
    "image_token_index": _OWN,
    "projector_hidden_act": "gelu",
    "image_seq_length": 64,
    "multimodal_projector_bias": True,
}
VISION: dict[str, dict[str, object]] = {
    "LLaVA": _model(
        "LlavaForConditionalGeneration",
        "llava",
        _CLIP,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        **_LLAVA,
    ),
    "Pixtral": _model(
        "LlavaForConditionalGeneration",
        "llava",
        _PIXTRAL,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **_LLAVA,
    ),
    "Mistral Small 3": _model(
        "Mistral3ForConditionalGeneration",
        "mistral3",
        _PIXTRAL,
        spatial_merge_size=2,
        vision_feature_layer=-1,
        **_LLAVA,
    ),
    "Idefics3": _model(
        "Idefics3ForConditionalGeneration", "idefics3", _SIGLIP, image_token_id=_OWN, scale_factor=2, pad_token_id=0
    ),
    "Gemma 3": _model(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        _SIGLIP | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=dict(FAMILIES["Gemma 3"]),
        tie_word_embeddings=True,
        mm_tokens_per_image=_GEMMA_ROWS,
        boi_token_index=_OWN,
        image_token_index=_OWN + 1,
        eoi_token_index=_OWN + 2,
    ),
}

_ROTATION = {"rope_type": "default", "rope_theta": 1e6}
VISION["Qwen3-VL"] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
    "vision_start_token_id": _OWN,
    "vision_end_token_id": _OWN + 1,
    "image_token_id": _OWN + 2,
    "video_token_id": _OWN + 3,
    "text_config": dict(_TINY)
    | {
        "model_type": "qwen3_vl_text",
        "tie_word_embeddings": True,
        "rope_parameters": _ROTATION | {"mrope_section": [12, 10, 10], "mrope_interleaved": True},
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 3,
        "hidden_size": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 256,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 256,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [0, 1],
    },
}

VISION["Qwen2.5-VL"] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
    "vision_start_token_id": _OWN,
    "vision_end_token_id": _OWN + 1,
    "image_token_id": _OWN + 2,
    "video_token_id": _OWN + 3,
    "text_config": dict(_TINY)
    | _NARROW
    | {
        "model_type": "qwen2_5_vl_text",
        "tie_word_embeddings": True,
        "rope_parameters": _ROTATION | {"mrope_section": [4, 6, 6]},
    },
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 3,
        "hidden_size": 128,
        "hidden_act": "silu",
        "intermediate_size": 256,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": _PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 4 * _PATCH,
        "fullatt_block_indexes": [2],
        "out_hidden_size": 256,
    },
}

VISION["InternVL"] = {
    "architectures": ["InternVLForConditionalGeneration"],
    "model_type": "internvl",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "image_token_id": _OWN,
    "image_seq_length": 16,
    "downsample_ratio": 0.5,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "text_config": dict(_TINY) | _NARROW | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "vision_config": _TOWER
    | {
        "model_type": "internvl_vision",
        "hidden_act": "gelu",
        "image_size": [8 * _PATCH] * 2,
        "patch_size": [_PATCH] * 2,
        "attention_bias": True,
        "norm_type": "layer_norm",
        "use_qk_norm": False,
    },
}

VISION["Qwen2-VL"] = VISION["Qwen2.5-VL"] | {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "text_config": VISION["Qwen2.5-VL"]["text_config"] | {"model_type": "qwen2_vl_text"},
    "vision_config": {
        "model_type": "qwen2_vl",
        "depth": 3,
        "embed_dim": 128,
        "hidden_size": 256,
        "hidden_act": "quick_gelu",
        "mlp_ratio": 2,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": _PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
_GRID = [[8 * _PATCH, 16 * _PATCH], [16 * _PATCH, 8 * _PATCH]]
VISION["LLaVA-NeXT"] = _model(
    "LlavaNextForConditionalGeneration",
    "llava_next",
    _CLIP,
    vision_feature_select_strategy="default",
    vision_feature_layer=-2,
    image_grid_pinpoints=_GRID,
    **_LLAVA,
)

VISION["LLaVA-OneVision"] = _model(
    "LlavaOnevisionForConditionalGeneration",
    "llava_onevision",
    _SIGLIP | {"model_type": "siglip_vision_model", "vision_use_head": False},
    text_config=VISION["InternVL"]["text_config"],
    image_token_index=_OWN,
    video_token_index=_OWN + 1,
    projector_hidden_act="gelu",
    multimodal_projector_bias=True,
    vision_feature_select_strategy="full",
    vision_feature_layer=-1,
    vision_aspect_ratio="anyres_max_9",
    image_grid_pinpoints=_GRID,
)
VISION["GLM-4.1V"] = {
    "architectures": ["Glm4vForConditionalGeneration"],
    "model_type": "glm4v",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "image_start_token_id": _OWN,
    "image_end_token_id": _OWN + 1,
    "image_token_id": _OWN + 2,
    "video_start_token_id": _OWN + 3,
    "video_end_token_id": _OWN + 4,
    "video_token_id": _OWN + 5,
    "text_config": dict(_TINY)
    | {
        "model_type": "glm4v_text",
        "attention_bias": True,
        "rope_parameters": _ROTATION | {"mrope_section": [4, 6, 6], "partial_rotary_factor": 0.5},
    },
    "vision_config": {
        "model_type": "glm4v_vision",
        "depth": 3,
        "hidden_size": 128,
        "hidden_act": "silu",
        "intermediate_size": 256,
        "num_heads": 4,
        "in_channels": 3,
        "image_size": 8 * _PATCH,
        "patch_size": _PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 256,
        "rms_norm_eps": 1e-5,
    },
}

VISION["GLM-4.5V"] = VISION["GLM-4.1V"] | {
    "architectures": ["Glm4vMoeForConditionalGeneration"],
    "model_type": "glm4v_moe",
    "text_config": VISION["GLM-4.1V"]["text_config"]
    | {
        "model_type": "glm4v_moe_text",
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": False,
    },
    "vision_config": VISION["GLM-4.1V"]["vision_config"] | {"model_type": "glm4v_moe_vision"},
}

# OpenGVLab's checkpoints bring the code of their configuration. This one has what vLLM reads.
_INTERN_CHAT = """from transformers import CONFIG_MAPPING, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    is_composition = True

    def __init__(self, vision_config=None, llm_config=None, **given):
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        own = dict(llm_config or {"model_type": "qwen2"})
        self.llm_config = CONFIG_MAPPING[own["model_type"]](**own)
        super().__init__(**given)
"""
VISION["InternVLChat"] = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "model_type": "internvl_chat",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 8 * _PATCH,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 4,
    "use_thumbnail": True,
    "ps_version": "v2",
    "select_layer": -1,
    "llm_config": VISION["InternVL"]["text_config"],
    "vision_config": _TOWER
    | {
        "model_type": "intern_vit_6b",
        "hidden_act": "gelu",
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "initializer_factor": 1.0,
    },
}

# The sizes of published models with a few layers and a small vocabulary. They are not tiny: for GPUs.
_QWEN_ROTATION = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
VISION |= {
    "Qwen3-VL-2B": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
        "vision_start_token_id": _OWN,
        "vision_end_token_id": _OWN + 1,
        "image_token_id": _OWN + 2,
        "video_token_id": _OWN + 3,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "vocab_size": _VOCAB,
            "max_position_embeddings": 32768,
            "rope_parameters": _QWEN_ROTATION,
            "rope_theta": 5e6,
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 6,
            "hidden_size": 1024,
            "hidden_act": "gelu_pytorch_tanh",
            "intermediate_size": 4096,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [1, 3, 5],
        },
    },
    "Mistral-Small-3.1": _model(
        "Mistral3ForConditionalGeneration",
        "mistral3",
        _PIXTRAL
        | {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "head_dim": 64,
            "image_size": 40 * _PATCH,
        },
        spatial_merge_size=2,
        vision_feature_layer=-1,
        **_LLAVA,
        text_config=_TEXT
        | {
            "model_type": "mistral",
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "architectures": ["MistralForCausalLM"],
        },
    ),
    "LLaVA-1.5-7B": _model(
        "LlavaForConditionalGeneration",
        "llava",
        _CLIP
        | {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 5,
            "num_attention_heads": 16,
            "image_size": 24 * _PATCH,
            "projection_dim": 768,
        },
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        **_LLAVA,
        text_config=_TEXT
        | {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
    ),
    "Gemma-3-4B": _model(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        _SIGLIP
        | {
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "image_size": 64 * _PATCH,
        },
        text_config=dict(FAMILIES["Gemma 3"])
        | {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "max_position_embeddings": 32768,
        },
        tie_word_embeddings=True,
        mm_tokens_per_image=256,
        boi_token_index=_OWN,
        image_token_index=_OWN + 1,
        eoi_token_index=_OWN + 2,
    ),
}
VISION["Qwen2.5-VL-3B"] = VISION["Qwen2.5-VL"] | {
    "text_config": VISION["Qwen2.5-VL"]["text_config"]
    | {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rope_parameters": _ROTATION | {"mrope_section": [16, 24, 24]},
    },
    "vision_config": VISION["Qwen2.5-VL"]["vision_config"]
    | {
        "depth": 6,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "window_size": 8 * _PATCH,
        "fullatt_block_indexes": [3, 5],
        "out_hidden_size": 2048,
    },
}
VISION["InternVL3-2B"] = VISION["InternVL"] | {
    "image_seq_length": 256,
    "text_config": VISION["InternVL"]["text_config"]
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
    "vision_config": VISION["InternVL"]["vision_config"]
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "image_size": [32 * _PATCH] * 2,
    },
}
VISION["InternVLChat-2B"] = VISION["InternVLChat"] | {
    "force_image_size": 32 * _PATCH,
    "max_dynamic_patch": 2,
    "llm_config": VISION["InternVL3-2B"]["text_config"],
    "vision_config": VISION["InternVLChat"]["vision_config"]
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "image_size": 32 * _PATCH,
    },
}
VISION["Qwen2-VL-2B"] = VISION["Qwen2-VL"] | {
    "text_config": VISION["Qwen2-VL"]["text_config"]
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rope_parameters": _ROTATION | {"mrope_section": [16, 24, 24]},
    },
    "vision_config": VISION["Qwen2-VL"]["vision_config"]
    | {"depth": 4, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16},
}
_LARGE_GRID = [[16 * _PATCH, 32 * _PATCH], [32 * _PATCH, 16 * _PATCH]]
VISION["LLaVA-NeXT-7B"] = VISION["LLaVA-1.5-7B"] | {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "model_type": "llava_next",
    "image_grid_pinpoints": _LARGE_GRID,
    "vision_config": VISION["LLaVA-1.5-7B"]["vision_config"] | {"image_size": 16 * _PATCH},
}
VISION["LLaVA-OneVision-7B"] = VISION["LLaVA-OneVision"] | {
    "image_grid_pinpoints": [[27 * _PATCH, 54 * _PATCH]],
    "text_config": VISION["LLaVA-OneVision"]["text_config"]
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 4,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
    "vision_config": VISION["Gemma-3-4B"]["vision_config"] | {"image_size": 27 * _PATCH},
}
VISION["GLM-4.1V-9B"] = VISION["GLM-4.1V"] | {
    "text_config": VISION["GLM-4.1V"]["text_config"]
    | {
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rope_parameters": _ROTATION | {"mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5},
    },
    "vision_config": VISION["GLM-4.1V"]["vision_config"]
    | {
        "depth": 4,
        "hidden_size": 1536,
        "intermediate_size": 13696,
        "num_heads": 12,
        "image_size": 24 * _PATCH,
        "out_hidden_size": 4096,
    },
}
CPU = (
    "Idefics3",
    "LLaVA",
    "Mistral Small 3",
    "Gemma 3",
    "Qwen3-VL",
    "Qwen2.5-VL",
    "InternVL",
    "InternVLChat",
    "Qwen2-VL",
    "LLaVA-NeXT",
    "LLaVA-OneVision",
    "GLM-4.1V",
    "Pixtral",
    "GLM-4.5V",
)  # tiny, and served there
# Of vLLM's LLM, for models that need them: code of their own, or room for three images in a prompt.
ARGUMENTS: dict[str, dict[str, object]] = dict.fromkeys(
    ("InternVLChat", "InternVLChat-2B"), {"trust_remote_code": True}
) | {"LLaVA-OneVision-7B": {"max_model_len": 8192, "limit_mm_per_prompt": {"image": 4, "video": 0}}}
WITHOUT_TORCHVISION = ("Idefics3",)


def _tokens(*names: str):
    """Write a tokenizer whose tokens from _OWN on are `names`. Returns the tokenizer."""

    def save(folder: Path):
        from transformers import PreTrainedTokenizerFast

        recipes.save_tokenizer(_OWN, folder)
        made = PreTrainedTokenizerFast.from_pretrained(folder)
        made.add_special_tokens({"additional_special_tokens": list(names)})
        return made

    return save


def _llava(size: int):
    def make(folder: Path):
        from transformers import CLIPImageProcessorPil, LlavaProcessor

        return LlavaProcessor(
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size),
            tokenizer=_tokens("<image>")(folder),
            patch_size=_PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )

    return make


def _llava_next(size: int, grid: list[list[int]]):
    def make(folder: Path):
        from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

        return LlavaNextProcessor(
            image_processor=LlavaNextImageProcessorPil(
                size={"shortest_edge": size}, crop_size=size, image_grid_pinpoints=grid
            ),
            tokenizer=_tokens("<image>")(folder),
            patch_size=_PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )

    return make


def _onevision(side: int, grid: list[list[int]]):
    """side: patches of an image's edge."""

    def make(folder: Path):
        from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

        size = {"height": side * _PATCH, "width": side * _PATCH}
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=grid),
            tokenizer=_tokens("<image>", "<video>")(folder),
            video_processor=LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=side**2,
            vision_feature_select_strategy="full",
        )

    return make


def _glm(folder: Path):
    from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor, PreTrainedTokenizerFast

    names = (
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        "<|video|>",
    )
    _tokens(*names)(folder).save_pretrained(folder)
    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    return Glm4vProcessor(
        image_processor=Glm4vImageProcessor(size=size, patch_size=_PATCH, merge_size=2, temporal_patch_size=2),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(
            folder, extra_special_tokens={"image_token": "<|image|>", "video_token": "<|video|>"}
        ),
        video_processor=Glm4vVideoProcessor(size=size),
    )


def _qwen2(folder: Path):
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=_PATCH, merge_size=2, temporal_patch_size=2),
        tokenizer=_tokens(*names)(folder),
        video_processor=Qwen2VLVideoProcessor(size=size),
    )


def _qwen(edge: int):
    def make(folder: Path):
        from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

        names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        size = {"shortest_edge": 64 * 64, "longest_edge": edge * edge}
        return Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(size=size, patch_size=16, merge_size=2, temporal_patch_size=2),
            tokenizer=_tokens(*names)(folder),
            video_processor=Qwen3VLVideoProcessor(size=size, max_frames=16, cap_pixels_per_frame=False),
        )

    return make


def _qwen2_5(folder: Path):
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=_PATCH, merge_size=2, temporal_patch_size=2),
        tokenizer=_tokens(*names)(folder),
        video_processor=Qwen2VLVideoProcessor(size=size),
    )


def _pixtral(merge: int, edge: int = 8 * _PATCH):
    def make(folder: Path):
        from transformers import PixtralImageProcessorPil, PixtralProcessor

        return PixtralProcessor(
            image_processor=PixtralImageProcessorPil(size={"longest_edge": edge}, patch_size=_PATCH * merge),
            tokenizer=_tokens("[IMG]", "[IMG_BREAK]", "[IMG_END]")(folder),
            patch_size=_PATCH,
            spatial_merge_size=merge,
        )

    return make


def _idefics3(folder: Path):
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    edge = int(str(_TOWER["image_size"]))
    places = [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
    names = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *places)
    return Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * edge}, max_image_size={"longest_edge": edge}
        ),
        tokenizer=_tokens(*names)(folder),
        image_seq_len=(edge // _PATCH) ** 2 // 4,
    )


def _gemma3(edge: int, rows: int):
    def make(folder: Path):
        return _gemma3_processor(folder, edge, rows)

    return make


def _gemma3_processor(folder: Path, edge: int, rows: int):
    from transformers import Gemma3ImageProcessorPil, Gemma3Processor, PreTrainedTokenizerFast

    parts = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    lines = ["\n" * count for count in (1, 2, 3, 4)]  # vLLM's processor looks them up
    _tokens(*parts.values())(folder).save_pretrained(folder)
    made = PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=parts)
    made.add_tokens(lines)
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": edge, "width": edge}),
        tokenizer=made,
        image_seq_length=rows,
    )


def _internvl(edge: int, rows: int, tiles: int):
    """edge: pixels of a tile. rows: of a tile, in the language model. tiles: the most of an image, besides one of the
    whole image."""

    def make(folder: Path):
        from transformers import (
            GotOcr2ImageProcessor,
            InternVLProcessor,
            InternVLVideoProcessor,
            PreTrainedTokenizerFast,
        )

        parts = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
        parts["video_token"] = "<video>"
        _tokens(*parts.values())(folder).save_pretrained(folder)
        size = {"height": edge, "width": edge}
        return InternVLProcessor(
            image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=tiles),
            tokenizer=PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=parts),
            video_processor=InternVLVideoProcessor(size=size),
            image_seq_length=rows,
        )

    return make


def _internvl_chat(folder: Path):
    """vLLM makes the processor itself."""
    (folder / "configuration_internvl_chat.py").write_text(_INTERN_CHAT)
    return _tokens("<IMG_CONTEXT>", "<img>", "</img>", "<image>")(folder)


_PROCESSORS: dict[str, Callable[[Path], object]] = {
    "LLaVA": _llava(8 * _PATCH),
    "LLaVA-1.5-7B": _llava(24 * _PATCH),
    "Qwen3-VL": _qwen(256),
    "Qwen2.5-VL": _qwen2_5,
    "Qwen2-VL": _qwen2,
    "LLaVA-OneVision": _onevision(8, _GRID),
    "LLaVA-OneVision-7B": _onevision(27, [[27 * _PATCH, 54 * _PATCH]]),
    "GLM-4.1V-9B": _glm,
    "GLM-4.1V": _glm,
    "GLM-4.5V": _glm,
    "Qwen2-VL-2B": _qwen2,
    "LLaVA-NeXT": _llava_next(8 * _PATCH, _GRID),
    "LLaVA-NeXT-7B": _llava_next(16 * _PATCH, _LARGE_GRID),
    "Qwen3-VL-2B": _qwen(512),
    "Mistral-Small-3.1": _pixtral(2, 40 * _PATCH),
    "Pixtral": _pixtral(1),
    "Mistral Small 3": _pixtral(2),
    "Idefics3": _idefics3,
    "Gemma 3": _gemma3(8 * _PATCH, _GEMMA_ROWS),
    "Gemma-3-4B": _gemma3(64 * _PATCH, 256),
    "Qwen2.5-VL-3B": _qwen2_5,
    "InternVL": _internvl(8 * _PATCH, 16, 4),
    "InternVLChat": _internvl_chat,
    "InternVLChat-2B": _internvl_chat,
    "InternVL3-2B": _internvl(32 * _PATCH, 256, 2),
}


# Parts of names of what is not a model's language model, in checkpoints of Hugging Face and of OpenGVLab.
_OUTSIDE = ("visual", "vision_tower", "vision_model", "multi_modal_projector", "connector", "mlp1")


def write(name: str, root: str | Path, scheme: str = "") -> str:
    """Write the config.json, tokenizer and image processor of a model in VISION into a folder below `root`.

    scheme: how the checkpoint's language model is quantized, a key of quantize.SCHEMES or FP8_CHANNELS, "" for 16-bit
    weights. Encoders and heads stay unquantized, as in published checkpoints.
    Returns the folder. Raises KeyError for a name that is not in VISION, and for another scheme.
    """
    made = VISION[name]
    if scheme:
        made = made | {"quantization_config": _quantized(name, scheme)}
    folder = shapes.save(f"{name} {scheme}".strip(), made, root)
    _PROCESSORS[name](Path(folder)).save_pretrained(folder)
    return folder


FP8_CHANNELS = "fp8-channels"
_FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}


def _quantized(name: str, scheme: str) -> dict[str, object]:
    """The quantization_config of a checkpoint whose encoder is not quantized."""
    patterns = [f"re:.*{part}.*" for part in _OUTSIDE]
    if scheme == FP8_CHANNELS:
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head", *patterns],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": _FLOAT | {"strategy": "channel", "dynamic": False},
                    "input_activations": _FLOAT | {"strategy": "token", "dynamic": True},
                }
            },
        }
    describe = quantize.SCHEMES[scheme][1]
    if scheme == quantize.FP8_BLOCKS:  # this method knows whole names only
        return describe(["lm_head", *outside(name)])
    if scheme == quantize.AWQ:
        return describe(["lm_head", *_OUTSIDE])
    if scheme == quantize.GPTQ:
        return describe(["lm_head", *(f".*{part}.*" for part in _OUTSIDE)])
    return describe(["lm_head", *patterns])


def outside(name: str) -> list[str]:
    """The names of a model's linears outside of its language model and its head, as Hugging Face transformers has them.

    Raises ValueError for a model that transformers lacks.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    held = dict(VISION[name])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(held.pop("model_type"), **held))
    linears = (part for part, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return [part for part in linears if any(piece in part for piece in _OUTSIDE)]
