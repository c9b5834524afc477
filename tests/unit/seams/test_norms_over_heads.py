"""The norms of MiniMax-M2 over all heads: one bundled kernel for each, a row certificate, and refusal over ranks."""

from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from bi_patch.errors import UnsupportedFeature
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


def test_a_sum_over_ranks_is_refused(forward):
    with pytest.raises(UnsupportedFeature, match="norm.cuda_queries: .* sum over ranks"):
        forward[0](over(8, 2), over(4, 2), torch.randn(3, 8), torch.randn(3, 4))


def test_merged_rows_get_the_same_norms_and_the_same_refusal(forward):
    merged, qkv = norm._merged(None).__func__, torch.randn(3, 16)
    q_norm, k_norm = over(8), over(4)
    q, k, v = merged(q_norm, k_norm, qkv, 8, 4)
    want = forward[0](q_norm, k_norm, *qkv.split([8, 4, 4], dim=-1)[:2])
    assert torch.equal(q, want[0]) and torch.equal(k, want[1]) and torch.equal(v, qkv[:, 12:])
    with pytest.raises(UnsupportedFeature, match="norm.cuda_queries: .* sum over ranks"):
        merged(over(8, 2), over(4, 2), qkv, 8, 4)


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


def test_norms_of_single_heads_have_none():
    attention = torch.nn.Module()
    attention.q_norm, attention.k_norm = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
    assert not list(rows._norms_over_heads(attention, torch.bfloat16))
