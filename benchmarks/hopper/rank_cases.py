"""The cases of parallel.py: models, arguments of engines of several ranks, and axes."""

from __future__ import annotations

from typing import NamedTuple

import schemes

EQUAL = {"BI_PATCH_TP_INVARIANT": "8"}
FEW = ("batch size", "position and order", "mixed lengths", "prefix cache", "chunk budget", "decode = prefill")
SIZES = ("tensor parallel size", "batch size", "chunk budget", "decode = prefill")
MEMORY = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 << 30}
SIZES_OF_GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]}}
SMALL = "DeepSeek-V3 small"
FRONT = "tiny-qwen3"  # with a tokenizer, which a server needs
LAYERS = {"Qwen3-8B": 4, "Qwen3-30B-A3B": 2, "DeepSeek-V2-Lite": 2, SMALL: 2}
EXPERTS = [name for name in LAYERS if name != "Qwen3-8B"]
# The architecture of DeepSeek-V3, with its router and groups of experts, in the sizes of a small model.
SMALL_SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 512,
    "n_routed_experts": 64,
    "first_k_dense_replace": 1,
}


class Case(NamedTuple):
    """model: a name of LAYERS or, with random weights, of schemes.py or RECURRENT.

    axes: of verify, empty for those of level quick. engine: arguments of vllm.LLM. length: tokens of the longest
    request, 0 for the level's.
    """

    model: str
    engine: dict[str, object]
    axes: tuple[str, ...] = ()
    eager: bool = True
    environ: dict[str, str] = {}
    length: int = 0


TWO, FOUR = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 4}
WHOLE = {"enable_expert_parallel": True}
STAGES = {"pipeline_parallel_size": 2}
NO_PEERS = {"disable_custom_all_reduce": True}
BOTH = (*FEW, "eager and compiled")
DATA, MORE = {"data_parallel_size": 2}, {"data_parallel_size": 4}
MADE = (*FEW, "restart")
SEED = 7
# Quantized weights that ranks share: names of schemes.py.
SHARED = (
    *("FP8 block", "FP8 block experts", "MiniMax-M2 FP8", "FP8 channel", "AWQ", "GPTQ", "W4A16", "INT8"),
    *("W4A16 experts", "MXFP4", "FP8 channel experts", "FP8 KV cache", "NVFP4", "NVFP4 W4A4", "NVFP4 experts"),
    *("W8A16", "FP8 static", "FP8 tensor", "INT8 static", "AWQ experts", "GPTQ experts"),
)
# Those whose parts are whole groups and blocks on four ranks, too.
BY_FOUR = (
    *("FP8 block", "MiniMax-M2 FP8", "FP8 channel", "AWQ", "GPTQ", "W4A16", "INT8", "MXFP4", "FP8 channel experts"),
    *("FP8 KV cache", "FP8 block MLA", "NVFP4"),
)
STAGED = ("INT8", "FP8 block", "FP8 block experts", "AWQ", "W4A16", "FP8 channel", "FP8 KV cache", "NVFP4")
# Four layers of families.py with a recurrent state, and what differs from the family's shape. A stage needs layers of
# all kinds.
RECURRENT = {
    "Qwen3-Next": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "Falcon-H1": {"mamba_rms_norm": False},  # as the 7B model. With the norm, ranks share a row
    "LFM2": {"layer_types": ["conv", "full_attention"] * 2},
    "Falcon-Mamba": {},
}
STATES = {"mamba_ssm_cache_dtype": "float32", "kv_cache_memory_bytes": 6 << 30}
PAGES = {"block_size": 1024, "max_num_batched_tokens": 2048}  # pages of a power of two tokens, which hold a state
OF_STATES = {
    "Qwen3-Next": STATES | PAGES,
    "Falcon-H1": STATES | PAGES,
    "LFM2": {},
    "Falcon-Mamba": STATES,
}


def _both(
    label: str, model: str, engine: dict[str, object], axes: tuple[str, ...] = FEW, length: int = 0
) -> dict[str, Case]:
    """A case in eager mode, and the same compiled."""
    case = Case(model, engine, axes, length=length)
    return {label: case, f"{label}, compiled": case._replace(eager=False)}


CASES = {
    "Qwen3-8B, 4 layers, TP 2 compiled": Case("Qwen3-8B", TWO, eager=False),
    "Qwen3-8B, 4 layers, TP 2": Case("Qwen3-8B", TWO),
    **_both("Qwen3-8B, 4 layers, TP 2 without peer memory", "Qwen3-8B", TWO | NO_PEERS),
    "Qwen3-8B, 4 layers, TP 1 and 2 equal": Case("Qwen3-8B", TWO, SIZES, environ=EQUAL),
    "Qwen3-8B, 4 layers, TP 1 and 2 equal, compiled": Case("Qwen3-8B", TWO, SIZES, eager=False, environ=EQUAL),
    # The axis compares every number of ranks that the host has GPUs for.
    "Qwen3-8B, 4 layers, TP 1, 2 and 4 equal": Case("Qwen3-8B", TWO, SIZES, environ=EQUAL),
    "Qwen3-8B, 4 layers, TP 1, 2 and 4 equal, compiled": Case("Qwen3-8B", TWO, SIZES, eager=False, environ=EQUAL),
    "Qwen3-8B, 4 layers, TP 1 in 8 parts": Case("Qwen3-8B", {}, FEW, environ=EQUAL),
    **_both("Qwen3-8B, 4 layers, TP 4", "Qwen3-8B", FOUR),
    **_both("Qwen3-8B, 4 layers, TP 4 without peer memory", "Qwen3-8B", FOUR | NO_PEERS),
    "Qwen3-30B-A3B, 2 layers, TP 2": Case("Qwen3-30B-A3B", TWO, FEW),
    "Qwen3-30B-A3B, 2 layers, TP 2 compiled": Case("Qwen3-30B-A3B", TWO, BOTH, eager=False),
    **_both("Qwen3-30B-A3B, 2 layers, TP 4", "Qwen3-30B-A3B", FOUR),
    **_both("Qwen3-30B-A3B, 2 layers, experts over 2 ranks", "Qwen3-30B-A3B", TWO | WHOLE),
    **_both("Qwen3-30B-A3B, 2 layers, experts over 4 ranks", "Qwen3-30B-A3B", FOUR | WHOLE),
    "DeepSeek-V2-Lite, 2 layers, TP 2 compiled": Case("DeepSeek-V2-Lite", TWO, FEW, eager=False),
    "DeepSeek-V2-Lite, 2 layers, TP 2": Case("DeepSeek-V2-Lite", TWO, FEW),
    **_both("DeepSeek-V2-Lite, 2 layers, TP 4", "DeepSeek-V2-Lite", FOUR),
    **_both("DeepSeek-V2-Lite, 2 layers, experts over 2 ranks", "DeepSeek-V2-Lite", TWO | WHOLE),
    **_both("DeepSeek-V2-Lite, 2 layers, experts over 4 ranks", "DeepSeek-V2-Lite", FOUR | WHOLE),
    "Qwen3-8B, 4 layers, PP 2": Case("Qwen3-8B", STAGES, FEW),
    "Qwen3-8B, 4 layers, PP 2 compiled": Case("Qwen3-8B", STAGES, FEW, eager=False),
    **{
        name: case
        for scheme in SHARED
        for name, case in _both(f"{schemes.label(scheme, 2)}, TP 2", scheme, TWO, MADE).items()
    },
    **{
        name: case
        for executor, words in (("external_launcher", "external launcher"), ("ray", "workers of Ray"))
        for name, case in _both(
            f"Qwen3-8B, 4 layers, TP 2, {words}", "Qwen3-8B", TWO | {"distributed_executor_backend": executor}
        ).items()
    },
    **_both("tiny-qwen3, two API servers", FRONT, {"api_server_count": 2}),
    **{
        name: case
        for scheme in BY_FOUR
        for name, case in _both(f"{schemes.label(scheme, 2)}, TP 4", scheme, FOUR).items()
    },
    **{
        name: case
        for scheme in STAGED
        for name, case in _both(f"{schemes.label(scheme, 2)}, PP 2", scheme, STAGES).items()
    },
    **{
        name: case
        for model, more in OF_STATES.items()
        for words, engine in (("TP 2", TWO), ("TP 4", FOUR), ("PP 2", STAGES))
        for name, case in _both(
            f"{model}, 4 layers, {words}", model, engine | more, length=8704 if "block_size" in more else 0
        ).items()
    },
    **{
        name: case
        for model in ("Qwen3-8B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite")
        for name, case in _both(f"{model}, {LAYERS[model]} layers, TP 2 x PP 2", model, TWO | STAGES).items()
    },
    **{
        name: case
        for model in ("Qwen3-30B-A3B", "DeepSeek-V2-Lite")
        for name, case in _both(f"{model}, 2 layers, PP 2", model, STAGES).items()
    },
    **{
        name: case
        for words, engine in (("DP 4", MORE), ("DP 2 x TP 2", DATA | TWO), ("PP 2 x DP 2", STAGES | DATA))
        for name, case in _both(f"Qwen3-8B, 4 layers, {words}", "Qwen3-8B", engine).items()
    },
    **_both("DeepSeek-V3 small, 2 layers, TP 2", SMALL, TWO),
    **_both("DeepSeek-V3 small, 2 layers, TP 4", SMALL, FOUR),
    **_both("DeepSeek-V3 small, 2 layers, experts over 2 ranks", SMALL, TWO | WHOLE),
    **_both("DeepSeek-V3 small, 2 layers, experts over 4 ranks", SMALL, FOUR | WHOLE),
    "Qwen3-8B, 4 layers, DP 2": Case("Qwen3-8B", DATA),
    "Qwen3-8B, 4 layers, DP 2 compiled": Case("Qwen3-8B", DATA, eager=False),
    **{
        name: case
        for model in EXPERTS
        for words, engine in (
            ("DP 2", DATA),
            ("DP 2, experts over ranks", DATA | WHOLE),
            ("DP 4", MORE),
            ("DP 4, experts over ranks", MORE | WHOLE),
            ("DP 2 x TP 2", DATA | TWO),
            ("DP 2 x TP 2, experts over ranks", DATA | TWO | WHOLE),
        )
        for name, case in _both(f"{model}, 2 layers, {words}", model, engine).items()
    },
}
