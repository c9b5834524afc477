"""Models in packages of their own are refused with what was found in each package."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import models, packages


def test_a_reason_for_each_package():
    assert packages.reason("vllm.models.beam.nvidia.model") == packages.PACKAGES["beam"]
    assert packages.reason("vllm.models.made_up") == "nobody has examined its package"
    assert packages.reason("vllm.models") == "nobody has examined its package"
    assert packages.reason("vllm.model_executor.models.llama") == packages.reason("") == ""


def test_the_documentation_has_each_reason():
    text = (Path(__file__).resolve().parents[3] / "docs" / "hopper.md").read_text()
    for name, found in packages.PACKAGES.items():
        assert f"| `{name}` | {found} |" in text, name


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_every_package_of_the_installed_release_was_examined():
    (folder,) = importlib.util.find_spec("vllm").submodule_search_locations
    found = {path.parent.name for path in Path(folder, "models").glob("*/__init__.py")}
    assert found - {"common"} <= set(packages.PACKAGES)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_model_of_a_package_is_refused_by_name():
    config = SimpleNamespace(model_config=SimpleNamespace(architectures=["DeepseekV32ForCausalLM"]))
    (policy,) = (p for p in models.policies("cuda") if p.name == "models.cuda")
    with pytest.raises(
        UnsupportedFeature, match="models.cuda: .*DeepseekV32ForCausalLM: an indexer chooses the tokens"
    ):
        policy.apply(config)
    policy.apply(SimpleNamespace(model_config=SimpleNamespace(architectures=["LlamaForCausalLM"])))
