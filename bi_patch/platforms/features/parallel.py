"""The fields of vLLM's ParallelConfig that somebody has examined. A configuration that changes another is refused."""

from __future__ import annotations

from typing import Any

from bi_patch.platforms.features import configs

# What decides the bits of a row: a row of the feature table or a policy looks at it.
EXAMINED = frozenset(
    {
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
        "data_parallel_size_local",
        "data_parallel_external_lb",
        "data_parallel_hybrid_lb",
        "enable_expert_parallel",
        "all2all_backend",
        "expert_placement_strategy",
        "enable_eplb",
        "enable_dbo",
        "distributed_executor_backend",
        "data_parallel_backend",
        "nnodes",
        "worker_cls",
        "worker_extension_cls",
        "sd_worker_cls",
        "disable_custom_all_reduce",
    }
)
# Where processes run, how they find each other, how long they wait, and what vLLM itself derives: no sums.
PLACES = frozenset(
    {
        "data_parallel_rank",
        "data_parallel_rank_local",
        "data_parallel_index",
        "data_parallel_master_ip",
        "data_parallel_rpc_port",
        "data_parallel_master_port",
        "dp_sync_interval",
        "disable_nccl_for_dp_synchronization",
        "is_moe_model",
        "max_parallel_loading_workers",
        "ray_workers_use_nsight",
        "ray_runtime_env",
        "placement_group",
        "master_addr",
        "master_port",
        "node_rank",
        "numa_bind",
        "numa_bind_nodes",
        "numa_bind_cpus",
        "assigned_physical_gpu_ids",
        "distributed_timeout_seconds",
        "cpu_distributed_timeout_seconds",
        "world_size",
        "rank",
        "_data_parallel_master_port_list",
        "_coord_store_port",
        "_api_process_count",
        "_api_process_rank",
    }
)
# What acts only together with a switch that is refused: experts' load balancing, elastic experts, dual batches,
# contexts that ranks share, and fault tolerance. Expert parallelism is served, so its options do not belong here.
BEHIND = frozenset(
    {
        "eplb_config",
        "elastic_ep_max_dp_size",
        "dbo_decode_token_threshold",
        "dbo_prefill_token_threshold",
        "dcp_kv_cache_interleave_size",
        "dcp_comm_backend",
        "dcp_q_replicate",
        "cp_kv_cache_interleave_size",
        "_allow_auto_resolve_cp_interleave_size",
        "fault_tolerance_config",
    }
)
KNOWN = EXAMINED | PLACES | BEHIND


def unknown(parallel: Any) -> list[str]:
    """The fields of a ParallelConfig that nobody has examined, and whose value is not vLLM's default."""
    return configs.changed(parallel, KNOWN)
