"""The evidence for the vLLM releases of each platform. `platforms/releases.py` lists the releases."""

from __future__ import annotations

from bi_patch.platforms.features.model import Cell, served, untried

VERSIONS: dict[str, dict[str, Cell]] = {
    "cpu": {
        "0.32.0": served("invariance-2026-11-22-cpu-vllm-0.32.0.json"),
        "0.33.0": untried("the patch points are compared with its sources"),
    },
    "cuda": {
        "0.23.0": served("invariance-2026-11-22-h100-seams-vllm-0.23.0.json"),
        "0.26.0": served(
            "invariance-2026-11-22-h100-seams-vllm-0.26.0.json",
            "invariance-2026-11-30-h200-vllm-0.26.0.json",
            "invariance-2026-11-30-h200-vllm-0.26.0-2.json",
            "invariance-2026-11-30-h200-families-vllm-0.26.0-2.json",
            "invariance-2026-11-30-h200-families-vllm-0.26.0-3.json",
            "invariance-2026-12-01-h200-families-vllm-0.26.0.json",
        ),
        "0.32.0": untried("the patch points are compared with its sources"),
        "0.33.0": served("invariance-2026-11-22-h100-seams-vllm-0.33.0.json"),
    },
    "ascend": {"0.23.0": untried("checked without a device; nothing has run on an NPU")},
}
