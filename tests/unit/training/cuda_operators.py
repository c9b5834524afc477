"""Runs in a child process with TRITON_INTERPRET=1: the trainer's CUDA operators on CPU tensors, against fp64.

Stand-ins take the places of FlashAttention 3, vLLM's other kernels and cuBLASLt. Padding lies between the sequences.
Prints one line per case: `ok NAME` or `FAIL NAME: reason`.
"""

import os

os.environ |= {"TRITON_INTERPRET": "1", "BI_PATCH": "0", "CUDA_VISIBLE_DEVICES": ""}

import torch  # noqa: E402

from bi_patch.kernels.triton import embedding_backward  # noqa: E402
from bi_patch.ops import bits  # noqa: E402
from bi_patch.training.cpu import chains as cpu_chains  # noqa: E402
from bi_patch.training.cuda import (  # noqa: E402
    attention,
    chains,
    embedding,
    experts,
    gated,
    head,
    linear,
    lora,
    norm,
    rope,
    vllm_kernels,
)

DTYPE = torch.float16  # the interpreter cannot multiply bf16
ROWS, STARTS, LENGTHS = 40, (3, 20, 33), (11, 0, 6)


def sequence_attention(q, k, v, scale, window=0, cap=0.0):
    """(output, lse) of one sequence in fp64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if cap:
        scores = cap * (scores / cap).tanh()
    hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    if window:
        hidden |= torch.ones(len(q), len(q), dtype=torch.bool).tril(-window)
    scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


told = []


def flash_attention(
    *,
    q,
    k,
    v,
    cu_seqlens_q,
    max_seqlen_q,
    softmax_scale,
    block_table=None,
    seqused_k=None,
    window=0,
    softcap=0.0,
    **given,
):
    told.append((max_seqlen_q, block_table is not None))
    outs, sums = [], []
    for s, (a, b) in enumerate(zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:])):
        if block_table is None:
            held = k[a:b], v[a:b]
        else:
            held = (x[block_table[s].long()].flatten(0, 1)[: int(seqused_k[s])] for x in (k, v))
        out, lse = sequence_attention(q[a:b], *held, softmax_scale, window, softcap)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs).to(q.dtype), torch.cat(sums, 1).float()


def activated(both, kind):
    gate, up = both.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(both.dtype)


def outer(grad, x, out, add=False):
    found = grad.float().t() @ x.float()
    return out.add_(found) if add else out.copy_(found)


def triton_attention(*, window_size, softcap, max_seqlen_k, **given):
    told.append((window_size, softcap))
    return flash_attention(**given, window=window_size[0] + 1, softcap=softcap)[0]


vllm_kernels.flash_attention = flash_attention
vllm_kernels.triton_attention = triton_attention
vllm_kernels.gated = activated
vllm_kernels.token_logprobs = lambda x, ids: x.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
vllm_kernels.divide = lambda x, heat: x.div_(heat[:, None])
vllm_kernels.top_k_top_p = lambda x, k, p: x.masked_fill_(
    x < x.sort(-1).values.gather(-1, x.shape[1] - k[:, None]), -torch.inf
)
linear.outer.product = outer
linear.routes.linear = lambda x, w, b: torch.nn.functional.linear(
    x.double(), w.double(), None if b is None else b.double()
).to(x.dtype)


def report(name, wrong):
    print(f"FAIL {name}: {wrong}" if wrong else f"ok {name}", flush=True)


def close(name, got, want, limit=3e-3):
    error = float((got.double() - want.double()).norm() / want.double().norm())
    report(name, "" if got.shape == want.shape and error < limit else f"relative error {error:.1e}")


def triton_attention(*, window_size, softcap, max_seqlen_k, **given):
    told.append((window_size, softcap))
    return flash_attention(**given, window=window_size[0] + 1, softcap=softcap)[0]


def attentions(generator, size, pages, window=0, cap=0.0):
    attention._contiguous_serves = lambda *_: not pages
    q, g = torch.randn(2, ROWS, 4, size, generator=generator).to(DTYPE)
    k, v = torch.randn(2, ROWS, 2, size, generator=generator).to(DTYPE)
    starts, lengths = torch.tensor(STARTS), torch.tensor(LENGTHS)
    told.clear()
    out, kept = attention.attention(q, k, v, starts, lengths, 0.2, window, cap, "")
    found = attention.attention_backward(g, q, k, v, out, kept, starts, lengths, 0.2, window, cap)
    name = f"attention {size} {'window' if window else 'pages' if pages else 'contiguous'}"
    asked = [((window - 1, 0), cap), (11, True)] if window else [(128 if size <= 64 else 11, pages)]
    report(f"{name} told", "" if told == asked else str(told))
    want, grads = torch.zeros_like(q), [torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v)]
    for first, count in zip(STARTS, LENGTHS):
        at = slice(first, first + count)
        wide = [x[at].double().requires_grad_() for x in (q, k, v)]
        o = sequence_attention(*wide, 0.2, window, cap)[0]
        want[at] = o.detach()
        for whole, part in zip(grads, torch.autograd.grad(o, wide, g[at].double())):
            whole[at] = part
    close(name, out, want)
    for part, got, grad in zip("qkv", found, grads, strict=True):
        close(f"{name} gradient of {part}", got, grad)
    none = torch.zeros(2, dtype=torch.int64)
    empty = attention.attention(q, k, v, none, none, 0.2, window, cap, "")
    grads = attention.attention_backward(g, q, k, v, *empty, none, none, 0.2, window, cap)
    report(f"{name} of nothing", "" if not any(x.any() for x in (*empty, *grads)) else "not zero")


def others(generator):
    def random(*shape):
        return torch.randn(shape, generator=generator).to(DTYPE)

    def by_autograd(run, grad, *inputs):
        wide = [x.double().requires_grad_() for x in inputs]
        out = run(*wide)
        return out.detach(), *torch.autograd.grad(out, wide, grad.double())

    x, g, w, b = random(9, 32), random(9, 24), random(24, 32), random(24)
    out, *grads = by_autograd(torch.nn.functional.linear, g, x, w, b)
    close("linear", linear.linear(x, w, b, 1), out)
    close("linear in parts", linear.linear(x, w, b, 4), out)
    for part, got, want in zip(("x", "weight", "bias"), linear.linear_backward(g, x, w, True, True, True), grads):
        close(f"linear gradient of {part}", got, want)
    master = linear.linear_backward(g, x, w.float(), False, True, False)
    report("linear master", "" if master[1].dtype == torch.float32 and not master[0].numel() else "wrong dtype")

    x, g, w = random(9, 32), random(9, 32), random(32)
    out, *grads = by_autograd(lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (w + 1), g, x, w)
    close("norm", norm.rms_norm(x, w, 1e-6, 1.0), out)
    for part, got, want in zip(("x", "weight"), norm.rms_norm_backward(g, x, w, 1e-6, 1.0), grads):
        close(f"norm gradient of {part}", got, want)

    gate, up, g = random(9, 32), random(9, 32), random(9, 32)
    out, *grads = by_autograd(lambda a, b: torch.nn.functional.silu(a) * b, g, gate, up)
    close("gated", gated.gated(gate, up, "silu"), out)
    for part, got, want in zip(("gate", "up"), gated.gated_backward(g, gate, up, "silu"), grads):
        close(f"gated gradient of {part}", got, want)

    angles = torch.randn(9, 16, generator=generator)
    table, x, g = torch.cat((angles.cos(), angles.sin()), -1).to(DTYPE), random(9, 3, 32), random(9, 3, 32)

    def turn(x):
        a, b = x.chunk(2, -1)
        cos, sin = table.double()[:, None].chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    out, grad = by_autograd(turn, g, x)
    close("rope", rope.rope(x, table), out)
    close("rope gradient", rope.rope_backward(g, table), grad)

    q, k, qw, kw = random(9, 96), random(9, 64), random(32), random(32)
    both = rope.kernel.rotate(torch.arange(9), q, k, table, 32, qw, kw, 1e-6)
    for name, x, w, want in (("q", q, qw, both[0]), ("k", k, kw, both[1])):
        normed = norm.head_norm(x.view(9, -1, 32), w, 1e-6)
        got = rope.rope(normed, table).view(want.shape)
        report(f"norm of {name} and rotation", "" if not bits.differing(got, want) else "not the fused kernel's bits")

    ids, w, g = torch.tensor([3, 1, 3]), random(5, 32), random(3, 32)
    out, grad = by_autograd(lambda w: w[ids], g, w)
    close("embedding", embedding.embedding(ids, w, DTYPE, -1), out)
    close("embedding gradient", embedding.embedding_backward(g, ids, 5), grad)


def routed(x, share, gate_up, down, ids):
    """The weighted sum of each row's experts, in x's dtype."""
    gate, up = torch.einsum("rc,rkdc->rkd", x, gate_up[ids]).chunk(2, -1)
    return torch.einsum("rkd,rkcd,rk->rc", torch.nn.functional.silu(gate) * up, down[ids], share)


def chosen(logits, top_k, renormalize):
    weights, ids = logits.softmax(-1, dtype=torch.float32).topk(top_k, -1)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, ids.int()


vllm_kernels.route = chosen
vllm_kernels.experts = lambda x, share, ids, first, second, kind, tile: routed(
    *(t.double() for t in (x, share, first, second)), ids.long()
).to(x.dtype)
tiles = []
experts._tile = lambda problem, device: tiles.append(problem) or {}


def choices(generator):
    for renormalize in (False, True):
        logits, mixed = torch.randn(9, 6, generator=generator), torch.randn(9, 2, generator=generator)
        wide = logits.double().requires_grad_()
        want, _ = wide.softmax(-1).topk(2, -1)
        want = want / want.sum(-1, keepdim=True) if renormalize else want
        weights, ids = experts.route(logits, 2, renormalize)
        (grad,) = torch.autograd.grad(want, wide, mixed.double())
        name = "renormalized" if renormalize else "plain"
        close(f"route {name} gradient", experts.route_backward(mixed, logits, weights, ids, renormalize), grad)
    experts._CHUNK = 4
    x, grad = torch.randn(2, 9, 32, generator=generator).to(DTYPE)
    first = torch.randn(6, 48, 32, generator=generator).to(DTYPE) * 0.2
    second = torch.randn(6, 32, 24, generator=generator).to(DTYPE) * 0.2
    wide = [t.double().requires_grad_() for t in (x, weights, first, second)]
    out = routed(*wide, ids.long())
    grads = torch.autograd.grad(out, wide, grad.double())
    close("experts", experts.experts(x, weights, ids, first, second, "silu"), out.detach())
    report("experts problem", "" if str(tiles[0]) == "E=6 N=24 K=32 top2 silu float16" else str(tiles[0]))
    given = grad, x, weights, ids, first, second, "silu"
    found = experts.experts_backward(*given, True, True)
    for part, got, want in zip(("x", "weights", "gate and up", "down"), found, grads, strict=True):
        close(f"experts gradient of {part}", got, want)
    rows = [experts.experts_backward(*(t[i : i + 1] for t in given[:4]), *given[4:], True, False) for i in range(9)]
    for place, part in enumerate(("x", "weights")):
        alone = torch.cat([row[place] for row in rows])
        report(f"experts gradient of {part} alone", "" if not bits.differing(alone, found[place]) else "other bits")
    totals = [torch.ones(w.shape) for w in (first, second)]
    experts.add_gradients(*given, *totals)
    for part, got, want in zip(("gate and up", "down"), totals, grads[2:]):
        close(f"experts gradient of {part} added", got, want + 1)
    report("experts not asked", "" if not any(t.numel() for t in rows[0][2:]) else "not empty")


def adapters(generator):
    y, x = (torch.randn(9, n, generator=generator).to(DTYPE) for n in (24, 300))
    a, b = torch.randn(4, 300, generator=generator) * 0.05, torch.randn(24, 4, generator=generator)
    out = lora.lora(y, x, a, b, 1.5)
    want = y.double() + (x.double() @ a.to(DTYPE).double().t()) @ (b.double() * 1.5).t()
    close("adapter", out, want)
    alone = torch.cat([lora.lora(y[i : i + 1], x[i : i + 1], a, b, 1.5) for i in range(9)])
    report("adapter alone", "" if not bits.differing(alone, out) else "other bits")
    wide = [torch.cat((part, part.new_zeros(size))) for part, size in ((a, (12, 300)), (b.t(), (12, 24)))]
    padded = lora.lora(y, x, wide[0], wide[1].t(), 1.5)
    report("adapter of more ranks", "" if not bits.differing(padded, out) else "other bits")


def heads(generator):
    head.CHUNK = 4
    x, w = (torch.randn(n, 32, generator=generator).to(DTYPE) for n in (9, 50))
    tokens, g = torch.arange(9) * 5, torch.randn(9, generator=generator)
    heat = 0.5 + torch.rand(9, generator=generator)
    most = torch.full((9,), 50)
    for name, given in {
        "raw": (torch.ones(9), None, None, 0.0),
        "temperature": (heat, None, None, 0.0),
        "soft cap": (heat, None, None, 3.0),
        "top-k": (heat, most - torch.arange(9) % 2 * 40, None, 0.0),
    }.items():
        wide = [t.double().requires_grad_() for t in (x, w)]
        logits = torch.nn.functional.linear(*wide)
        temperature, k, _, cap = given
        logits = (cap * (logits / cap).tanh() if cap else logits) / temperature.double()[:, None]
        kept = torch.ones(9, 50, dtype=torch.bool) if k is None else logits.argsort(-1).argsort(-1) >= 50 - k[:, None]
        seen = kept.gather(-1, tokens[:, None])[:, 0]
        want = logits.masked_fill(~kept, -torch.inf).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        grads = torch.autograd.grad(want[seen], wide, g[seen].double())
        got = head.token_logprobs(x, w, tokens, *given, "V2", False)
        close(f"head {name}", got[seen], want[seen].detach())
        report(f"head {name} dropped", "" if bool((got[~seen] == -torch.inf).all()) else "not minus infinity")
        found = head.token_logprobs_backward(torch.where(seen, g, 0.0), x, w, tokens, *given, "V2", False, True, True)
        for part, a, b in zip(("hidden", "weight"), found, grads, strict=True):
            close(f"head {name} gradient of {part}", a, b, 1e-2)


def chains_of_sequences(generator):
    """What CUDA adds to a chain is what the CPU adds."""
    spans = ((3, 14), (14, 14), (33, 39))
    g, x = (torch.randn(ROWS, n, generator=generator).to(DTYPE) for n in (24, 32))
    ids = torch.arange(ROWS) % 7
    for name, shape, given in (
        ("product", (24, 32), (g, x)),
        ("product", (24, 32), (g.float(), x.float())),
        ("column_sum", (24,), (g,)),
        ("norm", (32,), (x.flip(0), x, 1e-6)),
        ("embedding", (7, 24), (g, ids)),
    ):
        got, want = torch.ones(shape), torch.ones(shape)
        for module, into in ((chains, got), (cpu_chains, want)):
            getattr(module, name)(*given, spans, into)
            getattr(module, name)(*given, (), into)
        close(f"chain of {name} {given[0].dtype}", got, want, 1e-5)
    tried = {"product": (24, 32), "sum": (24,), "norm": (32,), "embedding": (7, 24)}
    for what, shape in tried.items():
        good = chains._serves(what, shape, DTYPE, g.device)
        report(f"trial of {what}", "" if good else "a good kernel does not pass")
    for what, shape in tried.items():
        for fault in ("order", "number"):
            module, name = (embedding_backward, "add") if what == "embedding" else (chains.kernel, f"{what}s")
            own = getattr(module, name)
            setattr(module, name, spoiled(own, fault))
            chains._passes.cache_clear()
            passed = chains._serves(what, shape, DTYPE, g.device)
            setattr(module, name, own)
            report(f"trial of {what} with another {fault}", "a spoiled kernel passes" if passed else "")
    chains._passes.cache_clear()
    asked = []
    own, chains._passes = chains._passes, lambda what, shape, *_: asked.append(shape) or True
    chains._serves("product", (151936, 4096), DTYPE, g.device)
    chains._passes = own
    report("trial of a large chain", "" if asked == [(4096, 4096)] else str(asked))


def spoiled(own, fault):
    """A kernel whose chain gets twice what it should, or rounds differently with several sequences."""

    def run(*given):
        chain = given[-1]
        before = chain.clone()
        own(*given)
        if fault == "number":
            chain += chain - before
        elif len(given[0]) > 300:
            chain *= 1 + 2**-22

    return run


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(11)
    attentions(generator, 64, False)
    attentions(generator, 128, True)
    attentions(generator, 64, True, 4, 3.0)
    others(generator)
    choices(generator)
    adapters(generator)
    heads(generator)
    chains_of_sequences(generator)
