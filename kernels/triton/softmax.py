"""One tile's step of online softmax (Milakov and Gimelshein 2018), for rows that may not have seen a key yet.

Before vLLM 0.33, vLLM's Triton attention calls this function in place of its own. vLLM 0.33 has the same step.
Order: Triton sums a row's weights in a tile; tiles are added in the order of the calls.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_step(scores, most, total):
    """scores [M, keys] and a running maximum and sum [M] -> maximum, sum, weights [M, keys], rescale factors [M].

    All fp32. The factors rescale what earlier tiles added. A row whose tiles were all masked keeps a maximum of minus
    infinity, so its later tiles have the same bits as without the masked tiles.
    """
    peak = tl.maximum(most, tl.max(scores, axis=1))
    shift = tl.where(peak > float("-inf"), peak, 0.0)  # finite, because minus infinity minus itself is NaN
    weights = tl.exp(scores - shift[:, None])
    shrink = tl.exp(most - shift)
    return peak, total * shrink + tl.sum(weights, axis=1), weights, shrink
