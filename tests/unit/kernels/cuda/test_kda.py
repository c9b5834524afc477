"""Kimi delta attention on the CPU, compared with fp64: g++ compiles the kernels over emulated instructions."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.kernels.cuda import kda

LAUNCH = {
    "prepare": "const u16* y, const u16* gate, const u16* beta, const float* rate, const float* dt_bias, float* "
    "decays, float* numbers, int tokens, int gate_row, int beta_row",
    "scan": "const u16* y, const float* decays, const float* numbers, float* states, u16* out, const int* starts, "
    "const int* slots, const signed char* fresh, i64 state_slot",
}
TOKENS, SLOTS = 12, 4


@pytest.fixture(scope="module")
def kernels(emulated, tmp_path_factory):
    """The kernels for the CPU, by form."""
    forms = (kda.Form(1, 2), kda.Form(1, 4))
    return {form: emulated(tmp_path_factory.mktemp("kda"), "kda", LAUNCH, form.defines()) for form in forms}


@pytest.fixture
def run(kernels, monkeypatch):
    """run(rows, ...): kda.run with so many rows of a thread."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))

    def load(form, kernel, device):
        return lambda grid, stream, given: getattr(kernels[form], f"run_{kernel}")(*grid, *given)

    monkeypatch.setattr(kda, "load", load)

    def step(rows, *given):
        monkeypatch.setattr(kda, "choose", lambda heads, requests: kda.Form(heads, rows))
        return kda.run(*given)

    return step


@pytest.fixture
def layer():
    """The tokens of one request (y, gate, beta), and a layer's parameters (rate, dt_bias)."""
    torch.manual_seed(5)
    gate = torch.randn(TOKENS, 3 * 128).bfloat16()[:, 128:256]
    tokens = torch.nn.functional.silu(torch.randn(TOKENS, 3 * 128)).bfloat16(), gate, torch.randn(TOKENS, 1).bfloat16()
    return tokens, (torch.randn(1), torch.randn(128))


def exact(tokens, parameters):
    """The outputs, and the state after them, in fp64 by a plain loop."""
    y, gate, beta = (t.double() for t in tokens)
    rate, bias = (t.double() for t in parameters)
    state, outs = torch.zeros(128, 128).double(), []
    for (q, k, v), raw, b in zip(y.view(TOKENS, 3, 128), gate, beta, strict=True):
        q, k = (t / (t.square().sum() + 1e-6).sqrt() for t in (q, k))
        state = state * (-rate.exp() * torch.nn.functional.softplus(raw + bias)).exp()
        state = state + torch.outer(b.sigmoid() * (v - state @ k), k)
        outs.append(state @ q * 128**-0.5)
    return torch.stack(outs), state


def ints(*held):
    return torch.tensor(held, dtype=torch.int32)


def test_cuts_company_decodes_and_rows_of_a_thread_change_no_bit(run, layer):
    tokens, parameters = layer
    states = torch.randn(SLOTS, 1, 128, 128)

    def step(rows, slot, first, last, beside=0):
        given = [torch.cat([t[:beside], t[first:last]]) for t in tokens]
        out = torch.empty(len(given[0]), 1, 128, dtype=torch.bfloat16)
        fresh = torch.tensor([1, first == 0], dtype=torch.int8)
        run(rows, out, *given, *parameters, states, ints(3, slot), ints(0, beside, len(out)), fresh)
        return out[beside:]

    want, (outs, state) = step(4, 1, 0, TOKENS), exact(tokens, parameters)
    assert (want[:, 0].double() - outs).abs().max() < 8e-3 * outs.abs().max()
    assert (states[1, 0].double() - state).abs().max() < 1e-5 * state.abs().max()

    got = [step(2, 2, 0, 5, beside=2)]
    for t in range(5, 7):
        given = [held[[0, t]] for held in tokens]
        out = torch.empty(2, 1, 128, dtype=torch.bfloat16)
        run(4, out, *given, *parameters, states, ints(0, 2), None, None)
        assert not out[0].any()
        got.append(out[1:])
    got.append(step(2, 2, 7, TOKENS, beside=1))
    assert torch.equal(torch.cat(got), want) and torch.equal(states[2], states[1])


def test_few_requests_take_few_rows_of_a_thread():
    assert kda.choose(32, 1).rows == 2 and kda.choose(32, 8).rows == 4
    assert kda.Form(32, 2).parts == 4 and kda.Form(32, 4).parts == 2


def test_what_does_not_fit_is_named(layer):
    (y, gate, beta), parameters = layer
    assert not kda.covers(128, 4) and "64 elements" in kda.covers(64, 4) and "3 tokens" in kda.covers(128, 3)
    out, states, slots = torch.empty(TOKENS, 128).bfloat16(), torch.zeros(2, 1, 128, 128), ints(1)
    for changed, said in (
        ({"y": y.float()}, "bf16"),
        ({"y": y[:, :256]}, "inputs and"),
        ({"rate": parameters[0].bfloat16()}, "fp32"),
        ({"states": states[..., :64]}, "states"),
        ({"slots": slots.long()}, "int32"),
    ):
        given = {"out": out, "y": y, "gate": gate, "beta": beta, "rate": parameters[0], "dt_bias": parameters[1]}
        given |= {"states": states, "slots": slots, "starts": None, "fresh": None} | changed
        with pytest.raises(kda.Unfit, match=said):
            kda.run(**given)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("rows", [2, 4])
def test_compiles_without_a_gpu(arch, rows):
    assert kda.build(kda.Form(32, rows), arch, 13)[:4] == b"\x7fELF"
