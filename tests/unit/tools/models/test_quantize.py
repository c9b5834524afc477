"""Quantized checkpoints: the formats, read back by the reader that verify compares products with."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bi_patch.tools.models import quantize
from bi_patch.tools.verify import checkpoint, dequantized

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
NAMES = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    made = {f"{name}.weight": torch.randn(128, 256, generator=generator).to(torch.bfloat16) for name in NAMES}
    made["lm_head.weight"] = torch.randn(16, 256).to(torch.bfloat16)
    save_file(made, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    "scheme",
    [quantize.INT8, quantize.STATIC, quantize.AWQ, quantize.GPTQ, quantize.W4A16, quantize.ZEROS, quantize.FP8_BLOCKS],
)
def test_a_checkpoint_is_near_what_it_was_made_from(folder, scheme):
    before = load_file(folder / "model.safetensors")
    quantize.convert(folder, scheme, left_out=(NAMES[3],))
    after = load_file(folder / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(after[f"{NAMES[3]}.weight"], before[f"{NAMES[3]}.weight"])
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    held = dequantized.Checkpoint(str(folder), MERGED)
    read = held.weight("model.layers.0.self_attn.qkv_proj", None)
    wanted = torch.cat([before[f"{name}.weight"] for name in NAMES[:3]]).double()
    steps = 127 if scheme in (quantize.INT8, quantize.STATIC) else 7.5
    assert (read - wanted).abs().max() < 0.6 * wanted.abs().max() / steps
    assert read.unique().numel() > 200  # a real spread
    assert torch.equal(held.weight(NAMES[0], torch.bfloat16), read[:128].bfloat16().double())
    with pytest.raises(KeyError):
        held.weight("model.layers.1.self_attn.qkv_proj", None)
    with pytest.raises(KeyError):
        quantize.convert(folder, "int3")


def test_other_weights_of_a_quantized_checkpoint(folder, tmp_path_factory):
    quantize.convert(folder, quantize.GPTQ)
    other = checkpoint.write(str(folder), 5, tmp_path_factory.mktemp("other"))
    a, b = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys() and all(a[name].dtype == b[name].dtype for name in a)
    assert torch.equal(a[f"{NAMES[0]}.g_idx"], b[f"{NAMES[0]}.g_idx"])
    assert not torch.equal(a[f"{NAMES[0]}.qweight"], b[f"{NAMES[0]}.qweight"])
    assert (b[f"{NAMES[0]}.scales"] > 0).all()
