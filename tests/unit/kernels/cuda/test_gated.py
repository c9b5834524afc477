"""Forms of SwiGLU on the CPU: g++ compiles the kernels over emulated instructions."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.kernels.cuda import gated

PARAMETERS = "const u16* x, u16* out, i64 x_row, u32 rows, "
KERNELS = {
    "gated_silu": f"{PARAMETERS} float factor, u32 zero",
    "clamped_pairs": f"{PARAMETERS} float alpha, float limit",
}


@pytest.fixture
def run(emulated, tmp_path, monkeypatch):
    def load(form, kernel, device):
        held = emulated(tmp_path, "gated", KERNELS, form.defines())
        return lambda grid, stream, given: getattr(held, f"run_{kernel}")(*grid, *given)

    monkeypatch.setattr(gated, "load", load)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    return lambda x, factor, adds_zero=False: gated.run(x, factor, adds_zero)


def test_rounds_where_the_separate_steps_round(run):
    torch.manual_seed(5)
    columns, factor = 2056, 0.8838834764831844  # more than a block has, and no whole number of blocks
    x = (torch.randn(3, 2 * columns + 8) * 4).bfloat16()[:, 8:]  # rows are strided
    gate, up = x.float().split(columns, 1)
    rounded = lambda t: t.bfloat16().float()  # noqa: E731
    want = rounded(torch.nn.functional.silu(rounded(gate * torch.tensor(factor)))) * up
    assert torch.equal(run(x, factor), want.bfloat16())
    assert torch.equal(run(x[1:2, :], factor), want[1:2].bfloat16())
    odd = x.flatten()[4 : 4 + 2 * columns].view(1, -1)  # not aligned to 16 bytes
    assert torch.equal(run(odd, 1.0), run(odd.clone(), 1.0))


def test_every_gate_is_rounded_as_the_exact_activation_is(run):
    gates = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(16, 4096)
    x = torch.cat([gates, torch.ones_like(gates)], 1)
    wide = gates.float()
    want = (wide / (1 + torch.exp(-wide))).bfloat16()
    got = run(x, 1.0)
    differ = got.view(torch.int16) != want.view(torch.int16)
    assert not (differ & ~want.isnan()).any() and torch.equal(got.isnan(), want.isnan())


def test_minus_zero_counts_as_zero_where_vllm_adds_zero(run):
    x = torch.tensor([[2.0, -2.0, 0.0, -0.0] * 2 + [-0.0] * 8]).bfloat16()
    for factor in (1.0, 0.5):
        kept, added = (run(x, factor, adds_zero).signbit()[0, :4].tolist() for adds_zero in (False, True))
        assert kept == [True, False, True, False] and added == [False, True, False, True]


def test_pairs_are_clamped_and_rounded_once(run):
    torch.manual_seed(5)
    odd = torch.tensor([[3.0, torch.nan], [-torch.inf, 1], [1e-39, 0], [9, 9]]).repeat(3, 2, 1)
    pairs = torch.cat([torch.randn(3, 264, 2) * 8, odd], 1)
    x = pairs.bfloat16()
    gate, up = x.float().clamp(max=7).unbind(2)
    up = torch.where(up.isnan(), 7.0, up.clamp(min=-7))
    want = ((up + 1) * gate / (1 + torch.exp(-gate * torch.tensor(1.702)))).bfloat16()
    out = torch.empty(3, 272, dtype=torch.bfloat16)
    gated.run_pairs(x.flatten(1), out, 1.702, 7.0)
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.nan_to_num(5), want.nan_to_num(5))


def test_refuses_more_elements_than_the_kernel_counts(run):
    x = torch.zeros(1, 1).bfloat16().expand(1 << 31, 16)
    with pytest.raises(ValueError, match="too many elements"):
        gated.run_pairs(x, x[:, 8:], 1.702, 7.0)


def test_takes_whole_groups_of_16_bit_elements():
    assert gated.covers(12288, torch.bfloat16) and gated.covers(8, torch.float16)
    assert not gated.covers(12, torch.bfloat16) and not gated.covers(0, torch.bfloat16)
    assert not gated.covers(12288, torch.float32)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("brain", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_compiles_without_a_gpu(arch, brain, scaled):
    assert gated.build(gated.Form(12288, brain, scaled), arch, 13)[:4] == b"\x7fELF"
