"""Models that take images, sound or video: served by the name of their architecture, everything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bi_patch.platforms.features.model import Feature, refused, row, served, untried
from bi_patch.platforms.features.ranks import compiled

_CPU_IMAGES = "invariance-2026-11-29-cpu-amx-images-vllm-0.32.0.json"
_CPU_MORE = "invariance-2026-11-29-cpu-amx-images-vllm-0.32.0-2.json"
_CPU_INTERN = "invariance-2026-11-29-cpu-amx-images-vllm-0.32.0-3.json"
_CPU_QWEN2 = "invariance-2026-11-30-cpu-images-vllm-0.32.0.json"
_CPU_GLM = "invariance-2026-11-30-cpu-images-vllm-0.32.0-2.json"
_CPU_NEW = "invariance-2026-11-30-cpu-images-vllm-0.32.0-3.json"
_CPU_GLM_EXPERTS = "invariance-2026-11-30-cpu-images-vllm-0.32.0-11.json"
_CPU_PIXTRAL = "invariance-2026-11-30-cpu-images-vllm-0.32.0-10.json"
_H200_IMAGES = "invariance-2026-11-29-h200-images-vllm-0.33.0.json"
_H200_GEMMA = "invariance-2026-11-29-h200-images-vllm-0.33.0-3.json"
_H200_GEMMA_COMPILED = "invariance-2026-11-29-h200-images-vllm-0.33.0-4.json"
_H200_TOGETHER = "invariance-2026-11-30-h200-images-vllm-0.33.0.json"  # images of a step in one call of the encoder
_H200_KINDS = "invariance-2026-11-30-h200-images-vllm-0.33.0-3.json"
_H200_KINDS_5 = "invariance-2026-11-30-h200-images-vllm-0.33.0-5.json"
_H200_KINDS_4 = "invariance-2026-11-30-h200-images-vllm-0.33.0-4.json"
_TEXT_ONLY = "Pass --language-model-only, which turns encoders off"
ASCEND = refused("no patch point covers it yet", todo="Use a text model")
# Architecture and the kind of its image encoder (model_type of its vision_config), as far as bi_patch covers them.
_IDEFICS = {("Idefics3ForConditionalGeneration", "idefics3_vision")}
_MISTRAL = {("Mistral3ForConditionalGeneration", "pixtral")}
_LLAVA = {("LlavaForConditionalGeneration", "clip_vision_model")}
_TOWERS = _MISTRAL | _LLAVA
_PIXTRAL = {("LlavaForConditionalGeneration", "pixtral")}
_QWEN = {("Qwen3VLForConditionalGeneration", "qwen3_vl"), ("Qwen3VLForConditionalGeneration", "qwen3_vl_vision")}
_QWEN2_5 = {("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl")}
_QWEN2 = {("Qwen2VLForConditionalGeneration", "qwen2_vl"), ("Qwen2VLForConditionalGeneration", "qwen2_vl_vision")}
_NEXT = {("LlavaNextForConditionalGeneration", "clip_vision_model")}
_ONEVISION = {("LlavaOnevisionForConditionalGeneration", "siglip_vision_model")}
_GLM = {("Glm4vForConditionalGeneration", "glm4v"), ("Glm4vForConditionalGeneration", "glm4v_vision")}
_GLM_EXPERTS = {("Glm4vMoeForConditionalGeneration", kind) for kind in ("glm4v_moe", "glm4v_moe_vision")}
_GEMMA = {("Gemma3ForConditionalGeneration", "siglip_vision_model")}
_INTERN = {("InternVLForConditionalGeneration", "internvl_vision")}
_INTERN_CHAT = {("InternVLChatModel", "intern_vit_6b")}
_NEW = _INTERN_CHAT | _QWEN2 | _NEXT | _ONEVISION | _GLM
OLDER = refused("bi_patch has patch points for newer releases only", todo="Use vLLM 0.33", releases="<0.33")
INTERN_ON_CUDA = (
    OLDER,
    served(
        _H200_TOGETHER,
        why="the shape of InternVL3-2B with few layers, random weights, bf16, in eager mode and compiled",
    ),
)


# Language models inside of others. vLLM makes a configuration for each, which calls itself multimodal, too.
_LANGUAGE = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
)


def taken(config: Any) -> str:
    """The name of the engine's architecture if requests may bring images, sound or video, else ""."""
    model = config.model_config
    if model is None or not model.is_multimodal_model:
        return ""
    if getattr(getattr(model, "multimodal_config", None), "language_model_only", False):
        return ""
    name = (getattr(model, "architectures", None) or ("a model",))[0]
    return "" if name in _LANGUAGE else name


def encoder(config: Any) -> tuple[str, str]:
    vision = getattr(getattr(config.model_config, "hf_config", None), "vision_config", None)
    kind = getattr(vision, "model_type", "")
    if getattr(vision, "norm_type", "layer_norm") != "layer_norm":
        kind = f"{kind} with {vision.norm_type}"
    norms = getattr(vision, "use_qk_norm", False) or getattr(vision, "qk_normalization", False)
    return taken(config), f"{kind} with norms of queries" if norms else kind


def _of(known: set[tuple[str, str]]) -> Callable[[Any], str]:
    return lambda config: f"images of {taken(config)}" if encoder(config) in known else ""


def _other(config: Any) -> str:
    known = encoder(config) in _IDEFICS | _TOWERS | _PIXTRAL | _GLM_EXPERTS | _QWEN | _QWEN2_5 | _GEMMA | _INTERN | _NEW
    return f"multimodal inputs of {taken(config)}" if taken(config) and not known else ""


def takes_videos(config: Any, platform: str) -> bool:
    """Whether requests may bring videos. config: a VllmConfig. platform: "cpu", "cuda" or "ascend"."""
    return platform in ("cpu", "cuda") and encoder(config) in _QWEN


def _spans(config: Any) -> str:
    """Images whose tokens attend in both directions: their keys and values are not those of a causal prompt."""
    both = taken(config) and getattr(config.model_config, "is_mm_prefix_lm", False)
    return "attention in both directions over an image" if both else ""


BACKENDS = ("FLASH_ATTN", "TORCH_SDPA")  # of encoders


def backend(media: Any) -> str:
    """The attention backend of encoders that a user asked for, by its name, "" for none."""
    asked = getattr(media, "mm_encoder_attn_backend", None)
    return str(getattr(asked, "name", asked or ""))


def _chosen_backend(config: Any, qwen: bool) -> str:
    media = getattr(config.model_config, "multimodal_config", None)
    name = backend(media) if taken(config) and (encoder(config) in _QWEN) == qwen else ""
    return f"images with the encoder on {name}" if name in BACKENDS else ""


def _compiled(config: Any) -> str:
    return "images with compiled code" if taken(config) and compiled(config) else ""


def _compiled_with(known: set[tuple[str, str]]) -> Callable[[Any], str]:
    """Compiled engines of some models, whose images have rows of evidence of their own."""

    def asked(config: Any) -> str:
        return f"compiled {taken(config)} with images" if encoder(config) in known and _compiled(config) else ""

    return asked


def _first_runner(config: Any) -> str:
    first = taken(config) and not getattr(config, "use_v2_model_runner", False)
    return "images in model runner V1" if first else ""


def _preempted_with(known: set[tuple[str, str]]) -> Callable[[Any], str]:
    """Preemption of models whose images have rows of evidence of their own."""
    return lambda config: f"images of {taken(config)}, preempted" if encoder(config) in known else ""


_TINY = "tiny models with random weights, in eager mode and compiled"
IMAGES: tuple[Feature, ...] = (
    row(
        "images (Idefics3)",
        short="images (Idefics3)",
        cpu=served(_CPU_IMAGES, _CPU_MORE, why=_TINY),
        cuda=(OLDER, served(_H200_IMAGES, why="a tiny model with random weights, in eager mode, two axes")),
        ascend=ASCEND,
        asked=_of(_IDEFICS),
        details="An image's rows depend on the image alone: not on other images of the step, of the prompt or of the "
        "caches, nor on the steps in which a prompt's images arrive.",
    ),
    row(
        "images (Mistral Small 3, LLaVA with CLIP)",
        short="images (Mistral Small 3, LLaVA with CLIP)",
        cpu=served(_CPU_MORE, why=_TINY),
        cuda=(
            OLDER,
            served(
                _H200_IMAGES,
                _H200_TOGETHER,
                why="shapes of Mistral Small 3.1 and LLaVA 1.5 with few layers, random weights, bf16; with the images "
                "of a step encoded together: the axis images, in eager mode",
            ),
        ),
        ascend=ASCEND,
        asked=_of(_TOWERS),
        details="On CPU, vLLM needs torchvision for them.",
    ),
    row(
        "images (Pixtral as Hugging Face transformers has it)",
        cpu=served(_CPU_PIXTRAL, why=f"{_TINY}; preemption in eager mode"),
        cuda=refused("nobody has compared such an engine", todo=_TEXT_ONLY),
        ascend=ASCEND,
        asked=_of(_PIXTRAL),
        details="LlavaForConditionalGeneration with an encoder of Pixtral. In Mistral's own format "
        "(PixtralForConditionalGeneration), the model is refused. vLLM needs torchvision for them.",
    ),
    row(
        "images (Qwen3-VL)",
        short="images (Qwen3-VL)",
        cpu=served(_CPU_MORE, why=_TINY),
        cuda=(
            OLDER,
            served(
                _H200_IMAGES,
                _H200_TOGETHER,
                why="the shape of Qwen3-VL-2B with few layers, random weights, bf16; also a restart, and a prefix "
                "cache turned off; with the images of a step encoded together: batch size, images, preemption and "
                "restart in eager mode, images compiled",
            ),
        ),
        ascend=ASCEND,
        asked=_of(_QWEN),
        details="On CPU, vLLM needs torchvision for them.",
    ),
    row(
        "images (Qwen2.5-VL)",
        short="images (Qwen2.5-VL)",
        cpu=served(_CPU_MORE, why=_TINY),
        cuda=(
            OLDER,
            served(
                _H200_TOGETHER,
                why="the shape of Qwen2.5-VL-3B with few layers, random weights, bf16, in eager mode",
            ),
        ),
        ascend=ASCEND,
        asked=_of(_QWEN2_5),
        details="On CPU, vLLM needs torchvision for them.",
    ),
    row(
        "images (Gemma 3, 4B and larger)",
        short="images (Gemma 3)",
        cpu=served(_CPU_MORE, why=_TINY),
        cuda=(
            OLDER,
            served(
                _H200_GEMMA,
                _H200_GEMMA_COMPILED,
                _H200_TOGETHER,
                why="the shape of Gemma-3-4B with few layers, random weights, bf16, in eager mode and compiled; with "
                "the images of a step encoded together: preemption, in eager mode",
            ),
        ),
        ascend=ASCEND,
        asked=_of(_GEMMA),
        details="On CPU, vLLM needs torchvision for them.",
    ),
    row(
        "images (InternVL as Hugging Face transformers has it)",
        short="images (InternVL)",
        cpu=served(_CPU_INTERN, why=_TINY),
        cuda=INTERN_ON_CUDA,
        ascend=ASCEND,
        asked=_of(_INTERN),
        details="InternVLForConditionalGeneration without norms of queries and keys in its encoder (InternVL3 up to "
        "14B). On CPU, vLLM needs torchvision for them.",
    ),
    row(
        "images (InternVLChatModel)",
        cpu=served(_CPU_NEW, why=_TINY),
        cuda=(
            OLDER,
            served(
                _H200_KINDS,
                why="the shape of InternVLChat-2B with few layers, random weights, bf16, in eager mode and compiled",
            ),
        ),
        ascend=ASCEND,
        asked=_of(_INTERN_CHAT),
        details="OpenGVLab's checkpoints of InternVL 2 to 3.5 with the encoder of 300M parameters, which has no norms "
        "of queries and keys. They need --trust-remote-code, and vLLM needs torchvision for them.",
    ),
    row(
        "images (Qwen2-VL)",
        cpu=served(_CPU_QWEN2, _CPU_NEW, why=_TINY),
        cuda=(
            OLDER,
            served(_H200_TOGETHER, why="the shape of Qwen2-VL-2B with few layers, random weights, bf16, in eager mode"),
        ),
        ascend=ASCEND,
        asked=_of(_QWEN2),
        details="On CPU, vLLM needs torchvision for them.",
    ),
    row(
        "images (LLaVA-NeXT with CLIP)",
        cpu=served(_CPU_NEW, why=_TINY),
        cuda=(
            OLDER,
            served(_H200_TOGETHER, why="a shape of LLaVA-NeXT 7B with few layers, random weights, bf16, in eager mode"),
        ),
        ascend=ASCEND,
        asked=_of(_NEXT),
        details="On CPU, vLLM needs torchvision for them.",
    ),
    row(
        "images (LLaVA-OneVision)",
        cpu=served(_CPU_NEW, why=_TINY),
        cuda=(
            OLDER,
            served(
                _H200_KINDS, why="the shape of LLaVA-OneVision-7B with few layers, random weights, bf16, in eager mode"
            ),
        ),
        ascend=ASCEND,
        asked=_of(_ONEVISION),
        details="On CPU, vLLM needs torchvision for them.",
    ),
    row(
        "images (GLM-4.1V)",
        cpu=served(_CPU_GLM, _CPU_NEW, why=_TINY),
        cuda=(
            OLDER,
            served(
                _H200_KINDS,
                why="the shape of GLM-4.1V-9B with few layers, random weights, bf16, in eager mode and compiled",
            ),
        ),
        ascend=ASCEND,
        asked=_of(_GLM),
        details="On CPU, vLLM needs torchvision for them.",
    ),
    row(
        "images (GLM-4.5V)",
        cpu=served(_CPU_GLM_EXPERTS, why=f"{_TINY}, 8 experts; preemption in eager mode"),
        cuda=refused("nobody has compared such an engine", todo=_TEXT_ONLY),
        ascend=ASCEND,
        asked=_of(_GLM_EXPERTS),
        details="vLLM needs torchvision for them.",
    ),
    row(
        "images, sound and video of other models",
        cpu=refused("no patch point covers its encoder", todo=_TEXT_ONLY),
        cuda=refused("no patch point covers its encoder", todo=_TEXT_ONLY),
        ascend=ASCEND,
        asked=_other,
    ),
    row(
        "video (Qwen3-VL)",
        cpu=served(_CPU_MORE, why=f"{_TINY}; a start certifies images, and no video of its own"),
        cuda=(
            replace(OLDER, by="features.cuda"),
            served(
                _H200_TOGETHER, why="as its images, in eager mode; a start certifies images, and no video of its own"
            ),
        ),
        ascend=refused("no patch point covers it yet", todo="Use a text model", by="features.ascend"),
        details="A video is known by its frames and their times, so the rows of another video never serve it.",
    ),
    row(
        "video and sound, in requests to another model whose images are served",
        cpu=refused("nobody has compared answers to them", todo="Leave them out", by="vision.names"),
        cuda=refused("nobody has compared answers to them", todo="Leave them out", by="vision.names"),
        ascend=refused("no patch point covers it yet", todo="Use a text model", by="features.ascend"),
    ),
    row(
        "images that attend in both directions (Gemma 3, PaliGemma)",
        cpu=served(_CPU_MORE, why="Gemma 3; vLLM's CPU build computes an image as causal text, and so does bi_patch"),
        cuda=(OLDER, served(_H200_GEMMA, _H200_GEMMA_COMPILED, why="Gemma 3, by a certificate of each kind of layer")),
        ascend=ASCEND,
        asked=_spans,
    ),
    row(
        "images, in an engine that vLLM compiles",
        cpu=served(_CPU_MORE),
        cuda=(
            OLDER,
            served(
                _H200_IMAGES,
                _H200_GEMMA_COMPILED,
                _H200_TOGETHER,
                why="Qwen3-VL, Mistral Small 3, LLaVA and Gemma 3, with CUDA graphs of the language model; batch size "
                "not of LLaVA; with the images of a step encoded together: the axis images of Qwen3-VL",
            ),
        ),
        ascend=ASCEND,
        asked=_compiled,
        details="The language model is compiled, its encoder is not.",
    ),
    row(
        "images of Idefics3 and Qwen2.5-VL, in an engine that vLLM compiles",
        cpu=served(_CPU_MORE),
        cuda=(OLDER, served(_H200_KINDS_4, _H200_KINDS)),
        ascend=ASCEND,
        asked=_compiled_with(_IDEFICS | _QWEN2_5),
    ),
    row(
        "images of InternVL, in an engine that vLLM compiles",
        cpu=served(_CPU_INTERN),
        cuda=INTERN_ON_CUDA,
        ascend=ASCEND,
        asked=_compiled_with(_INTERN),
    ),
    row(
        "images of InternVLChatModel, Qwen2-VL, LLaVA-NeXT and GLM-4.1V, in an engine that vLLM compiles",
        cpu=served(_CPU_NEW),
        cuda=(OLDER, served(_H200_KINDS)),
        ascend=ASCEND,
        asked=_compiled_with(_INTERN_CHAT | _QWEN2 | _NEXT | _GLM),
    ),
    row(
        "images of LLaVA-OneVision, in an engine that vLLM compiles",
        cpu=served(_CPU_NEW),
        cuda=(OLDER, untried()),
        ascend=ASCEND,
        asked=_compiled_with(_ONEVISION),
    ),
    row(
        "images in model runner V1 (VLLM_USE_V2_MODEL_RUNNER=0)",
        cpu=served(_CPU_IMAGES, why="the CPU build has no other runner"),
        cuda=refused("nobody has compared such an engine", todo="Use model runner V2"),
        ascend=ASCEND,
        asked=_first_runner,
    ),
    row(
        "images of Qwen3-VL and Gemma 3 with preemption",
        cpu=served(_CPU_MORE),
        cuda=(OLDER, served(_H200_TOGETHER, why="in eager mode")),
        ascend=ASCEND,
        asked=_preempted_with(_QWEN | _GEMMA),
    ),
    row(
        "images of Mistral Small 3 and Qwen2.5-VL with preemption",
        cpu=served(_CPU_MORE),
        cuda=(OLDER, served(_H200_KINDS)),
        ascend=ASCEND,
        asked=_preempted_with(_MISTRAL | _QWEN2_5),
    ),
    row(
        "images of LLaVA with CLIP and Idefics3 with preemption",
        cpu=served(_CPU_IMAGES, _CPU_MORE),
        cuda=(OLDER, untried("no run with its images preempted a request")),
        ascend=ASCEND,
        asked=_preempted_with(_LLAVA | _IDEFICS),
    ),
    row(
        "images of InternVL with preemption",
        cpu=served(_CPU_NEW),
        cuda=(OLDER, served(_H200_TOGETHER)),
        ascend=ASCEND,
        asked=_preempted_with(_INTERN),
    ),
    row(
        "images of Qwen2-VL and LLaVA-NeXT with preemption",
        cpu=served(_CPU_NEW),
        cuda=(OLDER, served(_H200_KINDS, _H200_KINDS_5)),
        ascend=ASCEND,
        asked=_preempted_with(_QWEN2 | _NEXT),
    ),
    row(
        "images of InternVLChatModel, LLaVA-OneVision and GLM-4.1V with preemption",
        cpu=served(_CPU_NEW),
        cuda=(OLDER, untried("no run with its images preempted a request")),
        ascend=ASCEND,
        asked=_preempted_with(_INTERN_CHAT | _ONEVISION | _GLM),
    ),
    row(
        "images of Qwen3-VL with the encoder on FlashAttention or SDPA (--mm-encoder-attn-backend FLASH_ATTN, "
        "TORCH_SDPA)",
        cpu=refused("nobody has compared such an engine"),
        cuda=(
            OLDER,
            served(_H200_KINDS_4, _H200_KINDS, why="few layers of Qwen3-VL-2B, random weights, in eager mode"),
        ),
        ascend=ASCEND,
        asked=lambda config: _chosen_backend(config, True),
        details="The certificate of images runs the encoder on the backend that the engine has.",
    ),
    row(
        "images of another model with the encoder on FlashAttention or SDPA",
        cpu=refused("nobody has compared such an engine"),
        cuda=refused("nobody has compared such an engine"),
        ascend=ASCEND,
        asked=lambda config: _chosen_backend(config, False),
    ),
)
