"""FP8 linears against fp64: which loaded weights may differ from the checkpoint's, and which products pass."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from bi_patch.tools.verify import eighths
from bi_patch.tools.verify.dequantized import Checkpoint

EIGHTH = torch.float8_e4m3fn
N, K = 256, 384


def cast(w, scale):
    """w [N, K] rounded to e4m3 with a scale of each element."""
    return (w / scale).clamp(-448, 448).float().to(EIGHTH)


def checkpoint_blocks(n=N, k=K):
    """e4m3 [n, k], and fp32 scales of blocks."""
    generator = torch.Generator().manual_seed(n)
    w = torch.randn(n, k, generator=generator, dtype=torch.float64) * 0.02
    scale = (eighths._largest(w) / 448).float()
    return cast(w, eighths.spread(scale.double(), n, k)), scale


def requantized(floats, scale, times=1.0):
    """As vLLM's requant_weight_ue8m0_inplace: the same blocks with scales that are powers of two."""
    n, k = floats.shape
    w = floats.double() * eighths.spread(scale.double(), n, k)
    powers = torch.exp2(torch.log2(eighths._largest(w).clamp_min(1e-4) / 448).ceil()).float() * times
    return cast(w, eighths.spread(powers.double(), n, k)), powers


class Blocks(torch.nn.Module):
    """A linear of FP8 blocks as vLLM holds it, its own quantization method."""

    def __init__(self, floats, scale, kind="DeepGemmFp8BlockScaledMMKernel", wrong=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(floats, requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
        self.wrong = wrong
        self.quant_method = SimpleNamespace(fp8_linear=type(kind, (), {})(), apply=self.product)

    def product(self, layer, x, bias):
        parts = x.float().unflatten(1, (-1, 128))
        scale = torch.exp2(torch.log2(parts.abs().amax(-1, keepdim=True) / 448).ceil())
        rows = (parts / scale).to(EIGHTH).float() * scale * self.wrong
        held = eighths.loaded(layer, N, K).dequantized()
        out = (rows.flatten(1).double() @ held.T).bfloat16()
        return out if bias is None else out + bias


class Rows(torch.nn.Module):
    """A linear with a scale for each row, or one, which lies as [K, N] filled up; static: the activations' scale."""

    def __init__(self, floats, scale, static=None):
        super().__init__()
        n, k = floats.shape
        padded = torch.zeros(n + 8, k + 16).to(EIGHTH)
        padded[:n, :k] = floats
        self.weight = torch.nn.Parameter(padded.t(), requires_grad=False)
        full = torch.cat((scale, torch.ones(8))) if scale.numel() > 1 else scale
        self.weight_scale = torch.nn.Parameter(full, requires_grad=False)
        names = ["weight", "weight_scale", "input_scale", "input_scale_ub"]
        held = {"quant_fp8": SimpleNamespace(static=static is not None), "layer_param_names": names}
        self.static, self.sizes = static, (n, k)
        self.scheme = SimpleNamespace(kernel=type("CutlassFP8ScaledMMLinearKernel", (), held)())
        self.quant_method = SimpleNamespace(apply=self.product)

    def product(self, layer, x, bias):
        scale = x.float().abs().amax(-1, keepdim=True) / 448 if self.static is None else self.static
        rows = (x.float() / scale).clamp(-448, 448).to(EIGHTH).double() * scale
        return (rows @ eighths.loaded(layer, *self.sizes).dequantized().T).bfloat16()


def exact(floats, scale):
    n, k = floats.shape
    return floats.double() * (eighths.spread(scale.double(), n, k) if scale.ndim == 2 else scale.double()[:, None])


def test_which_linears_have_a_scheme():
    blocks, by_row = Blocks(*checkpoint_blocks()), Rows(torch.zeros(8, 16).to(EIGHTH), torch.ones(8))
    assert eighths.scheme(blocks) == "W8A8 FP8 blocks" and eighths.scheme(by_row) == "W8A8 FP8 by row"
    assert eighths.scheme(Rows(torch.zeros(8, 16).to(EIGHTH), torch.ones(8), 0.5)) == "W8A8 FP8 static"
    blocks.is_bmm = True
    assert eighths.scheme(blocks) == eighths.scheme(SimpleNamespace()) == ""


def test_blocks_rounded_to_powers_of_two_are_near_and_are_what_a_product_has():
    floats, scale = checkpoint_blocks()
    layer = Blocks(*requantized(floats, scale))
    held, want = eighths.loaded(layer, N, K), exact(floats, scale)
    assert 0.9 < eighths.near(held, want) <= 1
    assert (held.dequantized() - want).abs().max() > 0
    for m in (1, 17):
        assert eighths.error(layer, held.dequantized(), torch.bfloat16, m, None) <= 1
        assert eighths.error(layer, want, torch.bfloat16, m, None) > 3  # the checkpoint's is another weight


def test_a_wrong_product_is_found():
    floats, scale = checkpoint_blocks()
    for wrong in (1.01, 0.99):
        layer = Blocks(*requantized(floats, scale), wrong=wrong)
        assert eighths.error(layer, eighths.loaded(layer, N, K).dequantized(), torch.bfloat16, 16, None) > 1


def test_blocks_that_are_not_rounded_again_must_be_equal():
    floats, scale = checkpoint_blocks()
    want = exact(floats, scale)
    assert eighths.near(eighths.Loaded(floats, scale), want) == 0
    # A step in one element; the scales are no powers of two.
    other = floats.view(torch.uint8).clone()
    other[3, 5] ^= 1
    assert eighths.near(eighths.Loaded(other.view(EIGHTH), scale), want) == float("inf")


@pytest.mark.parametrize("what", ["step", "coarse", "swapped", "sign", "nan", "scale"])
def test_more_than_half_a_step_is_wrong(what):
    floats, scale = checkpoint_blocks()
    got, powers = requantized(floats, scale, 2.0 if what == "coarse" else 1.0)
    words = got.view(torch.uint8).clone()
    if what == "step":
        words[3, 5] = words[3, 5] + 2
    if what == "sign":
        words[3, 5] ^= 128
    if what == "nan":
        words[3, 5] = 127
    if what == "swapped":
        words = words.roll(1, 0)
    if what == "scale":
        powers[1, 1] *= 2
    assert eighths.near(eighths.Loaded(words.view(EIGHTH), powers), exact(floats, scale)) > 1


def test_a_part_of_a_weight_has_its_scales(monkeypatch):
    floats, scale = checkpoint_blocks()
    held = eighths.Loaded(*requantized(floats, scale))
    whole = eighths.near(held, exact(floats, scale))
    monkeypatch.setattr(eighths, "_AT_ONCE", 128)
    assert eighths.near(held, exact(floats, scale)) == whole
    assert torch.equal(held.part(128, 300).dequantized(), held.dequantized()[128:])
    by_row = eighths.Loaded(floats, torch.rand(N))
    assert torch.equal(by_row.part(128, 300).dequantized(), by_row.dequantized()[128:])


def test_an_edge_that_fills_no_block():
    floats, scale = checkpoint_blocks(192, 384)
    held = eighths.Loaded(*requantized(floats, scale))
    assert held.scale.shape == (2, 3) and 0 < eighths.near(held, exact(floats, scale)) <= 1


def save(folder, parts):
    tensors = {f"layer.{part}.{name}": value for part, held in parts.items() for name, value in held.items()}
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(str(folder), {"qkv_proj": ["q_proj", "k_proj"]})


def merged(static=False):
    """Two parts with one scale each, and what vLLM makes of them: both rounded to the larger scale, through fp16."""
    parts, generator = {}, torch.Generator().manual_seed(1)
    for name, size, scale in (("q_proj", 64, 0.0013), ("k_proj", 32, 0.0004)):
        scale = torch.tensor(scale)
        w = torch.randn(size, 96, generator=generator, dtype=torch.float64) * 0.1
        parts[name] = {"weight": cast(w, scale.double()), "weight_scale": scale}
        if static:
            parts[name]["input_scale"] = torch.tensor(0.01 + size / 10000)
    most = max(held["weight_scale"] for held in parts.values())
    dequantized = [(held["weight"].half() * held["weight_scale"]).float() for held in parts.values()]
    return parts, cast(torch.cat(dequantized), most), most


def test_the_parts_of_a_merged_layer_are_rounded_to_the_largest_scale(tmp_path):
    parts, floats, most = merged()
    checkpoint = save(tmp_path, parts)
    layer = Rows(floats, most.repeat(96))
    layer.weight_scale.data[96:] = 1
    excess, rows, sizes = eighths.compare(layer, "layer.qkv_proj", eighths.BY_ROW, checkpoint, torch.bfloat16, (1, 16))
    assert excess <= 1 and sizes == (96, 96)
    assert 0 < eighths.near(eighths.loaded(layer, 96, 96), checkpoint.weight("layer.qkv_proj", None), float(most)) <= 1
    one = Rows(floats, most.reshape(1))
    assert eighths.compare(one, "layer.qkv_proj", eighths.BY_ROW, checkpoint, torch.bfloat16, (1,))[0] <= 1
    # With another scale than the largest part's, or where the checkpoint has a scale for each row.
    wrong = Rows(floats, (most * 1.01).reshape(1))
    excess, rows, _ = eighths.compare(wrong, "layer.qkv_proj", eighths.BY_ROW, checkpoint, torch.bfloat16, (1, 16))
    assert excess == float("inf") and rows == 0
    assert eighths.near(eighths.loaded(one, 96, 96), checkpoint.weight("layer.qkv_proj", None)) == float("inf")
    # And the part with the smaller scale, were it not rounded again, must be equal.
    kept = torch.cat([held["weight"] for held in parts.values()])
    scales = torch.cat([held["weight_scale"].repeat(len(held["weight"])) for held in parts.values()])
    scales[64:] *= 1.001
    assert eighths.compare(Rows(kept, scales), "layer.qkv_proj", eighths.BY_ROW, checkpoint, torch.bfloat16, (1,)) == (
        *(float("inf"), 0),
        (96, 96),
    )


def test_the_checkpoints_scale_of_activations_rounds_the_rows(tmp_path):
    parts, floats, most = merged(static=True)
    checkpoint = save(tmp_path, parts)
    scale = checkpoint.static_scale("layer.qkv_proj")
    assert scale == pytest.approx(0.0164) and checkpoint.one_scale("layer.qkv_proj") == float(most)
    right, wrong = (Rows(floats, most.reshape(1), scale * by) for by in (1, 1.1))
    given = "layer.qkv_proj", eighths.STATIC, checkpoint, torch.bfloat16, (1, 16, 257)
    assert eighths.compare(right, *given)[0] <= 1
    excess, rows, _ = eighths.compare(wrong, *given)
    assert excess > 1 and rows in (1, 16, 257)


def test_scales_of_rows_are_as_in_the_checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(48, 128, generator=generator, dtype=torch.float64)
    scale = (w.abs().amax(1) / 448).float()
    floats = cast(w, scale.double()[:, None])
    checkpoint = save(tmp_path, {"o_proj": {"weight": floats, "weight_scale": scale[:, None]}})
    assert checkpoint.one_scale("layer.o_proj") is None
    given = "layer.o_proj", eighths.BY_ROW, checkpoint, torch.bfloat16, (1, 16)
    assert eighths.compare(Rows(floats, scale), *given)[0] <= 1
    assert eighths.compare(Rows(floats, scale * 1.001), *given) == (float("inf"), 0, (48, 128))


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_blocks_are_read_by_both_names_of_their_scales(name, tmp_path):
    floats, scale = checkpoint_blocks()
    checkpoint = save(tmp_path, {"o_proj": {"weight": floats, name: scale}})
    layer = Blocks(*requantized(floats, scale))
    given = "layer.o_proj", eighths.BY_BLOCK, checkpoint, torch.bfloat16, (1, 16)
    assert 0 < eighths.compare(layer, *given)[0] <= 1
    layer.bias = torch.nn.Parameter(torch.randn(N).bfloat16(), requires_grad=False)
    assert 0 < eighths.compare(layer, *given)[0] <= 1


@pytest.mark.parametrize("kind", ["weight", "rows", "blocks", "blocks twice"])
def test_a_weight_that_becomes_fp8_as_it_is_loaded_is_rounded_once(kind, tmp_path):
    plain = torch.randn(N, K, generator=torch.Generator().manual_seed(3)).bfloat16() * 0.02
    checkpoint = save(tmp_path, {"o_proj": {"weight": plain}})
    w = plain.double()
    assert not checkpoint.has_scales("layer.o_proj") and torch.equal(checkpoint.plain("layer.o_proj"), w)

    def layer(times):
        if kind == "blocks":
            scale = (eighths._largest(w) / 448).float() * times
            return Blocks(cast(w, eighths.spread(scale.double(), N, K)), scale)
        if kind == "blocks twice":  # as DeepGEMM's blocks
            scale = (eighths._largest(w) / 448).float()
            return Blocks(*requantized(cast(w, eighths.spread(scale.double(), N, K)), scale, 2.0 ** int(2 * times - 2)))
        most = w.abs().amax(1) if kind == "rows" else w.abs().amax().repeat(N)
        scale = (most / 448).float() * times
        return Rows(cast(w, scale.double()[:, None]), scale)

    how = eighths.BY_BLOCK if "blocks" in kind else eighths.BY_ROW
    given = "layer.o_proj", how, checkpoint, torch.bfloat16, (1, 16)
    assert 0 < eighths.compare(layer(1.0), *given)[0] <= 1
    for times in (0.5, 2.5):  # some do not fit; coarser than what is allowed
        excess, rows, _ = eighths.compare(layer(times), *given)
        assert excess > 1 and rows == 0


def test_8_bits_without_a_scale_are_no_weight(tmp_path):
    checkpoint = save(tmp_path, {"o_proj": {"weight": checkpoint_blocks()[0]}})
    with pytest.raises(KeyError, match="without a scale"):
        checkpoint.plain("layer.o_proj")
    with pytest.raises(KeyError):
        checkpoint.weight("layer.o_proj", None)


def test_another_layout_is_an_error():
    floats, scale = checkpoint_blocks()
    for held in (Blocks(floats, scale.T.contiguous()), Blocks(floats, scale.bfloat16())):
        with pytest.raises(ValueError, match="scales"):
            eighths.loaded(held, N, K)
    with pytest.raises(ValueError, match="7 scales"):
        layer = Rows(floats, torch.ones(N))
        layer.weight_scale = torch.nn.Parameter(torch.ones(7), requires_grad=False)
        eighths.loaded(layer, N, K)
