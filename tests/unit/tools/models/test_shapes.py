"""The shapes of real models, for engines with random weights."""

import importlib.util
import json

import pytest

from bi_patch.tools.models import shapes


def test_a_shape_is_written_whole_into_a_folder_of_its_own(tmp_path):
    folders = {name: shapes.write(name, tmp_path) for name in shapes.SHAPES}
    assert len(set(folders.values())) == len(shapes.SHAPES)
    for name, folder in folders.items():
        assert folder == str(tmp_path / shapes.short(name)) and " " not in shapes.short(name)
        with open(f"{folder}/config.json") as file:
            assert json.load(file) == shapes.SHAPES[name]


def test_an_unknown_shape_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError):
        shapes.write("Qwen9-900B", tmp_path)
    assert not list(tmp_path.iterdir())


def test_few_layers_are_the_only_change_of_a_shortened_model():
    whole, few = shapes.SHAPES["Qwen3-30B-A3B"], shapes.SHAPES["Qwen3-30B-A3B, 6 layers"]
    assert {key for key in whole if whole[key] != few[key]} == {"num_hidden_layers"}


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers reads the configs")
@pytest.mark.parametrize("name", shapes.SHAPES)
def test_transformers_reads_every_shape(name, tmp_path):
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(shapes.write(name, tmp_path))
    held = shapes.SHAPES[name]
    assert read.architectures == held["architectures"]
    assert read.num_hidden_layers == held["num_hidden_layers"] and read.vocab_size == held["vocab_size"]
