"""Speculative decoding with model runner V2: each row draws as in a step without speculation."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Seam, Target


def _verify(original):
    """RejectionSampler._verify: sample every row by the sampler of a single step, and accept drafts that equal the
    draws. V2 keys the noise of a draw by the request's seed and the row's position."""
    from bi_patch.ops.cuda import drafts

    @functools.wraps(original)
    def _verify(
        self,
        logits,
        draft_logits,
        draft_sampled,
        pos,
        cu_num_logits,
        idx_mapping,
        idx_mapping_np,
        expanded_idx_mapping,
        expanded_local_pos,
        seq_lens_upper_bound_np,
        verify_draft_sampled,
    ):
        if self.watermark_key is not None:
            raise UnsupportedFeature(
                "speculation.cuda_rows: bi_patch does not cover watermarks beside speculative decoding. Leave out one"
            )
        drawn, processed = self.sampler.sample(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
            return_logprobs=True,
        )
        most = self.num_speculative_steps
        return processed, *drafts.check(drawn.flatten(), verify_draft_sampled, cu_num_logits, most)

    return _verify


SEAMS = (
    Seam(
        name="speculation.cuda_rows",
        targets=(Target("vllm.v1.worker.gpu.spec_decode.rejection_sampler", "RejectionSampler._verify", ">=0.33"),),
        close=_verify,
        why="the rejection sampler of model runner V2 draws other noise than a step without speculation, so a seeded "
        "request gets other tokens",
        how="each row draws with the noise of its own position. A draft is accepted while it equals the draw",
        until="upstream has a mode in which speculation changes no token "
        "(https://github.com/vllm-project/vllm/issues/54506)",
        causes=(22, 35),
    ),
)
