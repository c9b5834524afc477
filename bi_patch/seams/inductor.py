"""Options of PyTorch's Inductor that something sets in this process, on `torch._inductor.config`.

They act on every graph that vLLM compiles here. `graphs.check_inductor` looks at vLLM's own way to give options,
`platforms.features.variables` at environment variables.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops import casts
from bi_patch.seams import active

_MODULE = "torch._inductor.config"
_DETERMINISTIC = "TORCHINDUCTOR_DETERMINISTIC"
_MARK = "_bi_patch_keeps_inductor"

# Caches, logs, assertions, processes and profiles. None of them changes a sum or how a kernel is chosen.
_FREE = frozenset(
    {
        *("alignment_asserts", "nan_asserts", "scalar_asserts", "size_asserts", "assert_indirect_indexing"),
        *("autotune_remote_cache", "bundle_triton_into_fx_graph_cache", "force_disable_caches", "fx_graph_cache"),
        *("fx_graph_remote_cache", "global_cache_dir", "remote_gemm_autotune_cache", "cpp_cache_precompile_headers"),
        *("debug", "debug_fusion", "debug_index_asserts", "debug_ir_traceback", "comment_origin", "save_args"),
        *("disable_progress", "verbose_progress", "enabled_metric_tables", "log_tlparse"),
        *("compile_threads", "compile_worker_wait_timeout", "file_lock_timeout", "precompilation_timeout_seconds"),
        *("quiesce_async_compile_pool", "worker_log_path", "torchinductor_worker_logpath", "worker_start_method"),
        "worker_suppress_logging",
        *("_profile_var", "profile_bandwidth_output", "profiler_mark_wrapper_call", "cpp.enable_kernel_profile"),
        *("triton.unique_kernel_names", "triton.unique_user_kernel_names", "cpp.dynamic_threads"),
    }
)
# What vLLM sets around its own compilation.
_OF_VLLM = frozenset({"assume_32bit_indexing", "custom_should_partition_ops", "_cache_config_ignore_prefix"})
# What keeps an order, with the only value that does. Upstream's mode and arming set them.
_KEPT = {"batch_invariant": True, "deterministic": True}
_ROUNDED = "emulate_precision_casts"  # either value keeps an order. Only a hold's may not be taken back
_NOTHING = object()
_DYNAMO = "torch._dynamo.config"
# Dynamo's options that give Inductor other options, or another compiler, for some graphs.
_ROUTES = ("debug_backend_override", "debug_dynamo_config_override", "debug_inductor_config_override")
# Code is the affair of the policy plugins.code.
CODE = (
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "pre_grad_custom_pass",
    "_pre_fusion_custom_pass",
    "_post_fusion_custom_pass",
    "custom_partitioner_fn",
)


def compiles() -> bool:
    """Whether Inductor compiles vLLM's graphs. On Ascend, vLLM-Ascend's own compiler does, and loading torch_npu's
    Inductor sets options."""
    return active.plan is None or active.plan.platform != "ascend"


def check(config: Any = None) -> None:
    """Raise UnsupportedFeature for options that are set in this process and that nobody has examined.

    config: the engine's VllmConfig, which does not matter: vLLM compiles functions of its own in eager mode, too.
    """
    if compiles():
        _check_routes(sys.modules.get(_DYNAMO))
    options = sys.modules.get(_MODULE)
    if options is None or not compiles():  # without the module, nothing has set an option
        return
    _settle(options)
    found = changed(options)
    if found:
        raise UnsupportedFeature(
            f"compilation.options: {_MODULE} sets {', '.join(found)} in this process, which nobody has examined. "
            "Inductor may then choose kernels by time, cut sums or round in another way. Set it for your own graphs "
            "only, with torch.compile(..., options={...}), or in another process than the engine, or set BI_PATCH=0"
        )


def _check_routes(dynamo: Any) -> None:
    """Raise UnsupportedFeature for options of Dynamo that give some graphs other options of Inductor. dynamo: Dynamo's
    module of options, or None if it is not loaded."""
    found = [name for name in _ROUTES if getattr(dynamo, name, "")]
    if found:
        raise UnsupportedFeature(
            f"compilation.options: {_DYNAMO} sets {', '.join(found)} in this process, which gives some graphs other "
            "options or another compiler. Leave it empty, or set BI_PATCH=0"
        )


def changed(options: Any) -> list[str]:
    """Names of options, sorted, whose value is not PyTorch's own and may change bits. options: Inductor's module."""
    return sorted(name for name, entry in options._config.items() if not _free(options, name, entry))


def _free(options: Any, name: str, entry: Any) -> bool:
    if name in _FREE or name in _OF_VLLM or name.startswith("trace."):
        return True
    if getattr(entry, "alias", None) is not None:  # another option's name
        return True
    if name == _ROUNDED:
        return casts.kept()
    value = getattr(options, name)
    return value in (entry.default, _KEPT.get(name, _NOTHING)) or (name in CODE and callable(value))


def _settle(options: Any) -> None:
    """Make Inductor deterministic where arming set the variable for it: in all threads, as if PyTorch had read the
    variable first, and here, where something may have set the option. It stays so."""
    entry = options._config.get("deterministic")
    if entry is not None and _wanted():
        entry.default = True
        options.deterministic = True
        _hold(sys.modules["torch"])


def _wanted() -> bool:
    return os.environ.get(_DETERMINISTIC) == "1"


def _hold(torch: Any) -> None:
    """Let torch.use_deterministic_algorithms keep Inductor's option. Dynamo calls it after each graph, to give PyTorch
    its own flag back, and so turns the option off for all later graphs of the process."""
    original = torch.use_deterministic_algorithms
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def use_deterministic_algorithms(mode: bool, *, warn_only: bool = False) -> None:
        original(mode, warn_only=warn_only)
        if _wanted():
            sys.modules[_MODULE].deterministic = True

    setattr(use_deterministic_algorithms, _MARK, True)
    torch.use_deterministic_algorithms = use_deterministic_algorithms
