"""The norms of MiniMax-M2 over all heads: one bundled kernel for each, a row certificate, and sums over ranks."""

from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from bi_patch.ops import collectives
from bi_patch.ops.cuda import norm as kernels
from bi_patch.seams.cuda import norm, rows


def over(size, ranks=1):
    return SimpleNamespace(weight=torch.rand(size), variance_epsilon=1e-6, tp_world=ranks)


@pytest.fixture
def forward(monkeypatch):
    """The replacement, on a kernel that notes its calls."""
    calls = []

    def rms_norm(x, weight, eps):
        calls.append((x.shape, x.stride(), weight, eps))
        return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps) * weight

    monkeypatch.setattr(kernels, "define_ops", lambda: None)
    monkeypatch.setattr(kernels, "define_rank_ops", lambda: None)
    monkeypatch.setattr(kernels, "rms_norm", rms_norm)
    return norm._queries(None).__func__, calls


def test_queries_and_keys_get_a_norm_each(forward):
    call, calls = forward
    q_norm, k_norm, qkv = over(8), over(4), torch.randn(3, 16)
    q, k, _ = qkv.split([8, 4, 4], dim=-1)
    got = call(q_norm, k_norm, q, k)
    assert [tuple(part.shape) for part in got] == [(3, 8), (3, 4)]
    assert [given[0] for given in calls] == [(3, 8), (3, 4)] and calls[0][2] is q_norm.weight
    want = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6) * q_norm.weight
    assert torch.equal(got[0], want)


def sums_of(q, k):
    return torch.stack([part.float().pow(2).sum(-1) for part in (q, k)], -1)


def normed(x, sums, at, weight, eps, count):
    return x.float() * torch.rsqrt(sums[:, at, None] / count + eps) * weight


@pytest.fixture
def shared(monkeypatch, forward):
    """The replacement of one rank of several. shared(parts) -> a call; parts: sums of squares of all ranks."""
    monkeypatch.setattr(kernels, "square_sums", sums_of)
    monkeypatch.setattr(kernels, "norm_by_sums", normed)

    def of(parts):
        asked = []

        def added(sums):
            asked.append(sums)
            return collectives.in_rank_order(torch.stack([part.flatten() for part in parts]))

        monkeypatch.setattr(norm, "_added", added)
        return forward[0], asked

    return of


def test_ranks_add_their_sums_of_squares_in_rank_order(shared):
    """Each rank norms its heads by the sum of all ranks, fp32 from rank 0 on: in another order, the bits differ."""
    ranks, made = 4, torch.Generator().manual_seed(0)
    rows = [(torch.randn(3, 8, generator=made), torch.randn(3, 4, generator=made)) for _ in range(ranks)]
    # Of one rank, large squares: the small ones that are added later lose bits.
    rows[1] = tuple(part * 1000 for part in rows[1])
    parts = [sums_of(*row) for row in rows]
    total = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    assert not torch.equal(total, ((parts[3] + parts[2]) + parts[0]) + parts[1])
    for rank, (q, k) in enumerate(rows):
        call, asked = shared(parts)
        q_norm, k_norm = over(8, ranks), over(4, ranks)
        got = call(q_norm, k_norm, q, k)
        assert len(asked) == 1 and asked[0].dtype is torch.float32 and torch.equal(asked[0], parts[rank].flatten())
        assert torch.equal(got[0], normed(q, total, 0, q_norm.weight, 1e-6, 32))
        assert torch.equal(got[1], normed(k, total, 1, k_norm.weight, 1e-6, 16))


def test_merged_rows_get_the_same_norms(forward, shared):
    merged, qkv = norm._merged(None).__func__, torch.randn(3, 16)
    q, k, v = merged(over(8), k_norm := over(4), qkv, 8, 4)
    assert torch.equal(v, qkv[:, 12:]) and q.shape == (3, 8)
    assert torch.equal(k, forward[0](over(8), k_norm, *qkv.split([8, 4, 4], dim=-1)[:2])[1])
    parts = [sums_of(*qkv.split([8, 4, 4], dim=-1)[:2])] * 2
    call, asked = shared(parts)
    q_norm, k_norm = over(8, 2), over(4, 2)
    both = merged(q_norm, k_norm, qkv, 8, 4)
    want = call(q_norm, k_norm, *qkv.split([8, 4, 4], dim=-1)[:2])
    assert len(asked) == 2 and torch.equal(both[0], want[0]) and torch.equal(both[1], want[1])


@pytest.mark.parametrize("release", ["0.23.0", "0.26.0", "0.32.0", "0.33.0"])
def test_each_release_has_both(release):
    names = [s.name for s in norm.SEAMS for t in s.targets if "MiniMax" in t.qualname and t.holds(Version(release))]
    assert names == ["norm.cuda_queries", "norm.cuda_queries_merged"]


class MiniMaxText01RMSNormTP(torch.nn.Module):
    """A stand-in of vLLM's class."""

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))

    @staticmethod
    def forward_qk(q_norm, k_norm, q, k):
        return q * q_norm.weight, k * k_norm.weight


def test_the_norms_of_an_attention_layer_have_one_certificate():
    attention = torch.nn.Module()
    attention.q_norm, attention.k_norm = MiniMaxText01RMSNormTP(8), MiniMaxText01RMSNormTP(4)
    found = [check for check in rows._of_layers(attention, torch.bfloat16) if check.operation == "cuda.norm"]
    assert [check.problem for check in found] == ["MiniMaxText01RMSNormTP 8 4 bfloat16"]
    x = torch.randn(3, 12)
    q, k = found[0].run(x)
    assert torch.equal(q, x[:, :8]) and torch.equal(k, x[:, 8:])


def test_ranks_certify_their_own_part_alone(monkeypatch):
    """A rank that has the certificate already would not come to a sum over ranks."""
    monkeypatch.setattr(kernels, "square_sums", sums_of)
    monkeypatch.setattr(kernels, "norm_by_sums", normed)
    monkeypatch.setattr(norm, "_added", None)
    attention = torch.nn.Module()
    attention.q_norm, attention.k_norm = MiniMaxText01RMSNormTP(8), MiniMaxText01RMSNormTP(4)
    for held in (attention.q_norm, attention.k_norm):
        held.tp_world, held.variance_epsilon = 2, 1e-6
    (check,) = rows._norms_over_heads(attention, torch.bfloat16)
    assert check.problem == "MiniMaxText01RMSNormTP 8 4 of 2 ranks bfloat16"
    x = torch.randn(3, 12)
    q, k = check.run(x)
    assert torch.equal(q[1:2], check.run(x[1:2])[0]) and k.shape == (3, 4)


def test_norms_of_single_heads_have_none():
    attention = torch.nn.Module()
    attention.q_norm, attention.k_norm = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
    assert not list(rows._norms_over_heads(attention, torch.bfloat16))
