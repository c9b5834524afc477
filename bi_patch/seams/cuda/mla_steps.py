"""Which rows of a step are prompt tokens and which are generated ones, for MLA in two forms (mla.py)."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active
from bi_patch.seams.cuda import mla_prompts
from bi_patch.seams.cuda.chunks import Metadata
from bi_patch.seams.mla import unsplit

# The prompt length of each request of the current step, in the order of the step. None for a dummy step.
prompt_lengths = None


def two_forms() -> bool:
    return active.mla == "two"


def only_one_form(config) -> None:
    """Refuse what has only one form."""
    if two_forms() and getattr(config.model_config, "use_mla", False):
        if getattr(config.parallel_config, "use_ubatching", False):
            raise UnsupportedFeature(
                "mla.cuda_forms: nobody has compared MLA in two forms with micro-batches. Set BI_PATCH_MLA=one"
            )


def step(original):
    """GPUModelRunner.gather_batch_req_state: say which requests of the step still compute their prompt. A step with
    prompt rows runs no graph of decode steps."""

    @functools.wraps(original)
    def gather_batch_req_state(self, scheduler_output, dummy_run):
        global prompt_lengths
        state, uniform = original(self, scheduler_output, dummy_run)
        if not two_forms():
            return state, uniform
        if state is None:
            prompt_lengths = None
            return state, uniform
        prompt_lengths = self.req_states.prompt_len.np[state.idx_mapping_np]
        if (state.num_computed_prefill_tokens_np < prompt_lengths).any():
            return state._replace(decode_graph_eligible=False), None
        return state, uniform

    return gather_batch_req_state


def keys(original):
    """_gen_prompt_embeds_extra_hash_keys: the hash of a block with generated tokens also holds the prompt's length."""

    @functools.wraps(original)
    def _gen_prompt_embeds_extra_hash_keys(request, start_token_idx, end_token_idx):
        found = original(request, start_token_idx, end_token_idx)
        if active.latent and two_forms() and end_token_idx > request.num_prompt_tokens:
            return [*found, ("bi_patch_prompt", request.num_prompt_tokens)]
        return found

    return _gen_prompt_embeds_extra_hash_keys


def step_v1(original):
    """GPUModelRunner._determine_batch_execution_and_padding of model runner V1: as `step`. vLLM forces the kind of a
    dummy step, and of no other."""

    @functools.wraps(original)
    def _determine_batch_execution_and_padding(self, num_tokens, num_reqs, *args, force_uniform_decode=None, **kwargs):
        global prompt_lengths
        if two_forms():
            prompt_lengths = None
            if force_uniform_decode is None:
                prompt_lengths = self.input_batch.num_prompt_tokens[:num_reqs].copy()
                if (self.input_batch.num_computed_tokens_cpu[:num_reqs] < prompt_lengths).any():
                    force_uniform_decode = False
        return original(self, num_tokens, num_reqs, *args, force_uniform_decode=force_uniform_decode, **kwargs)

    return _determine_batch_execution_and_padding


def capture(original):
    """CudaGraphManager.capture: the steps that vLLM captures are dummy steps. The warm-up before them is none."""

    @functools.wraps(original)
    def capture(self, *args, **kwargs):
        global prompt_lengths
        prompt_lengths = None
        return original(self, *args, **kwargs)

    return capture


def build(original):
    """MLACommonMetadataBuilder.build: the position of a token decides its form."""

    @functools.wraps(original)
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        if not hasattr(self, "bi_patch_rows"):  # one form, or another backend
            return original(self, common_prefix_len, common_attn_metadata, fast_build)
        if common_attn_metadata.causal is False:
            raise UnsupportedFeature("mla.cuda_forms: only causal MLA has a certificate. Set BI_PATCH=0")
        rows, segments = divide(common_attn_metadata, prompt_lengths)
        if not segments and len(rows) == 0:
            return original(self, common_prefix_len, common_attn_metadata, fast_build)
        return _mixed(self, common_attn_metadata, rows, segments)

    return build


def divide(common, prompts):
    """The generated rows of a step, as (row, request, keys) each, and the prompt segments.

    prompts: the prompt length of each request, or None for a dummy step, where several tokens of a request are a
    prompt. Both lists are empty if every request has one generated row: such a step needs no lists.
    """
    import numpy as np

    starts = common.query_start_loc_cpu.numpy()
    counts = np.diff(starts)
    ends = common.seq_lens_cpu_upper_bound.numpy()[: len(counts)]
    if prompts is None:
        own = np.where(counts > 1, counts, 0)
    else:
        if int((counts[len(prompts) :]).sum()) or len(prompts) > len(counts):
            raise UnsupportedFeature(
                f"mla.cuda_forms: a step of {len(counts)} requests, of which {len(prompts)} are known. "
                "Set BI_PATCH_MLA=one"
            )
        own = np.zeros_like(counts)
        own[: len(prompts)] = np.clip(prompts - (ends - counts)[: len(prompts)], 0, counts[: len(prompts)])
    if not own.any() and counts.max() <= 1:
        return [], []
    rows, segments = [], []
    for request, (first, count, mine, end) in enumerate(
        zip(starts[:-1].tolist(), counts.tolist(), own.tolist(), ends.tolist(), strict=True)
    ):
        before = end - count
        if mine:
            segments.append(mla_prompts.Segment(first, mine, before + mine, request))
        rows += [(first + row, request, before + row + 1) for row in range(mine, count)]
    return rows, segments


def _mixed(builder, common, rows, segments):
    """The metadata of a step with prompt rows, or with several generated rows of a request."""
    import torch
    from vllm.utils.torch_utils import async_tensor_h2d

    device, table = builder.device, common.block_table_tensor
    made = unsplit(builder, common)
    generated, places = None, None
    if rows:
        count = len(rows)
        if all(row[0] == row[1] == number for number, row in enumerate(rows)):  # one row each, before all others
            blocks, lengths = table[:count], common.seq_lens[:count]
        else:
            numbers = async_tensor_h2d([list(column) for column in zip(*rows, strict=True)], device, torch.int32)
            places = numbers[0].long()
            blocks, lengths = table[numbers[1].long()], numbers[2].contiguous()
        generated = Metadata(
            num_actual_tokens=count,
            num_decodes=count,
            num_decode_tokens=count,
            num_prefills=0,
            query_start_loc=None,
            decode=builder.bi_patch_rows.make(blocks, lengths, common.max_seq_len),
        )
    workspace = builder.chunked_prefill_workspace
    made.bi_patch_forms = (
        generated,
        places,
        [mla_prompts.Group(some, table, workspace, device) for some in mla_prompts.groups(segments, len(workspace))],
    )
    return made
