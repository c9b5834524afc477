"""The parts of faults: products and sums in other orders, which replace a running model's layers.

A part computes the same value as the layer that it replaces, up to rounding: only the order or the precision differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from bi_patch.tools.verify import layers
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.layers import Product
from bi_patch.tools.verify.runner import replaced


@contextlib.contextmanager
def each_linear(
    engine: LocalEngine,
    make: Callable[[str, torch.nn.Module, Product], Product],
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[None]:
    """Within this context, every wanted linear runs make(path, layer, own product), where own is the layer's."""
    with contextlib.ExitStack() as stack:
        for name, layer in list(layers.linears(engine)):
            if not wanted(name):
                continue

            def wrap(held, name=name, layer=layer):
                def of(given):
                    return make(name, given, lambda x, bias: held(given, x, bias))

                own = of(layer)
                # The comparison with fp64 passes another layer, which holds the widened weight.
                return lambda given, x, bias=None: (own if given is layer else of(given))(x, bias)

            stack.enter_context(replaced(layer.quant_method, "apply", wrap))
        yield


@contextlib.contextmanager
def each_norm(engine: LocalEngine, make: Callable[[str, torch.nn.Module, Callable], Callable]) -> Iterator[None]:
    """Within this context, every RMSNorm runs make(path, layer, own forward): (x, residual or None) -> as vLLM's."""
    with contextlib.ExitStack() as stack:
        for name, layer in list(layers.norms(engine)):
            stack.enter_context(
                replaced(layer, "_forward_method", lambda held, name=name, layer=layer: make(name, layer, held))
            )
        yield


def product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, cuts: Sequence[int]) -> torch.Tensor:
    """x [..., K] @ w [N, K].T as partial sums over K between `cuts`, kept in fp32 and added in ascending order."""
    total = None
    for part in partials(x, w, cuts):
        total = part if total is None else total + part
    return (total if bias is None else total + bias.float()).to(x.dtype)


def partials(x: torch.Tensor, w: torch.Tensor, cuts: Sequence[int]) -> list[torch.Tensor]:
    """fp32 partial products over the spans of K between `cuts`, in the bundled GEMM's order: no row depends on M."""
    edges = [0, *cuts, x.shape[-1]]
    flat = x.reshape(-1, x.shape[-1])
    made = []
    for start, end in zip(edges, edges[1:]):
        made.append(_in_order(flat[:, start:end].float().contiguous(), w[:, start:end]))
    return [m.view(*x.shape[:-1], m.shape[-1]) for m in made]


_packed: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}


def forget() -> None:
    """Free the packed weights of removed faults."""
    _packed.clear()


def _in_order(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        return torch.ops.bi_patch.linear(x, w.float().contiguous(), None)
    n, k = w.shape
    key = (w.data_ptr(), n, k)
    if key not in _packed:
        _packed[key] = (w, torch.ops.bi_cpu.gemm_pack(w.float().contiguous()))  # keeping w keeps its address unique
    return torch.ops.bi_cpu.gemm(x, _packed[key][1], n, k, None)


def evenly(k: int, parts: int) -> list[int]:
    """The inner edges of `parts` equal spans of k."""
    return [k * i // parts for i in range(1, parts)]


def rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def two_block_norm(layer: torch.nn.Module, x: torch.Tensor, residual: torch.Tensor | None, blocks: int = 2):
    """vLLM's RMSNorm, with the sum of squares in `blocks` parts that are added at the end."""
    if residual is not None:
        x = x + residual
        residual = x
    wide = x.float()
    squares = torch.stack([part.pow(2).sum(-1) for part in wide.chunk(blocks, -1)], -1)
    total = squares[..., 0]
    for i in range(1, blocks):
        total = total + squares[..., i]
    y = wide * torch.rsqrt(total / x.shape[-1] + layer.variance_epsilon).unsqueeze(-1)
    y = y.to(x.dtype) * layer.weight.data
    return y if residual is None else (y, residual)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, edges: Sequence[int], scale: float
) -> torch.Tensor:
    """Causal attention of the last positions; KV is cut at `edges`, and partial results are merged in order in fp32.

    query: [n, heads, D], at the last n positions. key, value: [length, kv heads, D].
    """
    n, heads, _ = query.shape
    length, kv_heads, _ = key.shape
    group = heads // kv_heads
    q = query.float().transpose(0, 1)
    at = torch.arange(length - n, length, device=query.device).unsqueeze(1)
    best = total = out = None
    for start, end in zip([0, *edges], [*edges, length]):
        if start >= end:
            continue
        k = key[start:end].float().repeat_interleave(group, 1).permute(1, 2, 0)
        v = value[start:end].float().repeat_interleave(group, 1).transpose(0, 1)
        scores = torch.matmul(q, k) * scale
        hidden = torch.arange(start, end, device=query.device).unsqueeze(0) > at
        scores = scores.masked_fill(hidden, -torch.inf)
        top = scores.amax(-1, keepdim=True).clamp_min(-1e30)
        p = torch.exp(scores - top)
        mass, part = p.sum(-1, keepdim=True), torch.matmul(p, v)
        if best is None:
            best, total, out = top, mass, part
            continue
        new = torch.maximum(best, top)
        a, b = torch.exp(best - new), torch.exp(top - new)
        best, total, out = new, total * a + mass * b, out * a + part * b
    return (out / total).transpose(0, 1).to(query.dtype)


def unpack_cpu_cache(kv_cache: torch.Tensor, blocks: torch.Tensor, length: int, d: int):
    """key and value [length, kv heads, D] from the pages of the bundled CPU kernels (kernels/cpu/README.md)."""
    pages = kv_cache[blocks.long()]  # [n, kv heads, tokens, 2 * D]
    n, kv_heads, tokens, _ = pages.shape
    s = pack_width(kv_cache.dtype)
    flat = pages.reshape(n, kv_heads, 2 * tokens * d)
    k = flat[..., : tokens * d].view(n, kv_heads, tokens // 16, d // s, 16, s)
    v = flat[..., tokens * d :].view(n, kv_heads, tokens // s, d, s)
    k = k.permute(0, 2, 4, 1, 3, 5).reshape(n * tokens, kv_heads, d)
    v = v.permute(0, 2, 4, 1, 3).reshape(n * tokens, kv_heads, d)
    return k[:length], v[:length]


def pack_width(dtype: torch.dtype) -> int:
    """The number of positions or elements that the pages of the CPU kernels hold side by side."""
    from bi_patch.ops.cpu import machine

    return 2 if dtype == torch.bfloat16 and "bf16" in (machine._isa or "") else 1


_ops: torch.library.Library | None = None


def op(name: str, schema: str, run: Callable) -> Callable:
    """Define a dispatcher op, so that traces name the planted sum after the operation that it re-creates."""
    global _ops
    if _ops is None:
        _ops = torch.library.Library("bi_patch_fault", "FRAGMENT")
    if not hasattr(torch.ops.bi_patch_fault, name):
        _ops.define(f"{name}{schema}")
        _ops.impl(name, run, "CompositeExplicitAutograd")
    return getattr(torch.ops.bi_patch_fault, name)


def higher_first(scores: torch.Tensor, k: int):
    """Top-k of scores [..., V] in which the higher index wins a tie; in bi_patch's top-k, the lower index wins."""
    from bi_patch.ops.topk import TopK, topk

    found = topk(scores.flip(-1), k)
    return TopK(found.values, scores.shape[-1] - 1 - found.indices)


def original(seam: str):
    """The object at a seam's target before the seam was closed."""
    from bi_patch.arming import process

    state = process.state()
    assert state is not None
    return state.ledger.of(seam)[0].original
