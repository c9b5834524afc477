"""What runs have shown of quantized weights: the cells of several rows of the feature table."""

from __future__ import annotations

from bi_patch.platforms.features.model import Cell, refused, served, untried

NONE = refused("bi_patch has no certified order for their products", todo="Use unquantized weights")
REFUSED = {"cpu": NONE, "cuda": NONE, "ascend": NONE}
NO_KERNEL = REFUSED | {"cpu": refused("vLLM's CPU build has no kernel for them", todo="Use unquantized weights")}
H200 = "invariance-2026-11-28-h200-fp8-vllm-0.33.0.json"
BESIDE = "invariance-2026-11-30-h200-schemes-vllm-0.33.0.json"  # compiled, most beside eager engines
NINE_AXES = "invariance-2026-11-30-h200-schemes-vllm-0.33.0-2.json"  # compiled, nine axes
EXPERTS = "invariance-2026-11-30-h200-schemes-vllm-0.33.0-3.json"  # the same
WITH_MLA = served(
    "invariance-2026-11-29-h200-mla-blocks-compiled-vllm-0.33.0.json",
    "invariance-2026-11-29-h200-mla-two-compiled-vllm-0.33.0.json",
    why="four layers of DeepSeek-V3's sizes, compiled and in eager mode",
    releases=">=0.33",
)
COMPILED = served(H200, why="two layers of published sizes, compiled and in eager mode", releases=">=0.33")
TRIAL = untried("nobody has compared an engine's bits yet", releases=">=0.33")
NEW_EAGER = "invariance-2026-11-30-h200-quantized-vllm-0.33.0.json"
NEW_GRAPHS = "invariance-2026-11-30-h200-quantized-vllm-0.33.0-2.json"
CUT = "invariance-2026-11-30-h200-quantized-vllm-0.33.0-4.json"  # compiled, without an eager engine beside
WIDE = "invariance-2026-11-30-h200-channel-experts-vllm-0.33.0-3.json"
BLOCKS = "invariance-2026-11-30-h200-block-experts-vllm-0.33.0.json"
OWN_EXPERTS = "invariance-2026-11-30-h200-quantized-vllm-0.33.0-6.json"  # of 4 bits, on the bundled kernel


EARLIER_SCALES = "compiled and beside an eager engine; more axes in eager mode with an earlier order of the scales"


def layers(sizes: str, *, how: str = "compiled and in eager mode", files: tuple[str, ...] = ()) -> Cell:
    """Two layers of a model's sizes. how: the modes."""
    return served(*(files or (NEW_EAGER, NEW_GRAPHS)), why=f"two layers of {sizes}'s sizes, {how}", releases=">=0.33")


INT8 = (
    served(
        "invariance-2026-11-30-h200-gated-vllm-0.33.0-2.json",
        NINE_AXES,
        why="two layers of Qwen3-8B's sizes, compiled and in eager mode",
        releases=">=0.33",
    ),
    NONE,
)
STATIC_RUN = "invariance-2026-11-30-h200-static-vllm-0.33.0.json"
STATIC = (
    served(
        STATIC_RUN,
        BESIDE,
        why="two layers of Qwen3-8B's sizes, compiled and in eager mode",
        releases=">=0.33",
    ),
    NONE,
)
FOUR_BITS = "invariance-2026-11-29-h200-four-bits-vllm-0.33.0.json"
EAGER = "invariance-2026-11-29-h200-quantized-vllm-0.33.0-5.json"


def four(*files: str) -> tuple[Cell, ...]:
    """4-bit weights. files: of an earlier run in eager mode."""
    why = "two layers of Qwen3-8B's sizes, compiled and beside an eager engine"
    why += "; more axes in eager mode before the forms for few rows that serve now" if files else ""
    return served(*files, NINE_AXES, why=why, releases=">=0.33"), NONE


LATER = (
    served(
        "invariance-2026-11-29-h200-quantized-vllm-0.33.0-2.json",
        why="two layers of Qwen3-8B's sizes, compiled and in eager mode",
        releases=">=0.33",
    ),
    NONE,
)
EIGHT_BITS = (
    served(
        "invariance-2026-11-30-h200-w8a16-vllm-0.33.0.json",
        BESIDE,
        why="two layers of Qwen3-8B's sizes in compressed-tensors, a scale a channel, compiled and in eager mode",
        releases=">=0.33",
    ),
    NONE,
)
INT8_STATIC = (
    served(
        "invariance-2026-11-29-h200-quantized-vllm-0.33.0-4.json",
        NINE_AXES,
        why="two layers of Qwen3-8B's sizes, compiled and in eager mode",
        releases=">=0.33",
    ),
    NONE,
)
OSS_RUN = "invariance-2026-11-30-h200-mxfp4-vllm-0.33.0.json"
OSS = (
    served(
        OSS_RUN,
        why="two layers of gpt-oss-20b's sizes on the bundled kernels, compiled and beside an eager engine",
        releases=">=0.33",
    ),
    NONE,
)
BOTH = (
    served(EAGER, NINE_AXES, why=f"two layers of Qwen3-8B's sizes, {EARLIER_SCALES}", releases=">=0.33"),
    NONE,
)
NVFP4 = (
    served(
        "invariance-2026-11-30-h200-nvfp4-vllm-0.33.0-2.json",
        NINE_AXES,
        why="two layers of Qwen3-8B's sizes on the bundled kernels, compiled and in eager mode",
        releases=">=0.33",
    ),
    NONE,
)
NVFP4_MODELOPT = (
    served(
        NINE_AXES,
        why="two layers of Qwen3-8B's sizes on the bundled kernels, compiled and in eager mode",
        releases=">=0.33",
    ),
    NONE,
)
ROWS_EAGER = "invariance-2026-11-30-h200-nvfp4-rows-vllm-0.33.0.json"
ROWS_GRAPHS = "invariance-2026-11-30-h200-nvfp4-rows-vllm-0.33.0-2.json"
_IN_BF16 = "two layers of Qwen3-8B's sizes on the bundled kernels, activations in bf16"
NVFP4_ROWS = (
    served(ROWS_EAGER, ROWS_GRAPHS, why=f"{_IN_BF16}, compiled and in eager mode", releases=">=0.33"),
    NONE,
)
NVFP4_ROWS_QUARK = (
    served(ROWS_EAGER, NINE_AXES, why=f"{_IN_BF16}, compiled and in eager mode", releases=">=0.33"),
    NONE,
)
NVFP4_EXPERTS_RUN = "invariance-2026-11-30-h200-nvfp4-experts-vllm-0.33.0.json"
NVFP4_EXPERTS = layers(
    "Qwen3-30B-A3B", how="compiled and in eager mode; of ModelOpt in eager mode", files=(NVFP4_EXPERTS_RUN, EXPERTS)
)
NVFP4_ROWS_EXPERTS = layers(
    "Qwen3-30B-A3B", how="compiled and in eager mode; activations in bf16; not of ModelOpt", files=(NINE_AXES,)
)
Cells = dict[str, Cell | tuple[Cell, ...]]


def cuda(cell: Cell) -> Cells:
    """Refused, except on CUDA in the releases of a cell."""
    return REFUSED | {"cuda": (cell, NONE)}


CPU_RUN = "invariance-2026-11-28-cpu-amx-quantized-vllm-0.32.0.json"
ON_CPU = REFUSED | {
    "cpu": served(
        CPU_RUN,
        why="tiny models with random weights, on a CPU with AMX; without AMX other kernels run, which the tests cover",
    )
}
WITH_AMX: Cells = {"cpu": served(CPU_RUN, why="tiny models with random weights; vLLM needs AMX for it")}
