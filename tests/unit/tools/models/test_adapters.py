"""An adapter is made only for the classes of models whose linear layers are known."""

import pytest

from bi_patch.tools.models import adapters, families, shapes, vision

LORA = ("Qwen2.5", "Mistral")


def test_a_class_under_another_types_name_gets_no_adapter(tmp_path):
    """The tiny shape of a family that transformers lacks has Llama's type, and names its layers otherwise."""
    for name, config in families.FAMILIES.items():
        assert (adapters.missing(config) == "") == (name in LORA), name
    for name in ("PLaMo 3", "InternLM 2", "DeepSeek-MoE"):
        assert families.FAMILIES[name]["model_type"] == "llama"
        with pytest.raises(adapters.NoAdapter, match=families.FAMILIES[name]["architectures"][0]):
            adapters.write(families.write(name, str(tmp_path)), tmp_path / "made", seed=1, rank=8)


def test_every_known_class_gets_one():
    for kind, name in adapters.KINDS.items():
        assert adapters.missing({"model_type": kind, "architectures": [name]}) == ""
        assert adapters.missing({"model_type": kind}) == ""
    assert "'phi3'" in adapters.missing({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]})


def test_adapters_of_a_model_with_images_change_its_language_model(tmp_path):
    from safetensors import safe_open

    for kind in ("Qwen3-VL", "Gemma 3"):
        folder = adapters.write(shapes.save(kind, vision.VISION[kind], tmp_path), tmp_path / "made", seed=1, rank=8)
        with safe_open(folder / "adapter_model.safetensors", "pt") as held:
            names = set(held.keys())
        assert names and all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
