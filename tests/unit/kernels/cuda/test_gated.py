"""SwiGLU with a factor of its gate on the CPU: g++ compiles the kernel over emulated instructions."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.kernels.cuda import gated

PARAMETERS = "const u16* x, u16* out, i64 x_row, float factor"


@pytest.fixture
def run(emulated, tmp_path, monkeypatch):
    def load(form, device):
        held = emulated(tmp_path, "gated", {"gated_silu": PARAMETERS}, form.defines())
        return lambda grid, stream, given: held.run_gated_silu(*grid, *given)

    monkeypatch.setattr(gated, "load", load)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    return gated.run


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


def test_takes_whole_groups_of_16_bit_elements():
    assert gated.covers(12288, torch.bfloat16) and gated.covers(8, torch.float16)
    assert not gated.covers(12, torch.bfloat16) and not gated.covers(0, torch.bfloat16)
    assert not gated.covers(12288, torch.float32)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("brain", [False, True])
def test_compiles_without_a_gpu(arch, brain):
    assert gated.build(gated.Form(12288, brain), arch, 13)[:4] == b"\x7fELF"
