"""Environment variables of vLLM, of PyTorch's compiler and of OpenMP that somebody has examined. An engine for which
another one is set is refused.

vLLM has more than 300. Many choose a kernel, and some change it with the number of rows, draw experts at random, or let
a request's cache key leave something out. Some of OpenMP's give a kernel fewer threads than it asked for.
"""

from __future__ import annotations

import os
import sys

# What decides a kernel or an order. A patch point, a variable that arming sets, a row or a list of kernels covers it.
COVERED = frozenset(
    {
        "DYNAMIC_EPLB",
        "VLLM_ALLREDUCE_USE_FLASHINFER",
        "VLLM_ALLREDUCE_USE_SYMM_MEM",
        "VLLM_ASCEND_ENABLE_FLASHCOMM1",
        "VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE",
        "VLLM_ASCEND_ENABLE_MLAPO",
        "VLLM_BATCH_INVARIANT",
        "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER",
        "VLLM_CPU_INT4_W4A8",
        "VLLM_CUSTOM_ALLREDUCE_ALGO",
        "VLLM_DISABLED_KERNELS",
        "VLLM_LORA_ENABLE_DUAL_STREAM",
        "VLLM_MLA_DISABLE",
        "VLLM_MOE_USE_DEEP_GEMM",
        "VLLM_PLUGINS",
        "VLLM_REGEX_COMPILATION_TIMEOUT_S",
        "VLLM_SSM_CONV_STATE_LAYOUT",
        "VLLM_TRITON_USE_TD",
        "VLLM_TUNED_CONFIG_FOLDER",
        "VLLM_USE_DEEP_GEMM",
        "VLLM_USE_FLASHINFER_SAMPLER",
        "VLLM_USE_NCCL_SYMM_MEM",
        "VLLM_USE_RUST_FRONTEND",
        "VLLM_USE_V2_MODEL_RUNNER",
    }
)
# What vLLM sets itself, by the model, the platform or upstream's mode.
OWN = frozenset(
    {
        "VLLM_DISABLE_SHARED_EXPERTS_STREAM",
        "VLLM_MOE_SKIP_PADDING",
        "VLLM_USE_AOT_COMPILE",
        "VLLM_USE_BREAKABLE_CUDAGRAPH",
        "VLLM_USE_DEEP_GEMM_E8M0",
        "VLLM_WORKER_MULTIPROC_METHOD",
    }
)
# Where processes run, how they find each other, how long they wait, and which files they read and write.
PLACES = frozenset(
    {
        "ASCEND_HOME_PATH",
        "CUDA_HOME",
        "CUDA_VISIBLE_DEVICES",
        "HCCL_SO_PATH",
        "LD_LIBRARY_PATH",
        "LOCAL_RANK",
        "MAX_JOBS",
        "NVCC_THREADS",
        "S3_ACCESS_KEY_ID",
        "S3_ENDPOINT_URL",
        "S3_SECRET_ACCESS_KEY",
        "VLLM_ASSETS_CACHE",
        "VLLM_ASSETS_CACHE_MODEL_CLEAN",
        "VLLM_CACHE_ROOT",
        "VLLM_COMPILE_CACHE_SAVE_FORMAT",
        "VLLM_CONFIG_ROOT",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_CPU_NUM_OF_RESERVED_CPU",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_CUDART_SO_PATH",
        "VLLM_CUDA_COMPATIBILITY_PATH",
        "VLLM_DEEP_GEMM_WARMUP",
        "VLLM_DISABLE_COMPILE_CACHE",
        "VLLM_DP_MASTER_IP",
        "VLLM_DP_MASTER_PORT",
        "VLLM_DP_RANK",
        "VLLM_DP_RANK_LOCAL",
        "VLLM_DP_SIZE",
        "VLLM_ENABLE_CUDA_COMPATIBILITY",
        "VLLM_ENABLE_CUDAGRAPH_GC",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_ENGINE_ITERATION_TIMEOUT_S",
        "VLLM_ENGINE_READY_TIMEOUT_S",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS",
        "VLLM_HOST_IP",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
        "VLLM_LOOPBACK_IP",
        "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS",
        "VLLM_MODEL_REDIRECT_PATH",
        "VLLM_MQ_MAX_CHUNK_BYTES_MB",
        "VLLM_MSGPACK_ZERO_COPY_THRESHOLD",
        "VLLM_NCCL_INCLUDE_PATH",
        "VLLM_NCCL_SO_PATH",
        "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME",
        "VLLM_PORT",
        "VLLM_PP_LAYER_PARTITION",
        "VLLM_PROCESS_NAME_PREFIX",
        "VLLM_RINGBUFFER_WARNING_INTERVAL",
        "VLLM_RPC_BASE_PATH",
        "VLLM_RUST_FRONTEND_PATH",
        "VLLM_SKIP_P2P_CHECK",
        "VLLM_TARGET_DEVICE",
        "VLLM_USE_MODELSCOPE",
        "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS",
        "VLLM_WSL2_ENABLE_PIN_MEMORY",
    }
)
# Logs, statistics, measurements, and how vLLM was built.
LOGS = frozenset(
    {
        "CMAKE_BUILD_TYPE",
        "COMPILE_CUSTOM_KERNELS",
        "CXX_COMPILER",
        "C_COMPILER",
        "FORCE_COLOR",
        "MSMONITOR_USE_DAEMON",
        "NO_COLOR",
        "SOC_VERSION",
        "VERBOSE",
        "VLLM_BUILD_COMMIT",
        "VLLM_BUILD_PIPELINE",
        "VLLM_BUILD_URL",
        "VLLM_COMPUTE_NANS_IN_LOGITS",
        "VLLM_CONFIGURE_LOGGING",
        "VLLM_CUSTOM_SCOPES_FOR_PROFILING",
        "VLLM_DEBUG_DUMP_PATH",
        "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
        "VLLM_DEBUG_MFU_METRICS",
        "VLLM_DEBUG_WORKSPACE",
        "VLLM_DISABLE_LOG_LOGO",
        "VLLM_DOCKER_BUILD_CONTEXT",
        "VLLM_DO_NOT_TRACK",
        "VLLM_GC_DEBUG",
        "VLLM_IMAGE_TAG",
        "VLLM_LOGGING_COLOR",
        "VLLM_LOGGING_CONFIG_PATH",
        "VLLM_LOGGING_LEVEL",
        "VLLM_LOGGING_PREFIX",
        "VLLM_LOGGING_STREAM",
        "VLLM_LOG_BATCHSIZE_INTERVAL",
        "VLLM_LOG_MODEL_INSPECTION",
        "VLLM_LOG_STATS_INTERVAL",
        "VLLM_MAIN_CUDA_VERSION",
        "VLLM_NO_USAGE_STATS",
        "VLLM_NVTX_SCOPES_FOR_PROFILING",
        "VLLM_RAISE_ON_LOGIT_NANS",
        "VLLM_REQUEST_BODY_LOG_LEVEL",
        "VLLM_SKIP_PRECOMPILED_VERSION_SUFFIX",
        "VLLM_SKIP_VERSION_SUFFIX",
        "VLLM_TRACE_FUNCTION",
        "VLLM_USAGE_SOURCE",
        "VLLM_USAGE_STATS_SERVER",
        "VLLM_USE_PRECOMPILED",
        "VLLM_USE_PRECOMPILED_RUST",
        "VLLM_USE_RUST_BENCH",
        "VLLM_VERSION",
    }
)
# What the front end takes, refuses and makes of a request before the engine has it, from the request alone.
FRONT = frozenset(
    {
        "VLLM_ALLOW_INSECURE_SERIALIZATION",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_API_KEY",
        "VLLM_AUDIO_FETCH_TIMEOUT",
        "VLLM_CHAT_TEMPLATE_FUEL",
        "VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT",
        "VLLM_ENABLE_COHERE_API",
        "VLLM_ENABLE_RESPONSES_API_STORE",
        "VLLM_ENFORCE_STRICT_TOOL_CALLING",
        "VLLM_GPT_OSS_HARMONY_SYSTEM_INSTRUCTIONS",
        "VLLM_GPT_OSS_SYSTEM_TOOL_MCP_LABELS",
        "VLLM_HTTP_MAX_REQUEST_BODY_SIZE",
        "VLLM_IMAGE_FETCH_TIMEOUT",
        "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB",
        "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS",
        "VLLM_MAX_COMPLETION_PROMPTS",
        "VLLM_MAX_EMBED_DECODE_BYTES",
        "VLLM_MAX_IMAGE_PIXELS",
        "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB",
        "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES",
        "VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB",
        "VLLM_MAX_NUM_BAD_WORDS",
        "VLLM_MAX_N_SEQUENCES",
        "VLLM_MAX_STOP_STRINGS",
        "VLLM_MEDIA_FETCH_MAX_RETRIES",
        "VLLM_MEDIA_LOADING_THREAD_COUNT",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS",
        "VLLM_SERVER_DEV_MODE",
        "VLLM_SKIP_MODEL_NAME_VALIDATION",
        "VLLM_SYSTEM_START_DATE",
        "VLLM_TOOL_JSON_ERROR_AUTOMATIC_RETRY",
        "VLLM_TOOL_PARSE_REGEX_TIMEOUT_SECONDS",
        "VLLM_USE_FASTOKENS",
        "VLLM_V1_USE_OUTLINES_CACHE",
        "VLLM_VIDEO_FETCH_TIMEOUT",
        "VLLM_XGRAMMAR_CACHE_MB",
    }
)
# Inductor's caches, logs, assertions, processes and profiles, and what vLLM and arming set. Others choose how code is
# made: they time kernels anew in each process, cut sums, or allow unsafe arithmetic.
INDUCTOR = frozenset(
    f"TORCHINDUCTOR_{name}"
    for name in (
        "ALIGNMENT_ASSERTS",
        "AUTOGRAD_CACHE",
        "CACHE_DIR",
        "COMPILE_THREADS",
        "COMPILE_WORKER_WAIT_TIMEOUT",
        "CPP_DYNAMIC_THREADS",
        "CPP_ENABLE_KERNEL_PROFILE",
        "DEBUG_FUSION",
        "DETERMINISTIC",
        "ENABLED_METRIC_TABLES",
        "ERROR_ON_CUSTOM_OP_ALIASING",
        "FILE_LOCK_TIMEOUT",
        "FORCE_DISABLE_CACHES",
        "FX_GRAPH_CACHE",
        "FX_GRAPH_CACHE_DEFAULT",
        "NAN_ASSERTS",
        "PATTERN_MATCH_DEBUG",
        "PRECOMPILATION_TIMEOUT_SECONDS",
        "PROFILE",
        "PROFILE_OUTPUT",
        "SAVE_ARGS",
        "SCALAR_ASSERTS",
        "SIZE_ASSERTS",
        "UNIQUE_KERNEL_NAMES",
        "UNIQUE_USER_KERNEL_NAMES",
        "WORKER_LOGPATH",
        "WORKER_START",
        "WORKER_SUPPRESS_LOGGING",
    )
)
# The same of Dynamo, which hands the graphs to Inductor, with other options for some graphs if a variable says so
# (TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS).
DYNAMO = frozenset(
    {
        *(
            f"TORCH_COMPILE_{name}"
            for name in (
                "CACHE_KEY_TAG",
                "CPROFILE",
                "DEBUG",
                "DEBUG_DIR",
                "DEBUG_SAVE_REAL",
                "DISABLE",  # vLLM then runs in eager mode
                "DYNAMO_PROFILER",
                "FORCE_DISABLE_CACHES",
                "GRAPH_FORMAT",
                "STROBELIGHT",
            )
        ),
        *(
            f"TORCHDYNAMO_{name}"
            for name in (
                "DEBUG_FUNCTION",
                "DISABLE",  # the functions that PyTorch would compile run in eager mode
                "EXTENDED_ADVICE",
                "EXTENDED_DEBUG_CPP",
                "EXTENDED_DEBUG_CREATE_SYMBOL",
                "EXTENDED_DEBUG_GUARD_ADDED",
                "PRINT_MISSING",
                "VERBOSE",
            )
        ),
        "TORCH_DYNAMO_RUN_GC_AFTER_COMPILE",
    }
)
# The last are of products that PyTorch chooses by time.
_COMPILERS = (
    *("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_BISECT_", "TORCH_COMPILE_", "TORCH_COMPILER_", "TORCH_DYNAMO_"),
    "PYTORCH_TUNABLEOP_",
)
# Where OpenMP's threads run, how many there are, how they wait, and what they print. Others can give a parallel region
# fewer threads than it asked for: with OMP_DYNAMIC by the machine's load, with OMP_THREAD_LIMIT by other regions.
# oneDNN cuts a product for the threads that it asked for, so the parts of the missing ones are never computed.
OPENMP = frozenset(
    {
        *(f"GOMP_{name}" for name in ("CPU_AFFINITY", "DEBUG", "SPINCOUNT", "STACKSIZE")),
        *(
            f"KMP_{name}"
            for name in (
                "AFFINITY",
                "BLOCKTIME",
                "DUPLICATE_LIB_OK",
                "FORKJOIN_BARRIER",
                "FORKJOIN_BARRIER_PATTERN",
                "HW_SUBSET",
                "INIT_AT_FORK",
                "PLAIN_BARRIER",
                "PLAIN_BARRIER_PATTERN",
                "REDUCTION_BARRIER",
                "REDUCTION_BARRIER_PATTERN",
                "SETTINGS",
                "STACKSIZE",
                "TPAUSE",
                "USE_YIELD",
                "VERSION",
                "WARNINGS",
            )
        ),
        *(
            f"OMP_{name}"
            for name in (
                "AFFINITY_FORMAT",
                "CANCELLATION",
                "DEFAULT_DEVICE",
                "DISPLAY_AFFINITY",
                "DISPLAY_ENV",
                "NUM_THREADS",
                "PLACES",
                "PREFIX",
                "PROC_BIND",
                "SCHEDULE",
                "STACKSIZE",
                "TARGET_OFFLOAD",
                "WAIT_POLICY",
            )
        ),
    }
)
_RUNTIMES = ("GOMP_", "KMP_", "OMP_")
_HARMLESS = {"OMP_DYNAMIC": ("0", "false"), "OMP_MAX_ACTIVE_LEVELS": ("1",), "OMP_NESTED": ("0", "false")}
# What acts only together with a refused feature: KV transfer; Ray's variables say where its workers run.
BEHIND = ("MOONCAKE_", "VLLM_MOONCAKE_", "VLLM_NIXL_", "VLLM_P2P_", "VLLM_RAY_", "VLLM_USE_RAY_")
# What vLLM reads without listing.
UNLISTED = ("VLLM_CPU_SIM_MULTI_NUMA", "VLLM_MINIMAX_M3_MSA_CUTLASS_MIN_BATCH")
_LISTS = (("vllm.envs", "environment_variables"), ("vllm_ascend.envs", "env_variables"))
KNOWN = COVERED | OWN | PLACES | LOGS | FRONT


def unknown() -> list[str]:
    """The variables that are set, that vLLM, vLLM-Ascend, PyTorch's compiler or OpenMP reads, and that nobody has
    examined."""
    read = set(UNLISTED)
    for module, listed in _LISTS:
        read |= set(getattr(sys.modules.get(module), listed, ()))
    own = {name for name in read if name in os.environ and name not in KNOWN and not name.startswith(BEHIND)}
    own |= {name for name in os.environ if name.startswith(_COMPILERS) and name not in INDUCTOR | DYNAMO}
    return sorted(own | set(of_threads()))


def of_threads() -> list[str]:
    """The variables of OpenMP that are set, and that nobody has examined, or not with this value."""
    given = {name: value.strip().lower() for name, value in os.environ.items() if name.startswith(_RUNTIMES)}
    return sorted(n for n, value in given.items() if n not in OPENMP and value not in _HARMLESS.get(n, ()))


def switched(name: str) -> bool:
    """Whether a variable is set to another value than 0."""
    return os.environ.get(name, "0") not in ("", "0")
