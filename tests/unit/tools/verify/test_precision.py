"""The bound on each output's error: half a unit in the last place, and every output finite."""

import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from bi_patch.tools.verify import layers  # noqa: E402
from bi_patch.tools.verify.dequantized import Checkpoint  # noqa: E402
from bi_patch.tools.verify.engine import Options  # noqa: E402
from bi_patch.tools.verify.precision import folder, over, renamed  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_passes_and_truncation_does_not(dtype):
    exact = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros_like(exact)
    rounded = exact.to(dtype)
    assert 0.9 < over(rounded, exact, nothing) <= 1
    lower = torch.nextafter(rounded, torch.zeros_like(rounded))
    down = torch.where(rounded.double().abs() > exact.abs(), lower, rounded)
    assert 1.5 < over(down, exact, nothing) <= 2


def test_the_last_place_is_that_of_the_value():
    exact = torch.tensor([1.0, 1.999, 2.0, 1024.0], dtype=torch.float64)
    half = torch.tensor([2.0**-24, 2.0**-24, 2.0**-23, 2.0**-14], dtype=torch.float64)
    for value, part in zip(exact.float().double(), half):
        off = (value + 2 * part).float()[None]
        assert over(off, value[None], torch.zeros(1, dtype=torch.float64)) == 2


@pytest.mark.parametrize(
    "y, exact, allowed",
    [
        (math.nan, 1.0, 1.0),
        (math.inf, 1.0, 1.0),
        (1.0, math.nan, 1.0),
        (1.0, math.inf, math.inf),
        (1.0, 1.0, math.nan),
    ],
)
def test_what_is_not_finite_fails(y, exact, allowed):
    given = torch.tensor([0.5, y]), *(torch.tensor([0.5, v], dtype=torch.float64) for v in (exact, allowed))
    assert over(*given) == math.inf


def test_an_error_where_none_is_allowed_fails():
    zero = torch.zeros(2, dtype=torch.float64)
    assert over(torch.tensor([0.0, 0.0]), zero, zero) == 0
    assert over(torch.tensor([0.0, 1e-30]), zero, zero) > 1


def test_which_linears_of_8_bits_are_compared_on_cuda():
    def layer(kind, static=False):
        kernel = type(kind, (), {"config": SimpleNamespace(is_static_input_scheme=static)})()
        return SimpleNamespace(scheme=SimpleNamespace(kernel=kernel))

    assert layers._integers(layer("CutlassInt8ScaledMMLinearKernel")) == "W8A8 cutlass"
    assert layers._integers(layer("CutlassInt8ScaledMMLinearKernel", static=True)) == "W8A8 cutlass static"
    assert layers._integers(layer("DeepGemmFp8BlockScaledMMKernel")) == layers._integers(SimpleNamespace()) == ""


def test_files_are_those_of_a_folder_or_of_the_hubs_cache(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or "cached")
    assert folder(Options(str(tmp_path))) == str(tmp_path) and not asked
    assert folder(Options("some/model", extra={"revision": "abc", "download_dir": "there"})) == "cached"
    assert asked == [(("some/model",), {"revision": "abc", "cache_dir": "there", "local_files_only": True})]


def test_a_tensor_has_the_name_that_vllm_gives_it(tmp_path):
    utils = pytest.importorskip("vllm.model_executor.models.utils")
    from safetensors.torch import save_file

    prefixes = {"model.language_model.": "language_model.model.", "lm_head.": None}
    given = {"orig_to_new_stacked": {".q_proj": (".qkv_proj", "q")}}
    given = {name: value for name, value in given.items() if name in utils.WeightsMapper.__dataclass_fields__}
    model = SimpleNamespace(hf_to_vllm_mapper=utils.WeightsMapper(orig_to_new_prefix=prefixes, **given))
    parts = {f"model.language_model.layers.0.{part}": torch.randn(4, 8) for part in ("q_proj", "k_proj")}
    tensors = {f"{name}.weight": weight for name, weight in parts.items()} | {"lm_head.weight": torch.zeros(4, 8)}
    save_file(tensors, tmp_path / "model.safetensors")
    held = Checkpoint(str(tmp_path), {"qkv_proj": ["q_proj", "k_proj"]}, renamed(model))
    assert torch.equal(held.plain("language_model.model.layers.0.qkv_proj"), torch.cat([*parts.values()]).double())
    with pytest.raises(KeyError):
        held.plain("lm_head")
    assert Checkpoint(str(tmp_path), {}, renamed(SimpleNamespace())).plain("lm_head").shape == (4, 8)
