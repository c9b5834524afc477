"""Families of models on each platform. bi_patch judges a model by its layers. Names only tell what was measured.

`why` names the layer or feature for which bi_patch refuses a family. A model without a row starts if bi_patch covers
every layer, and counts as untried.
"""

from __future__ import annotations

from typing import Any

from bi_patch.platforms.features.images import INTERN_ON_CUDA
from bi_patch.platforms.features.model import Feature, absent, refused, row, served, untried

_CPU = "invariance-2026-11-22-cpu-vllm-0.32.0.json"
_FAMILIES = "invariance-2026-11-28-cpu-families-vllm-0.32.0.json"
_CPU_MLA_MORE = "invariance-2026-11-28-cpu-amx-mla-more-vllm-0.32.0.json"
_CPU_MLA = "invariance-2026-11-28-cpu-amx-mla-vllm-0.32.0.json"
_CPU_TEXT = "invariance-2026-11-28-cpu-text-vllm-0.32.0.json"
_H200_MLA = "invariance-2026-11-28-h200-mla-vllm-0.33.0.json"
_H200_MLA_TWO = "invariance-2026-11-29-h200-mla-two-vllm-0.33.0.json"
_H200_MLA_MORE = "invariance-2026-11-29-h200-mla-more-vllm-0.33.0.json"
_H200_MLA_GRAPHS = "invariance-2026-11-29-h200-mla-two-compiled-vllm-0.33.0.json"
_H200_MLA_BLOCKS = "invariance-2026-11-29-h200-mla-blocks-compiled-vllm-0.33.0.json"
_H200_MLA_SHAPES = "invariance-2026-11-29-h200-mla-shapes-vllm-0.33.0.json"
_H200_MLA_SIZES = "invariance-2026-11-29-h200-mla-shapes-vllm-0.33.0-2.json"
_H100 = "invariance-2026-11-22-h100-vllm-0.33.0.json"
_H100_LAYERS = "invariance-2026-11-28-h100-families-vllm-0.33.0.json"
_H100_ALIBI = "invariance-2026-11-28-h100-alibi-vllm-0.33.0.json"
_H100_FIRST = "invariance-2026-11-21-h100-vllm-0.33.0.json"
_H100_MOE = "invariance-2026-11-28-h100-vllm-0.33.0.json"
_H100_NEWEST = "invariance-2026-11-22-h100-seams-vllm-0.33.0.json"
_H100_DECODE = "invariance-2026-11-22-h100-decode-vllm-0.33.0.json"
_H200_LAYERS = "invariance-2026-11-30-h200-families-vllm-0.33.0.json"
# Families of which every axis of `bi-patch verify --full` was measured on CPU -> the file.
_FULL = "invariance-2026-11-29-cpu-amx-full-vllm-0.32.0"
_WITH_FULL = {
    **dict.fromkeys(("Qwen2-MoE", "Gemma 2", "GLM-4.5", "Command R7B"), "invariance-2026-11-28-cpu-full-vllm-0.32.0"),
    **dict.fromkeys(("Qwen2.5", "Mistral", "Gemma 3n", "GPT-2"), _FULL),
    **dict.fromkeys(("Falcon", "StableLM"), f"{_FULL}-2"),
    "GPT-NeoX": f"{_FULL}-3",
    **dict.fromkeys(
        (
            "Gemma 3",
            "Phi-3",
            "GLM-4",
            "Granite",
            "ERNIE 4.5",
            "SmolLM3",
            "Qwen3-Next",
        ),
        f"{_FULL}-4",
    ),
    **dict.fromkeys(
        (
            *("Mixtral", "DeepSeek-MoE", "EXAONE 4", "OLMo 1", "OLMo 2", "SeedOss", "Nemotron", "Ling 2", "PLaMo 3"),
            *("InternLM 3", "MiMo", "OPT", "Command R"),
        ),
        f"{_FULL}-5",
    ),
    **dict.fromkeys(
        ("PhiMoE", "OLMoE", "Gemma 1", "OLMo 3", "InternLM 2", "Solar", "Bailing", "Starcoder2"), f"{_FULL}-6"
    ),
    "ERNIE 4.5 MoE": f"{_FULL}-8",
}


def _tiny(*full: str):
    """A cell of tiny shapes. full: names of its families in _WITH_FULL."""
    files = dict.fromkeys(f"{_WITH_FULL[name]}.json" for name in full)
    more = f"; {', '.join(full)} with --full, too" if full else ""
    return served(_FAMILIES, *files, why=f"tiny shapes with random weights{more}")


_MLA = refused("MLA")
_SPARSE = refused("sparse MLA, layers with a recurrent state, or a package with kernels of its own")
_OWN = refused("its package has kernels that no patch point covers", by="models.cuda")
_QUANTIZED = refused("quantized experts")
_POOLING = refused("pooling")
_CPU_POOLING = (
    "invariance-2026-11-28-cpu-amx-pooling-vllm-0.32.0.json",
    "invariance-2026-11-28-cpu-amx-pooling-2-vllm-0.32.0.json",
)
_H200_POOLING = "invariance-2026-11-28-h200-pooling-vllm-0.33.0.json"
_H200_ENCODERS = "invariance-2026-11-29-h200-pooling-vllm-0.33.0.json"
_SIZES = refused("vLLM compiles its routing separately, by the number of tokens", todo="Use another model")
_H200_IMAGES = "invariance-2026-11-29-h200-images-vllm-0.33.0.json"
_H200_IMAGES_MORE = "invariance-2026-11-30-h200-images-vllm-0.33.0.json"
_H200_SHAPES = "invariance-2026-11-30-h200-families-vllm-0.33.0-2.json"
_H200_SHAPES_3 = "invariance-2026-11-30-h200-families-vllm-0.33.0-3.json"
_H200_SCORES_1 = "invariance-2026-11-30-h200-pooling-vllm-0.33.0.json"
_H200_SCORES_2 = "invariance-2026-11-30-h200-pooling-vllm-0.33.0-2.json"
_H200_GEMMA_IMAGES = (
    "invariance-2026-11-29-h200-images-vllm-0.33.0-3.json",
    "invariance-2026-11-29-h200-images-vllm-0.33.0-4.json",
)
_NEWER = refused("bi_patch covers images on vLLM 0.33", todo="Pass --language-model-only", releases="<0.33")
_CPU_IMAGES = "invariance-2026-11-29-cpu-amx-images-vllm-0.32.0.json"
_CPU_INTERN = "invariance-2026-11-29-cpu-amx-images-vllm-0.32.0-3.json"
_CPU_IMAGES_MORE = "invariance-2026-11-29-cpu-amx-images-vllm-0.32.0-2.json"
_IMAGES = refused("no patch point covers their encoders", todo="Pass --language-model-only, which turns encoders off")
_MULTIMODAL = refused("multimodal models")
_HRM = refused("after a preemption, the prompt is recomputed and attends to the answer", todo="Use another model")
_REMOVED = "vLLM removed the model after 0.28"
_ASCEND = untried("nothing has run on an NPU")
_LAYERS = served(_H100_LAYERS, why="two to four layers of published sizes, in eager mode")


def _architecture(*names: str):
    """The architecture of the engine's model if it is one of `names`, else ""."""

    def asked(config: Any) -> str:
        found = getattr(config.model_config, "architectures", None) or ()
        return next((name for name in found if name in names), "")

    return asked


def _compiles_nothing(config: Any) -> bool:
    mode = getattr(config.compilation_config, "mode", None)
    return getattr(mode, "name", mode) in ("NONE", 0)


def _eager(*names: str):
    """The same, if vLLM also compiles nothing (--enforce-eager, -O0)."""
    named = _architecture(*names)
    return lambda config: f"{named(config)} without compilation" if named(config) and _compiles_nothing(config) else ""


def _experts_of_minicpm(config: Any) -> str:
    model = config.model_config
    experts = getattr(getattr(model, "hf_text_config", None), "num_experts", 0)
    return _architecture("MiniCPMForCausalLM")(config) and "MiniCPM with experts" if experts else ""


def _sigmoid_of_cohere(config: Any) -> str:
    model = config.model_config
    chosen = getattr(getattr(model, "hf_text_config", None), "expert_selection_fn", "")
    named = _architecture("Cohere2MoeForCausalLM")(config)
    return f"{named} with sigmoid routing" if named and chosen == "sigmoid" else ""


FAMILIES: tuple[Feature, ...] = (
    row(
        "Llama 2 and 3", short="Llama", cpu=served(_CPU), cuda=served(_H100, _H100_NEWEST, _H200_LAYERS), ascend=_ASCEND
    ),
    row("Qwen3 dense", short="Qwen3", cpu=served(_CPU), cuda=served(_H100, _H100_DECODE), ascend=_ASCEND),
    row(
        "Qwen3-MoE",
        short="Qwen3-MoE",
        cpu=served(_CPU),
        cuda=served(_H100_FIRST, _H100_MOE, _H200_LAYERS),
        ascend=_ASCEND,
    ),
    row("Qwen2.5", cpu=_tiny("Qwen2.5"), cuda=served(_H100), ascend=_ASCEND),
    row(
        "SmolLM2",
        cpu=served(_CPU),
        cuda=served(_H200_SHAPES_3, why="the shape of SmolLM2-135M with random weights, in eager mode"),
        ascend=_ASCEND,
    ),
    row("Mistral 7B", cpu=_tiny("Mistral"), cuda=served(_H100_FIRST), ascend=_ASCEND),
    row(
        "Mixtral, PhiMoE, OLMoE, DeepSeek-MoE-16B, Qwen2-MoE",
        cpu=_tiny("Mixtral", "PhiMoE", "OLMoE", "DeepSeek-MoE", "Qwen2-MoE"),
        cuda=_LAYERS,
        ascend=_ASCEND,
    ),
    row(
        "Gemma 1, 2 and 3 (text)",
        short="Gemma, Phi, Mistral and other dense models",
        cpu=_tiny("Gemma 1", "Gemma 2", "Gemma 3"),
        cuda=served(_H100_LAYERS, _H200_LAYERS, why="four layers of published sizes; of Gemma 3, also compiled"),
        ascend=_ASCEND,
    ),
    row(
        "Phi-3.5, Phi-4, Granite 3, EXAONE 4, ERNIE 4.5, GLM-4, GLM-4.5 in bf16",
        cpu=_tiny("Phi-3", "Granite", "EXAONE 4", "ERNIE 4.5", "GLM-4", "GLM-4.5"),
        cuda=_LAYERS,
        ascend=_ASCEND,
    ),
    row(
        "OLMo 1 to 3, SmolLM3, SeedOss, Nemotron dense, Ling 2",
        cpu=_tiny("OLMo 1", "OLMo 2", "OLMo 3", "SmolLM3", "SeedOss", "Nemotron", "Ling 2"),
        cuda=_LAYERS,
        ascend=_ASCEND,
    ),
    row(
        "Command R7B, PLaMo 3, InternLM, Solar, MiMo, Bailing, ERNIE 4.5 MoE",
        cpu=_tiny("Command R7B", "PLaMo 3", "InternLM 2", "InternLM 3", "Solar", "MiMo", "Bailing", "ERNIE 4.5 MoE"),
        cuda=served(
            _H200_SHAPES,
            _H200_SHAPES_3,
            why="four layers of 2,048 to 4,096 elements, random weights, in eager mode; Command R7B compiled",
        ),
        ascend=_ASCEND,
    ),
    row(
        "Step 1 and Step 3",
        cpu=untried("Step 1 needs square-root ALiBi, which vLLM's CPU attention lacks"),
        cuda=served(_H200_SHAPES_3, why="three or four layers, random weights, in eager mode"),
        ascend=_ASCEND,
    ),
    row(
        "Granite SWA",
        cpu=refused("attention sinks", by="attention.cpu_init"),
        cuda=served(_H200_SHAPES, why="four layers, random weights, in eager mode"),
        ascend=_ASCEND,
    ),
    row(
        "GPT-2, GPT-NeoX, OPT, Falcon-7B, StableLM, Starcoder2",
        cpu=_tiny("GPT-2", "GPT-NeoX", "OPT", "Falcon", "StableLM", "Starcoder2"),
        cuda=_LAYERS,
        ascend=_ASCEND,
    ),
    row("gpt-oss in bf16", cpu=refused("attention sinks", by="attention.cpu_init"), cuda=_LAYERS, ascend=_ASCEND),
    row(
        "gpt-oss as published (MXFP4)",
        short="gpt-oss as published",
        cpu=_QUANTIZED,
        cuda=(
            refused("quantized experts", releases="<0.33"),
            served(
                "invariance-2026-11-30-h200-mxfp4-vllm-0.33.0.json",
                why="two layers of gpt-oss-20b's sizes with random weights, compiled and beside an eager engine",
            ),
        ),
        ascend=_QUANTIZED,
    ),
    row(
        "layers of MiniMax-M2 (FP8 blocks)",
        short="layers of MiniMax-M2 (FP8 blocks)",
        cpu=_QUANTIZED,
        cuda=(
            refused("quantized experts", releases="<0.33"),
            served(
                "invariance-2026-11-30-h200-quantized-vllm-0.33.0.json",
                "invariance-2026-11-30-h200-schemes-vllm-0.33.0-2.json",
                why="two layers of its sizes with random weights, compiled and in eager mode; the whole model needs "
                "several GPUs, which is untried",
            ),
        ),
        ascend=_QUANTIZED,
    ),
    row(
        "layers of GLM-4.6 (FP8 per channel)",
        short="layers of GLM-4.6 (FP8)",
        cpu=_QUANTIZED,
        cuda=(
            refused("quantized experts", releases="<0.33"),
            served(
                "invariance-2026-11-30-h200-quantized-vllm-0.33.0.json",
                "invariance-2026-11-30-h200-quantized-vllm-0.33.0-4.json",
                "invariance-2026-11-30-h200-quantized-vllm-0.33.0-5.json",
                why="two layers of its sizes with random weights, in eager mode; compiled, with eager mode's bits: "
                "batch size and decode = prefill; the whole model needs several GPUs, which is untried",
            ),
        ),
        ascend=_QUANTIZED,
    ),
    row(
        "DeepSeek V2 in bf16",
        short="DeepSeek V2 in bf16 (MLA)",
        cpu=served(_CPU_MLA, _CPU_MLA_MORE, why="a tiny shape with random weights, on a CPU with AMX"),
        cuda=(
            refused("MLA", releases="<0.33"),
            served(
                _H200_MLA,
                _H200_MLA_TWO,
                _H200_MLA_GRAPHS,
                _H200_MLA_MORE,
                why="27 layers of V2-Lite's sizes, compiled; with BI_PATCH_MLA=one slow with long contexts",
            ),
        ),
        ascend=_MLA,
    ),
    row(
        "GLM-4.7-Flash in bf16",
        cpu=served(_CPU_MLA_MORE, why="a tiny shape with random weights"),
        cuda=(
            refused("MLA", releases="<0.33"),
            served(_H200_MLA_SHAPES, _H200_MLA_MORE, why="four layers of its sizes, compiled and in eager mode"),
        ),
        ascend=_MLA,
    ),
    row(
        "DeepSeek V3, V3.1 and R1 in FP8 blocks",
        cpu=_QUANTIZED,
        cuda=(
            refused("MLA", releases="<0.33"),
            served(
                _H200_MLA_BLOCKS,
                _H200_MLA_GRAPHS,
                _H200_MLA_SIZES,
                why="four layers of V3's sizes, compiled and in eager mode; with V3.1's scales compiled",
            ),
        ),
        ascend=_MLA,
    ),
    row(
        "DeepSeek V3, V3.1 and R1 in bf16",
        cpu=untried(),
        cuda=(
            refused("MLA", releases="<0.33"),
            served(_H200_MLA_MORE, why="three layers of V3's sizes with 64 experts, in eager mode"),
        ),
        ascend=_MLA,
    ),
    row(
        "Kimi K2 in bf16",
        cpu=untried(),
        cuda=(
            refused("MLA", releases="<0.33"),
            served(
                _H200_MLA_SHAPES,
                _H200_MLA_SIZES,
                why="three layers of its sizes with 64 experts, compiled and in eager mode",
            ),
        ),
        ascend=_MLA,
    ),
    row(
        "LongCat in bf16",
        cpu=absent("vLLM's CPU build lacks the kernel of its router"),
        cuda=(
            refused("MLA", releases="<0.33"),
            untried("its first run stopped at a certificate that gave its router too few logits; none ran since"),
        ),
        ascend=_MLA,
    ),
    row(
        "MiniCPM3, which vLLM runs as ordinary attention",
        cpu=untried(),
        cuda=(
            served(
                _H200_MLA_SIZES,
                "invariance-2026-11-29-h200-mla-shapes-vllm-0.33.0-3.json",
                why="four layers of its sizes, compiled and in eager mode",
                releases=">=0.33",
            ),
            untried(),
        ),
        ascend=_ASCEND,
    ),
    row("DeepSeek V3.2 and V4, GLM-5, Kimi K3, MiniMax-M3", cpu=_SPARSE, cuda=_OWN, ascend=_MLA),
    row(
        "Idefics3",
        cpu=served(_CPU_IMAGES, _CPU_IMAGES_MORE, why="a tiny shape with random weights"),
        cuda=(_NEWER, served(_H200_IMAGES, why="a tiny shape with random weights, in eager mode")),
        ascend=_MULTIMODAL,
    ),
    row(
        "Qwen3-VL, Mistral-Small 3, LLaVA 1.5",
        cpu=served(_CPU_IMAGES_MORE, why="tiny shapes with random weights; vLLM needs torchvision for them"),
        cuda=(
            _NEWER,
            served(_H200_IMAGES, why="few layers of published sizes with random weights, in model runner V2"),
        ),
        ascend=_MULTIMODAL,
    ),
    row(
        "Qwen2.5-VL",
        cpu=served(_CPU_IMAGES_MORE, why="a tiny shape with random weights; vLLM needs torchvision for it"),
        cuda=(
            _NEWER,
            served(_H200_IMAGES_MORE, why="few layers of published sizes with random weights, in eager mode"),
        ),
        ascend=_MULTIMODAL,
    ),
    row(
        "Gemma 3 4B and larger, with images",
        cpu=served(_CPU_IMAGES_MORE, why="a tiny shape with random weights; vLLM needs torchvision for it"),
        cuda=(
            _NEWER,
            served(*_H200_GEMMA_IMAGES, why="few layers of published sizes with random weights, eager and compiled"),
        ),
        ascend=_MULTIMODAL,
    ),
    row(
        "InternVL3 up to 14B, as Hugging Face transformers has it",
        cpu=served(_CPU_INTERN, why="a tiny shape with random weights; vLLM needs torchvision for it"),
        cuda=INTERN_ON_CUDA,
        ascend=_MULTIMODAL,
    ),
    row(
        "Llama 4, Qwen-Omni, other LLaVA, Pixtral in Mistral's own format, Phi-3V",
        cpu=_IMAGES,
        cuda=_IMAGES,
        ascend=_MULTIMODAL,
    ),
    row(
        "Gemma 4",
        cpu=_IMAGES,
        cuda=refused("no patch point covers encoders", todo="Pass --language-model-only (untried)"),
        ascend=_MULTIMODAL,
    ),
    row(
        "BLOOM",
        cpu=refused("ALiBi", by="attention.cpu_init"),
        cuda=served(_H100_ALIBI, why="four layers of published sizes, in eager mode, on Triton attention"),
        ascend=refused("ALiBi", by="attention.ascend_backend"),
    ),
    row(
        "MPT",
        cpu=absent(_REMOVED),
        cuda=(untried(releases="<0.29"), absent(_REMOVED)),
        ascend=refused("ALiBi", by="attention.ascend_backend"),
    ),
    row(
        "HunYuan dense (dynamic NTK with a constant alpha)",
        cpu=served(_CPU_TEXT, _FAMILIES),
        cuda=served(_H100_ALIBI, why="four layers of published sizes, in eager mode"),
        ascend=_ASCEND,
    ),
    row(
        "rotations of type dynamic or longrope on the Transformers backend, past the model's original length",
        cpu=refused(
            "the rotation depends on the longest request of the batch",
            by="models.cpu_rotation",
            todo="Use --model-impl vllm if vLLM has the model",
        ),
        cuda=refused(
            "the rotation depends on the longest request of the batch",
            by="models.cuda_rotation",
            todo="Use --model-impl vllm if vLLM has the model, or a shorter --max-model-len",
        ),
        ascend=_ASCEND,
    ),
    row(
        "Whisper and other encoder-decoders",
        cpu=refused("encoder-decoder models"),
        cuda=refused("encoder-decoder models"),
        ascend=refused("encoder-decoder models"),
    ),
    row(
        "Qwen3-Embedding",
        cpu=served(_CPU_POOLING[1], why="tiny shapes with random weights"),
        cuda=(
            refused("pooling", releases="<0.33"),
            served(_H200_POOLING, why="Qwen3-Embedding-0.6B's shape, in eager mode"),
        ),
        ascend=_POOLING,
    ),
    row(
        "Qwen3-Reranker, Qwen2 classifiers and reward models",
        short="rerankers and classifiers made from decoders",
        cpu=served(_CPU_POOLING[1], why="tiny shapes with random weights"),
        cuda=(
            refused("pooling", releases="<0.33"),
            served(
                _H200_SCORES_1,
                _H200_SCORES_2,
                why="the shape of Qwen3-Reranker-0.6B, and four layers of Qwen2's sizes, random weights, in eager mode",
            ),
        ),
        ascend=_POOLING,
    ),
    row(
        "BERT, XLM-R, ModernBERT: embeddings, classifiers, rerankers",
        cpu=served(*_CPU_POOLING, why="tiny shapes with random weights"),
        cuda=(
            refused("nobody tried it with these releases", releases="<0.33"),
            served(
                _H200_ENCODERS,
                why="shapes of BERT large, XLM-R base and ModernBERT base, in bf16; BERT and ModernBERT also compiled",
            ),
        ),
        ascend=_POOLING,
    ),
    row(
        "HRM text",
        cpu=_HRM,
        ascend=_ASCEND,
        asked=_architecture("HrmTextForCausalLM"),
        cuda=_HRM,
    ),
    row(
        "Command R and R7B in eager mode",
        cpu=_tiny("Command R", "Command R7B"),
        ascend=_ASCEND,
        asked=_eager("CohereForCausalLM", "Cohere2ForCausalLM", "Cohere2MoeForCausalLM"),
        cuda=refused(
            "then vLLM compiles its norms separately, by the number of tokens", todo="Let vLLM compile the model"
        ),
    ),
    row(
        "Cohere2-MoE with sigmoid routing",
        cpu=untried("one certified operator routes"),
        cuda=_SIZES,
        ascend=_SIZES,
        asked=_sigmoid_of_cohere,
    ),
    row(
        "Gemma 3n in eager mode",
        cpu=_tiny("Gemma 3n"),
        ascend=_ASCEND,
        asked=_eager("Gemma3nForCausalLM"),
        cuda=(
            refused(
                "the number of tokens decides how its standard deviations are summed",
                todo="Let vLLM compile the model",
                releases="<0.33",
            ),
            served(_H200_SHAPES, why="four layers of published sizes, random weights"),
        ),
    ),
    row(
        "MiniCPM with experts",
        cpu=refused("its experts run on a Triton kernel", todo="Use another model"),
        ascend=_ASCEND,
        asked=_experts_of_minicpm,
        cuda=refused("bi_patch does not certify its experts' tiles", todo="Use another model"),
    ),
)
