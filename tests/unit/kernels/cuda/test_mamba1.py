"""Mamba 1's recurrence on the CPU, compared with fp64: g++ compiles the kernel over emulated instructions."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.kernels.cuda import mamba1

PARAMETERS = (
    "const u16* x, const u16* dt, const u16* b, const u16* c, const u16* gate, const float* rate, const float* skip, "
    "const float* dt_bias, float* states, u16* out, const int* starts, const int* slots, const signed char* fresh, "
    "i64 state_slot, int x_row, int dt_row, int b_row, int c_row, int gate_row"
)
FORM = mamba1.Form(70, 16)


@pytest.fixture
def run(emulated, tmp_path, monkeypatch):
    held = emulated(tmp_path, "mamba1", {"scan": PARAMETERS}, FORM.defines())
    monkeypatch.setattr(mamba1, "load", lambda *_: lambda grid, stream, given: held.run_scan(*grid, *given))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    return mamba1.run


def test_cuts_company_and_decodes_change_no_bit(run):
    torch.manual_seed(5)
    n, channels = 21, FORM.channels
    x, dt, gate = torch.randn(n, 3 * channels).bfloat16().chunk(3, 1)
    b, c = torch.randn(n, 32).bfloat16().chunk(2, 1)
    parameters = -torch.rand(channels, 16), torch.randn(channels), torch.randn(channels)
    states, ints = torch.randn(4, channels, 16), lambda *held: torch.tensor(held, dtype=torch.int32)

    def step(slot, first, last, beside=0):
        given = [torch.cat([t[:beside], t[first:last]]) for t in (x, dt, b, c, gate)]
        fresh = torch.tensor([1, first == 0], dtype=torch.int8)
        out = run(*given, *parameters, states, ints(3, slot), ints(0, beside, beside + last - first), fresh)
        return out[beside:]

    want = step(1, 0, n)
    step_size = torch.nn.functional.softplus(dt.double() + parameters[2].double())
    state, exact = torch.zeros(channels, 16).double(), []
    for t in range(n):
        state = (parameters[0].double() * step_size[t, :, None]).exp() * state
        state = state + (step_size[t] * x[t].double())[:, None] * b[t].double()
        exact.append((state * c[t].double()).sum(1) + parameters[1].double() * x[t].double())
    exact = torch.stack(exact) * torch.nn.functional.silu(gate.double())
    assert (want.double() - exact).abs().max() < 8e-3 * exact.abs().max()
    assert (states[1].double() - state).abs().max() < 1e-5 * state.abs().max()

    got = [step(2, 0, 9, beside=4)]
    for t in range(9, 12):
        given = [held[[0, t]] for held in (x, dt, b, c, gate)]
        out = run(*given, *parameters, states, ints(0, 2), None, None)
        assert not out[0].any()
        got.append(out[1:])
    got.append(step(2, 12, n, beside=1))
    assert torch.equal(torch.cat(got), want) and torch.equal(states[2], states[1])


def test_what_does_not_fit_is_named():
    assert not mamba1.covers(16) and "24 states" in mamba1.covers(24)
    x, b = torch.zeros(1, 70).bfloat16(), torch.zeros(1, 16).bfloat16()
    given = torch.zeros(70, 16), torch.zeros(70), None
    with pytest.raises(mamba1.Unfit, match="states"):
        mamba1.run(x, x, b, b, x, *given, torch.zeros(2, 70, 8), torch.zeros(1, dtype=torch.int32), None, None)
    with pytest.raises(mamba1.Unfit, match="bf16"):
        mamba1.run(x.float(), x, b, b, x, *given, torch.zeros(2, 70, 16), torch.zeros(1, dtype=torch.int32), None, None)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles_without_a_gpu(arch):
    assert mamba1.build(mamba1.Form(8192, 16), arch, 13)[:4] == b"\x7fELF"
