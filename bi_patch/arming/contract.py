"""What decides the bits of a running engine, as plain data. A trainer compares it with what decides its own.

The sign of an armed engine carries it (`sign.Sign.contract`), so the engine's front end and the server's /version show
it.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from bi_patch import identity, running
from bi_patch.seams import active, ranks

ASCENDING = "ascending in fp32, rounded once"  # rank_sums: the sum in rank order


def make(config: Any, executor: Any, platform: str, release: str) -> dict[str, Any]:
    """The contract of an engine whose workers are ready. config: its VllmConfig. executor: vLLM's executor.

    Fields: instance (vLLM's name of this engine), platform, vllm, torch, digest (of bi_patch's code), kernels (the
    digest of the bundled kernels, or their release), device, dtype, quantization, lora (whether requests may name
    adapters), kv_cache_dtype, tensor_parallel_size, rank_sums (how ranks are summed), attention (the backend of each
    layer), mla (which form such layers take, or None: see `_form_of_mla`), logprobs_mode, runner (V1 or V2), compiled,
    and model (values of its configuration).
    """
    import torch

    model = config.model_config
    workers = executor.collective_rpc(functools.partial(_worker, platform=platform))
    ranks = config.parallel_config.tensor_parallel_size
    return {
        "instance": config.instance_id,
        "platform": platform,
        "vllm": release,
        "torch": str(torch.__version__),
        "digest": identity.digest(),
        **workers[0],
        "attention": {name: backend for worker in workers for name, backend in worker["attention"].items()},
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "lora": config.lora_config is not None,
        "kv_cache_dtype": config.cache_config.cache_dtype,
        "tensor_parallel_size": ranks,
        "logprobs_mode": str(model.logprobs_mode),
        "runner": "V2" if getattr(config, "use_v2_model_runner", False) else "V1",
        "compiled": getattr(config.compilation_config.mode, "name", "NONE") != "NONE",
        "model": {name: _plain(getattr(model.hf_text_config, name, None)) for name in running.MODEL},
    }


def _worker(worker: Any, platform: str) -> dict[str, Any]:
    """In a worker: its device, its kernels, how ranks are summed, and the attention backend of each layer."""
    layers = worker.vllm_config.compilation_config.static_forward_context
    attention = {
        name: layer.attn_backend.get_name() for name, layer in layers.items() if hasattr(layer, "attn_backend")
    }
    return {
        **_KERNELS[platform](),
        "rank_sums": _rank_sums(worker.vllm_config, platform),
        "attention": attention,
        "mla": _form_of_mla(worker.vllm_config.model_config, platform),
    }


def _form_of_mla(model: Any, platform: str) -> str | None:
    """BI_PATCH_MLA, None where it changes no bit of this engine. Only CUDA has two forms of MLA."""
    return active.mla if platform == "cuda" and getattr(model, "use_mla", False) else None


def _rank_sums(config: Any, platform: str) -> str:
    """How ranks are summed: "none" for one rank, "nccl" where NCCL may add. Of experts: see `_experts`."""
    if active.leaves:
        return f"{active.leaves} parts of K in a tree"
    if experts := _experts(config):
        return experts
    if config.parallel_config.tensor_parallel_size == 1:
        return "none"
    if platform == "cpu":  # the seams communicator.cpu_sum and communicator.cpu_order, which proves it at each start
        return ASCENDING
    if platform != "cuda":
        return "by the platform's library"
    if active.plan is not None and any(p.seam.name == "communicator.cuda_sum" for p in active.plan.seams):
        return ASCENDING
    import torch
    from vllm.distributed.parallel_state import get_tp_group

    held = get_tp_group().device_communicator
    width = config.model_config.get_hidden_size()
    return _sums_of(held, torch.empty(1, width, dtype=config.model_config.dtype, device=held.device))


def _experts(config: Any) -> str:
    """How ranks hold experts that data-parallel ranks share, or that ranks hold whole. "" for other engines."""
    data, tensor = ranks.ranks_of_experts(config), config.parallel_config.tensor_parallel_size
    model = getattr(config, "model_config", None)
    whole = getattr(config.parallel_config, "enable_expert_parallel", False) and getattr(model, "is_moe", False)
    if data * tensor == 1 or data == 1 and not whole:
        return ""
    return f"{'whole' if whole else 'cut'} experts over {data * tensor} ranks, {data} of them data-parallel"


def _sums_of(communicator: Any, row: Any) -> str:
    """rank_sums of vLLM's CudaCommunicator before vLLM 0.32. row: [1, hidden size], one row of a message.

    A second check (communicator.cuda_order) proves that a message of many rows is summed as one row is.
    """
    first = [getattr(communicator, name, None) for name in ("qr_comm", "fi_ar_comm", "fi_pcie_ipc_ar_comm")]
    own = getattr(communicator, "ca_comm", None)
    serves = (
        not any(other is not None and not getattr(other, "disabled", False) for other in first)
        and os.environ.get("VLLM_USE_NCCL_SYMM_MEM", "0") == "0"
        and os.environ.get("VLLM_CUSTOM_ALLREDUCE_ALGO") == "1stage"
        and own is not None
        and not own.disabled
        and own.should_custom_ar(row)
    )
    return ASCENDING if serves else "nccl"


def _cpu() -> dict[str, str]:
    from bi_patch.ops.cpu import machine

    return machine.kernels()


def _cuda() -> dict[str, str]:
    from bi_patch.ops.cuda import machine

    return machine.kernels()


def _none() -> dict[str, str]:
    return {"kernels": "", "device": ""}


_KERNELS = {"cpu": _cpu, "cuda": _cuda, "ascend": _none}


def _plain(value: Any) -> Any:
    """A value of a configuration as it would come back from JSON."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
