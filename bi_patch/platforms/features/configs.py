"""The fields of vLLM's configuration classes that somebody has examined. An engine that changes another is refused.

Of vLLM 0.23 to 0.33. ParallelConfig and SpeculativeConfig have lists and rows of their own (`parallel`, `engine`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any


def unknown(config: Any) -> list[str]:
    """The options of a VllmConfig that nobody has examined, as Class.field, whose value is not vLLM's default."""
    return sorted({f"{kind}.{name}" for held, kind, known in _parts(config) for name in changed(held, known)})


def changed(held: Any, known: Collection[str]) -> list[str]:
    """The fields of a dataclass that `known` leaves out, and whose value is not their default."""
    fields = dataclasses.fields(held) if dataclasses.is_dataclass(held) else ()
    return sorted(f.name for f in fields if f.name not in known and _differs(getattr(held, f.name, None), f))


def _differs(value: Any, field: dataclasses.Field) -> bool:
    """Whether a field has another value than its default. False counts as None: vLLM resolves some switches so."""
    held = field.default if hasattr(field.default, "default_factory") else field  # pydantic's FieldInfo
    given = held.default_factory() if callable(held.default_factory) else held.default
    return value != given and not (value is False and given is None)


def _parts(held: Any) -> Iterator[tuple[Any, str, frozenset[str]]]:
    """Each configuration object in another one, itself first: (the object, its class's name, what is known of it)."""
    kinds = [kind.__name__ for kind in type(held).__mro__]
    known = frozenset().union(*(KNOWN.get(kind, ()) for kind in kinds))
    yield held, kinds[0], known
    for field in dataclasses.fields(held) if dataclasses.is_dataclass(held) else ():
        value = getattr(held, field.name, None)
        if field.name in known and _is_part(value):
            yield from _parts(value)


def _is_part(value: Any) -> bool:
    """Whether a field's value holds further options: an object of a class in vLLM's configuration, or in KNOWN."""
    kinds = type(value).__mro__
    if not dataclasses.is_dataclass(value) or any(kind.__name__ in _ELSEWHERE for kind in kinds):
        return False
    return any(kind.__name__ in KNOWN or kind.__module__.startswith("vllm.config.") for kind in kinds)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ELSEWHERE = ("ParallelConfig", "SpeculativeConfig", "WatermarkConfig")  # the last is refused as a whole
# Class -> the fields at which a row, a policy or a patch point looks; which act only beside something refused; which
# vLLM computes itself; or which say where, when and how much the engine works, and what it logs. The other fields of
# these releases may choose a kernel, a rule or a form.
KNOWN: dict[str, frozenset[str]] = {
    "AttentionConfig": _names(
        """
        backend disable_flashinfer_q_quantization flash_attn_max_num_splits_for_cuda_graph flash_attn_version
        flex_attn_block_m flex_attn_block_n flex_attn_kv_block_size flex_attn_q_block_size hisparse_config
        indexer_kv_dtype indexer_sparse_logits indexer_tp_shard_min_rows minimax_m3_indexer_cp
        minimax_m3_msa_decode_backend sparse_mla_force_mqa sparse_mla_prefill_workspace_factor
        tokenspeed_mla_min_split_kv tq_max_kv_splits_for_cuda_graph trtllm_ragged_backend use_fp4_indexer_cache
        use_non_causal use_prefill_query_quantization use_trtllm_attention
        """
    ),
    "AuxOutputConfig": _names("enable_return_routed_experts max_bytes"),
    "CacheConfig": _names(
        """
        _block_size_resolved block_size cache_dtype cache_hit_alignment_tokens effective_attention_block_size
        enable_prefix_caching gpu_memory_utilization hash_block_size is_attention_free kv_cache_layout
        kv_cache_max_concurrency kv_cache_memory_bytes kv_cache_size_tokens kv_offloading_backend kv_offloading_size
        kv_sharing_fast_prefill mamba_block_size mamba_cache_dtype mamba_cache_mode mamba_page_size_padded
        mamba_ssm_cache_dtype num_cpu_blocks num_gpu_blocks num_gpu_blocks_override prefix_cache_retention_interval
        prefix_caching_hash_algo replayssm_buffer_len simple_cpu_offload_num_blocks skip_page_size_padded sliding_window
        use_kda_recoverssm use_replayssm user_specified_block_size user_specified_mamba_block_size
        """
    ),
    "CompilationConfig": _names(
        """
        backend cache_dir compilation_time compile_cache_save_format compile_mm_encoder compile_ranges_endpoints
        compile_sizes cudagraph_capture_sizes cudagraph_mm_encoder cudagraph_mode cudagraph_num_of_warmups
        cudagraph_specialize_lora custom_ops debug_dump_path disabled_custom_ops dynamic_shapes_config
        enabled_custom_ops encoder_compilation_time encoder_cudagraph_max_frames_per_batch
        encoder_cudagraph_max_vision_items_per_batch encoder_cudagraph_token_budgets fast_moe_cold_start
        inductor_compile_config inductor_passes ir_enable_torch_wrap local_cache_dir max_cudagraph_capture_size mode
        pass_config splitting_ops static_all_moe_layers static_forward_context traced_files
        """
    ),
    "DeviceConfig": _names("device device_type"),
    "DiffusionConfig": _names("canvas_length max_denoising_steps"),
    "ECTransferConfig": _names(
        """
        ec_buffer_device ec_buffer_size ec_connector ec_connector_extra_config ec_connector_module_path ec_ip
        ec_parallel_size ec_port ec_rank ec_role engine_id mm_encoder_output_widths
        """
    ),
    "EncoderCacheManagerConfig": _names("encoder_cache_manager_cls manager_config"),
    "IrOpPriorityConfig": _names("fused_add_rms_norm gelu_and_mul_sparse rms_norm"),
    "KVEventsConfig": _names(
        """
        buffer_steps enable_kv_cache_events endpoint hwm max_queue_size publisher replay_endpoint topic
        """
    ),
    "KVTransferConfig": _names(
        """
        engine_id kv_buffer_device kv_buffer_size kv_connector kv_connector_extra_config kv_connector_module_path kv_ip
        kv_parallel_size kv_port kv_rank kv_role
        """
    ),
    "KernelConfig": _names(
        """
        enable_cutedsl_warmup enable_flashinfer_autotune enable_jit_warmup ir_op_priority linear_backend
        linear_backend_per_quant moe_backend
        """
    ),
    "LoRAConfig": _names(
        """
        default_mm_loras enable_mixed_moe_lora_format enable_moe_shared_loras enable_tower_connector_lora
        fully_sharded_loras lora_dtype max_cpu_loras max_lora_rank max_loras specialize_active_lora target_modules
        """
    ),
    "LoadConfig": _names(
        """
        device download_dir ignore_patterns load_format model_loader_extra_config pt_load_map_location
        safetensors_load_strategy safetensors_prefetch_block_size safetensors_prefetch_num_threads use_tqdm_on_load
        """
    ),
    "LoggingConfig": _names("configure_logging formatter log_level pylogging_config_file"),
    "ModelConfig": _names(
        """
        allow_deprecated_quantization allowed_local_media_path allowed_media_domains code_revision config_format convert
        disable_cascade_attn disable_sliding_window dtype enable_cumem_allocator enable_prompt_embeds
        enable_return_routed_experts enable_sleep_mode enforce_eager generation_config hf_config hf_config_path
        hf_overrides hf_text_config hf_token io_processor_plugin is_submodel_config logits_processors logprobs_mode
        max_logprobs max_model_len model model_impl model_weights multimodal_config override_generation_config
        pooler_config quantization quantization_config renderer_num_workers revision runner seed served_model_name
        skip_tokenizer_init spec_target_max_model_len tokenizer tokenizer_mode tokenizer_revision trust_remote_code
        word_embeddings_untied_by_checkpoint
        """
    ),
    "MultiModalConfig": _names(
        """
        enable_mm_embeds interleave_mm_strings language_model_only limit_per_prompt media_io_kwargs
        mm_device_do_normalize mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
        mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path mm_encoder_only mm_encoder_tp_mode
        mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb mm_processor_cache_type mm_processor_kwargs
        mm_shm_cache_max_object_size_mb mm_tensor_ipc skip_mm_profiling video_pruning_method video_pruning_rate
        """
    ),
    "ObservabilityConfig": _names(
        """
        collect_detailed_traces cudagraph_metrics custom_histogram_buckets enable_layerwise_nvtx_tracing
        enable_logging_iteration_details enable_mfu_metrics enable_mm_processor_stats jit_monitor_mode
        jit_monitor_verbose kv_cache_metrics kv_cache_metrics_sample otlp_traces_endpoint
        per_request_spec_decode_metrics show_hidden_metrics_for_version
        """
    ),
    "OffloadConfig": _names("offload_backend prefetch uva"),
    "PassConfig": _names(
        """
        eliminate_noops enable_sp fuse_act_quant fuse_allreduce_rms fuse_attn_quant fuse_gemm_comms fuse_minimax_qk_norm
        fuse_norm_quant fuse_rope_kvcache_cat_mla sp_min_token_num
        """
    ),
    "PoolerConfig": _names(
        """
        dimensions enable_flash_late_interaction logit_mean logit_sigma pooling_type returned_token_ids seq_pooling_type
        step_tag_id task tok_pooling_type use_activation
        """
    ),
    "PrefetchOffloadConfig": _names("offload_group_size offload_num_in_group offload_params offload_prefetch_step"),
    "ProfilerConfig": _names(
        """
        active_iterations capture_torch_profiler delay_iterations detailed_trace_annotation ignore_frontend
        max_iterations profiler proton_backend proton_context proton_data proton_graph_attribution proton_hook
        proton_mode proton_output_format proton_profiler_dir torch_profiler_activities torch_profiler_dir
        torch_profiler_dump_cuda_time_total torch_profiler_record_shapes torch_profiler_use_gzip
        torch_profiler_with_flops torch_profiler_with_memory torch_profiler_with_stack wait_iterations warmup_iterations
        """
    ),
    "QuantSpec": _names("activation weight"),
    "QuantizationConfigArgs": _names("ignore linear moe targets"),
    "ReasoningConfig": _names(
        """
        _enabled _natural_reasoning_end_token_ids _reasoning_end_token_ids _reasoning_start_token_ids reasoning_end_str
        reasoning_parser reasoning_start_str
        """
    ),
    "SchedulerConfig": _names(
        """
        async_scheduling disable_chunked_mm_input disable_hybrid_kv_cache_manager enable_chunked_prefill
        encoder_cache_size is_multimodal_model long_prefill_token_threshold long_prefill_token_threshold_adaptive
        max_long_partial_prefills max_num_active_seqs max_num_batched_tokens max_num_encoder_input_tokens
        max_num_partial_prefills max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens max_num_seqs policy
        prefill_schedule_interval runner_type scheduler_cls scheduler_reserve_full_isl stream_interval watermark
        """
    ),
    "StructuredOutputsConfig": _names(
        """
        backend disable_additional_properties disable_any_whitespace enable_in_reasoning reasoning_parser
        reasoning_parser_plugin
        """
    ),
    "UVAOffloadConfig": _names("cpu_offload_gb cpu_offload_params"),
    "VllmConfig": _names(
        """
        additional_config attention_config aux_output_config cache_config compilation_config device_config
        diffusion_config ec_manager_config ec_transfer_config instance_id kernel_config kv_events_config
        kv_transfer_config load_config logging_config lora_config mamba_config model_config observability_config
        offload_config optimization_level parallel_config performance_mode profiler_config quant_config reasoning_config
        scheduler_config shutdown_timeout speculative_config structured_outputs_config watchdog_config watermark_config
        weight_transfer_config
        """
    ),
    "WatchdogConfig": _names("check_interval dump_dir timeout"),
    "WeightTransferConfig": _names("backend"),
}
