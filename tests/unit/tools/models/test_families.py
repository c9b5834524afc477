"""The tiny shape of each family."""

import importlib.util
import json

import pytest

from bi_patch.tools.models import families


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers reads the configs")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_transformers_reads_every_family(name, tmp_path):
    from transformers import AutoConfig

    folder = families.write(name, tmp_path)
    with open(f"{folder}/config.json") as file:
        held = json.load(file)
    read = AutoConfig.from_pretrained(folder)
    assert held == families.FAMILIES[name] and read.architectures == held["architectures"]
    assert read.vocab_size == 2048 and read.num_hidden_layers == held["num_hidden_layers"]


def test_an_unknown_family_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError):
        families.write("Qwen9", tmp_path)
    assert not list(tmp_path.iterdir())
