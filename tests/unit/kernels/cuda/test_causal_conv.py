"""The kernels of causal convolutions on the CPU, compared with fp64: g++ compiles them over emulated instructions."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.kernels.cuda import causal_conv

LAUNCH = {
    "convolve": "const u16* x, const u16* weight, const u16* bias, u16* conv, u16* out, const int* starts, const int* "
    "slots, const signed char* fresh, const int* which, i64 conv_slot, int tokens, int requests, int per, int x_row, "
    "int conv_row",
    "keep_inputs": "const u16* x, u16* conv, const int* starts, const int* slots, const signed char* fresh, i64 "
    "conv_slot, int x_row, int conv_row",
}
FORMS = {gated: causal_conv.Form(70, 3, gated) for gated in (False, True)}
FLOATS = causal_conv.Form(70, 3, False, True)


@pytest.fixture(scope="module")
def kernels(emulated, tmp_path_factory):
    """The kernels for the CPU, by form."""
    forms = (*FORMS.values(), FLOATS)
    return {
        form: emulated(tmp_path_factory.mktemp("causal_conv"), "causal_conv", LAUNCH, form.defines()) for form in forms
    }


@pytest.fixture
def layer(kernels, monkeypatch):
    """layer(gated, conv, *requests (slot, fresh, rows), decode=False): the outputs of the requests of a step."""

    def load(form, kernel, device):
        return lambda grid, stream, given: getattr(kernels[form], f"run_{kernel}")(*grid, *given)

    monkeypatch.setattr(causal_conv, "load", load)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    torch.manual_seed(3)
    weight, bias = torch.randn(70, 3).bfloat16(), torch.randn(70).bfloat16()

    def step(gated, conv, *requests, decode=False, floats=False):
        slots, fresh, rows = zip(*requests, strict=True)
        sizes = torch.tensor([0, *map(len, rows)])
        more = None, None, None
        if not decode:
            which = torch.repeat_interleave(torch.arange(len(slots)), sizes[1:]).to(torch.int32)
            more = sizes.cumsum(0).to(torch.int32), torch.tensor(fresh, dtype=torch.int8), which
        given = torch.cat(rows), weight.float() if floats else weight, bias, conv
        form = FLOATS if floats else FORMS[gated]
        return causal_conv.run(form, *given, torch.tensor(slots, dtype=torch.int32), *more).split(sizes[1:].tolist())

    step.weight, step.bias = weight, bias
    return step


@pytest.mark.parametrize("gated", [False, True])
def test_cuts_company_and_decodes_change_no_bit(layer, gated):
    torch.manual_seed(5)
    x, other = (torch.randn(n, 70 * (3 if gated else 1)).bfloat16() for n in (21, 5))
    conv = torch.randn(4, 2, 70).bfloat16()
    (want,) = layer(gated, conv, (1, 1, x))
    state = conv[1].clone()
    before, after, inputs = x.view(21, 3, -1).unbind(1) if gated else (1, 1, x)
    u = before * inputs
    padded = torch.cat([torch.zeros(2, 70), u.float()]).double()
    sums = sum(padded[i : i + 21] * layer.weight[:, i].double() for i in range(3)) + layer.bias.double()
    exact = after.double() * sums if gated else torch.nn.functional.silu(sums)
    assert torch.equal(state, u[-2:])
    assert (want.double() - exact).abs().max() < 1e-2 * sums.abs().max()

    got = [layer(gated, conv, (3, 1, other), (2, 1, x[:1]))[1]]
    got += layer(gated, conv, (2, 0, x[1:10]), (3, 0, other))[:1]
    for t in range(10, 13):
        got += layer(gated, conv, (0, 0, other[:1]), (2, 0, x[t : t + 1]), decode=True)[1:]
    got += layer(gated, conv, (1, 1, other), (2, 0, x[13:]))[1:]
    assert torch.equal(torch.cat(got), want) and torch.equal(conv[2], state)


def test_weights_of_32_bits_with_the_same_values_have_the_same_bits(layer):
    torch.manual_seed(5)
    x, conv = torch.randn(9, 70).bfloat16(), torch.zeros(4, 2, 70).bfloat16()
    (want,), (got,) = layer(False, conv, (1, 1, x)), layer(False, conv, (2, 1, x), floats=True)
    assert torch.equal(got, want) and torch.equal(conv[2], conv[1])
    with pytest.raises(causal_conv.Unfit, match="weights in torch.bfloat16"):
        causal_conv.run(FLOATS, x, layer.weight, None, conv, torch.ones(1, dtype=torch.int32), None, None, None)


def test_what_does_not_fit_is_named(layer):
    conv, x = torch.zeros(2, 2, 70).bfloat16(), torch.zeros(1, 210).bfloat16()
    assert not causal_conv.covers(70, 3) and "even" in causal_conv.covers(71, 3) and "9" in causal_conv.covers(70, 9)
    with pytest.raises(causal_conv.Unfit, match="bf16"):
        layer(True, conv, (1, 1, x.float()))
    with pytest.raises(causal_conv.Unfit, match="states"):
        layer(True, conv[:, :1], (1, 1, x))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles_without_a_gpu(arch):
    assert causal_conv.build(causal_conv.Form(2048, 3, True), arch, 13)[:4] == b"\x7fELF"
