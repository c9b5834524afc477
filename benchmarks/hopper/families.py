"""Measures the invariance of one model of each family on a GPU: published sizes of a layer, few layers, random weights.

    PYTHONPATH=. python3 benchmarks/hopper/families.py [FAMILY ...] [--beside N] [--eager] [--preempt]
        [--dtype TYPE] [--until SECONDS] [--results DIR]

A family takes the shape of bi_patch/tools/models/families.py, with the sizes below. N engines run beside each other,
each in a part of the GPU's memory. The rows join one result file of the day. A refusal is printed and gets no row.
--until ends a run early, in seconds since 1970, and its file holds the axes that were complete.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import bi_patch_entry

bi_patch_entry.without_arming()  # the engines run in processes of their own

from until import ending  # noqa: E402

from bi_patch.tools.models import shapes  # noqa: E402

AXES = ("batch size", "mixed lengths", "co-batch contents", "prefix cache", "chunk budget", "decode = prefill")
PREEMPTION = "preemption"
DTYPES = {"bfloat16": "", "float16": ", fp16", "float32": ", fp32"}  # in labels
SEED = 7
CACHE = 3 << 30  # bytes of the KV cache of one engine
WINDOW = 256

_LAYERS = {"num_hidden_layers": 4, "vocab_size": 32000, "max_position_embeddings": 8192}
_EVERY_FOURTH = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": WINDOW}
_DELTA_NETS = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
_PLAIN = {"torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _sizes(hidden, intermediate, heads, key_heads, head_dim=None, **more):
    made = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim or hidden // heads,
    }
    return _LAYERS | made | more


SIZES: dict[str, dict[str, object]] = {
    "Gemma 1": _sizes(3072, 24576, 16, 16, 256),
    "Gemma 2": _sizes(3584, 14336, 16, 8, 256, **_EVERY_FOURTH, query_pre_attn_scalar=256),
    "Gemma 3": _sizes(1152, 6912, 4, 1, 256, **_EVERY_FOURTH, query_pre_attn_scalar=256),
    "Phi-3": _sizes(3072, 8192, 32, 32),
    "Granite": _sizes(4096, 12800, 32, 8),
    "Granite MoE": _sizes(1536, 512, 24, 8, num_local_experts=40, num_experts_per_tok=8),
    "EXAONE 4": _sizes(5120, 27392, 40, 8, **_EVERY_FOURTH, sliding_window_pattern=4),
    "ERNIE 4.5": _sizes(1024, 3072, 16, 2, 128),
    "GLM-4": _sizes(4096, 13696, 32, 2, 128),
    "GLM-4.5": _sizes(4096, 10944, 96, 8, 128, n_routed_experts=128, num_experts_per_tok=8, moe_intermediate_size=1408),
    "Command R7B": _sizes(4096, 14336, 32, 8, **_EVERY_FOURTH),
    "Qwen3-Next": _sizes(
        2048,
        5120,
        16,
        2,
        256,
        **_DELTA_NETS,
        num_experts=64,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    ),
    "Falcon-H1": _sizes(
        3072,
        12288,
        12,
        2,
        128,
        mamba_n_heads=24,
        mamba_d_head=128,
        mamba_d_ssm=3072,
        mamba_d_state=256,
        mamba_n_groups=1,
        mamba_chunk_size=256,
        max_position_embeddings=16384,
    ),
    "Granite 4-H": _sizes(
        4096,
        768,
        32,
        8,
        layer_types=["mamba", "mamba", "mamba", "attention"],
        mamba_n_heads=128,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
        mamba_chunk_size=256,
        num_local_experts=72,
        num_experts_per_tok=10,
        shared_intermediate_size=1536,
    ),
    "Nemotron-H": _sizes(
        4096,
        21504,
        32,
        8,
        128,
        mamba_num_heads=128,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        chunk_size=128,
    ),
    "Qwen3.5-MoE": _sizes(
        2048,
        5120,
        16,
        2,
        256,
        **_DELTA_NETS,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    ),
    "Qwen3.5": _sizes(
        4096,
        12288,
        16,
        4,
        256,
        **_DELTA_NETS,
    ),
    "Nemotron 3": _sizes(
        2688,
        1856,
        32,
        2,
        128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        chunk_size=128,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
    ),
    "Mamba 2": {
        "hidden_size": 2560,
        "intermediate_size": 5120,
        "num_heads": 80,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "chunk_size": 256,
        "num_hidden_layers": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 16384,
    },
    "Mamba": {
        "hidden_size": 2560,
        "intermediate_size": 5120,
        "time_step_rank": 160,
        "num_hidden_layers": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
    },
    "Falcon-Mamba": {
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "time_step_rank": 256,
        "num_hidden_layers": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
    },
    "Jamba": _sizes(
        4096,
        14336,
        32,
        8,
        mamba_dt_rank=256,
        attn_layer_period=4,
        attn_layer_offset=3,
        num_experts=16,
    ),
    "LFM2": _sizes(
        2048,
        8192,
        32,
        8,
        layer_types=["conv", "conv", "full_attention", "conv"],
        conv_dim=2048,
        conv_dim_out=2048,
        block_dim=2048,
        block_ff_dim=8192,
    ),
    "LFM2-MoE": _sizes(
        2048,
        7168,
        32,
        8,
        layer_types=["conv", "conv", "full_attention", "conv"],
        num_dense_layers=2,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=1792,
    ),
    "Llama": _sizes(4096, 14336, 32, 8),
    "Qwen3-MoE": _sizes(2048, 6144, 32, 4, 128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
    "Kimi Linear": shapes.SHAPES["Kimi-Linear-48B-A3B, 4 layers"]
    | _LAYERS
    | _PLAIN
    | {"num_experts": 64, "max_position_embeddings": 16384},
    "Qwen2-MoE": _sizes(
        2048,
        5632,
        16,
        16,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    "gpt-oss in bf16": shapes.SHAPES["gpt-oss-20b"]
    | _LAYERS
    | _PLAIN
    | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "Mixtral": _sizes(4096, 14336, 32, 8, num_hidden_layers=2),
    "OLMoE": _sizes(2048, 1024, 16, 16, num_experts=64, num_experts_per_tok=8),
    "PhiMoE": _sizes(4096, 6400, 32, 8, num_local_experts=16, num_experts_per_tok=2, num_hidden_layers=2),
    "DeepSeek-MoE": _sizes(
        2048, 10944, 16, 16, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408
    ),
    "DeepSeek V2": _sizes(
        2048,
        10944,
        16,
        16,
        64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_routed_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    ),
    "DeepSeek V3": _sizes(
        7168,
        18432,
        128,
        128,
        64,
        num_hidden_layers=3,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_routed_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=2,
        n_group=8,
        topk_group=4,
    ),
    "Kimi K2": _sizes(
        7168,
        18432,
        64,
        64,
        64,
        num_hidden_layers=3,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_routed_experts=64,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
    ),
    "GLM-4.7-Flash": _sizes(
        2048,
        10240,
        20,
        20,
        64,
        q_lora_rank=768,
        qk_nope_head_dim=192,
        v_head_dim=256,
        n_routed_experts=64,
        num_experts_per_tok=4,
        moe_intermediate_size=1536,
    ),
    "OLMo 2": _sizes(4096, 11008, 32, 32),
    "OLMo 3": _sizes(4096, 11008, 32, 32, **_EVERY_FOURTH),
    "OLMo 1": _sizes(4096, 11008, 32, 32),
    "SmolLM3": _sizes(2048, 11008, 16, 4, no_rope_layers=[1, 1, 1, 0]),
    "SeedOss": _sizes(5120, 27648, 80, 8, 128, num_hidden_layers=2),
    "Qwen2.5": _sizes(3584, 18944, 28, 4),
    "Mistral": _sizes(4096, 14336, 32, 8, sliding_window=WINDOW),
    "Nemotron": _sizes(3072, 9216, 24, 8, 128),
    "MiMo": _sizes(4096, 11008, 32, 8),
    "SmolLM2": _sizes(576, 1536, 9, 3, 64, num_hidden_layers=30, vocab_size=49152),
    "PLaMo 3": _sizes(
        *(2560, 8192, 32, 4, 128),
        **_EVERY_FOURTH,
        window_size=WINDOW,
        interleaved_sliding_window=[WINDOW, WINDOW, WINDOW, None],
    ),
    "InternLM 2": _sizes(4096, 14336, 32, 8),
    "Solar": _sizes(4096, 14336, 32, 8),
    "Bailing": _sizes(2048, 5632, 16, 4, 128, num_experts=64, num_experts_per_tok=6, moe_intermediate_size=1408),
    "ERNIE 4.5 MoE": _sizes(
        2560, 12288, 20, 4, 128, moe_num_experts=64, moe_k=6, moe_intermediate_size=1536, moe_layer_end_index=3
    ),
    "Step 1": _sizes(3072, 8192, 48, 4, 64, num_attention_groups=4),
    "Step 3": _sizes(
        *(7168, 18432, 64, 1, 256),
        num_hidden_layers=3,
        num_attention_groups=1,
        share_q_dim=2048,
        share_expert_dim=5120,
        moe_num_experts=16,
        moe_top_k=3,
        moe_intermediate_size=5120,
    ),
    "LongCat": _sizes(
        *(6144, 12288, 64, 64, 64),
        num_hidden_layers=2,
        num_layers=2,
        ffn_hidden_size=12288,
        expert_ffn_hidden_size=2048,
        moe_intermediate_size=2048,  # not every release of transformers reads one as the other
        n_routed_experts=32,
        zero_expert_num=16,
    ),
    "Gemma 3n (text)": _sizes(
        *(2048, [8192] * 4, 8, 2, 256),
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=WINDOW,
        vocab_size_per_layer_input=32000,
        hidden_size_per_layer_input=256,
        laurel_rank=64,
    ),
    "InternLM 3": _sizes(4096, 10240, 32, 2, 128),
    "Ling 2": _sizes(
        2048,
        5120,
        16,
        4,
        128,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        n_group=8,
        topk_group=4,
    ),
    "GPT-2": {"n_embd": 1280, "n_layer": 4, "n_head": 20, "n_inner": 5120, "n_positions": 2048, "vocab_size": 32000}
    | {"hidden_size": 1280, "num_hidden_layers": 4, "num_attention_heads": 20},
    "GPT-NeoX": _sizes(2560, 10240, 32, 32),
    "OPT": _sizes(2048, 8192, 32, 32, ffn_dim=8192, word_embed_proj_dim=2048),
    "Falcon": _sizes(4544, 18176, 71, 71),
    "StableLM": _sizes(2560, 6912, 32, 32),
    "Starcoder2": _sizes(3072, 12288, 24, 2),
    "HunYuan": _sizes(4096, 14336, 32, 8, 128),
    "Granite SWA": _sizes(2048, 8192, 32, 8, **_EVERY_FOURTH),
    "MiniCPM": _sizes(2304, 5760, 36, 36),
    "MiniCPM3": _sizes(
        2560,
        6400,
        40,
        40,
        96,
        q_lora_rank=768,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
    ),
    "BLOOM": {"n_layer": 4, "n_head": 32, "hidden_size": 4096, "vocab_size": 32000},
}

# What SIZES lacks of families that the CPU sweep does not have: bi_patch serves most of them on GPUs only.
GPU_ONLY: dict[str, dict[str, object]] = {
    "Llama": _PLAIN
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "SmolLM2": _PLAIN
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "Step 1": _PLAIN
    | {
        "architectures": ["Step1ForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "Step 3": _PLAIN
    | {
        "architectures": ["Step3TextForCausalLM"],
        "model_type": "step3_text",
        "max_position_embedding": 8192,
        "max_seq_len": 8192,
        "moe_layers_enum": "1,2",
        "norm_expert_weight": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "LongCat": _PLAIN
    | {
        "architectures": ["LongcatFlashForCausalLM"],
        "model_type": "longcat_flash",
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_topk": 12,
        "zero_expert_type": "identity",
        "routed_scaling_factor": 6.0,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "attention_method": "MLA",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": False,
    },
    "Qwen3-MoE": _PLAIN
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "BLOOM": _PLAIN
    | {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
    },
}


def measure(
    family: str,
    eager: bool,
    share: float,
    root: str,
    results: Path,
    preempt: bool = False,
    until: int = 0,
    dtype: str = "bfloat16",
) -> int:
    """Measure one family and write its rows. Returns the number of positions that differ. preempt: also in an engine
    whose KV cache is too small for the batch. until: the run ends then, in seconds since 1970; 0 for no end. dtype: of
    the weights, a key of DTYPES."""
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import families
    from bi_patch.tools.verify import levels, local

    config = families.FAMILIES.get(family, {}) | GPU_ONLY.get(family, {}) | SIZES[family]
    if family in ("Falcon", "LongCat"):
        del config["head_dim"]  # its configuration class computes the size itself
    cross = tuple(probe for probe in levels.QUICK.cross if preempt and probe.name == PREEMPTION)
    level = replace(levels.QUICK, seconds=None, cross=cross, graphs=1)
    given = {"gpu_memory_utilization": share, "kv_cache_memory_bytes": CACHE, "max_num_batched_tokens": 2048}
    states = {"linear_num_key_heads", "mamba_n_heads", "mamba_num_heads", "mamba_d_state", "linear_attn_config"}
    if states & set(config):
        # States in fp32; pages of a power of two tokens, which hold a state; prompts of two pages for the prefix cache.
        given |= {"mamba_ssm_cache_dtype": "float32", "block_size": 1024, "kv_cache_memory_bytes": 4 * CACHE}
        level = replace(level, max_model_len=8704)
    elif {"time_step_rank", "state_size"} & set(config):
        given |= {"mamba_ssm_cache_dtype": "float32", "kv_cache_memory_bytes": 2 * CACHE}
    folder = shapes.save(family, config, root)
    system = local.local(folder, level, eager=eager, random_weights=SEED, engine_args=given, dtype=dtype)
    label = f"{family}{DTYPES[dtype]}{', eager' if eager else ''}"
    only = (*AXES, *[probe.name for probe in cross])
    with ending(until):
        rows, report = invariance.measure(label, system, level, only=only, tell=told, cut=until > 0)
    found = evidence.new(evidence.Invariance, report)
    found.rows = rows
    found.command = "python3 benchmarks/hopper/families.py"
    if 0 < until <= time.time():
        found.note = f"{label}: complete axes of a run that was cut"
    evidence.write(found, results)
    return evidence.total_differing(rows)


def told(text: str) -> None:
    print(text, flush=True)


def _options(args: argparse.Namespace) -> list[str]:
    """The options of a run of a single family."""
    given = [*["--eager"] * args.eager, *["--preempt"] * args.preempt]
    return [*given, "--until", str(args.until), "--dtype", args.dtype]


def alone(family: str, args: argparse.Namespace) -> int:
    """Run this script for one family, and print its last line."""
    start = time.perf_counter()
    own = args.results / "families" / shapes.short(family)  # processes must not write to the same file
    own.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, family, "--results", str(own), "--share", str(0.9 / args.beside)]
    done = subprocess.run(
        [*command, *_options(args)],
        capture_output=True,
        text=True,
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no output"]
    (own / "log.txt").write_text(done.stdout + done.stderr)
    print(f"[{done.returncode}] {lines[-1][:400]} ({time.perf_counter() - start:.0f} s)", flush=True)
    return done.returncode


def join(results: Path) -> None:
    """Write the rows of all families to one result file."""
    from bi_patch.tools import evidence

    for file in sorted((results / "families").glob("*/invariance-*.json")):
        evidence.write(evidence.read(file, evidence.Invariance), results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(SIZES))
    parser.add_argument("--beside", type=int, default=4)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--preempt", action="store_true", help="also measure preempted requests, in another engine")
    parser.add_argument("--until", type=int, default=0, help="end the run then, seconds since 1970")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument(
        "--share", type=float, help="the share of the GPU's memory, for a single family in this process"
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    if args.share is None:
        with ThreadPoolExecutor(args.beside) as pool:
            codes = list(pool.map(lambda family: alone(family, args), args.families))
        join(args.results)
        sys.exit(max(codes))
    (family,) = args.families
    with tempfile.TemporaryDirectory() as root:
        differing = measure(family, args.eager, args.share, root, args.results, args.preempt, args.until, args.dtype)
    print(f"{family}: {differing} differ")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
