"""ALiBi's bias (Press et al. 2021), counted from the query's own position: slope * (key's position - query's position).

vLLM's Triton attention calls this function in place of its own. vLLM's function counts from the first token of the
chunk that holds the query. That adds the same number to all scores of a row, which changes how the row rounds.
"""

import triton
import triton.language as tl


@triton.jit
def apply_alibi_to_score(S, alibi_slope, seq_offset, context_len, query_pos, USE_ALIBI_SQRT: tl.constexpr):
    """S [M, keys] fp32 plus the bias. alibi_slope [M] fp32. seq_offset [keys]: positions of keys. context_len: tokens
    before the chunk. query_pos [M]: positions of queries in the chunk. USE_ALIBI_SQRT: the distance's square root."""
    relative = (seq_offset - (context_len + query_pos[:, None])).to(tl.float32)
    if USE_ALIBI_SQRT:
        relative = tl.where(relative <= 0, -tl.sqrt(-relative), 0.0)
    return S + alibi_slope[:, None] * relative
