"""What the patch points of MLA on CPU and on CUDA share."""

from typing import Any


def unsplit(builder: Any, common: Any) -> Any:
    """vLLM's metadata of a step with the requests as they come, without the split into prompts and generated tokens.

    builder: vLLM's builder of MLA's metadata. common: the step's CommonAttentionMetadata.
    """
    return builder.metadata_cls(
        num_reqs=common.num_reqs,
        max_query_len=common.max_query_len,
        max_seq_len=common.max_seq_len,
        num_actual_tokens=common.num_actual_tokens,
        query_start_loc=common.query_start_loc,
        slot_mapping=common.slot_mapping,
        head_dim=builder.model_config.get_head_size(),
        num_decodes=0,
        num_decode_tokens=0,
        num_prefills=common.num_reqs,
        causal=True,
        prefill=None,
        decode=None,
    )
