"""Models with recurrent layers in the armed CPU engine: every axis, and what is refused by name."""

import pytest

from bi_patch.errors import UnsupportedFeature
from bi_patch.tools.faults import catch, recurrent
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.models import families, shapes
from bi_patch.tools.verify.child import ARMED
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.probes import PROBES, Workload

pytestmark = pytest.mark.engine

OPTIONS = {"random_weights": 7, "tokenizer": False, "max_model_len": 1024}


def every_axis(engine):
    blocks = 2 * engine.info.block_size  # of vLLM's pages, which hold a recurrent state: up to 400 tokens
    lengths = (1, 3, 40, max(700, blocks + 30))
    load = Workload.random(engine.info.vocab_size, lengths=lengths, generate=6, sizes=(2, 17), prefix=blocks)
    measured = set()
    for probe in PROBES:
        if probe.missing(engine) or probe.name in ("long prompt", "unseeded sets"):
            continue
        result = probe.run(engine, load)
        assert result.compared > 0 and result.differing == 0, f"{result.axis}: {result.first}"
        measured.add(probe.name)
    assert {"chunk budget", "prefix cache", "decode = prefill", "prompt logprobs", "late arrivals"} <= measured


def test_gated_delta_nets(start, tmp_path):
    """No axis sees anything; the planted faults are seen and named."""
    folder = families.write(recurrent.MODEL, tmp_path)
    with start(ARMED, folder, kind=FaultyEngine, **OPTIONS) as engine:
        every_axis(engine)
        load = catch.workload(engine)
        assert not any(case.differs for case in catch.cases(engine, "chunk budget", load))
        for fault in recurrent.ON_CPU:
            found = catch.catch(engine, fault.name, load)
            assert found.caught and found.right, found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Falcon-H1", "Granite 4-H", "LFM2", "Falcon-Mamba", "Jamba"])
def test_other_families(start, tmp_path, family):
    with start(ARMED, families.write(family, tmp_path), **OPTIONS) as engine:
        every_axis(engine)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen3-Next", "Falcon-H1", "LFM2", "Falcon-Mamba"])
def test_compiled(start, tmp_path, family):
    with start(ARMED, families.write(family, tmp_path), eager=False, **OPTIONS) as engine:
        every_axis(engine)


ZAMBA_2 = {
    "architectures": ["Zamba2ForCausalLM"],
    "model_type": "zamba2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "layers_block_type": ["mamba", "hybrid"],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_mamba_heads": 8,
    "mamba_d_state": 16,
    "mamba_ngroups": 1,
    "vocab_size": 2048,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"mamba_ssm_cache_dtype": "bfloat16"}, "linear_attn: a recurrent state kept in .*float32"),
        ({"dtype": "float32"}, "recurrent layers in torch.float32. Use --dtype bfloat16"),
    ],
)
def test_what_the_kernels_do_not_keep_exactly_is_refused(refusing_late, tmp_path, extra, said):
    dtype = extra.pop("dtype", "bfloat16")
    folder = families.write("Qwen3-Next", tmp_path)
    given = Options(folder, dtype=dtype, chunk=256, extra=extra, **OPTIONS)
    with pytest.raises(UnsupportedFeature, match=said):
        refusing_late.refuse(given)


def test_other_recurrent_layers_are_refused(refusing, tmp_path):
    given = Options(shapes.save("Zamba 2", ZAMBA_2, tmp_path), chunk=256, **OPTIONS)
    with pytest.raises(UnsupportedFeature, match="hybrid and state-space models"):
        refusing.refuse(given)
