"""What decides the bits of a running engine, as plain data. A trainer compares it with what decides its own.

The sign of an armed engine carries it (`sign.Sign.contract`), so the engine's front end and the server's /version show
it.
"""

from __future__ import annotations

import functools
from typing import Any

from bi_patch import identity, running


def make(config: Any, executor: Any, platform: str, release: str) -> dict[str, Any]:
    """The contract of an engine whose workers are ready. config: its VllmConfig. executor: vLLM's executor.

    Fields: instance (vLLM's name of this engine), platform, vllm, torch, digest (of bi_patch's code), kernels (the
    digest of the bundled kernels, or their release), device, dtype, quantization, kv_cache_dtype, tensor_parallel_size,
    rank_sums (how ranks are summed), attention (the backend of each layer), logprobs_mode, runner (V1 or V2), compiled,
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
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "kv_cache_dtype": config.cache_config.cache_dtype,
        "tensor_parallel_size": ranks,
        "rank_sums": "ascending in fp32, rounded once" if ranks > 1 else "none",
        "logprobs_mode": str(model.logprobs_mode),
        "runner": "V2" if getattr(config, "use_v2_model_runner", False) else "V1",
        "compiled": getattr(config.compilation_config.mode, "name", "NONE") != "NONE",
        "model": {name: _plain(getattr(model.hf_text_config, name, None)) for name in running.MODEL},
    }


def _worker(worker: Any, platform: str) -> dict[str, Any]:
    """In a worker: its device, its kernels, and the attention backend of each layer."""
    layers = worker.vllm_config.compilation_config.static_forward_context
    attention = {
        name: layer.attn_backend.get_name() for name, layer in layers.items() if hasattr(layer, "attn_backend")
    }
    return {**_KERNELS[platform](), "attention": attention}


def _cpu() -> dict[str, str]:
    from bi_patch.ops.cpu import machine

    return {"kernels": machine.kernels_digest(), "device": machine.device().rpartition(",")[0]}  # without threads


def _cuda() -> dict[str, str]:
    import torch

    # Triton and CUDA compile the kernels' sources, which are part of the digest of the code.
    return {"kernels": f"cuda {torch.version.cuda}", "device": torch.cuda.get_device_name()}


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
