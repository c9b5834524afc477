"""A tile's step of online softmax in which a row may still have seen no key: what attention's kernels of vLLM call.

From 0.33 on vLLM has the same. Milakov and Gimelshein 2018, Online normalizer calculation for softmax.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_step(scores, most, total):
    """scores [M, keys], the running maximum and sum [M], all fp32 -> maximum, sum, weights [M, keys], and what scales
    earlier weights [M].

    A row whose tiles were all masked keeps a maximum of minus infinity, and so starts as a row without such tiles does.
    """
    peak = tl.maximum(most, tl.max(scores, axis=1))
    shift = tl.where(peak > float("-inf"), peak, 0.0)  # finite, or differences would be no numbers
    weights = tl.exp(scores - shift[:, None])
    shrink = tl.exp(most - shift)
    return peak, total * shrink + tl.sum(weights, axis=1), weights, shrink
