"""Features of engines with several ranks: parallelism, and who starts the workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bi_patch.platforms.features import parallel
from bi_patch.platforms.features.model import REFUSED, SERVED, UNTRIED, Feature, absent, refused, row, served, untried
from bi_patch.platforms.features.pairs import one_form, recurrent
from bi_patch.platforms.features.questions import NO_NPU, NO_SEAM, everywhere, joined, when_compiled
from bi_patch.platforms.features.ranks import compiled, norms, shown, size, whole_experts

_CPU_RANKS = "invariance-2026-11-28-cpu-ranks-vllm-0.32.0.json"
_CPU_TENSOR = "invariance-2026-11-29-cpu-amx-ranks-vllm-0.32.0.json"
_CPU_SIZES = "invariance-2026-11-29-cpu-amx-ranks-vllm-0.32.0-2.json"
_CPU_LAUNCHER = "invariance-2026-11-29-cpu-amx-launcher-vllm-0.32.0.json"
_H200_RANKS = "invariance-2026-11-29-h200-ranks-vllm-0.33.0.json"
_H200_SHARED = "invariance-2026-11-29-h200-ranks-vllm-0.33.0-3.json"
_H200_RANKS_MORE = "invariance-2026-11-30-h200-ranks-vllm-0.33.0.json"
_H200_DATA = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-2.json"
_H200_MORE_RANKS = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-5.json"
_H200_LAST = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-6.json"
_H200_FOUR = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-7.json"
_H200_EXECUTORS = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-3.json"
_H200_PARTS = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-4.json"
_H200_EIGHTHS = "invariance-2026-12-01-h200-ranks-vllm-0.33.0.json"
_CPU_STAGES = "invariance-2026-11-30-cpu-ranks-vllm-0.32.0-5.json"
_CPU_REPLICAS = "invariance-2026-11-30-cpu-replicas-vllm-0.32.0.json"
_CPU_MORE_RANKS = "invariance-2026-11-30-cpu-ranks-vllm-0.32.0-6.json"
_CPU_EXPERTS_IN_STAGES = "invariance-2026-11-30-cpu-ranks-vllm-0.32.0-7.json"
_CPU_RANKS_UPDATED = "invariance-2026-11-29-cpu-amx-ranks-vllm-0.32.0-3.json"


def _of_parallel(name: str, words: str, above: int = 1) -> Callable[[Any], str]:
    """`words` if a size of the parallel configuration is above a number, else "". A switch counts as 1."""
    return lambda config: words if int(getattr(config.parallel_config, name, 0) or 0) > above else ""


def _plain_data_parallel(words: str) -> Callable[[Any], str]:
    """`words` for several data-parallel ranks of a model without experts: they are independent engines."""

    def asked(config: Any) -> str:
        return words if size(config, "data_parallel_size") > 1 and not _shares_a_step(config) else ""

    return asked


# Models whose experts ranks may share.
_MOE_OF_RANKS = ("Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
_ALL_TO_ALL = "allgather_reducescatter"  # vLLM's default, whose sums over ranks have a patch point
_STAGES = ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size")
_MOST = 4  # ranks


def _beside_shared_experts(config: Any) -> dict[str, bool]:
    """What no patch point or run covers where several ranks share experts, and whether an engine has it."""
    held, model = config.parallel_config, config.model_config
    backend = getattr(held, "all2all_backend", _ALL_TO_ALL)
    return {
        f"the all-to-all {backend}": backend != _ALL_TO_ALL,
        "pipeline or context parallelism": any(size(config, name) > 1 for name in _STAGES),
        "quantized weights": getattr(model, "quantization", None) is not None,
        "MLA in one form": bool(getattr(model, "use_mla", False)) and one_form(),
        "recurrent layers": recurrent(model),
        "pooling": getattr(model, "runner_type", "generate") != "generate",
        "LoRA": getattr(config, "lora_config", None) is not None,
        f"more than {_MOST} ranks": _ranks_of(config) > _MOST,
        "several hosts": size(config, "nnodes") > 1,
        "another placement of experts": getattr(held, "expert_placement_strategy", "linear") != "linear",
        "a KV cache of another type": getattr(getattr(config, "cache_config", None), "cache_dtype", "auto") != "auto",
        "another model than Qwen3-MoE and DeepSeek": not _all_of(model, _MOE_OF_RANKS),
    }


def _ranks_of(config: Any) -> int:
    return size(config, "tensor_parallel_size") * size(config, "data_parallel_size")


def _all_of(model: Any, architectures: tuple[str, ...]) -> bool:
    """Whether a model has an architecture, and only some of these."""
    own = set(getattr(model, "architectures", None) or ())
    return bool(own) and own <= set(architectures)


def _judged(state: str, words: str, measured: bool, other: dict[str, bool]) -> str:
    """`words` for a configuration whose row is in a state: served if measured, and refused for what `other` names."""
    if any(other.values()):
        return joined(f"{words} with ", other) if state == REFUSED else ""
    return words if state == (SERVED if measured else UNTRIED) else ""


def _expert_parallel(state: str, words: str) -> Callable[[Any], str]:
    """`words` for tensor-parallel ranks that hold whole experts. The rows of data parallelism judge its ranks."""

    def asked(config: Any) -> str:
        if not whole_experts(config) or _shares_a_step(config):
            return ""
        other = _beside_shared_experts(config) | {"data parallelism": size(config, "data_parallel_size") > 1}
        return _judged(state, words, _ranks_of(config) == 1 or shown(config), other)

    return asked


def _shares_a_step(config: Any) -> bool:
    """Whether an engine has data-parallel ranks of a model with experts: each step is one of all ranks."""
    return size(config, "data_parallel_size") > 1 and bool(getattr(config.model_config, "is_moe", True))


def _experts_of_data_ranks(state: str, words: str) -> Callable[[Any], str]:
    """`words` for data-parallel ranks of a model with experts."""

    def asked(config: Any) -> str:
        if not _shares_a_step(config):
            return ""
        return _judged(state, words, shown(config), _beside_shared_experts(config))

    return asked


def _other_sizes(config: Any) -> str:
    ranks = size(config, "tensor_parallel_size")
    return "" if ranks in (1, 2, 4) else f"tensor parallelism over {ranks}"


_ONE_STAGE = (2, 4, 6, 8)  # ranks that vLLM's one-stage all-reduce serves


def _carried(config: Any) -> str:
    """NCCL carries the parts of more than two compiled ranks, as far as a configuration tells. Workers see the rest."""
    ranks = size(config, "tensor_parallel_size")
    off = ranks not in _ONE_STAGE or getattr(config.parallel_config, "disable_custom_all_reduce", False)
    found = ranks > 2 and off and compiled(config)
    return "more than two compiled ranks without vLLM's one-stage all-reduce" if found else ""


def _norms_over_ranks(config: Any) -> str:
    return "norms over ranks" if norms(config) else ""


def _started_by(backend: str, words: str) -> Callable[[Any], str]:
    """`words` if this backend of vLLM, not the engine, starts the workers."""

    def asked(config: Any) -> str:
        held = config.parallel_config
        given = {getattr(held, "distributed_executor_backend", None), getattr(held, "data_parallel_backend", None)}
        return words if backend in given else ""

    return asked


def _data_ranks_of_ray(config: Any) -> str:
    started = getattr(config.parallel_config, "data_parallel_backend", None) == "ray"
    return "data-parallel ranks of Ray" if started and size(config, "data_parallel_size") > 1 else ""


def _unexamined(config: Any) -> str:
    return ", ".join(parallel.unknown(config.parallel_config))


_STEP = "ranks share a step, and nobody has compared an engine's bits"
_NO_EXCHANGE = "vLLM's CPU communicator lacks all_gatherv: two ranks of a tiny Qwen3-MoE stopped at their first step"
_NO_MAP = "vLLM's CPU experts do not look which rank holds an expert"

DISTRIBUTED: tuple[Feature, ...] = (
    row(
        "tensor parallelism",
        short="tensor parallelism",
        cpu=served(
            _CPU_TENSOR,
            _CPU_SIZES,
            _CPU_RANKS_UPDATED,
            _CPU_MORE_RANKS,
            why="two and four ranks over shared memory, in eager mode and compiled, also with experts; new weights "
            "with two",
        ),
        cuda=(
            untried("the order of the sums is checked at the start", releases="<0.33"),
            served(
                _H200_RANKS,
                _H200_SHARED,
                _H200_RANKS_MORE,
                _H200_FOUR,
                why="two and four ranks over peer memory, compiled and in eager mode, also with experts; two with MLA, "
                "and over NCCL",
            ),
        ),
        ascend=untried(NO_NPU),
        asked=_of_parallel("tensor_parallel_size", "tensor parallelism over 1"),
    ),
    row(
        "tensor parallelism over other numbers of ranks than two and four",
        cpu=untried("measured with two and four ranks"),
        cuda=untried("measured with two and four ranks"),
        ascend=untried(NO_NPU),
        asked=_other_sizes,
    ),
    row(
        "tensor parallelism without vLLM's one-stage all-reduce (no peer memory, or other than 2, 4, 6 or 8 ranks), "
        "compiled",
        cpu=absent(),
        cuda=(
            untried("the order of the sums is checked at the start", releases="<0.32"),
            served(
                _H200_RANKS_MORE,
                _H200_DATA,
                why="two ranks of Qwen3-8B's sizes, in CUDA graphs; PyTorch's NCCL carried the parts, or vLLM's own",
            ),
        ),
        ascend=absent(),
    ),
    row(
        "tensor parallelism over more than two ranks without vLLM's one-stage all-reduce, compiled",
        cpu=absent(),
        cuda=(
            untried("the order of the sums is checked at the start", releases="<0.32"),
            refused(
                "NCCL carries the parts, and no run has shown more than two ranks in CUDA graphs",
                todo="Use --enforce-eager",
                by="communicator.cuda_rank_order",
            ),
        ),
        ascend=absent(),
        asked=_carried,
    ),
    row(
        "equal bits for every tensor-parallel size (BI_PATCH_TP_INVARIANT)",
        cpu=served(
            _CPU_SIZES,
            _CPU_RANKS_UPDATED,
            _CPU_STAGES,
            _CPU_REPLICAS,
            why="dense decoders; measured in bf16 (eager and compiled) and fp32 with 1, 2 and 4 ranks; in bf16 and "
            "eager mode also with two stages, and two ranks with two data-parallel ranks",
        ),
        cuda=(
            refused(NO_SEAM, todo="Leave BI_PATCH_TP_INVARIANT out", by="communicator.leaves", releases="<0.33"),
            served(
                _H200_RANKS,
                _H200_RANKS_MORE,
                _H200_LAST,
                _H200_EIGHTHS,
                why="dense decoders in 16 bits with a 16-bit KV cache: one, two and four ranks compiled, one and two "
                "in eager mode; layers with a window, sinks or ALiBi were not measured, and the rest is refused",
            ),
        ),
        ascend=refused(NO_SEAM, todo="Leave BI_PATCH_TP_INVARIANT out", by="communicator.leaves"),
    ),
    row(
        "pipeline parallelism",
        cpu=served(
            _CPU_RANKS,
            _CPU_STAGES,
            _CPU_REPLICAS,
            _CPU_EXPERTS_IN_STAGES,
            why="two stages, compiled and in eager mode, also with experts; stock vLLM 0.32 stops at the first request "
            "in eager mode",
        ),
        cuda=(untried(releases="<0.33"), served(_H200_RANKS, why="two stages in eager mode")),
        ascend=untried(NO_NPU),
        asked=_of_parallel("pipeline_parallel_size", "pipeline parallelism over 1"),
    ),
    row(
        "pipeline parallelism over three or more stages",
        cpu=served(_CPU_MORE_RANKS, why="three stages, a tiny Qwen3, in eager mode and compiled"),
        cuda=untried("measured with two stages"),
        ascend=untried(NO_NPU),
        asked=_of_parallel("pipeline_parallel_size", "pipeline parallelism over 2", 2),
    ),
    row(
        "pipeline parallelism, compiled",
        cpu=served(_CPU_RANKS),
        cuda=(untried(releases="<0.33"), served(_H200_RANKS_MORE, why="two stages")),
        ascend=untried(NO_NPU),
        asked=when_compiled(_of_parallel("pipeline_parallel_size", "compiled pipeline parallelism")),
    ),
    row(
        "data parallelism of models without experts",
        cpu=served(_CPU_RANKS, _CPU_REPLICAS, why="two and four ranks, in eager mode; four compiled, too"),
        cuda=(
            untried("the ranks are independent engines", releases="<0.33"),
            served(
                _H200_SHARED,
                _H200_FOUR,
                why="two ranks, compiled; with two tensor-parallel ranks each, also in eager mode",
            ),
        ),
        ascend=refused(NO_SEAM),
        asked=_plain_data_parallel("data parallelism over 1"),
        details="All ranks need the same kind of device.",
    ),
    row(
        "data parallelism of MoE models",
        cpu=refused(_NO_EXCHANGE),
        cuda=(
            refused(_STEP, todo="Use vLLM 0.33", releases="<0.33"),
            served(
                _H200_DATA,
                _H200_MORE_RANKS,
                _H200_FOUR,
                why="two layers, compiled and in eager mode: Qwen3-30B-A3B over two and four ranks, and two with two "
                "tensor-parallel ranks each, with and without expert parallelism; with it, DeepSeek-V2-Lite and a "
                "small DeepSeek V3 over two",
            ),
        ),
        ascend=refused(_STEP),
        asked=_experts_of_data_ranks(SERVED, "data parallelism over 1 of a MoE model"),
        details="A sum over ranks has one order, whichever rank owns a row. "
        "Requests have the same bits on every rank, whatever the other ranks do.",
    ),
    row(
        "data parallelism of MoE models in other sizes, models or modes than above, over hosts or load balancers",
        cpu=refused(_NO_EXCHANGE),
        cuda=(
            refused(_STEP, todo="Use vLLM 0.33", releases="<0.33"),
            untried("each worker checks the order of the sums at its start"),
        ),
        ascend=refused(_STEP),
        asked=_experts_of_data_ranks(UNTRIED, "data parallelism over 1 of a MoE model"),
    ),
    row(
        "data parallelism of MoE models with another all-to-all, more than four ranks, or another model or feature",
        **everywhere(_STEP),
        asked=_experts_of_data_ranks(REFUSED, "data parallelism over 1 of a MoE model"),
    ),
    row(
        "expert parallelism of tensor-parallel ranks",
        cpu=refused(_NO_MAP),
        cuda=(
            refused("nobody has compared an engine's bits", todo="Use vLLM 0.33", releases="<0.33"),
            served(
                _H200_SHARED,
                _H200_RANKS_MORE,
                _H200_FOUR,
                why="two layers of Qwen3-30B-A3B and of DeepSeek-V2-Lite: two ranks, compiled and in eager mode; "
                "four, compiled",
            ),
        ),
        ascend=refused(NO_SEAM),
        asked=_expert_parallel(SERVED, "expert parallelism"),
        details="Each rank holds whole experts and sees all rows. A model without experts ignores the option.",
    ),
    row(
        "expert parallelism in other sizes, models or modes than above",
        cpu=refused(_NO_MAP),
        cuda=(
            refused("nobody has compared an engine's bits", todo="Use vLLM 0.33", releases="<0.33"),
            untried(),
        ),
        ascend=refused(NO_SEAM),
        asked=_expert_parallel(UNTRIED, "expert parallelism"),
    ),
    row(
        "expert parallelism with more than four ranks, other models, or another feature",
        **everywhere("nobody has compared an engine's bits"),
        asked=_expert_parallel(REFUSED, "expert parallelism"),
    ),
    row(
        "expert load balancing",
        **everywhere("the load decides which rank holds an expert, and each rank's part of a sum is rounded"),
        asked=_of_parallel("enable_eplb", "expert load balancing", 0),
    ),
    row(
        "decode context parallelism",
        **everywhere(
            "ranks merge the keys before a chunk with the chunk's own keys, so the start of a chunk moves bits"
        ),
        asked=_of_parallel("decode_context_parallel_size", "decode context parallelism over 1"),
    ),
    row(
        "prefill context parallelism",
        **everywhere("ranks merge parts of a row"),
        asked=_of_parallel("prefill_context_parallel_size", "prefill context parallelism over 1"),
    ),
    row(
        "dual-batch overlap",
        **everywhere("the size of a batch decides where it is split in two"),
        asked=_of_parallel("enable_dbo", "dual-batch overlap", 0),
    ),
    row(
        "workers of an external launcher (torchrun)",
        cpu=served(_CPU_LAUNCHER, why="measured with two tensor-parallel ranks"),
        cuda=(
            untried("each worker must say that it is armed", releases="<0.33"),
            served(_H200_EXECUTORS, why="two tensor-parallel ranks of Qwen3-8B's sizes, in eager mode"),
        ),
        ascend=untried(NO_NPU),
        asked=_started_by("external_launcher", "workers of an external launcher"),
        details="Arm every rank (`VLLM_BATCH_INVARIANT=1` for the launcher): ranks ask each other at their start.",
    ),
    row(
        "workers of an external launcher (torchrun), compiled",
        cpu=served(_CPU_LAUNCHER),
        cuda=(
            untried("each worker must say that it is armed", releases="<0.33"),
            served(_H200_MORE_RANKS, why="two tensor-parallel ranks of Qwen3-8B's sizes"),
        ),
        ascend=untried(NO_NPU),
        asked=when_compiled(_started_by("external_launcher", "compiled workers of an external launcher")),
    ),
    row(
        "workers of Ray",
        cpu=refused(
            "vLLM's CPU build has none: with Ray 2.60.0 it says 'current platform cpu does not support ray'",
            todo="Use the executor mp",
        ),
        cuda=(
            untried("each worker must say that it is armed", releases="<0.33"),
            served(_H200_MORE_RANKS, why="two tensor-parallel ranks of Qwen3-8B's sizes, in eager mode, on one host"),
        ),
        ascend=untried(NO_NPU),
        asked=_started_by("ray", "workers of Ray"),
    ),
    row(
        "workers of Ray, compiled",
        cpu=refused("vLLM's CPU build has none", todo="Use the executor mp"),
        cuda=(
            untried("each worker must say that it is armed", releases="<0.33"),
            served(_H200_LAST, why="two tensor-parallel ranks of Qwen3-8B's sizes, on one host"),
        ),
        ascend=untried(NO_NPU),
        asked=when_compiled(_started_by("ray", "compiled workers of Ray")),
    ),
    row(
        "data-parallel ranks that Ray starts",
        cpu=refused("vLLM's CPU build has no Ray", todo="Use the executor mp"),
        cuda=untried("measured with tensor-parallel ranks"),
        ascend=untried(NO_NPU),
        asked=_data_ranks_of_ray,
    ),
    row(
        "several API servers (--api-server-count)",
        cpu=untried("a test compares two"),
        cuda=(
            untried("one engine answers them all", releases="<0.33"),
            served(_H200_LAST, why="two front ends of a tiny Qwen3, through HTTP, in eager mode"),
        ),
        ascend=untried(NO_NPU),
        asked=_of_parallel("_api_process_count", "several API servers"),
    ),
    row(
        "several hosts",
        cpu=untried("the sum over ranks is checked at the start"),
        cuda=untried("the sum over ranks is checked at the start"),
        ascend=untried(NO_NPU),
        asked=_of_parallel("nnodes", "several hosts"),
    ),
    row(
        "every other option of parallelism (sequence parallelism, sampling in shards, elastic experts, fault "
        "tolerance, ...)",
        **everywhere("nobody has examined it"),
        asked=_unexamined,
    ),
    row(
        "norms over ranks (MiniMax-M2 with tensor parallelism)",
        **everywhere("the norm is a sum over ranks")
        | {
            "cuda": (
                refused("the norm is a sum over ranks", todo="Use vLLM 0.33", releases="<0.33"),
                served(_H200_PARTS, why="two layers of MiniMax-M2's sizes, two ranks, in eager mode"),
            )
        },
        asked=_norms_over_ranks,
        details="Ranks add their sums of squares in rank order, in fp32.",
    ),
    row(
        "norms over ranks (MiniMax-M2 with tensor parallelism), compiled",
        **everywhere("the norm is a sum over ranks")
        | {
            "cuda": (
                refused("the norm is a sum over ranks", todo="Use vLLM 0.33", releases="<0.33"),
                served(_H200_MORE_RANKS, why="two layers of MiniMax-M2's sizes, two ranks"),
            )
        },
        asked=when_compiled(_norms_over_ranks),
    ),
)
