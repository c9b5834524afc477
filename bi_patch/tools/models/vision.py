"""One tiny model of each kind that takes images, as config.json, with its tokenizer and its image processor.

LLaVA has a CLIP or a Pixtral tower, Mistral Small 3 a Pixtral tower with merged patches, Idefics3 a SigLIP tower with
tiles, Gemma 3 a SigLIP tower whose rows are averaged, InternVL a tower of its own with tiles. Weights are random. The
tokens of images are the vocabulary's last ones, which verify's prompts leave out. vLLM needs torchvision for all of
them but Idefics3.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bi_patch.tools.models import recipes, shapes
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
CPU = (
    "Idefics3",
    "LLaVA",
    "Mistral Small 3",
    "Gemma 3",
    "Qwen3-VL",
    "Qwen2.5-VL",
    "InternVL",
)  # tiny, and served there
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


def _internvl(folder: Path):
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLProcessor,
        InternVLVideoProcessor,
        PreTrainedTokenizerFast,
    )

    parts = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    parts["video_token"] = "<video>"
    _tokens(*parts.values())(folder).save_pretrained(folder)
    size = {"height": 8 * _PATCH, "width": 8 * _PATCH}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=parts),
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=16,
    )


_PROCESSORS: dict[str, Callable[[Path], object]] = {
    "LLaVA": _llava(8 * _PATCH),
    "LLaVA-1.5-7B": _llava(24 * _PATCH),
    "Qwen3-VL": _qwen(256),
    "Qwen2.5-VL": _qwen2_5,
    "Qwen3-VL-2B": _qwen(512),
    "Mistral-Small-3.1": _pixtral(2, 40 * _PATCH),
    "Pixtral": _pixtral(1),
    "Mistral Small 3": _pixtral(2),
    "Idefics3": _idefics3,
    "Gemma 3": _gemma3(8 * _PATCH, _GEMMA_ROWS),
    "Gemma-3-4B": _gemma3(64 * _PATCH, 256),
    "Qwen2.5-VL-3B": _qwen2_5,
    "InternVL": _internvl,
}


def write(name: str, root: str | Path) -> str:
    """Write the config.json, tokenizer and image processor of a model in VISION into a folder below `root`.

    Returns the folder. Raises KeyError for a name that is not in VISION.
    """
    folder = shapes.save(name, VISION[name], root)
    _PROCESSORS[name](Path(folder)).save_pretrained(folder)
    return folder
