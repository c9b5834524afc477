"""Copies of e4m3 KV pages in 16 bits, for kernels that read no e4m3.

An element of the copy is fp32(element) * scale, rounded to nearest even in fp32, then in the copy's type: what the
decode kernel makes of the same page (kernels/cuda/eighths.h). No sum, so no order.

k, v [pages, page size, key heads, D] in e4m3, equal strides. Requests of a step follow each other in the copy: request
r has the pages from bases[r] on, PAGE tokens each, in the order of the request's tokens. owners [pages of the copy]:
each page's request. Tokens past a request's length become zeros, because a product with weight zero still meets them.
"""

import triton
import triton.language as tl

PAGE = 128  # tokens of a page of the copy: FlashAttention 3 then loads pages by tensor maps
_TOKENS = 32  # of a program
# What changes from step to step, or with the number of key heads at a time, must not ask for another compilation.
_ANY = ["table", "lengths", "owners", "bases", "k_scales", "v_scales", "table_row", "scale_step", "heads"]


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_ANY)
def _widen(
    k,
    v,
    keys,
    values,
    table,
    lengths,
    owners,
    bases,
    k_scales,
    v_scales,
    table_row,
    page_step,
    token_step,
    head_step,
    scale_step,
    heads,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD: tl.constexpr,
):
    page, head = tl.program_id(0), tl.program_id(1)
    request = tl.load(owners + page)
    row = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    token = (page - tl.load(bases + request)) * PAGE + row
    real = token < tl.load(lengths + request)
    held = tl.load(table + request.to(tl.int64) * table_row + token // SIZE, mask=real, other=0).to(tl.int64)
    d = tl.arange(0, HEAD)[None, :]
    at = (held * page_step + (token % SIZE) * token_step + head * head_step)[:, None] + d
    to = ((page.to(tl.int64) * PAGE + row) * heads + head)[:, None] * HEAD + d
    k_scale, v_scale = tl.load(k_scales + head * scale_step), tl.load(v_scales + head * scale_step)
    key = tl.load(k + at, mask=real[:, None], other=0.0).to(tl.float32) * k_scale
    tl.store(keys + to, tl.where(real[:, None], key, 0.0).to(keys.dtype.element_ty))
    value = tl.load(v + at, mask=real[:, None], other=0.0).to(tl.float32) * v_scale
    tl.store(values + to, tl.where(real[:, None], value, 0.0).to(values.dtype.element_ty))


def widen(k, v, scales, table, lengths, owners, bases, keys, values) -> None:
    """Write the keys and values of requests to keys, values [pages of the copy, PAGE, key heads, D]: 16 bits,
    contiguous.

    scales: K's and V's, fp32 [key heads], with equal strides. table [requests, most], int32: the pages of each request.
    lengths [requests], int32: tokens. owners, bases: int32, see above.
    """
    size, heads, head = k.shape[1:]
    tokens = min(PAGE, _TOKENS)
    _widen[len(owners), heads, PAGE // tokens](
        *(k, v, keys, values, table, lengths, owners, bases, *scales, table.stride(0)),
        *(*k.stride()[:3], scales[0].stride(0), heads),
        SIZE=size,
        PAGE=PAGE,
        TOKENS=tokens,
        HEAD=head,
    )
