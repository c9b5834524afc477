"""A seam left open as a planted fault: the start-up check stops the engine and names the seam. If the engine is forced
to run, its answers differ."""

import pytest

from bi_patch.errors import BiPatchError, SeamOpen
from bi_patch.tools.models import recipes
from bi_patch.tools.verify.child import ARMED, ChildEngine, EngineFailed
from bi_patch.tools.verify.probes import PROBES, Workload

pytestmark = pytest.mark.engine


SEAMS = ("attention.cpu_forward", "linear.cpu_dispatch")
LEFT_OPEN = {"BI_PATCH_LEAVE_OPEN": ",".join(SEAMS)}


@pytest.fixture(scope="module")
def stopped(start):
    """The error of one engine with all of SEAMS open."""
    with pytest.raises(SeamOpen) as caught:
        with start(ARMED, recipes.QWEN3, environ=LEFT_OPEN):
            pass
    return str(caught.value)


@pytest.mark.parametrize("seam", SEAMS)
def test_an_open_seam_stops_the_engine_and_is_named(stopped, seam):
    assert f"  {seam} at " in stopped


class WithoutPlugins(ChildEngine):
    """A child that loads no plugin of vLLM. Its process is a fork of the one that `stopped` needs, too."""

    worker = "without_plugins"


def test_leaving_the_plugin_out_does_not_skip_the_start_up_check(start, user_code):
    code = "import os\nos.environ['VLLM_PLUGINS'] = 'none'\nfrom bi_patch.tools.verify.worker import main"
    (user_code / "without_plugins.py").write_text(code)
    with pytest.raises(SeamOpen, match="linear.cpu_dispatch"):
        with start(ARMED, recipes.QWEN3, environ=LEFT_OPEN, kind=WithoutPlugins):
            pass


def test_forced_to_run_the_fault_is_seen(start):
    environ = {"BI_PATCH_LEAVE_OPEN": "attention", "BI_PATCH_ALLOW_OPEN": "1"}
    with start(ARMED, recipes.QWEN3, environ=environ) as engine:
        assert set(engine.info.open_seams) >= {"attention.cpu_forward", "attention.cpu_build"}
        load = Workload.random(engine.info.vocab_size, long=900, generate=6, sizes=(2, 17, 64))
        results = [probe.run(engine, load) for probe in PROBES if probe.name in ("batch size", "long prompt")]
    assert sum(r.differing for r in results) > 0, results


@pytest.mark.parametrize(
    "options, said",
    [
        ({"extra": {"enable_shm_tensor_arena": True}}, "features: .*does not cover enable_shm_tensor_arena"),
        ({"extra": {"kv_cache_dtype": "fp8"}}, "features: .*on CPU does not cover a 'fp8' KV cache"),
        ({"extra": {"quantization": "fp8"}}, "features: .*quantized weights .fp8"),
        ({"extra": {"worker_extension_cls": "my.Extension"}}, "plugins.code: .*BI_PATCH_ALLOW_CODE=my.Extension"),
    ],
    ids=["an option of parallelism", "fp8 KV cache", "fp8 weights", "worker extension"],
)
def test_uncovered_features_are_refused_by_name(refusing, options, said):
    with pytest.raises(BiPatchError, match=said) as caught:
        refusing.refuse(refusing.options.but(**options))
    assert not isinstance(caught.value, EngineFailed)
