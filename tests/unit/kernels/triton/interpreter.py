"""Runs in a child process with TRITON_INTERPRET=1 and tests every Triton kernel.

Each kernel is compared with fp64 within a tolerance, and each row alone with the row in a batch, bitwise. Prints one
line per case: `ok NAME` or `FAIL NAME: reason`.
"""

import functools
import itertools
import os
import sys
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402

from bi_patch.kernels.triton import (
    attention_backward,
    attention_lse,
    block_experts,
    chains,
    drafts,
    eighths,
    embedding_backward,
    expert_lora,
    gated_backward,
    gemm,
    leaves,
    logits_backward,
    lora,
    norm,
    norm_backward,
    pooling,
    rank_norm,
    ranks,
    reduce,
    rope,
    scaled_gemm,
)  # noqa: E402
from bi_patch.kernels.triton import (
    heads as by_head,
)
from bi_patch.kernels.triton.softmax import softmax_step  # noqa: E402
from bi_patch.ops import collectives  # noqa: E402
from bi_patch.ops import drafts as by_torch  # noqa: E402

_dot = interpreter.InterpreterBuilder.create_dot


def _upcast(handle):
    """Convert bf16 and e4m3 to floats: the interpreter holds both as integers and would multiply these."""
    if handle.dtype.scalar == tl.float8e4nv:
        wide = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn).float().numpy()
        return interpreter.TensorHandle(wide, tl.float32)
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    widened = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(widened, tl.float32)


def _create_dot(self, a, b, *rest):
    return _dot(self, _upcast(a), _upcast(b), *rest)


interpreter.InterpreterBuilder.create_dot = _create_dot

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILES = {
    "reference": gemm.Tile(32, 32, 32, 4, 2),
    "skinny": gemm.Tile(16, 32, 64, 4, 2),
    "ragged depth": gemm.Tile(16, 16, 128, 4, 2),
}


def report(name: str, wrong: str) -> None:
    print(f"FAIL {name}: {wrong}" if wrong else f"ok {name}", flush=True)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> str:
    error = float((got.double() - want).norm() / want.norm())
    limit = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6}[dtype]
    return "" if error < limit else f"relative error {error:.2e}"


def heads_products() -> None:
    generator = torch.Generator().manual_seed(9)
    for dtype in (torch.bfloat16, torch.float16):
        for rows, depth, cols in ((1, 128, 160), (70, 96, 48), (3, 256, 64)):
            a = torch.randn((rows, 3, depth), generator=generator).to(dtype).transpose(0, 1)
            b = torch.randn((3, depth, cols), generator=generator).to(dtype)
            held = torch.empty((rows, 3, cols), dtype=dtype)
            got = by_head.product(a, b, held.transpose(0, 1))
            name = f"heads {dtype} {rows} {depth} {cols}"
            report(name, close(got, a.double() @ b.double(), dtype))
            for i in {0, rows // 2, rows - 1}:
                alone = by_head.product(a[:, i : i + 1], b, torch.empty((3, 1, cols), dtype=dtype))
                report(f"{name} row {i} alone", "" if torch.equal(alone[:, 0], got[:, i]) else "a row differs alone")


def gemms() -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in DTYPES:
        for bias in (False, True):
            x = torch.randn(37, 96, generator=generator).to(dtype)
            weight = torch.randn(48, 96, generator=generator).to(dtype)
            held = torch.randn(48, generator=generator).to(dtype) if bias else None
            want = x.double() @ weight.double().T + (held.double() if bias else 0)
            for name, tile in TILES.items():
                case = f"gemm {name} {dtype} {'bias' if bias else 'plain'}"
                got = gemm.gemm(x, weight, held, tile)
                report(case, close(got, want, dtype))
                mixed = gemm.product(x, weight, held, (gemm.Part(gemm.Tile(16, 16, 32, 4, 2), 16), gemm.Part(tile, 48)))
                whole = [
                    gemm.gemm(x, weight[at], None if held is None else held[at], t)
                    for at, t in ((slice(16), gemm.Tile(16, 16, 32, 4, 2)), (slice(16, 48), tile))
                ]
                report(f"{case} mixed", "" if torch.equal(mixed, torch.cat(whole, 1)) else "columns are misplaced")
                alone = torch.cat([gemm.gemm(x[m : m + 1], weight, held, tile) for m in (0, 17, 36)])
                report(f"{case} alone", "" if torch.equal(alone, got[[0, 17, 36]]) else "a row alone differs")


SCALED = {
    "reference": scaled_gemm.Tile(32, 64, 128, 4, 2),
    "swapped": scaled_gemm.Tile(16, 64, 128, 4, 2, True),
    "ragged depth": scaled_gemm.Tile(16, 32, 64, 4, 2, True),
}


def scaled_gemms() -> None:
    generator = torch.Generator().manual_seed(9)
    rows, cols, depth = 37, 136, 288  # a few columns of the second 128, which share a scale
    x, w = (torch.randn(n, depth, generator=generator).to(torch.float8_e4m3fn) for n in (rows, cols))
    for dtype in (torch.float16, torch.bfloat16):
        for grouped, bias in ((False, False), (False, True), (True, False), (True, True)):
            k = 256 if grouped else depth
            sizes = ((rows, 2), (2, 2)) if grouped else ((rows,), (cols,))
            scales = [torch.rand(size, generator=generator) + 0.5 for size in sizes]
            held = torch.randn(cols, generator=generator).to(dtype) if bias else None
            a, b = x[:, :k].contiguous(), w[:, :k].contiguous()
            wide = [t.double() for t in scales]
            if grouped:
                wide = [wide[0].repeat_interleave(128, 1), wide[1].repeat_interleave(128, 0)[:cols]]
                wide[1] = wide[1].repeat_interleave(128, 1)
            else:
                wide = [t[:, None] for t in wide]
            want = (a.double() * wide[0]) @ (b.double() * wide[1]).T + (held.double() if bias else 0)
            for name, tile in SCALED.items():
                case = f"scaled gemm {name} {dtype} {'groups' if grouped else 'rows'} {'bias' if bias else 'plain'}"
                got = scaled_gemm.gemm(a, b, *scales, held, dtype, tile)
                report(case, close(got, want, dtype))
                alone = [
                    scaled_gemm.gemm(a[m : m + 1], b, scales[0][m : m + 1], scales[1], held, dtype, tile)
                    for m in (0, 36)
                ]
                report(f"{case} alone", "" if torch.equal(torch.cat(alone), got[[0, 36]]) else "a row alone differs")


BLOCKS = {
    "reference": (32, 64, 2, False),
    "swapped": (16, 64, 1, True),
    "grouped": (16, 128, 3, False),
}


def sorted_blocks(ids: torch.Tensor, size: int, without: int):
    """As vLLM: the rows of each block, sorted by expert; the expert of each block, -1 for `without`; their number."""
    rows, experts = [], []
    for expert in sorted(set(ids.flatten().tolist())):
        mine = (ids.flatten() == expert).nonzero().flatten().tolist()
        mine += [ids.numel()] * (-len(mine) % size)
        rows += mine
        experts += [-1 if expert == without else expert] * (len(mine) // size)
    padded = torch.tensor([len(rows)], dtype=torch.int32)
    # What lies past the end is never read as a row.
    return *(torch.tensor(x + [0] * n, dtype=torch.int32) for x, n in ((rows, size), (experts, 1))), padded


def run_blocks(x, w, scales, weights, ids, dtype, tile, part, without=-1, unsorted=False):
    """The products [rows, N] of the tokens `part` alone. x has a row for each token, or one for each of its rows."""
    size, columns, together, swap = tile
    named = {"BLOCK_SIZE_M": size, "BLOCK_SIZE_N": columns, "GROUP_SIZE_M": together, "num_stages": 2}
    top, each = ids.shape[1], len(x) // len(ids)
    chosen = ids[part]
    at = slice(part.start * each, part.stop * each)
    out = torch.full((len(chosen), top, w.shape[1]), float("nan"), dtype=dtype)
    held = None, chosen.flatten(), torch.tensor([chosen.numel() * size], dtype=torch.int32)
    held = held if unsorted else sorted_blocks(chosen, size, without)
    factors = None if weights is None else weights[part].contiguous()
    given = x[at].contiguous(), w, out, scales[0][at].contiguous(), scales[1], factors
    block_experts.products(*given, *held, top // each, named, swap)
    return out.flatten(0, 1)


def block_products() -> None:
    generator = torch.Generator().manual_seed(13)
    tokens, experts, top, cols = 21, 4, 2, 160  # a few columns of the second 128
    ids = torch.rand(tokens, experts, generator=generator).topk(top, dim=-1).indices.to(torch.int32)
    kept = ids.flatten() != 1
    for dtype, depth, second in itertools.product((torch.float16, torch.bfloat16), (256, 288), (False, True)):
        rows, groups = tokens * (top if second else 1), -(-depth // 128)
        x = torch.randn(rows, depth, generator=generator).to(torch.float8_e4m3fn)
        w = torch.randn(experts, cols, depth, generator=generator).to(torch.float8_e4m3fn)
        scales = [torch.rand(size, generator=generator) + 0.5 for size in ((rows, groups), (experts, 2, groups))]
        weights = torch.rand(tokens, top, generator=generator) if second else None
        wide = [scale.double().repeat_interleave(128, -1)[..., :depth] for scale in scales]
        a = (x.double() * wide[0]).repeat_interleave(1 if second else top, 0)
        b = w.double() * wide[1].repeat_interleave(128, 1)[:, :cols]
        want = torch.einsum("ik,ink->in", a, b[ids.flatten().long()])
        want *= weights.double().view(-1, 1) if second else 1
        for name, tile in BLOCKS.items():
            run = functools.partial(run_blocks, x, w, scales, weights, ids, dtype, tile)
            case = f"block experts {name} {dtype} K={depth} {'second' if second else 'first'}"
            got = run(slice(0, tokens))
            report(case, close(got, want, dtype))
            report(f"{case} alone", "" if torch.equal(run(slice(5, 6)), got[10:12]) else "a row alone differs")
            same = torch.equal(run(slice(5, 6), unsorted=True), got[10:12])
            report(f"{case} unsorted", "" if same else "a row without sorted blocks differs")
            got = run(slice(0, tokens), without=1)
            held = bool((got[~kept] == 0).all()) and not close(got[kept], want[kept], dtype)
            report(f"{case} of another rank", "" if held else "rows of another rank's expert are not zero")


def norms() -> None:
    generator = torch.Generator().manual_seed(2)
    for dtype in DTYPES:
        for cols in (96, 128, 1536, 20000):
            x = torch.randn(5, cols, generator=generator).to(dtype)
            residual = torch.randn(5, cols, generator=generator).to(dtype)
            weight = torch.randn(cols, generator=generator).to(dtype)
            for held in (None, residual):
                case = f"norm {cols} {dtype} {'residual' if held is not None else 'plain'}"
                got, summed = norm.rms_norm(x, weight, 1e-6, held)
                base = x.double() if held is None else (x + held).double()
                want = base * (base.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
                report(case, close(got, want, dtype))
                if held is not None:
                    # The interpreter rounds to bf16 differently.
                    exact = dtype != torch.bfloat16 and torch.equal(summed, x + held)
                    report(f"{case} sum", "" if exact else close(summed, x.double() + held.double(), dtype))
                alone, _ = norm.rms_norm(x[3:4], weight, 1e-6, None if held is None else held[3:4])
                report(f"{case} alone", "" if torch.equal(alone[0], got[3]) else "a row alone differs")
    wide = torch.randn(3, 4 * 32 + 64, generator=generator)
    heads = wide[:, : 4 * 32].view(3, 4, 32)
    got, _ = norm.rms_norm(heads, None, 1e-6)
    report("norm heads", "" if torch.equal(got, norm.rms_norm(heads.contiguous(), None, 1e-6)[0]) else "strides")
    got, _ = norm.rms_norm(heads, torch.zeros(32), 1e-6, None, 1.0)
    report("norm offset", "" if torch.equal(got, norm.rms_norm(heads, None, 1e-6)[0]) else "the offset is lost")


def norms_over_ranks() -> None:
    """Ranks with a part of each row: the norm of whole rows, by sums of squares that are added in rank order."""
    generator = torch.Generator().manual_seed(3)
    for dtype in DTYPES:
        for cols, several in ((96, 2), (1536, 4), (20000, 2)):
            case = f"norm over {several} ranks {cols} {dtype}"
            parts = [torch.randn(5, cols + 64 + 32, generator=generator).to(dtype) for _ in range(several)]
            split = [part.split([cols, 64, 32], dim=-1)[:2] for part in parts]
            weight = torch.randn(cols, generator=generator).to(dtype)
            sums = [rank_norm.square_sums(q, k) for q, k in split]
            alone = rank_norm.square_sums(split[1][0][3:4], split[1][1][3:4])
            report(f"{case} sums alone", "" if torch.equal(alone[0], sums[1][3]) else "a row alone differs")
            total = collectives.in_rank_order(torch.stack(sums))
            q, k = (torch.cat([part[at] for part in split], -1).double() for at in (0, 1))
            exact = torch.stack([q.square().sum(-1), k.square().sum(-1)], -1)
            report(f"{case} sums", close(total, exact, torch.float32))
            got = rank_norm.norm(split[1][0], total, 0, weight, 1e-6, cols * several)
            want = split[1][0].double() * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
            report(case, close(got, want, dtype))
            alone = rank_norm.norm(split[1][0][3:4], total[3:4], 0, weight, 1e-6, cols * several)
            report(f"{case} alone", "" if torch.equal(alone[0], got[3]) else "a row alone differs")
            got = rank_norm.norm(split[0][1], total, 1, weight[:64], 1e-6, 64 * several)
            want = split[0][1].double() * (k.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight[:64].double()
            report(f"{case} keys", close(got, want, dtype))


def layer_norms() -> None:
    generator = torch.Generator().manual_seed(4)
    for dtype in DTYPES:
        for cols in (96, 1536):
            wide = torch.randn(5, cols + 32, generator=generator).to(dtype)
            weight, bias = torch.randn(2, cols, generator=generator).to(dtype)
            for w, b in ((None, None), (weight, None), (weight, bias)):
                for x in (wide[:, :cols].contiguous(), wide[:, :cols]):
                    case = f"layer norm {cols} {dtype} {w is not None} {b is not None} {x.is_contiguous()}"
                    got = norm.layer_norm(x, w, b, 1e-5)
                    held = [None if t is None else t.double() for t in (w, b)]
                    want = torch.nn.functional.layer_norm(x.double(), (cols,), *held, 1e-5)
                    report(case, close(got, want, dtype))
                    alone = norm.layer_norm(x[3:4], w, b, 1e-5)
                    report(f"{case} alone", "" if torch.equal(alone[0], got[3]) else "a row alone differs")


def ropes() -> None:
    generator = torch.Generator().manual_seed(3)
    size, heads_q, heads_k, tokens = 32, 5, 2, 4
    angles = torch.arange(64.0)[:, None] * torch.logspace(0, -3, size // 2)
    cache = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.tensor([3, 0, 17, 63])
    for dtype in DTYPES:
        qkv = torch.randn(tokens, (heads_q + 2 * heads_k) * size, generator=generator).to(dtype)
        q, k = qkv[:, : heads_q * size], qkv[:, heads_q * size : (heads_q + heads_k) * size]
        weights = [torch.rand(size, generator=generator).to(dtype) + 0.5 for _ in range(2)]
        for held in ((None, None), weights):
            case = f"rope {dtype} {'norm' if held[0] is not None else 'plain'}"
            got = rope.rotate(positions, q, k, cache, size, *held, 1e-6)
            for part, x, out, weight in zip("qk", (q, k), got, held, strict=True):
                heads = x.double().reshape(tokens, -1, size)
                if weight is not None:
                    heads = heads * (heads.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
                a, b = heads.chunk(2, -1)
                cos, sin = (c[:, None].double() for c in cache[positions].chunk(2, -1))
                want = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).reshape(tokens, -1)
                report(f"{case} {part}", close(out, want, dtype))
            alone = rope.rotate(positions[2:3], q[2:3], k[2:3], cache, size, *held, 1e-6)
            same = torch.equal(alone[0][0], got[0][2]) and torch.equal(alone[1][0], got[1][2])
            report(f"{case} alone", "" if same else "a row alone differs")


def sums() -> None:
    generator = torch.Generator().manual_seed(4)
    for dtype in DTYPES:
        for cols in (1, 33, 2048, 5000):
            x = torch.rand(5, cols, generator=generator).to(dtype)
            for mean in (False, True):
                case = f"{'mean' if mean else 'sum'} {cols} {dtype}"
                got = reduce.row_sum(x, dtype, mean)
                report(case, close(got, x.double().mean(-1) if mean else x.double().sum(-1), dtype))
                same = torch.equal(reduce.row_sum(x[3:4], dtype, mean)[0], got[3])
                report(f"{case} alone", "" if same else "a row alone differs")
        for n, several in ((1, 2), (1000, 4), (3001, 8)):
            parts = torch.randn(several, n, generator=generator).to(dtype)
            want = parts[0].float()
            for part in parts[1:]:
                want = want + part.float()
            got = ranks.rank_sum(parts)
            # The interpreter cuts fp32 to bf16 where a GPU rounds.
            same = dtype == torch.bfloat16 or torch.equal(got, want.to(dtype))
            case = f"sum over {several} ranks {n} {dtype}"
            report(case, close(got, want, dtype) if same else "not the sum in rank order")
    empty = reduce.row_sum(torch.empty(3, 0), torch.float32)
    report("sum of nothing", "" if torch.equal(empty, torch.zeros(3)) else "not zero")


def parts_of_k() -> None:
    """Products in eight leaves: the same bits for every number of ranks, in every form, and for a row alone."""
    generator = torch.Generator().manual_seed(8)
    leaves._processors = lambda device: 2  # a program has several tiles
    for dtype, k in ((torch.bfloat16, 384), (torch.float16, 256)):
        x, w = torch.randn(17, k, generator=generator).to(dtype), torch.randn(24, k, generator=generator).to(dtype)
        bias = torch.randn(24, generator=generator).to(dtype)
        # Sums in fp32: other orders have other bits, which rounding to 16 bits would hide.
        fp32 = torch.float32
        want = leaves.product(x, w, bias, 8, fp32)
        report(f"leaves {k} {dtype}", close(want, x.double() @ w.double().T + bias.double(), dtype))
        rounded = leaves.product(x, w, bias, 8, dtype)
        report(f"leaves {k} {dtype} rounded", close(rounded, want, dtype))
        same = torch.equal(leaves.product(x[2:3], w, bias, 8, fp32)[0], want[2])
        report(f"leaves {k} {dtype} alone", "" if same else "a row alone differs")
        # NumPy's order depends on the step of K, which is the same for all.
        tile = gemm.Tile(16, 16, leaves.step(k // 8), 4, 2)
        forms = (leaves.Form(groups, described, tile) for groups, described in ((2, 0), (1, 0), (1, 1), (0, 1)))
        for form, count in itertools.product(forms, (1, 2, 4, 8)):
            if 8 // count < (form.groups or 2):
                continue
            own = k // count
            cut = [slice(r * own, (r + 1) * own) for r in range(count)]
            roots = [leaves.product(x[:, c], w[:, c], None, 8 // count, fp32, form) for c in cut]
            same = torch.equal(leaves.tree(torch.stack(roots), bias, fp32), want)
            report(f"leaves {k} {dtype} {count} ranks {form}", "" if same else "other bits")
            if count == 1:
                same = torch.equal(leaves.product(x, w, bias, 8, fp32, form), want)
                report(f"leaves {k} {dtype} with bias {form}", "" if same else "other bits")
    for leaf in (gemm.Tile(16, 16, 32, 4, 2), gemm.Tile(16, 16, 64, 4, 2)):
        try:
            leaves.product(x, w, None, 8, dtype, leaves.Form(1, False, leaf))
            report(f"leaves in steps of {leaf.k}", "a leaf with a single step or less is not refused")
        except ValueError as error:
            report(f"leaves in steps of {leaf.k}", "" if "does not fit 8 leaves of 32" in str(error) else str(error))


@triton.jit
def attend(scores, values, out, tiles, STEP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """out [ROWS] = softmax(scores [ROWS, tiles * TILE]) @ values, tile by tile, with weights rounded to fp16."""
    row, key = tl.arange(0, ROWS), tl.arange(0, TILE)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total, held = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for tile in range(tiles):
        x = tl.load(scores + row[:, None] * tiles * TILE + tile * TILE + key[None, :])
        most, total, weights, shrink = STEP(x, most, total)
        v = tl.load(values + tile * TILE + key)
        held = held * shrink + tl.sum(weights.to(tl.float16).to(tl.float32) * v[None, :], axis=1)
    tl.store(out + row, held / total)


@triton.jit
def step_from_zero(scores, most, total):
    """The softmax step of vLLM before 0.33: after a fully masked tile, a row's running maximum restarts at 0."""
    peak = tl.maximum(most, tl.max(scores, axis=1))
    peak = tl.where(peak > float("-inf"), peak, 0.0)
    weights = tl.exp(scores - peak[:, None])
    shrink = tl.exp(most - peak)
    return peak, total * shrink + tl.sum(weights, axis=1), weights, shrink


def softmaxes() -> None:
    """Compare rows whose first tiles are fully masked with the same rows without these tiles."""
    generator = torch.Generator().manual_seed(5)
    rows, tile = 16, 32
    for mean in (0.0, -1.0, -4.0, 3.0):
        for empty in (1, 2, 3):
            scores = torch.randn(rows, 5 * tile, generator=generator) * 0.5 + mean
            values = torch.randn(8 * tile, generator=generator)
            masked = torch.cat((torch.full((rows, empty * tile), -torch.inf), scores), 1)
            found = {}
            for step in (step_from_zero, softmax_step):  # bi_patch's step last: the loop leaves its results
                alone, beside = torch.empty(rows), torch.empty(rows)
                attend[(1,)](scores, values[empty * tile :], alone, 5, step, rows, tile)
                attend[(1,)](masked, values, beside, 5 + empty, step, rows, tile)
                found[step] = int((alone != beside).sum())
            want = (scores.double().softmax(-1) @ values[empty * tile : (empty + 5) * tile].double()).float()
            case = f"softmax mean {mean} after {empty} empty tiles"
            report(case, "" if (beside - want).abs().max() < 2e-3 else "wrong")
            report(f"{case} alone", f"{found[softmax_step]} rows differ" if found[softmax_step] else "")
            # The old step differs, so these scores distinguish the two steps.
            report(f"{case} planted", "" if found[step_from_zero] or mean > -4 else "the planted fault is not seen")


class Packed(NamedTuple):
    """Sequences in one batch: q, do [T, H, D], k, v [T, G, D], and each sequence's first row."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    starts: list[int]

    def only(self, *sequences: int) -> "Packed":
        parts = [[x[self.starts[s] : self.starts[s + 1]] for s in sequences] for x in self[:4]]
        lengths = [self.starts[s + 1] - self.starts[s] for s in sequences]
        return Packed(*map(torch.cat, parts), [0, *np.cumsum(lengths).tolist()])


def packed(lengths, heads: int, key_heads: int, size: int, dtype, generator) -> Packed:
    def random(count):
        return torch.randn(sum(lengths), count, size, generator=generator).to(dtype)

    return Packed(random(heads), random(key_heads), random(key_heads), random(heads), [0, *np.cumsum(lengths).tolist()])


def attention(batch: Packed, scale: float, window: int | None, cap: float):
    """(o, lse, dq, dk, dv) in fp64 by autograd."""
    q, k, v = (x.double().requires_grad_() for x in batch[:3])
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for a, b in zip(batch.starts, batch.starts[1:]):
        scores = torch.einsum("ihd,jhd->hij", q[a:b], k[a:b].repeat_interleave(group, 1)) * scale
        if cap:
            scores = cap * (scores / cap).tanh()
        behind = torch.arange(b - a)[:, None] - torch.arange(b - a)
        scores = scores.masked_fill((behind < 0) | (behind >= (window or b - a)), -torch.inf)
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[a:b].repeat_interleave(group, 1)))
    o = torch.cat(outs)
    return o.detach(), torch.cat(lses, 1).detach(), *torch.autograd.grad(o, (q, k, v), batch.do.double())


def attention_backwards() -> None:
    generator = torch.Generator().manual_seed(6)
    pair = (attention_backward.Tile(16, 32, 4, 1), attention_backward.Tile(32, 16, 4, 1))
    whole = attention_backward.Tiles(*pair, 0)
    split = attention_backward.Tiles(*(tile._replace(split=True, level=True) for tile in pair), 0)
    other = attention_backward.Tiles(*reversed(pair), 0)
    both = (torch.bfloat16, torch.float32)
    # (heads, heads of keys, head size, window, soft cap, dtypes)
    kinds = {
        "plain": (2, 1, 64, None, 0.0, both),
        "odd heads": (3, 1, 96, None, 0.0, both[:1]),
        "window and cap": (1, 1, 64, 19, 2.0, both),
        "small window": (1, 1, 32, 3, 0.0, both[1:]),
    }
    for name, (heads, key_heads, size, window, cap, dtypes) in kinds.items():
        for dtype in dtypes:
            batch = packed((1, 37, 17), heads, key_heads, size, dtype, generator)
            scale = size**-0.5 * 1.3
            o, lse, *want = attention(batch, scale, window, cap)
            o, lse = o.to(dtype), lse.float()

            def run(batch, o, lse, tiles, longest=37, scale=scale, window=window, cap=cap):
                starts = torch.tensor(batch.starts, dtype=torch.int32)
                q, k, v, do = batch[:4]
                return attention_backward.backward(q, k, v, o, lse, do, starts, longest, scale, window, cap, tiles)

            limits = torch.tensor(batch.starts, dtype=torch.int32), 37, scale, window, cap
            logs = attention_lse.lse(batch.q, batch.k, *limits)
            report(f"lse {name} {dtype}", close(logs, lse.double(), torch.float32))
            one = batch.only(2)
            alone = attention_lse.lse(one.q, one.k, torch.tensor(one.starts, dtype=torch.int32), *limits[1:])
            same = torch.equal(alone, logs[:, batch.starts[2] : batch.starts[3]])
            report(f"lse {name} {dtype} alone", "" if same else "other bits")
            got = run(batch, o, lse, whole)
            for part, g, w in zip(("dq", "dk", "dv"), got, want, strict=True):
                report(f"backward {name} {dtype} {part}", close(g, w, dtype))
            same = all(map(torch.equal, run(batch, o, lse, split), got))
            report(f"backward {name} {dtype} split loops, level", "" if same else "other bits")
            same = all(map(torch.equal, run(batch, o, lse, whole, 70), got))
            report(f"backward {name} {dtype} longer limit", "" if same else "other bits")
            for order in ((1,), (2, 0, 1)):
                rows = torch.cat([torch.arange(batch.starts[s], batch.starts[s + 1]) for s in order])
                found = run(batch.only(*order), o[rows], lse[:, rows].contiguous(), whole)
                same = all(torch.equal(f, g[rows]) for f, g in zip(found, got, strict=True))
                report(f"backward {name} {dtype} sequences {order}", "" if same else "other bits")
            if dtype == torch.float32:  # bf16 hides it
                same = all(map(torch.equal, run(batch, o, lse, other), got))
                report(f"backward {name} {dtype} planted", "another order is not seen" if same else "")


def gradients(out, inputs, grad):
    return torch.autograd.grad(out, inputs, grad.double())


def norm_backwards() -> None:
    generator = torch.Generator().manual_seed(7)
    for dtype in (torch.bfloat16, torch.float32):
        for cols, rows in ((96, 700), (1536, 37)):
            x, g = torch.randn(2, rows, cols, generator=generator).to(dtype)
            weight = torch.rand(cols, generator=generator).to(dtype)
            wide, w = (t.double().requires_grad_() for t in (x, weight))
            out = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (w + 1)
            got = norm_backward.rms_norm(x, g, weight, 1e-6, 1.0)
            for part, found, want in zip(("x", "weight"), got, gradients(out, (wide, w), g), strict=True):
                report(f"norm backward {cols} {dtype} {part}", close(found, want, dtype))
            alone = norm_backward.rms_norm(x[3:4], g[3:4], weight, 1e-6, 1.0)[0]
            report(f"norm backward {cols} {dtype} alone", "" if torch.equal(alone[0], got[0][3]) else "a row differs")


def gated_backwards() -> None:
    generator = torch.Generator().manual_seed(8)
    for dtype in (torch.bfloat16, torch.float32):
        for kind in gated_backward.KINDS:
            g, gate, up = torch.randn(3, 5, 300, generator=generator).to(dtype)
            wide, u = (t.double().requires_grad_() for t in (gate, up))
            approximate = "tanh" if kind == "gelu_tanh" else "none"
            functional = torch.nn.functional
            act = functional.silu(wide) if kind == "silu" else functional.gelu(wide, approximate=approximate)
            got = gated_backward.gated(g, gate, up, kind)
            for part, found, want in zip(("gate", "up"), got, gradients(act * u, (wide, u), g), strict=True):
                report(f"gated backward {kind} {dtype} {part}", close(found, want, dtype))
            alone = gated_backward.gated(*(t[2:3] for t in (g, gate, up)), kind)
            same = all(torch.equal(a[0], b[2]) for a, b in zip(alone, got, strict=True))
            report(f"gated backward {kind} {dtype} alone", "" if same else "a row differs")


def logits_backwards() -> None:
    generator = torch.Generator().manual_seed(9)
    for dtype in (torch.bfloat16, torch.float32):
        for cap in (0.0, 5.0):
            raw = torch.randn(5, 9000, generator=generator) * 4
            x = raw.double().requires_grad_()
            capped = cap * (x / cap).tanh() if cap else x
            heat = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7])
            tokens = torch.tensor([0, 8999, 17, 4096, 5])
            dropped = torch.zeros(5, 9000, dtype=torch.bool)
            dropped[1, :4500] = dropped[4, 6:] = True
            scores = (capped / heat[:, None]).masked_fill(dropped, -torch.inf)
            g = torch.randn(5, generator=generator)
            (want,) = gradients(scores.log_softmax(-1)[torch.arange(5), tokens], (x,), g)
            held = (g, scores.detach().float(), capped.detach().float(), tokens, heat)
            got = logits_backward.logits(*held, cap, dtype)
            report(
                f"logits backward {dtype} {cap}", close(got, want, dtype if dtype != torch.float32 else torch.float16)
            )
            alone = logits_backward.logits(*(t[3:4] for t in held), cap, dtype)
            report(f"logits backward {dtype} {cap} alone", "" if torch.equal(alone[0], got[3]) else "a row differs")


def embedding_backwards() -> None:
    generator = torch.Generator().manual_seed(10)
    ids = torch.tensor([5, 0, 5, 7, 0, 5, 99])
    for dtype in (torch.bfloat16, torch.float32):
        g = torch.randn(7, 600, generator=generator).to(dtype)
        want = torch.zeros(100, 600)
        for row, token in zip(g, ids.tolist(), strict=True):
            want[token] += row.float()
        got = embedding_backward.embedding(g, ids, 100)
        report(f"embedding backward {dtype}", "" if torch.equal(got, want) else "not the ascending sum")


def _chain(name: str, add, rows: tuple, shape: tuple, dtype) -> None:
    """One call for all sequences has the bits of a call for each with a copy of its rows; `add` returns the sum."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(13))
    spans = ((0, 5), (5, 5), (5, 70), (73, 210))  # rows 70 to 73 belong to nobody
    together, apart, want = start.clone(), start.clone(), start.double()
    add(*rows, spans, together)
    for first, last in spans:
        own = tuple(x[first:last].clone() for x in rows)
        add(*own, ((0, last - first),), apart)
        want = want + add(*own, None, None)
    report(f"{name} {dtype}", close(together, want, torch.float32))
    report(f"{name} {dtype} apart", "" if torch.equal(together, apart) else "a cut changes a bit")


def chain_additions() -> None:
    generator = torch.Generator().manual_seed(14)

    def product(g, x, spans, chain):
        return g.double().t() @ x.double() if chain is None else chains.products(g, x, spans, chain)

    def norm(g, x, spans, chain):
        if chain is not None:
            return chains.norms(g, x, 1e-6, spans, chain)
        wide = x.double()
        return (g.double() * wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).sum(0)

    def column_sum(g, spans, chain):
        return g.double().sum(0) if chain is None else chains.sums(g, spans, chain)

    for dtype in (torch.bfloat16, torch.float32):
        g, x = (torch.randn(210, cols, generator=generator).to(dtype) for cols in (70, 100))
        _chain("chain of products", product, (g, x), (70, 100), dtype)
        _chain("chain of norms", norm, (g, g.flip(0)), (70,), dtype)
        _chain("chain of sums", column_sum, (g,), (70,), dtype)
        whole, parts = torch.ones(9, 70), torch.ones(9, 70)
        ids = torch.randint(0, 9, (210,), generator=generator)
        embedding_backward.add(g, ids, whole)
        for at in range(0, 210, 30):
            embedding_backward.add(g[at : at + 30], ids[at : at + 30], parts)
        report(f"chain of embeddings {dtype}", "" if torch.equal(whole, parts) else "a cut changes a bit")


def training() -> None:
    norm_backwards()
    gated_backwards()
    logits_backwards()
    embedding_backwards()
    chain_additions()


def poolings() -> None:
    generator = torch.Generator().manual_seed(12)
    starts = torch.tensor([0, 1, 34, 40, 107])
    for dtype in DTYPES:
        for cols in (1, 33, 256, 5000):
            x = torch.randn(107, cols, generator=generator).to(dtype)
            got = pooling.l2_normalize(x[:9], 1e-12)
            report(f"norm {cols} {dtype}", close(got, torch.nn.functional.normalize(x[:9].double(), dim=-1), dtype))
            same = torch.equal(pooling.l2_normalize(x[4:5], 1e-12)[0], got[4])
            report(f"norm {cols} {dtype} alone", "" if same else "a row alone differs")
            if cols > 256:  # means take columns by 64
                continue
            means = pooling.mean_rows(x, starts)
            spans = list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
            want = torch.stack([x[a:b].double().mean(0) for a, b in spans])
            report(f"mean of sequences {cols} {dtype}", close(means, want, torch.float32))
            alone = [pooling.mean_rows(x[a:b].contiguous(), torch.tensor([0, b - a]))[0] for a, b in spans]
            same = torch.equal(torch.stack(alone), means)
            report(f"mean of sequences {cols} {dtype} alone", "" if same else "a sequence alone differs")
    tiny = pooling.l2_normalize(torch.full((2, 5), 1e-20), 1e-12)
    report("norm of a tiny row", "" if torch.equal(tiny, torch.full((2, 5), 1e-20) / 1e-12) else "not divided by eps")


def _adapters(dtype, slices: int, ranks, rank: int, k: int, sizes):
    """Stacks of adapters, and what vLLM's _get_lora_a_ptr and _get_lora_b_ptr make of them."""
    generator = torch.Generator().manual_seed(11)
    a = [torch.zeros(len(ranks), rank, k, dtype=dtype) for _ in range(slices)]
    b = [torch.zeros(len(ranks), n, rank, dtype=dtype) for n in sizes]
    for s in range(slices):
        for slot, held in enumerate(ranks):
            a[s][slot, :held] = (torch.randn(held, k, generator=generator) * k**-0.5).to(dtype)
            b[s][slot, :, :held] = (torch.randn(sizes[s], held, generator=generator) * held**-0.5).to(dtype)

    def pointers(held):
        return torch.tensor([t.data_ptr() for t in held], dtype=torch.uint64) if slices > 1 else held[0]

    begins = [sum(sizes[:i]) for i in range(slices)]
    same = len(set(sizes)) == 1
    strides = [t.stride(0) for t in b]
    given = (
        torch.tensor(begins, dtype=torch.uint64) if slices > 1 else 0,
        pointers(b),
        strides[0] if same else torch.tensor(strides),
        sizes[0] if same else torch.tensor(sizes),
        same,
        max(sizes),
    )
    return a, b, (pointers(a), a[0].stride(0), a[0].stride(1)), given


def _named(slots: list[int], most: int):
    """vLLM's metadata of rows with these slots (LoRAKernelMeta.prepare_tensors)."""
    held = torch.tensor(slots, dtype=torch.int32)
    rows = torch.sort(held, stable=True).indices.to(torch.int32)
    ids, counts = torch.unique(held, sorted=True, return_counts=True)
    active, number, starts = torch.full((most + 1,), -1), torch.zeros(most + 1), torch.zeros(most + 2)
    active[: len(ids)], number[: len(ids)], starts[1 : len(ids) + 1] = ids, counts, counts.cumsum(0)
    return rows, number.to(torch.int32), starts.to(torch.int32), active.to(torch.int32), most + 1


def loras() -> None:
    ranks = (8, 24, 16)
    slots = [(i * 5) % 4 - 1 for i in range(21)]
    for dtype in (torch.bfloat16, torch.float16):
        for slices, sizes, k in ((1, (40,), 300), (3, (40, 24, 24), 600), (2, (136, 136), 512)):
            a, b, of_a, of_b = _adapters(dtype, slices, ranks, 24, k, sizes)
            generator = torch.Generator().manual_seed(12)
            x = torch.randn(21, k, generator=generator).to(dtype)
            y = torch.randn(21, sum(sizes), generator=generator).to(dtype)
            case = f"lora {slices} {dtype}"
            want = y.double()
            for s, size in enumerate(sizes):
                at = sum(sizes[:s])
                for i, slot in enumerate(slots):
                    if slot >= 0:
                        t = x[i].double() @ a[s][slot].double().T
                        want[i, at : at + size] += t @ b[s][slot].double().T
            got = {}
            for way in ("fused", "split", "whole"):
                got[way] = y.clone()
                lora.lora(got[way], x, of_a, of_b, 24, slices, *_named(slots, 3), way=way)
                report(f"{case} {way}", close(got[way], want, dtype))
                report(f"{case} {way} too", "" if torch.equal(got[way], got["fused"]) else "it differs")
            base = [i for i, slot in enumerate(slots) if slot < 0]
            report(f"{case} no adapter", "" if torch.equal(got["fused"][base], y[base]) else "a row was touched")
            if slices == 1:  # an embedding: t is a row of the adapter
                t = torch.randn(21, 24, generator=generator).to(dtype)
                want, embedded = y.double(), y.clone()
                for i, slot in enumerate(slots):
                    if slot >= 0:
                        want[i] += t[i].double() @ b[0][slot].double().T
                lora.expand(embedded, t[None, None], of_b, 24, 1, *_named(slots, 3))
                report(f"{case} embedding", close(embedded, want, dtype))
                for i in (1, 2):
                    alone = y[i : i + 1].clone()
                    lora.expand(alone, t[None, None, i : i + 1], of_b, 24, 1, *_named(slots[i : i + 1], 3))
                    report(f"{case} token {i} alone", "" if torch.equal(alone[0], embedded[i]) else "it differs")
            for i in (0, 1, 2, 3):
                alone = y[i : i + 1].clone()
                lora.lora(alone, x[i : i + 1], of_a, of_b, 24, slices, *_named(slots[i : i + 1], 3))
                report(f"{case} row {i} alone", "" if torch.equal(alone[0], got["fused"][i]) else "a row alone differs")


def _experts_of(dtype, slots, experts, rank, ranks, k, n, slices):
    """Adapters of experts: A [slots, experts, rank, k] and B [slots, experts, n, rank], zero above their rank."""
    generator = torch.Generator().manual_seed(14)
    a = [torch.zeros(slots, experts, rank, k, dtype=dtype) for _ in range(slices)]
    b = [torch.zeros(slots, experts, n, rank, dtype=dtype) for _ in range(slices)]
    for s in range(slices):
        for slot, held in enumerate(ranks):
            a[s][slot, :, :held] = (torch.randn(experts, held, k, generator=generator) * k**-0.5).to(dtype)
            b[s][slot, :, :, :held] = (torch.randn(experts, n, held, generator=generator) * held**-0.5).to(dtype)
    return a, b


def _blocks(ids, mapping, slots: int, experts: int, enabled, in_order: bool, seed: int = 0):
    """What vLLM's moe_lora_align_block_size makes of the experts of each token; rows of a block in a random order."""
    size, rows = expert_lora.BLOCK_M, ids.numel()
    active = torch.tensor([*sorted(set(mapping.tolist())), *[-1] * (slots + 1)], dtype=torch.int32)[: slots + 1]
    if not in_order:
        return expert_lora.Blocks(None, ids.reshape(-1), None, mapping, active, enabled, slots + 1)
    generator = torch.Generator().manual_seed(seed)
    length = rows + experts * (size - 1)
    blocks = -(-length // size)
    sorted_rows = torch.randint(10**6, (slots, length), generator=generator).int()  # what was never written
    of_block, padded = torch.full((slots, blocks), -1).int(), torch.randint(99, (slots,), generator=generator).int()
    for slot in range(slots):
        if not enabled[slot] or slot not in mapping:
            continue
        at = 0
        for expert in range(experts):
            held = ((ids == expert) & (mapping[:, None] == slot)).reshape(-1).nonzero().flatten()
            held = held[torch.randperm(len(held), generator=generator)]
            for first in range(0, len(held), size):
                part = held[first : first + size]
                of_block[slot, at // size] = expert
                sorted_rows[slot, at : at + size] = rows
                sorted_rows[slot, at : at + len(part)] = part.int()
                at += size
        padded[slot] = at
    return expert_lora.Blocks(
        sorted_rows.reshape(-1), of_block.reshape(-1), padded, mapping, active, enabled, slots + 1
    )  # fmt: skip


def _expert_loop(y, x, a, b, ids, mapping, enabled, weights):
    """The order of kernels/triton/expert_lora.py, one row at a time."""
    got, top_k = y.clone(), ids.shape[1]
    for i in range(len(y)):
        slot, expert = int(mapping[i // top_k]), int(ids.reshape(-1)[i])
        if slot < 0 or not enabled[slot]:
            continue
        n = b[0].shape[-2]
        for s in range(len(a)):
            row = x[i // top_k] if len(x) < len(y) else x[i]
            total, k = torch.zeros(a[s].shape[-2]), len(row)
            for first in range(0, k, lora.chunk(k)):
                acc = torch.zeros(a[s].shape[-2])
                for k0 in range(first, min(k, first + lora.chunk(k)), lora.BLOCK_K):
                    acc = acc + a[s][slot, expert, :, k0 : k0 + 128].float() @ row[k0 : k0 + 128].float()
                total = total + acc
            d = b[s][slot, expert].float() @ total.to(y.dtype).float()
            d = d if weights is None else d * weights.reshape(-1)[i]
            at = slice(s * n, (s + 1) * n)
            got[i, at] = (got[i, at].float() + d.to(y.dtype).float()).to(y.dtype)
    return got


def expert_loras() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for slices, k, n in ((2, 600, 40), (1, 300, 136)):
            _expert_case(f"expert lora {slices} {dtype}", dtype, slices, k, n)


def _expert_case(case: str, dtype, slices: int, k: int, n: int) -> None:
    experts, top_k, tokens, rank, ranks = 5, 2, 19, 24, (8, 24, 16)
    enabled = torch.tensor([1, 1, 0, 0], dtype=torch.int32)
    generator = torch.Generator().manual_seed(15)
    mapping = torch.tensor([(i * 5) % 4 - 1 for i in range(tokens)], dtype=torch.int32)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]).int()
    a, b = _experts_of(dtype, len(ranks), experts, rank, ranks, k, n, slices)
    second = slices == 1  # the second product has a row of x for each row of y, and the router's weights
    x = torch.randn(tokens * (top_k if second else 1), k, generator=generator).to(dtype)
    y = torch.randn(tokens * top_k, slices * n, generator=generator).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator) if second else None

    def run(at, way="", in_order=True, seed=0):
        """The rows of tokens `at` in a batch of these tokens."""
        lines = (at[:, None] * top_k + torch.arange(top_k)).flatten()
        got = y[lines].clone()
        blocks = _blocks(ids[at], mapping[at], len(ranks), experts, enabled, in_order, seed)
        part = None if weights is None else weights[at].reshape(-1)
        expert_lora.expert_lora(got, x[lines] if second else x[at], a, b, blocks, part, top_k, way=way)
        return got

    whole = torch.arange(tokens)
    want = _expert_loop(y, x, a, b, ids, mapping, enabled, weights)
    got = run(whole, "fused")
    report(f"{case} loop", close(got, want.double(), dtype))
    for way in ("fused", "whole"):
        for in_order in (True, False):
            other = run(whole, way, in_order, seed=1)
            report(f"{case} {way} {in_order}", "" if torch.equal(other, got) else "it differs")
    base = [i for i in range(len(y)) if mapping[i // top_k] < 0 or not enabled[mapping[i // top_k]]]
    report(f"{case} no adapter", "" if torch.equal(got[base], y[base]) and base else "a row was touched")
    held = [i for i in range(len(y)) if i not in base]
    report(f"{case} adapters", "it added nothing" if bool((got[held] == y[held]).all(1).any()) else "")
    for i in (1, 2, 5, 6):
        alone = run(torch.tensor([i]), in_order=i != 2)
        same = torch.equal(alone, got[i * top_k : (i + 1) * top_k])
        report(f"{case} token {i} alone", "" if same else "a token alone differs")


def drafted() -> None:
    """The same tokens and numbers as PyTorch's operations, which the tests of these compare with a loop."""
    generator = torch.Generator().manual_seed(13)
    for most in (1, 2, 4, 7):
        for kind in (torch.int32, torch.int64):
            counts = torch.randint(most + 1, (9,), generator=generator).tolist()
            drawn = torch.randint(2, (sum(counts) + 9,), generator=generator)
            held = torch.randint(-1, 2, (sum(counts),), generator=generator).to(kind)
            follows = by_torch.inputs(held, counts)
            edges = torch.tensor([0, *(count + 1 for count in counts)]).cumsum(0).int()
            want = by_torch.check(drawn, follows, edges[1:], most)
            tokens, numbers = drafts.check(drawn, follows, edges, most)
            same = torch.equal(tokens, want.tokens) and torch.equal(numbers.long(), want.counts)
            report(f"drafts {most} {kind}", "" if same else f"{tokens.tolist()} not {want.tokens.tolist()}")
            alone, number = drafts.check(drawn[: edges[1]], follows[: edges[1]], edges[:2], most)
            same = torch.equal(alone[0], tokens[0]) and number[0] == numbers[0]
            report(f"drafts {most} {kind} alone", "" if same else "a request alone differs")


def copies_of_pages() -> None:
    """Copies of e4m3 pages in fp16, against PyTorch: the interpreter cuts fp32 to bf16, where a GPU rounds."""
    generator = torch.Generator().manual_seed(3)
    lengths, most = [5, 128, 300, 0, 129], 40
    bases, owners = [0, 1, 2, 5, 5], [0, 1, 2, 2, 2, 4, 4]
    for page, head, key_heads in ((16, 64, 2), (32, 128, 1), (1024, 256, 2)):
        count = -(-most * 16 // page)
        table = torch.randperm(len(lengths) * count, generator=generator).to(torch.int32).view(len(lengths), count)
        cache = torch.randn(table.numel(), key_heads, page, 2 * head, generator=generator).to(torch.float8_e4m3fn)
        held = cache.view(torch.uint8)
        held[table[0].long(), :, 5:] = 0x7F  # NaN past a request's tokens
        k, v = cache.transpose(1, 2).split(head, dim=-1)
        per_head = torch.rand(2, key_heads, generator=generator) + 0.1
        for what, scales in (("own", tuple(per_head)), ("one", tuple(x[:1].expand(key_heads) for x in per_head))):
            keys, values = (torch.full((7, 128, key_heads, head), 7.0, dtype=torch.float16) for _ in range(2))
            numbers = [torch.tensor(x, dtype=torch.int32) for x in (lengths, owners, bases)]
            eighths.widen(k, v, scales, table, *numbers, keys, values)
            for i, length in enumerate(lengths):
                for name, got, wide, scale in (("K", keys, k, scales[0]), ("V", values, v, scales[1])):
                    case = f"e4m3 pages of {page} D={head} {what} scales {name} request {i}"
                    pages = [n for n, owner in enumerate(owners) if owner == i]
                    rows = got[pages].flatten(0, 1)
                    want = torch.zeros_like(rows)
                    tokens = torch.arange(length)
                    found = wide[table[i].long()[tokens // page], tokens % page]
                    want[:length] = (found.float() * scale[:, None]).half()
                    report(case, "" if torch.equal(rows, want) else "other numbers")


AREAS = {
    "gemm": gemms,
    "heads": heads_products,
    "scaled gemm": scaled_gemms,
    "block experts": block_products,
    "norm": norms,
    "norm over ranks": norms_over_ranks,
    "layer norm": layer_norms,
    "rope": ropes,
    "sum": sums,
    "leaves": parts_of_k,
    "pooling": poolings,
    "softmax": softmaxes,
    "attention backward": attention_backwards,
    "training": training,
    "lora": loras,
    "expert lora": expert_loras,
    "drafts": drafted,
    "e4m3 pages": copies_of_pages,
}

if __name__ == "__main__":
    for area in sys.argv[1:]:
        print(f"area {area}")
        AREAS[area]()
