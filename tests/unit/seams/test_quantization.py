"""Quantized weights and KV caches are refused by name on each platform, and what is plain passes."""

from types import SimpleNamespace

import pytest

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cpu import quantization as cpu
from bi_patch.seams.cuda import quantization as cuda

POLICIES = (*cuda.POLICIES, *cpu.POLICIES)


def config(weights=None, cache="auto"):
    model = SimpleNamespace(quantization=weights)
    return SimpleNamespace(model_config=model, cache_config=SimpleNamespace(cache_dtype=cache))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_what_is_quantized_is_refused_by_name(policy):
    policy.apply(config())
    policy.apply(config(cache="bfloat16"))
    for given, said in ((config("awq"), "'awq' weights"), (config(cache="fp8"), "'fp8' KV cache")):
        with pytest.raises(UnsupportedFeature, match=f"{policy.name}: no seam covers .*{said}"):
            policy.apply(given)


def test_an_fp32_cache_is_for_the_cpu_only():
    refused = []
    for policy in POLICIES:
        try:
            policy.apply(config(cache="float32"))
        except UnsupportedFeature:
            refused.append(policy.name)
    assert refused == ["quantization.cuda"]
