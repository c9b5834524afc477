"""Devices: where bf16 models were measured, and what to do on other devices."""

from __future__ import annotations

from dataclasses import dataclass

from bi_patch.platforms.features.model import Cell, refused, served, untried


@dataclass(frozen=True)
class Card:
    """name: a kind of device. platform: cpu, cuda, ascend or ""."""

    name: str
    platform: str
    cell: Cell


_NOT_HOPPER = untried("Triton attention serves there, certified at each first start; nothing has run on such a card")

CARDS: tuple[Card, ...] = (
    Card("NVIDIA H100", "cuda", served("invariance-2026-11-22-h100-vllm-0.33.0.json")),
    Card("NVIDIA H200", "cuda", served("invariance-2026-11-22-h200-vllm-0.33.0.json")),
    Card("NVIDIA A100, A10, L4, L40, RTX 30 and 40", "cuda", _NOT_HOPPER),
    Card(
        "NVIDIA B200 and later",
        "cuda",
        untried("as on other cards; on B200, bi_patch refuses heads of 256 elements"),
    ),
    Card("x86-64 CPU with AVX512-BF16", "cpu", served("invariance-2026-11-22-cpu-vllm-0.32.0.json")),
    Card(
        "x86-64 CPU with AMX",
        "cpu",
        served(
            "invariance-2026-11-28-cpu-amx-speculation-vllm-0.32.0.json",
            "invariance-2026-11-28-cpu-amx-lora-vllm-0.32.0.json",
            "invariance-2026-11-29-cpu-amx-quick-vllm-0.32.0.json",
        ),
    ),
    Card("x86-64 CPU with AVX2", "cpu", untried()),
    Card("Ascend 910B, A3 and 950", "ascend", untried("checked without a device; nothing has run on an NPU")),
    Card("AMD GPUs, Intel XPU, TPU", "", refused("bi_patch has no patch points for these builds of vLLM")),
)
