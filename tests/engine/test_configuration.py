"""Real configurations of vLLM meet the policies of the CPU platform: set to safe values, or refused by name."""

import os

import pytest

from bi_patch.arming.catalog import CATALOG
from bi_patch.errors import UnsupportedFeature
from bi_patch.tools.models import recipes

pytestmark = pytest.mark.engine


@pytest.fixture
def configured(model):
    """configured(name, **options): the finished configuration of vLLM, after the policies of the CPU platform.

    vLLM sets variables of the process, e.g. LD_PRELOAD. Later tests must not start engines with them.
    """
    from vllm.engine.arg_utils import EngineArgs

    before = dict(os.environ)

    def make(name=recipes.QWEN3, **options):
        given = {"max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 32, "seed": 0, **options}
        config = EngineArgs(model=model(name), **given).create_engine_config()
        for policy in CATALOG.policies:
            if "cpu" in policy.platforms:
                policy.apply(config)
        return config

    yield make
    os.environ.clear()
    os.environ.update(before)


def test_one_range_serves_every_number_of_tokens(configured):
    for bounds in (None, [8, 64], [64, 1]):
        config = configured(compilation_config={"compile_ranges_endpoints": bounds})
        assert [(r.start, r.end) for r in config.compilation_config.get_compile_ranges()] == [(1, 256)]


@pytest.mark.parametrize(
    "options", [{}, {"enforce_eager": True}, {"data_parallel_size": 2}, {"pipeline_parallel_size": 2}]
)
def test_what_is_covered_passes(configured, options):
    configured(**options)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"compilation_config": {"mode": 1}}, "compilation.cpu_mode: .*STOCK_TORCH_COMPILE"),
        ({"compilation_config": {"inductor_compile_config": {"deterministic": False}}}, "compilation.inductor"),
        ({"kernel_config": {"ir_op_priority": {"rms_norm": ["vllm_c"]}}}, "ir_op_priority for rms_norm"),
        ({"use_fp64_gumbel": True}, "ModelConfig.use_fp64_gumbel: nobody has examined it"),
        ({"compilation_config": {"use_inductor_graph_partition": True}}, "CompilationConfig.use_inductor_graph"),
        ({"compilation_config": {"dynamic_shapes_config": {"type": "unbacked"}}}, "DynamicShapesConfig.type"),
        ({"name": recipes.MOE, "data_parallel_size": 2}, "data parallelism over 1 of a MoE model"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "KV transfer .ExampleConnector",
        ),
    ],
)
def test_what_is_not_covered_is_refused_by_name(configured, options, named):
    with pytest.raises(UnsupportedFeature, match=named):
        configured(**options)


def test_threads_by_the_load_of_the_machine_are_refused(configured, monkeypatch):
    """With this variable and a load above the number of cores, all 12 answers of an INT8 model were NaN."""
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    with pytest.raises(UnsupportedFeature, match="OMP_DYNAMIC: nobody has examined it. Unset it"):
        configured()
