"""Each served cell of the feature table cites files that hold rows of the feature's models and axes.

A cell cites files, and a file holds many models. So a cell without an entry below, or with an entry that its files do
not satisfy, fails. An entry is a pattern (fnmatch) of a model's name in the file, then patterns of the axes that one
such model must have.
"""

import fnmatch
import functools
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from bi_patch.platforms.features import matrix, model, pairs, quantization, quantized_ranks, ranks, table

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"

Rows = tuple[str, ...]  # the pattern of a model's name, then axes

_SAMPLED = ("seeded sampling", "kinds of sampling", "prompt logprobs", "logprobs in any order")
_CACHED = ("prefix cache", "shared prefix", "chunk budget", "preemption")
_FIVE = ("batch size", "mixed lengths", "co-batch contents", "prefix cache", "chunk budget")
_SIX = (*_FIVE, "decode = prefill")
_IMAGES = ("images", "chunk budget")
_NEW_IMAGES = "InternVLChatModel, Qwen2-VL, LLaVA-NeXT, LLaVA-OneVision and GLM-4.1V"
_NEW_MODELS = ("InternVLChat", "Qwen2-VL", "LLaVA-NeXT", "LLaVA-OneVision", "GLM-4.1V")
_MLA = ("batch size", "prefix cache", "chunk budget")
_ENCODED = ("batch size", "mixed lengths", "pooled vectors")
_TRAINED = ("alone", "padded right", "packed", "gradients", "GRPO", "GRPO rerun", "weight update")
_LORA = ("LoRA", "LoRA off")
_ADAPTED = ("batch size", "late arrivals", "chunk budget", "prefix cache", "decode = prefill", "prompt logprobs")
_ASKED = (
    *("n", "beam search", "prompt embeddings", "bias with allowed tokens", "min_tokens", "priorities"),
    "a reset of running requests",
)
_EQUAL = ("tensor parallel size",)
_DENSE_AND_EXPERTS = ("qwen3", "qwen3-moe")
_STEPS = ("batch size", "load of all ranks", "data-parallel rank")
_OTHER_FOUR_BITS = ("tiny-qwen2-awq", "tiny-llama-gptq")
_RANKS = ("batch size", "position and order", "mixed lengths", "prefix cache", "chunk budget")
_WHOLE = (*_RANKS, "decode = prefill")
_STEPPED = ("batch size", "mixed lengths", "prefix cache", "chunk budget", "decode = prefill")
_STAGED = (*_RANKS[:3], "co-batch contents", "decode = prefill", "seeded sampling")
_REPLICAS = ("batch size", "one by one", "data-parallel rank")
_RECURRENT = ("Qwen3-Next", "Falcon-H1", "Mamba", "Jamba", "LFM2")
_SPECULATED = ("speculative decoding",)
_PUBLISHED = ("batch size", "decode = prefill", "eager and compiled")
_RESTARTED = ("preemption", "restart")
_NINE = (*_SIX, *_RESTARTED, "eager and compiled")
_LATE = ("batch size", "decode = prefill", *_RESTARTED)

RECURRENT = next(row.name for row in pairs.PAIRS if row.name.startswith("recurrent layers over ranks in other"))
OVER_FOUR = next(row.name for row in quantized_ranks.SHARED if row.name.endswith("over four ranks"))

_STREAMED = ("streamed inputs",)


def _modes(model: str, *axes: str) -> tuple[Rows, ...]:
    """Entries of a model in eager mode, and of the model compiled."""
    return (model, *axes), (f"{model}, compiled", *axes)


SHOWN: dict[tuple[str, str], tuple[Rows, ...]] = {
    ("Mamba 2 (the first models)", "cuda"): (
        ("Mamba 2, eager", *_SIX),
        ("Mamba 2", *_SIX),
    ),
    ("gated delta nets (Qwen3.5)", "cuda"): (
        ("Qwen3.5", *_SIX),
        ("Qwen3.5-MoE", *_SIX),
        ("Qwen3.5-MoE, eager", *_SIX),
    ),
    (
        "images of Qwen3-VL with the encoder on FlashAttention or SDPA (--mm-encoder-attn-backend "
        "FLASH_ATTN, TORCH_SDPA)",
        "cuda",
    ): (
        ("Qwen3-VL-2B, bf16, encoder on FLASH_ATTN", "images"),
        ("Qwen3-VL-2B, bf16, encoder on TORCH_SDPA", "images"),
    ),
    ("images of Mistral Small 3 and Qwen2.5-VL with preemption", "cuda"): (
        ("Mistral-Small-3.1, bf16, across engines", "preemption"),
        ("Qwen2.5-VL-3B, bf16, across engines", "preemption"),
    ),
    ("images of Qwen2-VL and LLaVA-NeXT with preemption", "cuda"): (
        ("Qwen2-VL-2B, bf16, across engines", "preemption"),
        ("LLaVA-NeXT-7B, bf16, across engines", "preemption"),
    ),
    ("images of InternVLChatModel, Qwen2-VL, LLaVA-NeXT and GLM-4.1V, in an engine that vLLM compiles", "cuda"): (
        ("InternVLChat-2B, bf16 compiled", "images"),
        ("Qwen2-VL-2B, bf16 compiled", "images"),
        ("LLaVA-NeXT-7B, bf16 compiled", "images"),
        ("GLM-4.1V-9B, bf16 compiled", "images"),
    ),
    ("images of Idefics3 and Qwen2.5-VL, in an engine that vLLM compiles", "cuda"): (
        ("Idefics3, bf16 compiled", "images"),
        ("Qwen2.5-VL-3B, bf16 compiled", "images"),
    ),
    ("multimodal models as text models (--language-model-only)", "cuda"): (
        ("Gemma-3-4B, bf16, language model only", *_SIX),
        ("Qwen3-VL-2B, bf16 compiled, language model only", *_SIX),
    ),
    ("pooling: classifiers, rerankers and rewards made from decoders", "cuda"): (
        ("Qwen3-Reranker-0.6B, bf16", *_ENCODED, "prefix cache", "chunk budget"),
        ("Qwen2 classifier,*", *_ENCODED),
        ("Qwen2 reward,*", *_ENCODED),
    ),
    ("Mamba (the first models)", "cuda"): (
        ("Mamba, eager", *_SIX),
        ("Mamba", *_SIX),
    ),
    ("LFM2 with experts, compiled", "cuda"): (("LFM2-MoE", *_SIX),),
    ("images with structured output", "cuda"): (("Qwen3-VL-2B, bf16, grammars", "images"),),
    ("images (GLM-4.1V)", "cuda"): (
        ("GLM-4.1V-9B, bf16", "images"),
        ("GLM-4.1V-9B, bf16 compiled", "images"),
    ),
    ("images (LLaVA-OneVision)", "cuda"): (("LLaVA-OneVision-7B, bf16", "images"),),
    ("images (InternVLChatModel)", "cuda"): (
        ("InternVLChat-2B, bf16", "images"),
        ("InternVLChat-2B, bf16 compiled", "images"),
    ),
    ("fp32 weights", "cuda"): (
        ("Llama, fp32, eager", *_SIX),
        ("Llama, fp32", *_SIX),
        ("Qwen3-MoE, fp32, eager", *_SIX),
    ),
    ("gated delta nets (Qwen3.5)", "cpu"): tuple(
        (f"{name}, tiny, bf16{mode}", *_SIX, "preemption")
        for name in ("Qwen3.5", "Qwen3.5-MoE")
        for mode in ("", " compiled")
    ),
    ("gated delta nets (Qwen3.5 without experts), in eager mode", "cpu"): (
        ("Qwen3.5, tiny, bf16", *_SIX, "preemption", "restart"),
    ),
    ("fp16 weights", "cpu"): (("* fp16", *_SIX, "preemption"), ("* fp16 compiled", *_SIX, "preemption")),
    ("fp16 weights", "cuda"): (
        ("Llama, fp16, eager", *_SIX),
        ("Qwen3-MoE, fp16, eager", *_SIX),
        ("Qwen3-MoE, fp16", *_SIX),
        ("Qwen2.5, fp16, eager", *_SIX),
    ),
    ("bf16 weights", "cpu"): (("* bf16", *_SIX), ("* bf16 compiled", *_SIX)),
    ("bf16 weights", "cuda"): (("Qwen3-8B", *_SIX), ("Llama-3.2-1B", *_SIX)),
    ("fp32 weights", "cpu"): (("* fp32", *_SIX), ("* fp32 compiled", *_SIX)),
    ("greedy and seeded sampling, logprobs, prompt logprobs", "cpu"): (("tiny-*", *_SAMPLED), ("smollm2*", *_SAMPLED)),
    ("greedy and seeded sampling, logprobs, prompt logprobs", "cuda"): (
        ("Qwen3-8B", *_SAMPLED),
        ("Llama-3.2-1B", *_SAMPLED),
    ),
    ("prefix caching, chunked prefill, preemption", "cpu"): (
        ("tiny-*", *_CACHED, "prefix cache off", "chunked prefill"),
    ),
    ("prefix caching, chunked prefill, preemption", "cuda"): (("Qwen2.5-1.5B", *_CACHED), ("Llama-3.2-1B", *_CACHED)),
    ("torch.compile", "cpu"): (("* compiled", *_SIX), ("* bf16", "eager and compiled")),
    ("torch.compile", "cuda"): (("Qwen3-8B", *_SIX), ("Llama-3.2-1B", "eager and compiled")),
    ("CUDA graphs", "cuda"): (("Qwen3-8B", *_SIX), ("Llama-3.2-1B", "eager and compiled")),
    ("weight updates", "cpu"): (
        ("*, eager", "weight update"),
        ("* compiled", "weight update"),
        ("DeepSeek V3*", "weight update"),
        ("Qwen3-Next*", "weight update"),
        *(
            (f"{model} bf16, {mode}", "weight update")
            for model in (*("tiny-qwen3-int8", "tiny-qwen3-w4a16", "tiny-qwen3-w4a16-zeros"), *_OTHER_FOUR_BITS)
            for mode in ("eager", "compiled")
        ),
    ),
    ("weight updates", "cuda"): (
        ("*, eager", "weight update"),
        ("*, graphs", "weight update"),
        ("* graphs, * GRPO steps", "GRPO,*", "GRPO rerun*"),
    ),
    ("structured output", "cpu"): (("smollm2*", "structured output"), ("* compiled", "structured output")),
    ("n, beam search, bias with allowed tokens, min_tokens, priorities, a reset of running requests", "cpu"): tuple(
        (f"* {dtype}, single requests{mode}", *_ASKED) for dtype in ("bf16", "fp32") for mode in ("", ", compiled")
    ),
    ("custom logits processors", "cpu"): tuple(
        (f"tiny-* requests{mode}", "custom logits processors") for mode in ("", ", compiled")
    ),
    ("prompt embeddings, compiled", "cpu"): tuple(
        (f"* {dtype}, single requests, compiled", "prompt embeddings") for dtype in ("bf16", "fp32")
    ),
    ("sleep and wake (--enable-sleep-mode)", "cuda"): (("*, eager", "weight update"), ("*, graphs", "weight update")),
    ("pauses (sleep level 0, pause_generation)", "cpu"): tuple(
        (model, "pauses") for model in ("tiny-* requests", "tiny-* compiled", "Qwen3-Next*", "DeepSeek V2*")
    ),
    ("streamed inputs (prompts in parts)", "cpu"): (
        *((f"* {dtype}, single requests", *_STREAMED) for dtype in ("bf16", "fp32")),
        ("tiny-* compiled", *_STREAMED),
        ("Qwen3-Next*", *_STREAMED),
        ("DeepSeek V2*", *_STREAMED),
    ),
    ("prompt embeddings (enable_prompt_embeds)", "cpu"): tuple(
        (f"* {dtype}, single requests", "prompt embeddings") for dtype in ("bf16", "fp32")
    ),
    ("speculative decoding with MLA", "cpu"): (("DeepSeek V3 bf16, n-grams", *_SPECULATED),),
    ("INT8 weights and activations with pipeline parallelism", "cpu"): (
        ("tiny-qwen3-int8 * PP 2 compiled", *_MLA, "decode = prefill"),
        ("tiny-qwen3-int8 bf16 PP 2", *_MLA, "decode = prefill"),
    ),
    ("MLA with pipeline parallelism", "cpu"): (
        ("DeepSeek V2 * PP 2 compiled", *_MLA, "decode = prefill"),
        ("DeepSeek V2 * PP 2 compiled", "batch size", "position and order", "decode = prefill", "seeded sampling"),
        ("DeepSeek V2 bf16 PP 2", "batch size", "position and order", "decode = prefill", "seeded sampling"),
    ),
    ("tensor parallelism with pipeline parallelism", "cpu"): tuple(
        (f"{model} bf16 TP 2 PP 2{mode}", *axes)
        for mode in ("", " compiled")
        for model, axes in (
            ("tiny-qwen3", (*_SIX, *_STAGED)),
            ("tiny-qwen3-moe", (*_SIX, *_STAGED)),
            ("tiny-qwen3", _REPLICAS[:2]),
        )
    ),
    ("tensor parallelism with data parallelism", "cpu"): tuple(
        (f"tiny-{model} bf16 TP 2 DP 2{mode}", *_REPLICAS)
        for mode in ("", " compiled")
        for model in ("qwen3", "qwen3-int8", "qwen3-w4a16")
    ),
    ("pipeline parallelism with data parallelism", "cpu"): tuple(
        (f"tiny-qwen3 bf16 PP 2 DP 2{mode}", *_REPLICAS) for mode in ("", " compiled")
    ),
    ("MLA with tensor parallelism", "cpu"): tuple(
        (f"DeepSeek {version} bf16 TP 2{mode}", *_STAGED) for version in ("V2", "V3") for mode in ("", " compiled")
    ),
    ("recurrent layers with tensor parallelism", "cpu"): tuple(
        (f"{family} bf16 TP 2{mode}", *_STAGED, "prefix cache", "chunk budget")
        for family in (*_RECURRENT, "Granite 4-H", "Granite 4-H, one group")
        for mode in ("", " compiled")
    ),
    ("recurrent layers with pipeline parallelism", "cpu"): tuple(
        (f"{family}, four layers, bf16 PP 2{mode}", *_STAGED, "prefix cache", "chunk budget")
        for family in _RECURRENT
        for mode in ("", " compiled")
    ),
    ("processed logprobs and logits (--logprobs-mode)", "cpu"): (("*", "processed logprobs"),),
    ("processed logprobs and logits (--logprobs-mode)", "cuda"): (("Qwen3-30B-A3B*", "processed logprobs"),),
    ("a trainer on Hugging Face transformers with the sampler's bits", "cpu"): (
        ("tiny-llama-tied *", *_TRAINED),
        ("SmolLM2-135M *", *_TRAINED),
        ("tiny-qwen3-moe *", *_TRAINED),
        *((f"{name},*", "logprobs*", "gradients*") for name in ("Gemma 2", "Gemma 3", "Mistral", "Mixtral", "Qwen2.5")),
        ("* LoRA,*", "with the adapter*", "gradients*"),
        ("*, TRL *", "GRPOTrainer,*"),
    ),
    ("a trainer on Hugging Face transformers with the sampler's bits", "cuda"): (
        ("* graphs", *_TRAINED),
        ("Llama-3.2-1B", "64 sequences*"),
        ("Qwen3-1.7B", "64 sequences*"),
        ("Mixtral,*", "logprobs*", "experts chosen*", "gradients*"),
        ("Qwen3-30B-A3B,*", "logprobs*", "experts chosen*", "gradients*"),
        ("tiny-qwen3-moe *", *_TRAINED),
        ("Gemma 2,*", "logprobs*", "gradients*"),
        ("Gemma 3,*", "logprobs*", "gradients*"),
        ("Mistral,*", "logprobs*", "gradients*"),
        ("Qwen2.5,*", "logprobs*", "gradients*"),
        ("* LoRA,*", "with the adapter*", "gradients*"),
        ("* LoRA, bfloat16, compiled", "with the adapter*", "without an adapter*", "gradients*"),
        ("*, trainer alone", "gradients*"),
        ("*, FSDP2", "logprobs, 1 rank*", "logprobs, 2 ranks*", "gradients*"),
        ("* GRPO steps", "GRPO,*", "GRPO rerun*"),
    ),
    ("a trainer on one device beside a sampler with tensor parallelism", "cpu"): (
        ("* sampler TP 2", *_TRAINED),
        ("* sampler TP 4", *_TRAINED),
    ),
    ("a trainer on one device beside a sampler with tensor parallelism", "cuda"): (
        ("Qwen3-1.7B*, sampler TP 2", "16 sequences*"),
    ),
    ("sliding windows", "cpu"): (("Mistral,*", *_SIX), ("Gemma 2,*", *_SIX)),
    ("sliding windows", "cuda"): (("Mistral-window-*", "batch size", "decode = prefill"), ("Gemma 2,*", *_SIX)),
    ("attention sinks", "cuda"): (("gpt-oss*", *_SIX),),
    ("ALiBi", "cuda"): (("BLOOM*", *_SIX),),
    ("tensor parallelism", "cpu"): (
        ("* TP 2", *_SIX),
        ("*-moe bf16 TP 2", "batch size"),
        ("* TP 2 compiled", "batch size"),
        ("* TP 2, new weights", "weight update"),
        *((f"tiny-{model} bf16 TP 4{mode}", *_SIX) for model in _DENSE_AND_EXPERTS for mode in ("", " compiled")),
    ),
    ("pipeline parallelism over three or more stages", "cpu"): (
        ("tiny-qwen3 bf16 PP 3", *_SIX),
        ("tiny-qwen3 bf16 PP 3 compiled", *_SIX),
    ),
    ("tensor parallelism", "cuda"): (
        ("Qwen3-8B*TP 4, compiled", *_RANKS, "decode = prefill"),
        ("Qwen3-30B-A3B*TP 4, compiled", *_RANKS, "decode = prefill"),
        ("DeepSeek-V2-Lite*TP 2 compiled", *_RANKS),
        ("* TP 2 without peer memory, compiled", *_RANKS, "decode = prefill"),
        ("* TP 2 compiled", *_SIX, "eager and compiled"),
        ("* TP 2 without peer memory", "batch size", "decode = prefill"),
        ("Qwen3-30B-A3B*TP 2 compiled", "batch size", "prefix cache", "decode = prefill", "eager and compiled"),
        *_modes("Qwen3-8B FP8 block, 2 layers, TP 4", *_WHOLE),
        ("Qwen3-30B-A3B, 2 layers, TP 4", *_WHOLE),
    ),
    ("equal bits for every tensor-parallel size (BI_PATCH_TP_INVARIANT)", "cuda"): (
        ("* TP 1 and 2 equal", *_EQUAL),
        ("* TP 1, 2 and 4 equal, compiled", *_EQUAL),
        ("* TP 1 and 2 equal, compiled", *_EQUAL),
        *(("* TP 1 and 2 equal, on one GPU" + end, "tensor parallel 2 and 1") for end in ("", ", compiled")),
        ("* TP 1, 2 and 4 equal, on one GPU", "tensor parallel 2 and 1", "tensor parallel 2 and 4"),
        *_modes("* one rank, K in eight parts", *_STEPPED),
    ),
    (
        "tensor parallelism without vLLM's one-stage all-reduce (no peer memory, or other than 2, 4, 6 or 8 ranks), "
        "compiled",
        "cuda",
    ): (("* TP 2 without peer memory, compiled", *_RANKS, "decode = prefill"),),
    ("pipeline parallelism, compiled", "cuda"): (("* PP 2 compiled", *_RANKS, "decode = prefill"),),
    ("experts with tensor parallelism", "cuda"): (
        ("Qwen3-30B-A3B*TP 2 compiled", "batch size", "prefix cache", "decode = prefill", "eager and compiled"),
        ("Qwen3-30B-A3B*TP 4, compiled", *_RANKS, "decode = prefill"),
        ("Qwen3-30B-A3B, 2 layers, TP 4", *_WHOLE),
        *_modes("Qwen3-Next, 4 layers, TP 2", *_WHOLE),
    ),
    ("MLA with tensor parallelism", "cuda"): (
        ("DeepSeek-V2-Lite*TP 2 compiled", *_RANKS),
        ("DeepSeek-V2-Lite*experts over 4 ranks, compiled", *_RANKS),
        ("DeepSeek-V2-Lite, 2 layers, TP 2", *_RANKS),
    ),
    ("MLA with pipeline parallelism", "cuda"): _modes("DeepSeek-V2-Lite, 2 layers, PP 2", *_RANKS),
    ("tensor parallelism with pipeline parallelism", "cuda"): (
        *_modes("Qwen3-8B, 4 layers, TP 2 x PP 2", *_WHOLE),
        *_modes("Qwen3-30B-A3B, 2 layers, TP 2 x PP 2", *_WHOLE),
    ),
    ("tensor parallelism with data parallelism", "cuda"): (
        *_modes("Qwen3-8B, 4 layers, DP 2 x TP 2", "batch size", "one by one"),
        *_modes("Qwen3-30B-A3B, 2 layers, DP 2 x TP 2", *_STEPS),
    ),
    ("recurrent layers with tensor parallelism", "cuda"): (
        *_modes("Qwen3-Next, 4 layers, TP 2", *_WHOLE),
        *_modes("Falcon-H1, 4 layers, TP 2", *_WHOLE),
    ),
    ("recurrent layers with pipeline parallelism", "cuda"): (("Qwen3-Next, 4 layers, PP 2", *_WHOLE),),
    (RECURRENT, "cpu"): tuple(
        (f"{model}{layers} bf16 {kind} 2{mode}", *_STAGED)
        for model in ("Mamba", "Jamba", "LFM2")
        for layers, kind in (("", "TP"), (", four layers,", "PP"))
        for mode in ("", " compiled")
    ),
    ("an FP8 KV cache with tensor parallelism", "cuda"): _modes("Qwen3-8B FP8 KV cache, 2 layers, TP 2", *_WHOLE),
    (OVER_FOUR, "cuda"): _modes("Qwen3-8B FP8 block, 2 layers, TP 4", *_WHOLE),
    (f"{quantized_ranks.NVFP4}, with tensor parallelism", "cuda"): _modes("Qwen3-8B NVFP4, 2 layers, TP 2", *_WHOLE),
    ("pipeline parallelism", "cuda"): (("* PP 2", "batch size", "decode = prefill"),),
    ("equal bits for every tensor-parallel size (BI_PATCH_TP_INVARIANT)", "cpu"): (
        ("* fp32, TP 1, 2 and 4 equal", *_EQUAL),
        ("* bf16, TP 1, 2 and 4 equal", *_EQUAL),
        ("* bf16, TP 1, 2 and 4 equal, compiled", *_EQUAL),
        ("* bf16 PP 2, TP 1, 2 and 4 equal", *_EQUAL),
        *((f"* TP 2 {kind} 2, equal for every size", *_REPLICAS[:2]) for kind in ("PP", "DP")),
    ),
    ("pipeline parallelism", "cpu"): (
        ("* PP 2 compiled", *_REPLICAS[:2]),
        ("tiny-qwen3 bf16 PP 2", *_REPLICAS[:2]),
        ("tiny-qwen3 bf16 PP 2", *_SIX, *_STAGED),
        *((f"tiny-qwen3-moe bf16 PP 2{mode}", *_SIX, *_STAGED) for mode in ("", " compiled")),
    ),
    ("pipeline parallelism, compiled", "cpu"): (("* PP 2 compiled", "batch size", "one by one"),),
    ("data parallelism of models without experts", "cpu"): (
        ("* DP 2", *_REPLICAS[:2]),
        ("* DP 4", *_REPLICAS),
        ("* DP 4 compiled", *_REPLICAS),
    ),
    ("data parallelism of models without experts", "cuda"): (
        ("* DP 2 compiled", "batch size", "one by one"),
        ("Qwen3-8B, 4 layers, DP 2 x TP 2", "batch size", "one by one"),
    ),
    ("data parallelism of MoE models", "cuda"): (
        ("Qwen3-30B-A3B*DP 2, compiled", *_STEPS),
        ("Qwen3-30B-A3B*DP 2, experts over ranks, compiled", *_STEPS),
        ("DeepSeek-V2-Lite*DP 2, experts over ranks, compiled", *_STEPS),
        ("Qwen3-30B-A3B, 2 layers, DP 2", *_STEPS),
        ("Qwen3-30B-A3B, 2 layers, DP 2, experts over ranks", *_STEPS),
        *_modes("Qwen3-30B-A3B, 2 layers, DP 4", *_STEPS),
        *_modes("Qwen3-30B-A3B, 2 layers, DP 4, experts over ranks", *_STEPS),
        *_modes("Qwen3-30B-A3B, 2 layers, DP 2 x TP 2", *_STEPS),
        *_modes("Qwen3-30B-A3B, 2 layers, DP 2 x TP 2, experts over ranks", *_STEPS),
        ("DeepSeek-V2-Lite, 2 layers, DP 2, experts over ranks", *_STEPS),
        *_modes("DeepSeek-V3 small, 2 layers, DP 2, experts over ranks", *_STEPS),
    ),
    ("INT8 weights and activations, with tensor parallelism", "cuda"): (
        ("Qwen3-8B INT8, 2 layers, TP 2", *_RANKS, "decode = prefill"),
        ("Qwen3-8B INT8, 2 layers, TP 2, compiled", *_WHOLE),
    ),
    ("GPTQ, with tensor parallelism", "cuda"): (
        ("Qwen3-8B GPTQ, 2 layers, TP 2", *_RANKS, "decode = prefill"),
        ("Qwen3-8B GPTQ, 2 layers, TP 2, compiled", *_WHOLE),
    ),
    ("MXFP4, with experts, with tensor parallelism", "cuda"): (
        ("gpt-oss-20b MXFP4, 2 layers, TP 2", *_RANKS, "decode = prefill"),
        ("gpt-oss-20b MXFP4, 2 layers, TP 2, compiled", *_WHOLE),
    ),
    ("INT8 weights and activations, with tensor parallelism", "cpu"): (
        ("tiny-qwen3-int8 bf16 TP 2", *_SIX),
        ("tiny-qwen3-int8 bf16 TP 2 compiled", *_SIX),
        ("tiny-qwen3-int8 bf16 TP 2, new weights", "weight update"),
    ),
    ("AWQ, with tensor parallelism", "cpu"): (
        ("tiny-qwen2-awq bf16 TP 2", *_SIX),
        ("tiny-qwen2-awq bf16 TP 2 compiled", *_SIX),
        ("tiny-qwen2-awq bf16 TP 2, new weights", "weight update"),
    ),
    ("GPTQ, with tensor parallelism", "cpu"): (
        ("tiny-llama-gptq bf16 TP 2", *_SIX),
        ("tiny-llama-gptq bf16 TP 2 compiled", *_SIX),
    ),
    ("compressed-tensors W4A16, with tensor parallelism", "cpu"): (
        ("tiny-qwen3-w4a16 bf16 TP 2", *_SIX),
        ("tiny-qwen3-w4a16 bf16 TP 2 compiled", *_SIX),
    ),
    ("AWQ, with tensor parallelism", "cuda"): (
        ("Qwen3-8B AWQ, 2 layers, TP 2", *_RANKS, "decode = prefill", "restart"),
        ("Qwen3-8B AWQ, 2 layers, TP 2, compiled", *_RANKS, "decode = prefill"),
    ),
    ("FP8 per channel, with tensor parallelism", "cuda"): (
        ("Qwen3-8B FP8 channel, 2 layers, TP 2", *_RANKS, "decode = prefill", "restart"),
        ("Qwen3-8B FP8 channel, 2 layers, TP 2, compiled", *_WHOLE),
    ),
    ("FP8 blocks of 128 x 128, with tensor parallelism", "cuda"): (
        ("Qwen3-8B FP8 block, 2 layers, TP 2", *_RANKS, "decode = prefill"),
        ("Qwen3-8B FP8 block, 2 layers, TP 2, compiled", *_RANKS, "decode = prefill"),
    ),
    ("FP8 blocks of 128 x 128, with experts, with tensor parallelism", "cuda"): (
        ("Qwen3-30B-A3B FP8 block experts, 2 layers, TP 2", *_RANKS, "decode = prefill"),
        ("Qwen3-30B-A3B FP8 block experts, 2 layers, TP 2, compiled", *_RANKS, "decode = prefill"),
        ("MiniMax-M2 FP8, 2 layers, TP 2", *_RANKS, "decode = prefill"),
        ("MiniMax-M2 FP8, 2 layers, TP 2, compiled", *_RANKS, "decode = prefill"),
    ),
    ("norms over ranks (MiniMax-M2 with tensor parallelism), compiled", "cuda"): (
        ("MiniMax-M2 FP8, 2 layers, TP 2, compiled", *_RANKS, "decode = prefill"),
    ),
    ("norms over ranks (MiniMax-M2 with tensor parallelism)", "cuda"): (
        ("MiniMax-M2 FP8, 2 layers, TP 2", *_RANKS, "decode = prefill"),
    ),
    ("compressed-tensors W4A16, with experts, with tensor parallelism", "cuda"): (
        ("Qwen3-30B-A3B W4A16 experts, 2 layers, TP 2", *_RANKS, "decode = prefill"),
        ("Qwen3-30B-A3B W4A16 experts, 2 layers, TP 2, compiled", *_RANKS, "decode = prefill"),
    ),
    ("compressed-tensors W4A16, with tensor parallelism", "cuda"): (
        ("Qwen3-8B W4A16, 2 layers, TP 2", *_RANKS, "decode = prefill"),
        ("Qwen3-8B W4A16, 2 layers, TP 2, compiled", *_WHOLE),
    ),
    ("FP8 per channel, with experts, with tensor parallelism", "cuda"): (
        ("Qwen3-30B-A3B FP8 channel experts, 2 layers, TP 2", *_RANKS, "decode = prefill"),
        ("Qwen3-30B-A3B FP8 channel experts, 2 layers, TP 2, compiled", *_WHOLE),
    ),
    ("several API servers (--api-server-count)", "cuda"): (
        (
            "tiny-qwen3, two API servers",
            "batch size",
            "co-batch contents",
            "mixed lengths",
            "position and order",
            "prefix cache",
        ),
    ),
    ("workers of Ray, compiled", "cuda"): (("* workers of Ray, compiled", *_SIX, "executor"),),
    ("expert parallelism of tensor-parallel ranks", "cuda"): (
        ("Qwen3-30B-A3B*experts over 2 ranks", *_RANKS, "decode = prefill"),
        ("DeepSeek-V2-Lite*experts over 2 ranks", *_RANKS),
        ("DeepSeek-V2-Lite*experts over 2 ranks, compiled", *_RANKS),
        ("DeepSeek-V2-Lite*experts over 4 ranks, compiled", *_RANKS),
        ("Qwen3-30B-A3B, 2 layers, experts over 4 ranks, compiled", *_WHOLE),
        (
            "Qwen3-30B-A3B*experts over 2 ranks, compiled",
            "batch size",
            "prefix cache",
            "chunk budget",
            "decode = prefill",
        ),
    ),
    ("workers of an external launcher (torchrun)", "cpu"): (
        ("* external launcher", *_SIX, "both ranks"),
        ("* external launcher, compiled", *_SIX, "both ranks"),
    ),
    ("workers of an external launcher (torchrun), compiled", "cpu"): (
        ("* external launcher, compiled", *_SIX, "both ranks"),
    ),
    ("workers of an external launcher (torchrun)", "cuda"): (("* external launcher", *_SIX, "executor", "both ranks"),),
    ("workers of an external launcher (torchrun), compiled", "cuda"): (
        ("* external launcher, compiled", *_SIX, "executor", "both ranks"),
    ),
    ("workers of Ray", "cuda"): (("* workers of Ray", *_SIX, "executor"),),
    ("LoRA", "cpu"): (("* LoRA", *_LORA),),
    ("LoRA adapters of embeddings and of the head", "cpu"): (("* LoRA", *_LORA),),
    **dict.fromkeys(
        (("LoRA adapters of embeddings and of the head", "cuda"), ("LoRA with experts: Qwen3-MoE", "cuda")),
        tuple((f"Qwen3-30B-A3B (2 layers, 32 experts) {kind}", *_LORA, *_ADAPTED) for kind in ("LoRA", "LoRA eager")),
    ),
    ("LoRA", "cuda"): (("* LoRA eager", *_LORA), ("* LoRA compiled", *_LORA)),
    ("speculative decoding with n-grams of the request (method ngram)", "cpu"): (
        ("* bf16, n-grams", *_SPECULATED),
        ("* compiled, n-grams", *_SPECULATED),
    ),
    ("speculative decoding with n-grams of the request (method ngram)", "cuda"): (("* n-grams with *", *_SPECULATED),),
    ("speculative decoding with suffixes of earlier answers (method suffix, which needs arctic-inference)", "cpu"): (
        ("* suffixes", *_SPECULATED),
    ),
    ("speculative decoding with a model's own heads (method mtp) of MiMo", "cpu"): (("* MTP", *_SPECULATED),),
    ("speculative decoding on model runner V1 (VLLM_USE_V2_MODEL_RUNNER=0)", "cpu"): (("* n-grams", *_SPECULATED),),
    ("speculative decoding with a draft model or heads (methods draft_model, eagle, eagle3)", "cpu"): (
        ("* a draft model, heads", *_SPECULATED),
    ),
    ("speculative decoding with a draft model, heads or suffixes, compiled", "cuda"): tuple(
        (f"*, {method} * drafts, runner V2", *_SPECULATED) for method in ("draft_model", "eagle", "eagle3")
    ),
    ("speculative decoding with a draft model or heads (methods draft_model, eagle, eagle3)", "cuda"): tuple(
        (f"*, {method} * drafts, runner V2", *_SPECULATED) for method in ("draft_model", "eagle", "eagle3")
    ),
    ("pooling: embeddings", "cpu"): (
        ("Qwen3-Embedding,*", *_ENCODED, "prefix cache", "chunk budget"),
        ("BERT, mean,*", *_ENCODED),
    ),
    ("pooling: embeddings", "cuda"): (("Qwen3-Embedding*", *_ENCODED, "prefix cache", "chunk budget"),),
    ("pooling: classifiers, rerankers and rewards made from decoders", "cpu"): (
        ("Qwen3-Reranker,*", *_ENCODED),
        ("Qwen2 reward,*", *_ENCODED),
    ),
    ("pooling models, compiled", "cuda"): (("BERT * compiled", *_ENCODED), ("ModernBERT * compiled", *_ENCODED)),
    **{
        ("encoders with attention in both directions (BERT, XLM-R, ModernBERT)", platform): (
            ("BERT*", *_ENCODED),
            ("XLM-R*", *_ENCODED),
            ("ModernBERT*", *_ENCODED),
        )
        for platform in ("cpu", "cuda")
    },
    ("multimodal models as text models (--language-model-only)", "cpu"): (
        ("tiny-idefics3 bf16, language model only", "batch size"),
        ("tiny-idefics3 * compiled", "batch size", "one by one"),
    ),
    ("MLA (multi-head latent attention)", "cpu"): (("DeepSeek V2,* bf16", *_SIX), ("GLM-4.7-Flash,*", *_SIX)),
    ("MLA (multi-head latent attention)", "cuda"): (
        ("DeepSeek V2, eager", *_SIX),
        ("DeepSeek V2, eager, BI_PATCH_MLA=two", *_MLA, "preemption"),
        ("DeepSeek V2, BI_PATCH_MLA=two", *_MLA, "preemption"),
        ("DeepSeek-V2-Lite", *_MLA),
        ("GLM-4.7-Flash", *_MLA),
        ("DeepSeek V2, BI_PATCH_MLA=one", *_MLA),
        ("Kimi K2, eager", *_FIVE),
    ),
    ("MLA, compiled", "cpu"): (("DeepSeek V2,* compiled", *_SIX),),
    ("MLA, compiled", "cuda"): (
        ("DeepSeek V2, BI_PATCH_MLA=two", *_MLA, "preemption"),
        ("DeepSeek-V2-Lite", *_MLA),
        ("GLM-4.7-Flash", *_MLA),
        ("Kimi K2", *_MLA),
    ),
    ("MLA in one form, compiled (BI_PATCH_MLA=one)", "cuda"): (
        ("DeepSeek V2, BI_PATCH_MLA=one", *_MLA),
        ("DeepSeek V2, BI_PATCH_MLA=one", *_SIX),
    ),
    ("MLA in one form, compiled (BI_PATCH_MLA=one)", "cpu"): (("DeepSeek V2,* compiled", *_SIX),),
    ("FP8 KV cache (e4m3, static scales)", "cuda"): (
        ("* FP8 KV cache,*", *_SIX, "preemption", "eager and compiled"),
        ("* KV cache per head, 2 layers", *_PUBLISHED, *_RESTARTED),
        ("* KV cache per head,* eager", *_SIX),
    ),
    ("fp32 KV cache", "cpu"): (("* fp32", *_SIX, "preemption"),),
    # Images.
    ("images (InternVL as Hugging Face transformers has it)", "cpu"): (
        ("InternVL, bf16", *_IMAGES, "prefix cache", "batch size", "co-batch contents"),
        ("InternVL, bf16 compiled", *_IMAGES),
    ),
    **dict.fromkeys(
        (
            ("images (InternVL as Hugging Face transformers has it)", "cuda"),
            ("InternVL3 up to 14B, as Hugging Face transformers has it", "cuda"),
            ("images of InternVL, in an engine that vLLM compiles", "cuda"),
        ),
        (
            ("InternVL3-2B, bf16", *_IMAGES, "prefix cache", "batch size", "co-batch contents"),
            ("InternVL3-2B, bf16 compiled", "images", "batch size"),
        ),
    ),
    **{
        (f"images ({row})", "cpu"): (
            (f"{model}, bf16", *_IMAGES, "prefix cache", "batch size"),
            (f"{model}, bf16 compiled", *_IMAGES, "batch size"),
        )
        for row, model in {
            "Qwen2-VL": "Qwen2-VL",
            "GLM-4.1V": "GLM-4.1V",
            "InternVLChatModel": "InternVLChat",
            "LLaVA-NeXT with CLIP": "LLaVA-NeXT",
            "LLaVA-OneVision": "LLaVA-OneVision",
        }.items()
    },
    ("images of InternVLChatModel, Qwen2-VL, LLaVA-NeXT and GLM-4.1V, in an engine that vLLM compiles", "cpu"): (
        ("InternVLChat, bf16 compiled", *_IMAGES),
        ("Qwen2-VL, bf16 compiled", *_IMAGES),
        ("LLaVA-NeXT, bf16 compiled", *_IMAGES),
        ("GLM-4.1V, bf16 compiled", *_IMAGES),
    ),
    ("images of LLaVA-OneVision, in an engine that vLLM compiles", "cpu"): (
        ("LLaVA-OneVision, bf16 compiled", *_IMAGES),
    ),
    ("images of Qwen2-VL and LLaVA-NeXT with preemption", "cpu"): (
        ("Qwen2-VL, bf16, across engines", "preemption"),
        ("LLaVA-NeXT, bf16, across engines", "preemption"),
    ),
    ("images of InternVLChatModel, LLaVA-OneVision and GLM-4.1V with preemption", "cpu"): (
        ("InternVLChat, bf16, across engines", "preemption"),
        ("LLaVA-OneVision, bf16, across engines", "preemption"),
        ("GLM-4.1V, bf16, across engines", "preemption"),
    ),
    ("images of InternVL with preemption", "cpu"): (("InternVL, bf16, across engines", "preemption"),),
    ("images (Qwen2-VL)", "cuda"): (("Qwen2-VL-2B, bf16", "images", "batch size"),),
    ("images (LLaVA-NeXT with CLIP)", "cuda"): (("LLaVA-NeXT-7B, bf16", "images"),),
    ("images of Qwen3-VL and Gemma 3 with preemption", "cuda"): tuple(
        (f"{model}, bf16, across engines", "preemption") for model in ("Qwen3-VL-2B", "Gemma-3-4B")
    ),
    ("images of InternVL with preemption", "cuda"): (("InternVL3-2B, * across engines", "preemption", "restart"),),
    ("images of InternVL, in an engine that vLLM compiles", "cpu"): (("InternVL, bf16 compiled", *_IMAGES),),
    ("images (Idefics3)", "cpu"): (
        ("Idefics3, bf16", *_IMAGES, "prefix cache", "batch size"),
        ("Idefics3, bf16 compiled", *_IMAGES, "prefix cache", "batch size"),
    ),
    **{
        (row, "cpu"): tuple(
            entry
            for model in models
            for entry in (
                (f"{model}, bf16", *_IMAGES, "prefix cache", "batch size", "co-batch contents"),
                (f"{model}, bf16 compiled", *_IMAGES, "prefix cache", "batch size"),
                (f"{model}, bf16, across engines", "preemption", "eager and compiled", "thread count"),
            )
        )
        for row, models in {
            "images (Mistral Small 3, LLaVA with CLIP)": ("Mistral Small 3", "LLaVA"),
            "images (Qwen3-VL)": ("Qwen3-VL",),
            "images (Qwen2.5-VL)": ("Qwen2.5-VL",),
            "images (Gemma 3, 4B and larger)": ("Gemma 3",),
            "video (Qwen3-VL)": ("Qwen3-VL",),  # its axis "images" has videos
            "images that attend in both directions (Gemma 3, PaliGemma)": ("Gemma 3",),
        }.items()
    },
    ("images (Idefics3)", "cuda"): (("Idefics3, bf16", "images", "batch size"),),
    ("images (Mistral Small 3, LLaVA with CLIP)", "cuda"): tuple(
        row
        for model in ("Mistral-Small-3", "LLaVA-1.5")
        for row in ((f"{model}*, bf16", *_IMAGES, "prefix cache"), (f"{model}*, bf16", "images"))
    ),
    ("images (Qwen2.5-VL)", "cuda"): (("Qwen2.5-VL-3B, bf16", "images"),),
    ("video (Qwen3-VL)", "cuda"): (("Qwen3-VL-2B, bf16", "images"),),  # its axis "images" has videos
    ("images (Qwen3-VL)", "cuda"): (
        ("Qwen3-VL*, bf16", *_IMAGES, "prefix cache"),
        ("Qwen3-VL*, across engines", "restart", "prefix cache off"),
        ("Qwen3-VL*, bf16", "images", "batch size"),
        ("Qwen3-VL*, across engines", "restart", "preemption"),
        ("Qwen3-VL* compiled", "images"),
    ),
    ("images, in an engine that vLLM compiles", "cpu"): tuple(
        (f"{model}, bf16 compiled", *_IMAGES)
        for model in ("Qwen3-VL", "Qwen2.5-VL", "Gemma 3", "Mistral Small 3", "LLaVA", "Idefics3")
    ),
    ("images of Idefics3 and Qwen2.5-VL, in an engine that vLLM compiles", "cpu"): tuple(
        (f"{model}, bf16 compiled", *_IMAGES) for model in ("Idefics3", "Qwen2.5-VL")
    ),
    ("images (Gemma 3, 4B and larger)", "cuda"): (
        ("Gemma-3-4B, bf16", *_IMAGES, "prefix cache", "batch size"),
        ("Gemma-3-4B, bf16 compiled", *_IMAGES, "batch size", "co-batch contents"),
        ("Gemma-3-4B, bf16, across engines", "preemption"),
    ),
    **dict.fromkeys(
        (
            ("images that attend in both directions (Gemma 3, PaliGemma)", "cuda"),
            ("Gemma 3 4B and larger, with images", "cuda"),
        ),
        (
            ("Gemma-3-4B, bf16", *_IMAGES, "prefix cache", "batch size"),
            ("Gemma-3-4B, bf16 compiled", *_IMAGES, "batch size", "co-batch contents"),
        ),
    ),
    ("images, in an engine that vLLM compiles", "cuda"): (
        *((f"{model}* compiled", *_IMAGES) for model in ("Qwen3-VL", "Mistral-Small-3", "LLaVA-1.5", "Gemma-3-4B")),
        ("Qwen3-VL* compiled", "images"),
    ),
    ("images in model runner V1 (VLLM_USE_V2_MODEL_RUNNER=0)", "cpu"): (("Idefics3, bf16", *_IMAGES),),
    ("images of Qwen3-VL and Gemma 3 with preemption", "cpu"): tuple(
        (f"{model}, * across engines", "preemption") for model in ("Qwen3-VL", "Gemma 3")
    ),
    ("images of Mistral Small 3 and Qwen2.5-VL with preemption", "cpu"): (
        ("Mistral Small 3, * across engines", "preemption"),
        ("Qwen2.5-VL, * across engines", "preemption"),
    ),
    ("images of LLaVA with CLIP and Idefics3 with preemption", "cpu"): (
        ("LLaVA, * across engines", "preemption"),
        ("Idefics3, * across engines", "preemption"),
    ),
    ("images (GLM-4.5V)", "cpu"): (
        ("GLM-4.5V, bf16", *_IMAGES, "prefix cache", "batch size"),
        ("GLM-4.5V, bf16 compiled", *_IMAGES, "batch size"),
        ("GLM-4.5V, bf16, across engines", "preemption"),
    ),
    ("images (Pixtral as Hugging Face transformers has it)", "cpu"): (
        ("Pixtral, bf16", *_IMAGES, "prefix cache", "batch size"),
        ("Pixtral, bf16 compiled", *_IMAGES, "batch size"),
        ("Pixtral, bf16, across engines", "preemption"),
    ),
    # Images beside another feature.
    ("images with INT8 weights and activations of the language model", "cpu"): (
        ("Qwen3-VL, bf16, INT8", *_IMAGES, "batch size"),
        ("Qwen3-VL, bf16 compiled, INT8", "images"),
        ("Gemma 3, bf16, INT8", "images"),
        ("Qwen3-VL, bf16, INT8, across engines", "preemption"),
    ),
    ("images with AWQ of the language model", "cpu"): (
        ("Qwen2.5-VL, bf16, AWQ", *_IMAGES, "batch size"),
        ("Qwen2.5-VL, bf16 compiled, AWQ", "images"),
    ),
    ("images with GPTQ of the language model", "cpu"): (("Qwen3-VL, bf16, GPTQ", "images", "batch size"),),
    ("images with 4-bit weights of compressed-tensors of the language model", "cpu"): (
        ("Qwen3-VL, bf16, W4A16", "images", "batch size"),
    ),
    (
        "images of Qwen3-VL, Qwen2.5-VL, Gemma 3, InternVL, Mistral Small 3, LLaVA with CLIP with two tensor-parallel "
        "ranks",
        "cpu",
    ): (
        ("Qwen3-VL, bf16, TP 2", "images", "batch size"),
        ("Qwen3-VL, bf16 compiled, TP 2", "images"),
        *(
            (f"{model}, bf16, TP 2", "images")
            for model in ("Qwen2.5-VL", "Gemma 3", "InternVL", "Mistral Small 3", "LLaVA")
        ),
    ),
    (
        "images of Qwen3-VL and Qwen2.5-VL with two tensor-parallel ranks that encode whole images "
        "(--mm-encoder-tp-mode data)",
        "cpu",
    ): (
        ("Qwen3-VL, bf16, TP 2, whole images", "images", "batch size"),
        ("Qwen2.5-VL, bf16, TP 2, whole images", "images"),
        ("Qwen3-VL, bf16 compiled, TP 2, whole images", "images"),
    ),
    ("images with n-grams (speculative decoding)", "cpu"): (
        ("Qwen3-VL, bf16, n-grams", "images"),
        ("Qwen3-VL, bf16 compiled, n-grams", "images"),
        ("Qwen3-VL, bf16, across engines", "speculative decoding"),
    ),
    ("images with LoRA of the language model", "cpu"): (("Qwen3-VL, bf16, LoRA", "images", "batch size"),),
    ("images with INT8 weights, AWQ, n-grams or two ranks, in an engine that vLLM compiles", "cpu"): (
        ("Qwen3-VL, bf16 compiled, TP 2", "images"),
        ("Qwen3-VL, bf16 compiled, TP 2, whole images", "images"),
        ("Qwen3-VL, bf16 compiled, INT8", "images"),
        ("Qwen2.5-VL, bf16 compiled, AWQ", "images"),
        ("Qwen3-VL, bf16 compiled, n-grams", "images"),
    ),
    ("images with LoRA and n-grams", "cpu"): (("Qwen3-VL, bf16", "features together"),),
    ("images with structured output", "cpu"): (("Qwen3-VL, bf16, grammars", "images"),),
    ("structured output", "cuda"): (
        ("qwen3-100m bf16, requests", "structured output"),
        ("qwen3-100m bf16 compiled, requests", "structured output"),
    ),
    ("custom logits processors", "cuda"): (("qwen3-100m bf16, logits processors", "custom logits processors"),),
    ("prompt embeddings (enable_prompt_embeds)", "cuda"): (("* single requests, eager", "prompt embeddings"),),
    ("prompt embeddings, compiled", "cuda"): (("* single requests, compiled", "prompt embeddings"),),
    ("n, beam search, bias with allowed tokens, min_tokens, priorities, a reset of running requests", "cuda"): (
        ("* single requests, eager", *_ASKED),
        ("* single requests, compiled", *_ASKED),
    ),
    ("streamed inputs (prompts in parts)", "cuda"): (
        ("qwen3-100m bf16, requests", "streamed inputs"),
        ("qwen3-100m bf16 compiled, requests", "streamed inputs"),
        ("* single requests, eager", *_STREAMED),
        ("* single requests, compiled", *_STREAMED),
    ),
    ("pauses (sleep level 0, pause_generation)", "cuda"): (
        ("qwen3-100m bf16, requests", "pauses"),
        ("qwen3-100m bf16 compiled, requests", "pauses"),
    ),
    ("breakable CUDA graphs (VLLM_USE_BREAKABLE_CUDAGRAPH=1)", "cuda"): (
        ("qwen3-100m bf16 compiled, breakable CUDA graphs", *_SIX, "preemption"),
    ),
    ("KV offload to the engine's own memory (OffloadingConnector, SimpleCPUOffloadConnector)", "cuda"): (
        (
            "* OffloadingConnector, eager",
            "offloaded prefix",
            "offloaded prefix, in a batch",
            "prompt logprobs of offloaded positions",
        ),
        (
            "* OffloadingConnector, compiled",
            "offloaded prefix",
            "offloaded prefix, in a batch",
            "prompt logprobs of offloaded positions",
        ),
        (
            "* SimpleCPUOffloadConnector, eager",
            "offloaded prefix",
            "offloaded prefix, in a batch",
            "prompt logprobs of offloaded positions",
        ),
        (
            "* SimpleCPUOffloadConnector, compiled",
            "offloaded prefix",
            "offloaded prefix, in a batch",
            "prompt logprobs of offloaded positions",
        ),
    ),
    ("two of LoRA, speculation and quantized weights, in an engine that vLLM compiles", "cuda"): (
        ("llama-100m, LoRA, ngram 3 drafts*", *_SPECULATED),
        ("llama-100m, FP8, ngram 3 drafts*", *_SPECULATED),
        ("llama-100m bf16 compiled, FP8, LoRA, each other", *_FIVE),
    ),
    ("weights in the host's memory (--cpu-offload-gb, --offload-group-size)", "cuda"): (
        ("* --cpu-offload-gb, eager", "weights on the host"),
        ("* --offload-group-size, eager", "weights on the host"),
        ("qwen3-100m bf16, weights on the host", *_SIX, "preemption"),
        ("qwen3-100m bf16, weights on the host, prefetched", *_SIX, "preemption"),
        ("qwen3-100m bf16 compiled, weights on the host", *_SIX, "preemption"),
        ("qwen3-100m bf16 compiled, weights on the host, prefetched", *_SIX, "preemption"),
    ),
    # Recurrent layers.
    ("gated delta nets (Qwen3-Next)", "cpu"): (("Qwen3-Next,*", *_SIX, "preemption"),),
    ("gated delta nets (Qwen3-Next)", "cuda"): (
        *((f"Qwen3-Next{mode}", *_SIX, *more) for mode in ("", ", eager") for more in ((), ("preemption",))),
    ),
    ("gated delta nets, in eager mode", "cuda"): (
        ("Qwen3-Next, eager", *_SIX),
        ("Qwen3-Next, eager", *_SIX, "preemption"),
    ),
    ("gated delta nets, in eager mode", "cpu"): (("Qwen3-Next,*", *_SIX, "preemption"),),
    ("gated delta nets, compiled", "cuda"): (("Qwen3-Next", *_SIX), ("Qwen3-Next", *_SIX, "preemption")),
    ("gated delta nets, compiled", "cpu"): (("Qwen3-Next,* --full", *_SIX, "eager and compiled"),),
    **{
        (f"Mamba 2{more}", platform): (("Falcon-H1*", *_SIX), ("Granite 4-H*", *_SIX))
        for more, platform in (
            (" (Falcon-H1, Granite 4-H, Nemotron-H)", "cpu"),
            (", compiled", "cuda"),
            (", in eager mode", "cpu"),
        )
    },
    ("Mamba 2 (Falcon-H1, Granite 4-H, Nemotron-H)", "cuda"): (
        ("Falcon-H1", *_SIX),
        ("Granite 4-H", *_SIX),
        ("Falcon-H1, eager", *_SIX),
        ("Nemotron-H, eager", *_SIX),
        ("Granite 4-H, eager", *_SIX),
        ("Nemotron-H", *_SIX),
    ),
    ("Granite 4-H, in eager mode", "cpu"): (("Granite 4-H*", *_SIX),),
    ("Granite 4-H, in eager mode", "cuda"): (
        ("Granite 4-H, eager", *_SIX),
        ("Granite 4-H, eager", *_SIX, "preemption"),
    ),
    ("Mamba 2, compiled", "cpu"): tuple(
        (f"{name},* --full", *_SIX, "eager and compiled")
        for name in ("Falcon-H1", "Granite 4-H", "Nemotron-H", "Mamba 2")
    ),
    ("Mamba 2, in eager mode", "cuda"): tuple(
        (f"{name}, eager", *_SIX) for name in ("Falcon-H1", "Nemotron-H", "Granite 4-H")
    ),
    **{
        (name, "cpu"): ((f"{model},* --full", *_SIX, "eager and compiled"),)
        for name, model in {
            "Nemotron-H": "Nemotron-H",
            "Nemotron-H, compiled": "Nemotron-H",
            "Mamba 2 (the first models)": "Mamba 2",
            "short convolutions, compiled": "LFM2",
            "Jamba, compiled": "Jamba",
        }.items()
    },
    ("Nemotron-H", "cuda"): (("Nemotron-H, eager", *_SIX), ("Nemotron-H", *_SIX)),
    ("Nemotron-H, compiled", "cuda"): (("Nemotron-H", *_SIX),),
    ("short convolutions (LFM2)", "cpu"): (("LFM2,*", *_SIX, "preemption"),),
    ("short convolutions (LFM2)", "cuda"): (
        ("LFM2, eager", *_SIX),
        ("LFM2, eager", *_SIX, "preemption"),
        ("LFM2", *_SIX),
    ),
    ("LFM2 with experts", "cuda"): (("LFM2-MoE, eager", *_SIX),),
    ("LFM2 with experts, compiled", "cpu"): (("LFM2-MoE,* compiled", *_SIX, "eager and compiled"),),
    ("gated delta nets (Qwen3.5 without experts), in eager mode", "cuda"): (("Qwen3.5, eager", *_SIX),),
    ("LFM2 with experts", "cpu"): (
        ("LFM2-MoE,* bf16", *_SIX, "preemption"),
        ("LFM2-MoE,* compiled", *_SIX, "eager and compiled"),
    ),
    ("short convolutions, compiled", "cuda"): (("LFM2", *_SIX),),
    ("Mamba 1 (Mamba, Falcon-Mamba, Jamba)", "cpu"): (
        ("Mamba,* bf16", *_SIX),
        ("Falcon-Mamba,* bf16", *_SIX),
        ("Jamba,* bf16", *_SIX),
    ),
    ("Mamba 1 (Mamba, Falcon-Mamba, Jamba)", "cuda"): tuple(
        (f"{name}{mode}", *_SIX) for name in ("Falcon-Mamba", "Jamba") for mode in ("", ", eager")
    ),
    ("Mamba 1, compiled", "cuda"): (("Falcon-Mamba", *_SIX),),
    ("Jamba, compiled", "cuda"): (("Jamba", *_SIX),),
    ("Kimi delta attention (Kimi Linear)", "cuda"): (
        *(("Kimi Linear", *_FIVE), ("Kimi Linear, eager", *_FIVE)),
        *(("Kimi Linear, BI_PATCH_MLA=one", *_SIX), ("Kimi Linear, eager, BI_PATCH_MLA=one", *_SIX)),
    ),
    ("Mamba (the first models)", "cpu"): (("Mamba,* bf16", *_SIX),),
    ("Mamba 1, compiled", "cpu"): (("Mamba,* compiled", *_SIX), ("Falcon-Mamba,* compiled", *_SIX)),
    # Quantized weights.
    ("INT8 weights and activations (compressed-tensors W8A8)", "cpu"): (("*-int8 bf16", *_SIX),),
    ("INT8 weights and activations (compressed-tensors W8A8)", "cuda"): (
        ("* INT8,* eager", *_SIX),
        ("* INT8, 2 layers", *_NINE),
    ),
    ("INT8 weights, static INT8 activations", "cpu"): (("*-int8-static bf16", *_SIX),),
    ("INT8 weights, static INT8 activations", "cuda"): (
        ("* INT8 static,* eager", *_SIX),
        ("* INT8 static, 2 layers", *_NINE),
    ),
    ("AWQ, 4 bits", "cpu"): (("*-awq bf16", *_SIX),),
    ("AWQ, 4 bits", "cuda"): (("* AWQ,* eager", *_SIX), ("* AWQ, 2 layers", *_NINE)),
    ("GPTQ, 4 bits", "cpu"): (("*-gptq bf16", *_SIX),),
    ("GPTQ, 4 bits", "cuda"): (
        ("* GPTQ,* eager", *_SIX),
        ("* GPTQ, 2 layers", *_NINE),
    ),
    ("compressed-tensors W4A16", "cpu"): (("*-w4a16 bf16", *_SIX), ("*-w4a16-zeros bf16", *_SIX)),
    ("compressed-tensors W4A16", "cuda"): (("* W4A16, 2 layers", *_NINE),),
    ("8-bit weights alone (GPTQ, compressed-tensors W8A16)", "cuda"): (
        ("* W8A16,* eager", *_SIX),
        ("* W8A16, 2 layers", *_PUBLISHED, *_RESTARTED),
    ),
    ("FP8 in blocks of 128 x 128", "cpu"): (("*-fp8-blocks bf16", *_SIX),),
    ("FP8 in blocks of 128 x 128", "cuda"): (
        ("* FP8 block,* eager", *_SIX),
        ("* FP8 block, 2 layers", *_NINE),
        ("MiniMax-M2 FP8, 2 layers", *_NINE),
    ),
    ("FP8 per channel or tensor, activations per token (compressed-tensors)", "cuda"): (
        ("* FP8 channel,* eager", *_SIX),
        ("* FP8 channel, 2 layers", *_NINE),
    ),
    **{
        (row, "cuda"): (
            (f"* {scheme}, 2 layers, eager", *_SIX, *_RESTARTED),
            (f"* {scheme}, 2 layers", *_SIX, *_PUBLISHED),
        )
        for row, scheme in (
            ("AutoRound (INC), 4 bits in the packing of GPTQ", "AutoRound"),
            ("ModelOpt: FP8 per tensor, static activations", "ModelOpt FP8"),
            ("Quark: FP8 per tensor, static activations", "Quark FP8"),
            ("FP8 per tensor, dynamic activations", "FP8 tensor"),
            ("quantized language-model head (GPTQ)", "GPTQ head"),
        )
    },
    ("experts in FP8 per channel, activations per token (compressed-tensors, as GLM-4.6)", "cuda"): (
        ("* FP8 channel experts, 2 layers, eager", *_SIX),
        ("* FP8 channel experts, 2 layers", *_NINE),
    ),
    ("experts in FP8 with one scale each (method fp8)", "cuda"): (
        ("* FP8 tensor experts, 2 layers", *_SIX, *_RESTARTED, *_PUBLISHED),
        ("* FP8 tensor experts,* eager", *_SIX, *_RESTARTED),
        ("* FP8 static experts,* eager", *_SIX, *_RESTARTED),
        ("* FP8 static experts, 2 layers", "batch size", "decode = prefill"),
    ),
    ("experts in FP8 made while loading, per channel", "cuda"): (
        ("* FP8 channel experts while loading,* eager", *_SIX, *_RESTARTED),
    ),
    ("experts of 4 bits in groups with zero points (AWQ, compressed-tensors)", "cuda"): (
        ("* AWQ experts, 2 layers", *_SIX, *_RESTARTED, *_PUBLISHED),
        ("* W4A16 experts with zero points, 2 layers", *_SIX, *_RESTARTED, *_PUBLISHED),
    ),
    ("FP8 per tensor, static activations (method fp8)", "cuda"): (
        ("* FP8 static,* eager", *_SIX),
        ("* FP8 static, 2 layers", *_PUBLISHED, *_RESTARTED),
    ),
    ("FP8 made while loading (--quantization fp8)", "cuda"): (("* FP8 while loading,*", *_SIX, *_PUBLISHED),),
    ("FP8 made while loading, in blocks (--quantization fp8_per_block)", "cuda"): (
        ("* FP8 block while loading, 2 layers", *_SIX, "preemption"),
        ("* FP8 block while loading,* eager", *_SIX),
    ),
    ("FP8 made while loading, per channel (--quantization fp8_per_channel)", "cuda"): (
        ("* FP8 channel while loading,*", *_SIX, *_PUBLISHED),
    ),
    ("experts of 4 bits in groups (GPTQ, compressed-tensors W4A16)", "cuda"): (
        ("* W4A16 experts, 2 layers", *_SIX, *_RESTARTED, *_PUBLISHED),
        ("* GPTQ experts, 2 layers", *_SIX, *_RESTARTED, *_PUBLISHED),
    ),
    ("experts of 8 bits in groups, weights alone (GPTQ, compressed-tensors)", "cuda"): (
        ("* GPTQ 8-bit experts, 2 layers, eager", *_SIX),
        ("* GPTQ 8-bit experts, 2 layers", *_NINE),
    ),
    ("experts of AWQ and GPTQ by --quantization moe_wna16", "cuda"): tuple(
        (f"* {method} experts by moe_wna16, 2 layers", *_SIX, *_RESTARTED, *_PUBLISHED) for method in ("AWQ", "GPTQ")
    ),
    ("NVFP4 weights alone (compressed-tensors)", "cuda"): (
        ("* NVFP4,* eager", *_SIX),
        ("* NVFP4, 2 layers", *_NINE),
    ),
    **{
        (name, "cuda"): (
            (f"Qwen3-8B {scheme}, 2 layers, eager", *_SIX),
            (f"Qwen3-8B {scheme}, 2 layers", "batch size", "decode = prefill", "eager and compiled"),
        )
        for name, scheme in (
            ("NVFP4 weights and activations (compressed-tensors)", "NVFP4 W4A4"),
            ("ModelOpt: NVFP4 weights and activations", "ModelOpt NVFP4 W4A4"),
        )
    },
    ("ModelOpt: NVFP4 weights alone", "cuda"): (
        ("Qwen3-8B ModelOpt NVFP4, 2 layers, eager", *_SIX),
        ("Qwen3-8B ModelOpt NVFP4, 2 layers", *_NINE),
    ),
    ("Quark: NVFP4 weights and activations", "cuda"): (
        ("Qwen3-8B Quark NVFP4 W4A4, 2 layers, eager", *_SIX),
        ("Qwen3-8B Quark NVFP4 W4A4, 2 layers", *_NINE),
    ),
    ("experts in NVFP4, weights alone (compressed-tensors, ModelOpt)", "cuda"): (
        ("* NVFP4 experts, 2 layers, eager", *_SIX),
        ("* NVFP4 experts, 2 layers", *_NINE),
        ("* ModelOpt NVFP4 experts, 2 layers, eager", "batch size", "mixed lengths", "decode = prefill"),
    ),
    ("experts in NVFP4, weights and activations (compressed-tensors, ModelOpt)", "cuda"): (
        ("* NVFP4 W4A4 experts, 2 layers, eager", *_SIX),
        ("* NVFP4 W4A4 experts, 2 layers", *_NINE),
    ),
    ("FP8 per channel or tensor, static activations (other methods)", "cuda"): (
        ("* FP8 static, compressed-tensors,* eager", *_SIX),
        ("* FP8 static, compressed-tensors, 2 layers", *_NINE),
    ),
    **{
        (name, "cuda"): (("gpt-oss-20b MXFP4, 2 layers", *_SIX, "preemption", "eager and compiled"),)
        for name in ("MXFP4 (gpt-oss as published)", "experts in MXFP4", "gpt-oss as published (MXFP4)")
    },
    ("experts in FP8 blocks of 128 x 128", "cuda"): (
        ("* FP8 block experts, 2 layers, eager", *_SIX),
        ("* FP8 block experts, 2 layers", *_NINE),
        ("MiniMax-M2 FP8, 2 layers", *_NINE),
        ("MiniMax-M2 FP8,* eager", *_SIX, *_RESTARTED),
    ),
    ("FP8 blocks of 128 x 128 in DeepSeek V3 (MLA)", "cuda"): (("DeepSeek-V3 FP8 block,*", *_MLA),),
    ("quantized weights of a checkpoint, compiled", "cpu"): tuple(
        (f"*-{scheme} bf16 compiled", *_SIX, "eager and compiled")
        for scheme in ("int8", "int8-static", "awq", "gptq", "w4a16", "fp8-blocks")
    ),
    ("quantized weights of a checkpoint, compiled", "cuda"): tuple(
        (f"* {scheme},*", *_PUBLISHED) for scheme in ("W8A16", "FP8 static")
    )
    + tuple(
        (f"* {scheme}, 2 layers", *_NINE)
        for scheme in (
            "AWQ",
            "GPTQ",
            "W4A16",
            "INT8",
            "INT8 static",
            "NVFP4",
            "FP8 channel experts",
            "FP8 block experts",
            "NVFP4 W4A4 experts",
            "FP8 block",
            "FP8 channel",
            "FP8 static, compressed-tensors",
            "ModelOpt FP8",
            "Quark FP8",
            "AutoRound",
            "Quark NVFP4 W4A4",
            "ModelOpt NVFP4",
        )
    )
    + tuple((f"* {scheme}, 2 layers", *_SIX) for scheme in ("MXFP4", "W4A16 experts", "GPTQ experts"))
    + tuple((f"* {scheme}, 2 layers", *_SIX, *_PUBLISHED) for scheme in ("FP8 tensor", "AWQ experts"))
    + (
        ("* NVFP4 experts, 2 layers", *_NINE),
        ("* GPTQ 8-bit experts, 2 layers", *_NINE),
        ("Qwen3-8B NVFP4 W4A4, 2 layers", "batch size", "decode = prefill", "eager and compiled"),
        ("Qwen3-8B ModelOpt NVFP4 W4A4, 2 layers", "batch size", "decode = prefill", "eager and compiled"),
    ),
    ("quantized weights or experts in another scheme, compiled", "cpu"): tuple(
        (f"*-{scheme} bf16 compiled", *_SIX, "eager and compiled")
        for scheme in ("int8", "int8-static", "awq", "gptq", "w4a16", "w4a16-zeros", "fp8-blocks")
    ),
    # Pairs.
    ("experts with tensor parallelism", "cpu"): (
        ("*-moe bf16 TP 2", "batch size"),
        *((f"*-moe bf16 TP {mode}", *_SIX) for mode in ("2 compiled", "4", "4 compiled")),
    ),
    ("LoRA with speculative decoding", "cpu"): (
        ("* LoRA, n-grams", *_SPECULATED),
        ("tiny-llama bf16, features together", "features together"),
        ("tiny-qwen3 bf16, features together, *", "features together"),
    ),
    ("LoRA with speculative decoding", "cuda"): (("*, LoRA, eager, ngram *", *_SPECULATED, "prefix cache"),),
    ("speculative decoding with quantized weights", "cuda"): (
        ("*, FP8, eager, ngram *", *_SPECULATED, "prefix cache", "preemption"),
    ),
    **{
        (f"speculative decoding with {pairs.OTHER_SCHEMES}", "cpu"): tuple(
            (f"* {scheme}, n-grams", *_SPECULATED) for scheme in ("INT8", "W4A16", "FP8 blocks")
        )
    },
    ("LoRA with quantized weights", "cuda"): (("llama-100m bf16, FP8, LoRA", *_LORA),),
    (f"LoRA with {pairs.OTHER_SCHEMES}", "cpu"): tuple(
        (f"* {s}, LoRA", *_LORA) for s in ("INT8", "W4A16", "FP8 blocks")
    ),
    ("LoRA with quantized weights", "cpu"): tuple((f"* {s}, LoRA", *_LORA) for s in ("INT8", "W4A16", "FP8 blocks")),
    ("FP8 blocks with scales of powers of two (scale_fmt ue8m0, as in DeepSeek V3.1)", "cuda"): (
        ("DeepSeek-V3 FP8 block ue8m0,*", *_MLA),
    ),
    ("an FP8 KV cache with FP8 blocks of 128 x 128 in models with MLA", "cuda"): (
        ("DeepSeek-V3 FP8 block ue8m0,* FP8 KV cache", *_MLA),
    ),
    ("an FP8 KV cache with MLA", "cuda"): (
        ("DeepSeek V2, FP8 KV cache", *_MLA, "preemption"),
        ("DeepSeek V2, FP8 KV cache, eager", *_MLA, "preemption"),
    ),
    ("an FP8 KV cache with FP8 blocks of 128 x 128 in dense models", "cuda"): (
        ("* FP8 block and KV cache,* eager", *_SIX),
    ),
    ("an FP8 KV cache with NVFP4 weights in dense models", "cuda"): (
        ("* ModelOpt NVFP4 W4A4 and KV cache,* eager", *_SIX),
    ),
    (
        "an FP8 KV cache with FP8 blocks of 128 x 128 in dense models, or NVFP4 weights in dense models, compiled",
        "cuda",
    ): tuple((f"Qwen3-8B {scheme} and KV cache, 2 layers", *_NINE) for scheme in ("FP8 block", "ModelOpt NVFP4 W4A4")),
    ("an FP8 KV cache with FP8 weights per channel", "cuda"): (
        ("* FP8 channel and KV cache,* eager", *_SIX),
        ("* KV cache per head, 2 layers", *_PUBLISHED, *_RESTARTED),
        ("* KV cache per head,* eager", *_SIX),
    ),
    ("speculative decoding with quantized weights", "cpu"): tuple(
        (f"* {scheme}, n-grams", *_SPECULATED) for scheme in ("INT8", "W4A16", "FP8 blocks")
    ),
}

# Pairs of what an engine turns on or requests ask for: the models of the engine's part, and the axis of the other.
_ENGINES = {
    ("cpu", pairs.LORA): "tiny-llama bf16, LoRA",
    ("cpu", pairs.SPECULATION): "tiny-qwen3 bf16, n-grams",
    ("cpu", pairs.QUANTIZED): "*-awq bf16",
    ("cuda", pairs.LORA): "* LoRA eager",
    ("cuda", pairs.SPECULATION): "* n-grams with *",
    ("cuda", pairs.QUANTIZED): "*, FP8",
    ("cuda", matrix.GRAMMARS): "*, structured output",
    ("cpu", matrix.GRAMMARS): "*, structured output",
}
# Pairs on CUDA whose files name the engine's part in another way.
_NAMED: dict[str, Rows] = {
    f"{pairs.LORA} with {matrix.GRAMMARS}": ("llama-100m bf16, LoRA", "structured output"),
    f"{pairs.LORA} with {matrix.PREEMPTED}": ("llama-100m bf16, LoRA", "preemption"),
    f"{pairs.SPECULATION} with {matrix.GRAMMARS}": ("qwen3-100m bf16, n-grams", "structured output"),
    f"{pairs.SPECULATION} with {matrix.CACHED}": ("Qwen3-8B, 3 layers, ngram*", "prefix cache"),
    f"{pairs.SPECULATION} with {matrix.PREEMPTED}": ("qwen3-100m bf16, n-grams", "preemption"),
}
_ASKED = {
    matrix.GRAMMARS: "structured output",
    matrix.CACHED: "prefix cache",
    matrix.PREEMPTED: "preemption",
    matrix.LOGPROBS: "logprobs in any order",
}
_COMPARES_LOGPROBS = {pairs.LORA: _LORA, pairs.SPECULATION: _SPECULATED}  # where no other axis of logprobs ran


def of_pair(name: str, platform: str) -> tuple[Rows, ...]:
    """What the files of a served row of `matrix.MATRIX` must hold."""
    if platform == "cuda" and name in _NAMED:
        return (_NAMED[name],)
    first, other = name.split(" with ")
    axes = (_ASKED[other],)
    if (platform, other) == ("cuda", matrix.LOGPROBS):
        axes = _COMPARES_LOGPROBS.get(first, axes)
    if first in (*matrix.ENGINES, matrix.GRAMMARS):
        return ((_ENGINES[platform, first], *axes),)
    return (("*", _ASKED[first], _ASKED[other]),)


# Families: the beginning of a model's name in the files, and the axes.
PLAIN: dict[str, tuple[str, ...]] = {
    "Qwen2.5": ("Qwen2.5",),
    "Mixtral, PhiMoE, OLMoE, DeepSeek-MoE-16B, Qwen2-MoE": ("Mixtral", "PhiMoE", "OLMoE", "DeepSeek-MoE", "Qwen2-MoE"),
    "Gemma 1, 2 and 3 (text)": ("Gemma 1", "Gemma 2", "Gemma 3"),
    "Phi-3.5, Phi-4, Granite 3, EXAONE 4, ERNIE 4.5, GLM-4, GLM-4.5 in bf16": (
        *("Phi-3", "Granite", "Granite MoE", "EXAONE 4", "ERNIE 4.5", "GLM-4", "GLM-4.5"),
    ),
    "OLMo 1 to 3, SmolLM3, SeedOss, Nemotron dense, Ling 2": (
        *("OLMo 1", "OLMo 2", "OLMo 3", "SmolLM3", "SeedOss", "Nemotron", "Ling 2"),
    ),
    "Command R7B, PLaMo 3, InternLM, Solar, MiMo, Bailing, ERNIE 4.5 MoE": (
        *("Command R7B", "PLaMo 3", "InternLM 2", "InternLM 3", "Solar", "MiMo", "Bailing", "ERNIE 4.5 MoE"),
    ),
    "GPT-2, GPT-NeoX, OPT, Falcon-7B, StableLM, Starcoder2": (
        *("GPT-2", "GPT-NeoX", "OPT", "Falcon", "StableLM", "Starcoder2"),
    ),
    "gpt-oss in bf16": ("gpt-oss in bf16",),
    "BLOOM": ("BLOOM",),
    "HunYuan dense (dynamic NTK with a constant alpha)": ("HunYuan",),
    "Command R and R7B in eager mode": ("Command R", "Command R7B"),
    "Gemma 3n in eager mode": ("Gemma 3n (text)",),
}
FAMILIES: dict[tuple[str, str], tuple[Rows, ...]] = {
    ("Qwen3-Reranker, Qwen2 classifiers and reward models", "cuda"): (
        ("Qwen3-Reranker-0.6B, bf16", *_ENCODED, "prefix cache", "chunk budget"),
        ("Qwen2 classifier,*", *_ENCODED),
        ("Qwen2 reward,*", *_ENCODED),
    ),
    ("Step 1 and Step 3", "cuda"): (
        ("Step 1, eager", *_SIX),
        ("Step 3, eager", *_SIX),
    ),
    ("SmolLM2", "cuda"): (("SmolLM2, eager", *_SIX),),
    ("Granite SWA", "cuda"): (("Granite SWA, eager", *_SIX),),
    ("Llama 2 and 3", "cpu"): (("tiny-llama bf16", *_SIX), ("tiny-llama fp32", *_SIX)),
    ("Llama 2 and 3", "cuda"): (
        ("Llama-3.2-1B", "batch 257", "mixed lengths*", "cached prefix*", "decode = prefill"),
        ("Llama-3.2-1B", *_SIX, "eager and compiled"),
        ("Llama", *_SIX, "preemption"),
    ),
    ("Qwen3 dense", "cpu"): (("tiny-qwen3 bf16", *_SIX), ("tiny-qwen3 fp32", *_SIX)),
    ("Qwen3 dense", "cuda"): (("Qwen3-8B", *_SIX), ("Qwen3-1.7B", *_SIX, "eager and compiled")),
    ("Qwen3-MoE", "cpu"): (("tiny-qwen3-moe bf16", *_SIX), ("tiny-qwen3-moe fp32", *_SIX)),
    ("Qwen3-MoE", "cuda"): (
        ("Qwen3-30B-A3B", "batch 257", "decode = prefill"),
        ("Qwen3-30B-A3B, *", *_SIX),
        ("Qwen3-MoE", *_SIX, "preemption"),
    ),
    ("SmolLM2", "cpu"): (("smollm2-*", *_SIX),),
    ("Mistral 7B", "cpu"): (("Mistral,*", *_SIX),),
    ("Mistral 7B", "cuda"): (("Mistral-window-*", "batch 257", "decode = prefill"),),
    ("Idefics3", "cpu"): (("Idefics3, bf16", *_IMAGES), ("Idefics3, bf16 compiled", *_IMAGES)),
    ("Qwen3-VL, Mistral-Small 3, LLaVA 1.5", "cpu"): tuple(
        (f"{model}, bf16", *_IMAGES) for model in ("Qwen3-VL", "Mistral Small 3", "LLaVA")
    ),
    ("Qwen2.5-VL", "cpu"): (("Qwen2.5-VL, bf16", *_IMAGES),),
    ("InternVL3 up to 14B, as Hugging Face transformers has it", "cpu"): (("InternVL, bf16", *_IMAGES),),
    ("Gemma 3 4B and larger, with images", "cpu"): (("Gemma 3, bf16", *_IMAGES),),
    ("Idefics3", "cuda"): (("Idefics3, bf16", "images", "batch size"),),
    ("Qwen2.5-VL", "cuda"): (("Qwen2.5-VL-3B, bf16", "images"),),
    ("Qwen3-VL, Mistral-Small 3, LLaVA 1.5", "cuda"): tuple(
        (f"{model}*, bf16", *_IMAGES) for model in ("Qwen3-VL", "Mistral-Small-3", "LLaVA-1.5")
    ),
    ("HunYuan dense (dynamic NTK with a constant alpha)", "cpu"): (
        ("HunYuan,*", *_SIX),
        ("tiny-hunyuan * compiled", "batch size", "one by one"),
    ),
    ("DeepSeek V2 in bf16", "cpu"): (("DeepSeek V2,* bf16", *_SIX), ("DeepSeek V2,* compiled", *_SIX)),
    ("DeepSeek V2 in bf16", "cuda"): (
        *(("DeepSeek-V2-Lite", *_MLA), ("DeepSeek V2, eager*", *_MLA)),
        ("DeepSeek V2, BI_PATCH_MLA=two", *_MLA, "preemption"),
    ),
    ("GLM-4.7-Flash in bf16", "cpu"): (("GLM-4.7-Flash,*", *_SIX),),
    ("GLM-4.7-Flash in bf16", "cuda"): (("GLM-4.7-Flash, eager", *_FIVE), ("GLM-4.7-Flash", *_MLA)),
    ("Kimi K2 in bf16", "cuda"): (("Kimi K2, eager", *_FIVE), ("Kimi K2", *_MLA)),
    ("MiniCPM3, which vLLM runs as ordinary attention", "cuda"): (("MiniCPM3, eager", *_SIX), ("MiniCPM3", *_SIX)),
    ("layers of MiniMax-M2 (FP8 blocks)", "cuda"): (
        ("MiniMax-M2 FP8, 2 layers", *_NINE),
        ("MiniMax-M2 FP8,* eager", *_SIX, *_RESTARTED),
    ),
    ("layers of GLM-4.6 (FP8 per channel)", "cuda"): (
        ("GLM-4.6 FP8,* eager", *_SIX, *_RESTARTED),
        ("GLM-4.6 FP8, 2 layers", "batch size", "decode = prefill"),
        ("GLM-4.6 FP8, 2 layers", "batch size", "eager and compiled"),
    ),
    ("DeepSeek V3, V3.1 and R1 in FP8 blocks", "cuda"): (
        ("DeepSeek-V3 FP8 block,*", *_MLA),
        ("DeepSeek-V3 FP8 block ue8m0,*", *_MLA),
    ),
    ("DeepSeek V3, V3.1 and R1 in bf16", "cuda"): (("DeepSeek V3,*", *_FIVE),),
    **{
        ("Qwen3-Embedding", platform): (("Qwen3-Embedding*", *_ENCODED, "prefix cache"),)
        for platform in ("cpu", "cuda")
    },
    ("Qwen3-Reranker, Qwen2 classifiers and reward models", "cpu"): (
        ("Qwen3-Reranker,*", *_ENCODED),
        ("Qwen2 reward,*", *_ENCODED),
    ),
    **{
        ("BERT, XLM-R, ModernBERT: embeddings, classifiers, rerankers", platform): tuple(
            (f"{model}*", *_ENCODED) for model in ("BERT", "XLM-R", "ModernBERT")
        )
        for platform in ("cpu", "cuda")
    },
}


def shown(name: str, platform: str) -> tuple[Rows, ...]:
    """What the files of a served cell must hold, by the row's name. Empty for a row that nobody entered here."""
    if name in (row.name for row in matrix.MATRIX):
        return of_pair(name, platform)
    found = SHOWN.get((name, platform)) or FAMILIES.get((name, platform))
    return found or tuple((f"{family}@", *_SIX) for family in PLAIN.get(name, ()))


SERVED = [
    (row.name, platform, cell)
    for row in table.ROWS
    for platform, held in row.cells.items()
    for cell in held
    if cell.state == model.SERVED
]


@functools.cache
def axes_by_model(file):
    """Model -> its axes that compared something, none of which differs."""
    found = defaultdict(set)
    for row in json.loads((RESULTS / file).read_text())["rows"]:
        assert row["compared"] > 0 and not row["differing"], (file, row)
        found[row["model"]].add(row["axis"])
    return found


def named(pattern, name):
    """Whether a model's name has a pattern. A pattern's last @ stands for the end of the name, or ", " and more."""
    if pattern.endswith("@"):
        return re.match(re.escape(pattern[:-1]) + "(,|-[0-9.]+B|$)", name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def holds(file, entry):
    pattern, *axes = entry
    assert axes, f"{entry} names no axis"
    return any(
        named(pattern, name) and all(fnmatch.filter(have, axis) for axis in axes)
        for name, have in axes_by_model(file).items()
    )


@pytest.mark.parametrize("name, platform, cell", SERVED, ids=[f"{name}, {platform}" for name, platform, _ in SERVED])
def test_the_files_hold_what_the_cell_says(name, platform, cell):
    wanted = shown(name, platform)
    assert wanted, f"enter what shows {name!r} on {platform} here: models and axes of {cell.evidence}"
    for entry in wanted:
        assert any(holds(file, entry) for file in cell.evidence), f"no row of {entry} in {cell.evidence}"
    for file in cell.evidence:
        assert any(holds(file, entry) for entry in wanted), f"{file} holds none of {wanted}"


_MODELS = {"Qwen3MoeForCausalLM": "Qwen3-30B-A3B", "DeepseekV2ForCausalLM": "DeepSeek-V2-Lite"}
_MODELS |= {"MiniMaxM2ForCausalLM": "MiniMax-M2 FP8", "GptOssForCausalLM": "gpt-oss-20b MXFP4"}
_MODELS |= {"DeepseekV3ForCausalLM": "DeepSeek-V3 small"}
_MODELS = {name: f"{held}, 2 layers" for name, held in _MODELS.items()}
_MODELS["Qwen3NextForCausalLM"] = "Qwen3-Next, 4 layers"


@pytest.mark.parametrize("run", sorted(ranks.RUNS))
def test_each_run_of_ranks_has_a_file(run):
    """Eager engines are compared by axes of their own, or with a compiled engine."""
    architecture, tensor, data, whole, compiled = run
    if data > 1:
        sizes = f"DP {data}" + f" x TP {tensor}" * (tensor > 1)
        ranks_of, axes = f"{sizes}{', experts over ranks' if whole else ''}", _STEPS
    else:
        ranks_of, axes = f"experts over {tensor} ranks" if whole else f"TP {tensor}", ("batch size", "chunk budget")
    together = not compiled and not whole
    ends = ["compiled"] if compiled or together else [""]
    names = [f"{_MODELS[architecture]}, {ranks_of}{gap}{end}" for end in ends for gap in (", ", " ")]
    entries = [(name.rstrip(", "), "eager and compiled") if together else (name.rstrip(", "), *axes) for name in names]
    if not compiled:
        entries.append((f"{_MODELS[architecture]}, {ranks_of}", *axes))
    files = [file.name for file in RESULTS.glob("invariance-*-h200-ranks-vllm-0.33.0*.json")]
    assert any(holds(file, entry) for file in files for entry in entries)


@pytest.mark.parametrize("name", quantization._COMPILED_RUNS)
def test_each_scheme_that_ran_compiled_has_a_compiled_model(name):
    (cell,) = (cell for row, platform, cell in SERVED if (row, platform) == (name, "cuda"))
    models = {held for file in cell.evidence for held in axes_by_model(file) if not held.endswith("eager")}
    assert any(named(pattern, held) for pattern, *_ in SHOWN[name, "cuda"] for held in models)


def test_nothing_is_entered_for_a_row_that_is_not_served():
    served = {(name, platform) for name, platform, _ in SERVED}
    assert {*SHOWN, *FAMILIES} <= served
    assert set(PLAIN) <= {name for name, _ in served}


def test_an_entry_needs_one_model_with_all_its_axes(monkeypatch):
    have = {"tiny-a bf16": {"batch size"}, "tiny-b, eager": {"images", "batch size"}}
    monkeypatch.setitem(globals(), "axes_by_model", lambda file: have)
    assert holds("f", ("tiny-*", "images", "batch size")) and holds("f", ("tiny-b@", "batch*"))
    assert not holds("f", ("tiny-a*", "images")) and not holds("f", ("tiny-c*", "batch size"))
    assert not holds("f", ("tiny@", "batch size"))
