"""What a CUDA worker hands to the certificates once its model is loaded. Everything around is a stand-in."""

from types import SimpleNamespace

import pytest

from bi_patch.ops.cuda import certify
from bi_patch.seams import active, ranks, weights
from bi_patch.seams import pooling as poolers
from bi_patch.seams import vision as images
from bi_patch.seams.cuda import (
    activation,
    attention,
    chunks,
    eighths,
    leaves,
    linear,
    moe,
    norm,
    packed_linear,
    packed_products,
    pooling,
    quantized,
    rows,
    scaled_linear,
    vision,
)

# By module: what is found in a model, each by a name of its own.
FOUND = {
    linear: "_problems",
    scaled_linear: "problems",
    packed_linear: "problems",
    packed_products: "problems",
    moe: "experts",
    attention: "decoders",
    chunks: "layers",
    leaves: "checks",
    rows: "checks",
    activation: "forms",
    ranks: "others",
}
DONE = (
    (vision, "prepare certify"),
    (norm, "replace_layer_norms"),
    (pooling, "prepare"),
    (quantized, "check"),
    (eighths, "reserve require"),
    (weights, "watch_model"),
)


@pytest.fixture
def given(monkeypatch):
    """What `certify` gets, as its arguments and its options."""
    got = []
    for module, name in FOUND.items():
        monkeypatch.setattr(module, name, lambda *_, text=f"{module.__name__}.{name}": [text])
    for module, names in DONE:
        for name in names.split():
            monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(poolers, "is_pooling", lambda config: False)
    monkeypatch.setattr(images, "takes_images", lambda config: False)
    monkeypatch.setattr(active, "leaves", 0)
    monkeypatch.setattr(active, "cache", "the cache")
    monkeypatch.setattr(ranks, "alike", lambda name, config, make: make())
    monkeypatch.setattr(linear.library, "vllm", lambda: "1")
    monkeypatch.setattr(certify, "begin", lambda *_: "begun")
    monkeypatch.setattr(certify, "certify", lambda *given, **options: got.append((given, options)))
    monkeypatch.setattr("vllm.config.set_current_vllm_config", lambda config: _Nothing())
    return got


class _Nothing:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def test_every_kind_that_a_model_has_is_certified(given):
    config = SimpleNamespace(
        lora_config=None,
        model_config=SimpleNamespace(get_vocab_size=lambda: 9, dtype="a type"),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=77),
    )
    worker = SimpleNamespace(vllm_config=config, get_model=lambda: "a model")
    assert linear._load(lambda self: "loaded")(worker) == "loaded"
    ((placed, options),) = given
    cuda = "bi_patch.seams.cuda"
    products = [f"{cuda}.{name}" for name in ("linear._problems", "scaled_linear.problems", "packed_linear.problems")]
    assert placed == (
        [*products, f"{cuda}.packed_products.problems"],
        [f"{cuda}.moe.experts"],
        [f"{cuda}.attention.decoders"],
        [f"{cuda}.chunks.layers"],
        [f"{cuda}.leaves.checks", f"{cuda}.rows.checks"],
    )
    version = options.pop("library")
    assert version.startswith("1 descriptors=")
    assert options == {
        "max_rows": 77,
        "cache": "the cache",
        "ahead": "begun",
        "others": ["bi_patch.seams.ranks.others"],
        "activations": [f"{cuda}.activation.forms"],
    }
