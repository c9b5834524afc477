"""A trainer with the sampler's bits."""

from __future__ import annotations

from bi_patch.platforms.features.model import Feature, refused, row, served

_CPU_PARITY_EXPERTS = "parity-2026-11-29-cpu-amx-experts-vllm-0.32.0.json"
_CPU_PARITY_RANKS = "parity-2026-11-29-cpu-amx-ranks-vllm-0.32.0.json"
_CPU_PARITY_TRL = "parity-2026-11-29-cpu-amx-trl-vllm-0.32.0.json"
_CPU_PARITY_LORA = "parity-2026-11-29-cpu-amx-lora-vllm-0.32.0.json"
_CPU_PARITY_FAMILIES = "parity-2026-11-29-cpu-amx-families-vllm-0.32.0.json"
_CPU_PARITY = "parity-2026-11-28-cpu-vllm-0.32.0.json"
_H200_PARITY = "parity-2026-11-28-h200-vllm-0.33.0.json"
_H200_PARITY_SHAPES = "parity-2026-11-29-h200-trainer-vllm-0.33.0.json"
_H200_PARITY_EXPERTS = "parity-2026-11-29-h200-experts-vllm-0.33.0.json"
_H200_PARITY_LORA = "parity-2026-11-29-h200-lora-vllm-0.33.0.json"
_H200_PARITY_FSDP = "parity-2026-11-29-h200-fsdp-vllm-0.33.0.json"
_H200_PARITY_RANKS = "parity-2026-11-29-h200-ranks-vllm-0.33.0.json"
_H200_PARITY_GRPO = "parity-2026-11-29-h200-grpo-vllm-0.33.0-4.json"
_H200_PARITY_EXPERTS_LINES = "parity-2026-11-29-h200-experts-vllm-0.33.0-2.json"
_H200_PARITY_LORA_COMPILED = "parity-2026-11-29-h200-lora-vllm-0.33.0-2.json"
_H200_PARITY_FAMILIES = "parity-2026-11-29-h200-families-vllm-0.33.0.json"
_H200_PARITY_WINDOW = "parity-2026-11-29-h200-families-vllm-0.33.0-2.json"
_H200_PARITY_QWEN2_5 = "parity-2026-11-29-h200-families-vllm-0.33.0-3.json"
_H200_PARITY_GRADIENTS_2B = "parity-2026-11-29-h200-gradients-vllm-0.33.0-3.json"
_H200_PARITY_GRADIENTS_1B = "parity-2026-11-29-h200-gradients-vllm-0.33.0-2.json"
_H200_PARITY_GRADIENTS = "parity-2026-11-29-h200-gradients-vllm-0.33.0.json"

TRAINERS: tuple[Feature, ...] = (
    row(
        "a trainer on Hugging Face transformers with the sampler's bits",
        short="a trainer with the sampler's bits",
        cpu=served(
            _CPU_PARITY,
            _CPU_PARITY_EXPERTS,
            _CPU_PARITY_FAMILIES,
            _CPU_PARITY_LORA,
            _CPU_PARITY_TRL,
            why="two tiny models and SmolLM2-135M on all lines of parity, a tiny Qwen3-MoE, Mixtral, Mistral, Qwen2.5, "
            "Gemma 2 and Gemma 3, LoRA adapters of PEFT, and TRL's GRPOTrainer",
        ),
        cuda=served(
            _H200_PARITY,
            _H200_PARITY_SHAPES,
            _H200_PARITY_EXPERTS,
            _H200_PARITY_EXPERTS_LINES,
            _H200_PARITY_FAMILIES,
            _H200_PARITY_WINDOW,
            _H200_PARITY_QWEN2_5,
            _H200_PARITY_LORA,
            _H200_PARITY_LORA_COMPILED,
            _H200_PARITY_FSDP,
            _H200_PARITY_GRADIENTS,
            _H200_PARITY_GRADIENTS_1B,
            _H200_PARITY_GRADIENTS_2B,
            _H200_PARITY_GRPO,
            why="two small models and two published shapes without experts, a tiny Gemma 2, Gemma 3, Mistral, Qwen2.5, "
            "Mixtral and Qwen3-MoE, two layers of Qwen3-30B-A3B, LoRA adapters of PEFT in bf16 beside an eager and a "
            "compiled sampler, and FSDP2 on one and two GPUs, with random weights; 200 steps of GRPO of SmolLM2-135M",
        ),
        ascend=refused("its operators with a backward do not exist there", by="training.device"),
        details="`bi_patch.training`: Llama, Mistral, Qwen2.5, Qwen3, Gemma 2 and 3, Mixtral, Qwen3-MoE.",
    ),
    row(
        "a trainer on one device beside a sampler with tensor parallelism",
        cpu=served(_CPU_PARITY_RANKS, why="two and four ranks, tiny models without experts"),
        cuda=served(
            _H200_PARITY_RANKS,
            why="two ranks, six layers of Qwen3-1.7B's shape, measured while vLLM's one-stage all-reduce added, which "
            "has the same order; where NCCL adds, the trainer refuses",
        ),
        ascend=refused("its operators with a backward do not exist there", by="training.device"),
        details="The trainer cuts K of `o_proj` and `down_proj` as the ranks do, and adds the parts in rank order. "
        "Refused by name: samplers whose ranks share experts, and samplers with `BI_PATCH_TP_INVARIANT`.",
    ),
)
