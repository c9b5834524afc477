"""Fixtures of the trainer's tests: the kernels, and tiny random models of transformers, which need no engine."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bi_patch.tools.models import families
from bi_patch.tools.verify.weights import fill
from bi_patch.training import devices

LLAMA = dict(families.FAMILIES["Mistral"], model_type="llama", architectures=["LlamaForCausalLM"], sliding_window=None)
QWEN3 = dict(families.FAMILIES["Mistral"], model_type="qwen3", architectures=["Qwen3ForCausalLM"], sliding_window=None)
SHAPES = {"Llama": LLAMA, "Qwen3": QWEN3, **families.FAMILIES}


@pytest.fixture(scope="session", autouse=True)
def kernels(cache):
    devices.prepare("cpu")


@pytest.fixture
def make():
    """make(family, dtype=fp32, **changes of the configuration): a random model, in eval mode."""

    def model(family, dtype=torch.float32, **changes):
        shape = {**SHAPES[family], "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, **changes}
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        fill(made, 7)
        return made.eval()

    return model


@pytest.fixture
def ids():
    """Three sequences, padded to 40 on the right: ids and mask [3, 40]."""
    made = torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) < torch.tensor([40, 7, 19])[:, None]).long()
    return made * mask, mask
