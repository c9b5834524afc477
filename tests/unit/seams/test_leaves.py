"""BI_PATCH_TP_INVARIANT: what it does not cover is refused by name, and a layer's parts must fit."""

from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from bi_patch.arming.catalog import plan
from bi_patch.errors import UnsupportedFeature
from bi_patch.platforms import releases
from bi_patch.seams import active, leaves
from bi_patch.seams.common import communicator as common

POLICY = common.POLICIES[0]


def config(ranks=2, **changes):
    model = {
        "is_moe": False,
        "dtype": torch.bfloat16,
        "use_mla": False,
        "is_hybrid": False,
        "quantization": None,
        "runner_type": "generate",
        "is_multimodal_model": False,
        "is_encoder_decoder": False,
        "enforce_eager": True,
    }
    whole = {"lora_config": None, "speculative_config": None}
    for name, value in changes.items():
        (model if name in model else whole)[name] = value
    parallel = SimpleNamespace(
        tensor_parallel_size=ranks,
        pipeline_parallel_size=whole.pop("pipeline", 1),
        data_parallel_size=whole.pop("data", 1),
    )
    whole["cache_config"] = SimpleNamespace(cache_dtype=whole.pop("cache", "auto"))
    return SimpleNamespace(model_config=SimpleNamespace(**model), parallel_config=parallel, **whole)


@pytest.fixture(autouse=True)
def eight(monkeypatch):
    monkeypatch.setattr(active, "leaves", 8)
    use(monkeypatch, "cpu")


def use(monkeypatch, platform):
    monkeypatch.setattr(active, "plan", plan(Version(releases.BY_PLATFORM[platform][-1]), platform))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_dense_decoders_pass(ranks):
    POLICY.apply(config(ranks))
    POLICY.apply(config(ranks, pipeline=2, data=2))
    POLICY.apply(SimpleNamespace(model_config=None))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ranks": 3}, "3 ranks"),
        ({"ranks": 16}, "16 ranks"),
        ({"is_moe": True}, "experts"),
        ({"use_mla": True}, "MLA"),
        ({"is_hybrid": True}, "recurrent layers"),
        ({"quantization": "awq", "is_moe": True}, "experts, quantized weights"),
        ({"runner_type": "pooling"}, "pooling"),
        ({"is_multimodal_model": True}, "images"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"lora_config": object()}, "LoRA"),
        ({"speculative_config": object()}, "speculative decoding"),
    ],
)
def test_the_rest_is_refused(changes, said):
    with pytest.raises(UnsupportedFeature, match=f"communicator.leaves: BI_PATCH_TP_INVARIANT=8 .*{said}"):
        POLICY.apply(config(**changes))


def test_what_nobody_measured_on_cuda_is_refused(monkeypatch):
    use(monkeypatch, "cuda")
    for ranks in (1, 2):
        POLICY.apply(config(ranks))
    for ranks in (1, 2, 4):
        POLICY.apply(config(ranks, enforce_eager=False))
    POLICY.apply(config(cache="bfloat16"))
    for changes, said in (
        ({"ranks": 8, "enforce_eager": False}, "8 ranks on CUDA"),
        ({"ranks": 4}, "4 ranks on CUDA in eager mode"),
        ({"cache": "fp8"}, "a 'fp8' KV cache on CUDA"),
        ({"data": 2}, "data parallelism on CUDA"),
        ({"pipeline": 2}, "pipeline parallelism on CUDA"),
    ):
        with pytest.raises(UnsupportedFeature, match=said):
            POLICY.apply(config(**changes))


def test_other_platforms_and_releases_are_refused(monkeypatch):
    use(monkeypatch, "ascend")
    with pytest.raises(UnsupportedFeature, match="the platform ascend"):
        POLICY.apply(config())
    use(monkeypatch, "cuda")
    POLICY.apply(config())
    with pytest.raises(UnsupportedFeature, match="weights of torch.float32 on CUDA"):
        POLICY.apply(config(dtype=torch.float32))
    monkeypatch.setattr(active, "plan", plan(Version("0.26.0"), "cuda"))
    with pytest.raises(UnsupportedFeature, match="vLLM 0.26.0 on CUDA"):
        POLICY.apply(config())


def test_without_the_setting_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(active, "leaves", 0)
    POLICY.apply(config(3, is_moe=True))


def layer(**changes):
    given = {"tp_size": 2, "input_size": 768, "reduce_results": True, "prefix": "model.layers.0.mlp.down_proj"}
    return SimpleNamespace(**given | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"tp_size": 1}, ""),
        ({"reduce_results": False, "bi_patch_leaves": True}, ""),
        ({"reduce_results": False}, "down_proj. whose ranks' parts the model adds by itself"),
        ({"input_size": 772}, "K = 772 on 2 ranks cannot be cut into 8 equal parts"),
        ({"tp_size": 3}, "K = 768 on 3 ranks cannot"),
    ],
)
def test_the_parts_of_a_layer_must_fit(changes, said):
    if not said:
        leaves.check(layer(**changes))
        return
    with pytest.raises(UnsupportedFeature, match=said):
        leaves.check(layer(**changes))


def test_every_layer_must_have_taken_its_parts(monkeypatch):
    from vllm.model_executor.layers import linear

    monkeypatch.setattr(linear, "RowParallelLinear", torch.nn.Linear)
    model = torch.nn.ModuleDict({"up": torch.nn.Identity(), "o": torch.nn.Linear(2, 2), "down": torch.nn.Linear(2, 2)})
    for layer in (model.o, model.down):
        setattr(layer, leaves.SERVED, True)
    leaves.check_served(model)
    delattr(model.down, leaves.SERVED)
    with pytest.raises(UnsupportedFeature, match="communicator.leaves: .*1 row-parallel layers .*[(]down[)]"):
        leaves.check_served(model)


def test_an_embedding_has_one_zero(monkeypatch):
    from vllm.model_executor.layers import vocab_parallel_embedding

    monkeypatch.setattr(vocab_parallel_embedding, "VocabParallelEmbedding", torch.nn.Embedding)
    model = torch.nn.Sequential(torch.nn.Embedding(2, 2), torch.nn.Linear(2, 2, bias=False))
    for part in model:
        part.weight.data.fill_(-0.0)
    leaves.one_zero(model)
    assert not model[0].weight.signbit().any() and model[1].weight.signbit().all()


def test_new_weights_are_refused():
    with pytest.raises(UnsupportedFeature, match="new weights with BI_PATCH_TP_INVARIANT=8"):
        leaves.no_update(torch.nn.Identity())
