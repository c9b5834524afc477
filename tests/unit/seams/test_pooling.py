"""The allow-list of poolers, the refusals, and the CPU seams on vLLM's own pooler classes."""

import importlib
import inspect
import pkgutil
from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedFeature, WeightsBroken
from bi_patch.ops import bits
from bi_patch.seams import pooling, weights

layers = pytest.importorskip("vllm.model_executor.layers.pooler")


@pytest.fixture(scope="module", autouse=True)
def kernels(cache):
    from bi_patch.kernels.cpu import load

    load(cache)


class Model(torch.nn.Module):
    """A model of vLLM's, as far as the seams look at it."""


def model(pooler, **parts):
    held = Model()
    held.pooler = pooler
    for name, part in parts.items():
        setattr(held, name, part)
    return held


def sequence(method: str = "MEAN", **head):
    from vllm.model_executor.layers.pooler.seqwise import heads, methods, poolers

    return poolers.SequencePooler(methods.get_seq_pooling_method(method), heads.EmbeddingPoolerHead(**head))


def dispatch(pooler):
    from vllm.model_executor.layers.pooler import DispatchPooler

    return DispatchPooler({"embed": pooler})


def test_every_class_of_vllms_poolers_is_in_the_list_or_known_to_be_refused():
    found = set()
    for module in pkgutil.walk_packages(layers.__path__, f"{layers.__name__}."):
        held = importlib.import_module(module.name)
        found |= {
            name
            for name, kind in vars(held).items()
            if inspect.isclass(kind) and issubclass(kind, torch.nn.Module) and not inspect.isabstract(kind)
            if kind.__module__.startswith(layers.__name__)
        }
    assert found - pooling._POOLERS == {"IdentityPooler"}
    assert pooling._POOLERS - found == {"BertPooler", "ModernBertPooler"}


def test_poolers_in_a_plain_dict_are_seen():
    inner = torch.nn.Linear(4, 4)
    held = model(dispatch(sequence(projector=inner)))
    assert inner in set(pooling.modules(held)) and inner not in set(held.modules())
    pooling.check(held, "pooling.cpu")


def test_what_the_list_lacks_is_refused_by_name():
    class Strange(layers.Pooler):
        def get_supported_tasks(self):
            return {"embed"}

        def forward(self, hidden_states, pooling_metadata):
            return hidden_states

    for held, name in (
        (model(dispatch(Strange())), "the pooler Strange"),
        (model(dispatch(sequence()), body=torch.nn.Conv1d(2, 2, 3)), "the layer Conv1d"),
        (model(dispatch(sequence(projector=torch.nn.BatchNorm1d(4)))), "the layer BatchNorm1d"),
    ):
        with pytest.raises(UnsupportedFeature, match=f"pooling.cpu: bi_patch does not cover {name}"):
            pooling.check(held, "pooling.cpu")


def test_an_activation_outside_of_the_list_is_refused():
    from vllm.model_executor.layers.pooler.activations import LambdaPoolerActivation

    pooling.check(model(dispatch(sequence(activation=LambdaPoolerActivation(torch.nn.Tanh())))), "pooling.cpu")
    with pytest.raises(UnsupportedFeature, match="the activation cumsum"):
        pooling.check(model(dispatch(sequence(activation=LambdaPoolerActivation(torch.cumsum)))), "pooling.cpu")


def config(runner="pooling", chunked=False, cached=False, whole=True):
    held = SimpleNamespace(
        runner_type=runner,
        is_chunked_prefill_supported=not whole,
        is_prefix_caching_supported=not whole,
        architectures=["BertModel"],
    )
    return SimpleNamespace(
        model_config=held,
        scheduler_config=SimpleNamespace(enable_chunked_prefill=chunked),
        cache_config=SimpleNamespace(enable_prefix_caching=cached),
    )


def test_a_model_that_needs_whole_prompts_gets_them():
    (rule,) = pooling.policies("cpu")
    for fine in (config(), config("generate", True, True), config(chunked=True, cached=True, whole=False)):
        rule.apply(fine)
    for wrong, option in ((config(chunked=True), "chunked-prefill"), (config(cached=True), "prefix-caching")):
        with pytest.raises(UnsupportedFeature, match=f"pooling.cpu_whole: BertModel .* --enable-{option}"):
            rule.apply(wrong)


def test_new_weights_are_refused():
    class Model(torch.nn.Module):
        def load_weights(self, given):
            raise AssertionError("weights were loaded")

    held = Model()
    weights.watch_model(held, pooling.no_update, pooling.no_update)
    try:
        with pytest.raises(UnsupportedFeature, match="pooling.weights"):
            held.load_weights([])
        with pytest.raises((UnsupportedFeature, WeightsBroken)):
            weights.settle()
    finally:
        weights._models.pop(held), weights._broken.pop(held, None)
        weights.pending = weights._untold = False


def metadata(lengths):
    cursor = SimpleNamespace(prompt_lens_cpu=torch.tensor(lengths), is_partial_prefill=lambda: False)
    return SimpleNamespace(get_pooling_cursor=lambda: cursor)


def test_a_mean_has_the_bits_of_the_ascending_sum_alone_and_in_company():
    from vllm.model_executor.layers.pooler.seqwise.methods import MeanPool

    from bi_patch.seams.cpu.pooling import _mean

    lengths = [1, 40, 3, 257]
    rows = torch.randn(sum(lengths), 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    got = _mean(MeanPool.forward)(None, rows, metadata(lengths))
    start = 0
    for length, mine in zip(lengths, got, strict=True):
        total = torch.zeros(96)
        for row in rows[start : start + length]:
            total = total + row.float()
        assert not bits.differing(mine, total / length)
        alone = _mean(MeanPool.forward)(None, rows[start : start + length], metadata([length]))
        assert not bits.differing(alone[0], mine)
        start += length


def test_heads_get_the_bundled_gemm():
    from bi_patch.ops.cpu import dense
    from bi_patch.seams.cpu.pooling import prepare

    inner = torch.nn.Linear(64, 32)
    held = model(dispatch(sequence(projector=inner)))
    prepare(held, config("generate"))
    assert type(inner) is torch.nn.Linear
    with torch.inference_mode():
        prepare(held, config())
        x = torch.randn(40, 64)
        whole = inner(x)
        assert type(inner) is dense.Dense and torch.allclose(
            whole, torch.nn.functional.linear(x, *inner.parameters()), atol=1e-5
        )
        for rows in (1, 2, 17):
            assert not bits.differing(inner(x[:rows]), whole[:rows])
