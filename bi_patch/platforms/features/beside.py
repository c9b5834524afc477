"""Images beside another feature: each pair is served with evidence of both together, or refused by name.

Quantized weights, LoRA and drafts belong to the language model alone: a seam refuses a quantized encoder when the model
is loaded (`vision.cpu`, `vision.cuda`), and adapters of encoders are refused here. Ranks cut an encoder as well, so
tensor parallelism has a list of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bi_patch.platforms import schemes
from bi_patch.platforms.features import images
from bi_patch.platforms.features import scheme_kinds as kinds
from bi_patch.platforms.features.model import Cell, Feature, refused, row, served, untried
from bi_patch.platforms.features.pairs import LORA, MLA, PARTS, POOLING, QUANTIZED, RECURRENT, SPECULATION
from bi_patch.platforms.features.ranks import compiled, size

_H200_KINDS = "invariance-2026-11-30-h200-images-vllm-0.33.0-3.json"
_CPU_RANKS = "invariance-2026-11-30-cpu-images-vllm-0.32.0-4.json"
_CPU_FIRST = "invariance-2026-11-30-cpu-images-vllm-0.32.0-5.json"
_CPU_RANKS_MORE = "invariance-2026-11-30-cpu-images-vllm-0.32.0-6.json"
_CPU_MORE = "invariance-2026-11-30-cpu-images-vllm-0.32.0-7.json"
_CPU_WHOLE = (
    "invariance-2026-11-30-cpu-images-vllm-0.32.0-8.json",
    "invariance-2026-11-30-cpu-images-vllm-0.32.0-9.json",
)
_INT8, _AWQ, _GPTQ, _FOUR = "INT8 weights and activations", "AWQ", "GPTQ", "4-bit weights of compressed-tensors"
_BLOCKS, _CHANNELS = "FP8 blocks of 128 x 128", "FP8 weights per channel"
# Every quantization scheme of a checkpoint must be of the kind.
_SCHEMES: dict[str, Callable[[schemes.Scheme], bool]] = {
    _INT8: lambda s: (
        s.method == "compressed-tensors" and s.scale == schemes.CHANNEL and kinds.int8(s, schemes.TOKEN, static=False)
    ),
    _AWQ: kinds.int4("awq"),
    _GPTQ: kinds.int4("gptq"),
    _FOUR: lambda s: kinds.int4("compressed-tensors")(s) and not s.zeros,
    _BLOCKS: lambda s: s.method == "fp8" and kinds.blocks(s) and not s.powers,
    _CHANNELS: lambda s: s.method == "compressed-tensors" and kinds.fp8(s, schemes.CHANNEL, schemes.TOKEN),
}
_TWO, _GRAMS = "two tensor-parallel ranks", "n-grams"
_WHOLE = "two tensor-parallel ranks that encode whole images"
_RANKS = "several ranks"
_ONE_OF = ("pipeline", "data", "decode_context", "prefill_context")
# Models whose encoder a run compared over two ranks, by what tables call them.
_CUT = {
    "Qwen3-VL": "Qwen3VLForConditionalGeneration",
    "Qwen2.5-VL": "Qwen2_5_VLForConditionalGeneration",
    "Gemma 3": "Gemma3ForConditionalGeneration",
    "InternVL": "InternVLForConditionalGeneration",
    "Mistral Small 3": "Mistral3ForConditionalGeneration",
    "LLaVA with CLIP": "LlavaForConditionalGeneration",
}

# Models whose ranks encoded whole images in a run.
_UNCUT = {name: _CUT[name] for name in ("Qwen3-VL", "Qwen2.5-VL")}


def _of_scheme(kind: Callable[[schemes.Scheme], bool]) -> Callable[[Any], bool]:
    def asked(config: Any) -> bool:
        used = schemes.of(config) if PARTS[QUANTIZED](config) else ()
        return bool(used) and all(kind(s) and not (s.other or s.head or s.online) for s in used)

    return asked


def _two(config: Any, *names: str) -> bool:
    """Two ranks that cut an encoder: vLLM gives whole images to ranks where they cannot share its heads evenly.

    names: of models in _CUT, all of them by default."""
    vision = getattr(getattr(config.model_config, "hf_config", None), "vision_config", None)
    heads = getattr(vision, "num_attention_heads", None) or getattr(vision, "num_heads", None) or 1
    known = images.taken(config) in [_CUT[name] for name in names or _CUT] and heads % 2 == 0
    return _pair(config) and known and not _by_image(config)


def _whole(config: Any) -> bool:
    """Two ranks, each of which encodes some of the images."""
    return _pair(config) and images.taken(config) in _UNCUT.values() and _by_image(config)


def _pair(config: Any) -> bool:
    """Two tensor-parallel ranks, and no others."""
    alone = all(size(config, f"{kind}_parallel_size") == 1 for kind in _ONE_OF)
    return size(config, "tensor_parallel_size") == 2 and alone


def _by_image(config: Any) -> bool:
    media = getattr(config.model_config, "multimodal_config", None)
    return getattr(media, "mm_encoder_tp_mode", None) == "data"


def _grams(config: Any) -> bool:
    return getattr(config.speculative_config, "method", "") == "ngram"


def _adapters(config: Any) -> bool:
    odd = ("enable_tower_connector_lora", "default_mm_loras")
    return PARTS[LORA](config) and not any(getattr(config.lora_config, name, None) for name in odd)


# What runs compared beside images -> whether an engine has it, and the part of `PARTS` that it is an example of.
_SHOWN: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{name: (_of_scheme(kind), QUANTIZED) for name, kind in _SCHEMES.items()},
    _TWO: (_two, _RANKS),
    _WHOLE: (_whole, _RANKS),
    _GRAMS: (_grams, SPECULATION),
    LORA: (_adapters, LORA),
}
_PARTS = (LORA, SPECULATION, POOLING, QUANTIZED, MLA, RECURRENT, _RANKS, "KV transfer or offload")


def _shown(config: Any) -> dict[str, str]:
    """What an engine has of `_SHOWN`: name -> the part that it is an example of."""
    return {name: part for name, (asked, part) in _SHOWN.items() if asked(config)}


def _of_media(name: str, wanted: object) -> Callable[[Any], bool]:
    return lambda media: getattr(media, name, None) == wanted


def _prepared_by(media: Any) -> object:
    """The device on which vLLM brings images to a model's size."""
    return (getattr(media, "mm_processor_kwargs", None) or {}).get("device")


# Settings of vLLM's MultiModalConfig under which an encoder computes in another way.
_SETTINGS: dict[str, Callable[[Any], object]] = {
    "an encoder without its language model (--mm-encoder-only)": _of_media("mm_encoder_only", True),
    "quantized attention of encoders (--mm-encoder-attn-dtype)": lambda m: getattr(m, "mm_encoder_attn_dtype", None),
    "another attention backend of encoders (--mm-encoder-attn-backend)": lambda m: (
        images.backend(m) not in ("", *images.BACKENDS)
    ),
    "pruned video (--video-pruning-rate)": lambda m: getattr(m, "video_pruning_rate", None),
    "images that a GPU prepares (--mm-processor-device)": lambda m: _prepared_by(m) not in (None, "cpu"),
}


def _other(config: Any) -> str:
    """What an engine combines with images, and nobody has examined together with them."""
    if not images.taken(config):
        return ""
    model, shown = config.model_config, _shown(config)
    media = getattr(model, "multimodal_config", None)
    found = {name: PARTS[name](config) and name not in shown.values() for name in _PARTS}
    found |= {name: asked(media) for name, asked in _SETTINGS.items()}
    found |= {
        "whole images for each rank (--mm-encoder-tp-mode data)": _by_image(config) and _WHOLE not in shown,
        "transfer of encoded images": getattr(config, "ec_transfer_config", None) is not None,
        "prompt embeddings": getattr(model, "enable_prompt_embeds", False),
    }
    named = [name for name, there in found.items() if there]
    return f"images with {' and '.join(named)}" if named else ""


def _both(first: str, second: str) -> Callable[[Any], str]:
    """Two names of _SHOWN, and no third."""

    def asked(config: Any) -> str:
        there = images.taken(config) and set(_shown(config)) == {first, second}
        return f"images with {first} and {second}" if there else ""

    return asked


_PAIRS = ({LORA, _GRAMS},)  # that have rows of their own


def _two_others(config: Any) -> str:
    shown = _shown(config) if images.taken(config) else {}
    return f"images with {' and '.join(shown)}" if len(shown) > 1 and set(shown) not in _PAIRS else ""


_ALONE = refused("nobody has compared such an engine")
_EAGER = untried("measured in eager mode")
_TINY = "a tiny model with random weights, Qwen3-VL"
Cells = Cell | tuple[Cell, ...]


def _beside(name: str, words: str, *, cpu: Cells, cuda: Cells = _ALONE, details: str = "") -> Feature:
    """A row: images with a feature of `_SHOWN`. words: the row's name."""

    def asked(config: Any) -> str:
        return f"images with {name}" if images.taken(config) and _SHOWN[name][0](config) else ""

    return row(words, cpu=cpu, cuda=cuda, ascend=images.ASCEND, asked=asked, details=details)


def _of_language(name: str, *, cpu: Cells, cuda: Cells = _ALONE) -> Feature:
    """A row: images with quantized weights of one kind."""
    return _beside(name, f"images with {name} of the language model", cpu=cpu, cuda=cuda, details=_ENCODER)


_ENCODER = "An encoder with quantized weights is refused when the model is loaded."


def _compiled(*names: str) -> Callable[[Any], str]:
    """What an engine that vLLM compiles has of these names of _SHOWN."""

    def asked(config: Any) -> str:
        shown = _shown(config) if images.taken(config) and compiled(config) else {}
        found = [name for name in shown if name in names]
        return f"images with {' and '.join(found)}, compiled" if found else ""

    return asked


def _option(name: str, words: str, why: str) -> Feature:
    """A row: an option of vLLM's CompilationConfig for encoders."""

    def asked(config: Any) -> str:
        on = getattr(getattr(config, "compilation_config", None), name, False)
        return f"images with {words}" if images.taken(config) and on else ""

    return row(f"images with {words} ({name})", cpu=refused(why), cuda=refused(why), ascend=images.ASCEND, asked=asked)


def _ranks(names: tuple[str, ...], cuda: Cells) -> Feature:
    """A row: images of models of _CUT with two ranks."""
    return row(
        f"images of {', '.join(names)} with two tensor-parallel ranks",
        cpu=served(
            *(_CPU_RANKS, _CPU_RANKS_MORE, _CPU_MORE),
            why="tiny models with random weights, over shared memory; Qwen3-VL compiled, too",
        ),
        cuda=cuda,
        ascend=images.ASCEND,
        asked=lambda config: f"images with {_TWO}" if _two(config, *names) else "",
        details="The ranks cut encoder and language model. With another number of ranks, images are refused.",
    )


BESIDE: tuple[Feature, ...] = (
    _of_language(
        _INT8,
        cpu=served(_CPU_FIRST, _CPU_MORE, why="a tiny Qwen3-VL with random weights, compiled, too, and a tiny Gemma 3"),
    ),
    _of_language(_AWQ, cpu=served(_CPU_MORE, why="a tiny Qwen2.5-VL with random weights, compiled, too")),
    *(_of_language(name, cpu=served(_CPU_MORE, why=f"{_TINY}, in eager mode")) for name in (_GPTQ, _FOUR)),
    *(_of_language(name, cpu=_ALONE) for name in (_BLOCKS, _CHANNELS)),
    _ranks(tuple(_CUT), _ALONE),
    _beside(
        _WHOLE,
        f"images of {' and '.join(_UNCUT)} with two tensor-parallel ranks that encode whole images "
        "(--mm-encoder-tp-mode data)",
        cpu=served(*_CPU_WHOLE, why="tiny models with random weights, over shared memory; Qwen3-VL compiled, too"),
    ),
    _beside(
        _GRAMS,
        "images with n-grams (speculative decoding)",
        cpu=served(_CPU_FIRST, _CPU_MORE, why=f"{_TINY}, compiled, too; on equals off in eager mode"),
    ),
    _beside(
        LORA,
        "images with LoRA of the language model",
        cpu=served(_CPU_MORE, why=f"{_TINY}, in eager mode"),
        details="Adapters of encoders (enable_tower_connector_lora) are refused, and so are adapters that vLLM chooses "
        "by a request's images (--default-mm-loras).",
    ),
    row(
        "images with LoRA and n-grams",
        cpu=served(_CPU_MORE, why=f"{_TINY}; also with grammars, logprobs and cached prefixes at once"),
        cuda=_ALONE,
        ascend=images.ASCEND,
        asked=_both(LORA, _GRAMS),
    ),
    row(
        "images with structured output",
        cpu=served(_CPU_MORE, why=_TINY),
        cuda=(images.OLDER, served(_H200_KINDS, why="few layers of Qwen3-VL-2B, random weights, in eager mode")),
        ascend=images.ASCEND,
        asked=lambda config: "images with structured output" if images.taken(config) else "",
    ),
    row(
        "images with INT8 weights, AWQ, n-grams or two ranks, in an engine that vLLM compiles",
        cpu=served(_CPU_RANKS_MORE, _CPU_MORE, _CPU_WHOLE[1], why="tiny models with random weights"),
        cuda=_ALONE,
        ascend=images.ASCEND,
        asked=_compiled(_INT8, _AWQ, _GRAMS, _TWO, _WHOLE),
    ),
    row(
        "images with GPTQ, 4-bit weights of compressed-tensors or LoRA, in an engine that vLLM compiles",
        cpu=_EAGER,
        cuda=_ALONE,
        ascend=images.ASCEND,
        asked=_compiled(_GPTQ, _FOUR, LORA),
    ),
    row(
        "images with two others of LoRA, speculation, quantized weights and several ranks",
        cpu=_ALONE,
        cuda=_ALONE,
        ascend=images.ASCEND,
        asked=_two_others,
    ),
    _option(
        "compile_mm_encoder",
        "a compiled encoder",
        "compiled code fuses the norms and sums of an encoder, and no certificate covers it",
    ),
    _option(
        "cudagraph_mm_encoder",
        "CUDA graphs of the encoder",
        "the images of a step choose the graph, which fills them up to its own size, and the certificate of images "
        "runs no such graph",
    ),
    row(
        "images with another feature (other drafts, quantized weights, models or ranks than above, pooling, KV "
        "transfer, prompt embeddings)",
        cpu=_ALONE,
        cuda=_ALONE,
        ascend=images.ASCEND,
        asked=_other,
    ),
)
