"""vLLM's environment variables: one that nobody has examined is refused, also one that a later release brings."""

import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from bi_patch.platforms.features import engine, variables

ROWS = {row.name: row for row in engine.FEATURES}


def row(start: str):
    return next(row for name, row in ROWS.items() if name.startswith(start))


@pytest.fixture
def listed(monkeypatch):
    """vLLM's list of its variables, in a release of the test's own. No variable of vLLM is set."""
    envs = ModuleType("vllm.envs")
    envs.environment_variables = dict.fromkeys(
        ("VLLM_LOGGING_LEVEL", "VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "VLLM_SUM_BY_ARRIVAL", "VLLM_NIXL_HOST")
    )
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    for name in (*envs.environment_variables, *variables.UNLISTED, *variables.KNOWN):
        if name.startswith("VLLM_"):
            monkeypatch.delenv(name, raising=False)
    others = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE_", "OMP_", "GOMP_", "KMP_")
    for name in [name for name in os.environ if name.startswith(others)]:
        monkeypatch.delenv(name)


def test_what_vllm_lists_and_nobody_has_examined_is_refused(listed, monkeypatch):
    assert variables.unknown() == []
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_NIXL_HOST", "VLLM_SERVICE_HOST"):  # the last is a cluster's, not vLLM's
        monkeypatch.setenv(name, "1")
    assert variables.unknown() == []
    monkeypatch.setenv("VLLM_SUM_BY_ARRIVAL", "0")
    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random")
    found = ["VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "VLLM_SUM_BY_ARRIVAL"]
    assert variables.unknown() == found
    refusing = row("environment variables of vLLM")
    assert refusing.asked(None) == ", ".join(found)
    assert all(cell.state == "refused" for cells in refusing.cells.values() for cell in cells)


def test_what_vllm_reads_without_listing_is_refused(listed, monkeypatch):
    monkeypatch.setenv(variables.UNLISTED[0], "1")
    assert variables.unknown() == [variables.UNLISTED[0]]


def test_an_option_of_inductor_is_refused_as_a_variable_too(listed, monkeypatch):
    """`inductor_compile_config` refuses the same options by name."""
    for name in variables.INDUCTOR:
        monkeypatch.setenv(name, "1")
    assert variables.unknown() == []
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG", "1")
    found = ["TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG", "TORCHINDUCTOR_MAX_AUTOTUNE"]
    assert variables.unknown() == found


def test_what_gives_inductor_other_options_for_some_graphs_is_refused(listed, monkeypatch):
    for name in variables.DYNAMO:
        monkeypatch.setenv(name, "1")
    assert variables.unknown() == []
    found = ["TORCH_COMPILE_OVERRIDE_BACKENDS", "TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS"]
    for name in found:
        monkeypatch.setenv(name, ">=0:max_autotune=True")
    assert variables.unknown() == found


def test_what_gives_a_kernel_fewer_threads_than_it_asked_for_is_refused(listed, monkeypatch):
    """With each of these, PyTorch's bf16 product of 300 x 256 and 256 x 768 left parts of the result as they were."""
    for name in variables.OPENMP:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_DYNAMIC", "False")
    monkeypatch.setenv("OMP_MAX_ACTIVE_LEVELS", "1")
    assert variables.unknown() == []
    given = {"OMP_DYNAMIC": "true", "OMP_MAX_ACTIVE_LEVELS": "0", "OMP_THREAD_LIMIT": "1", "KMP_DYNAMIC_MODE": "thread"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert variables.unknown() == sorted(given)


def test_the_sets_do_not_overlap():
    sets = (variables.COVERED, variables.OWN, variables.PLACES, variables.LOGS, variables.FRONT)
    assert sum(map(len, sets)) == len(variables.KNOWN)
    assert not any(name.startswith(variables.BEHIND) for name in variables.KNOWN)


def test_arming_sets_no_variable_that_is_refused():
    from bi_patch.seams.registry import CATALOG

    set_by_arming = {n.variable for n in CATALOG.variables if n.variable.startswith(("VLLM_", "TORCHINDUCTOR_"))}
    assert set_by_arming <= variables.KNOWN | variables.INDUCTOR
    others = {n.variable for n in CATALOG.variables} - set_by_arming
    assert not {name for name in others if name.startswith(("TORCH_COMPILE", "TORCHDYNAMO", "OMP_", "KMP_"))}


def test_the_engines_of_verify_have_no_variable_that_is_refused(monkeypatch):
    from bi_patch.tools.verify.child import ARMED, Options, child_environ

    for eager in (True, False):
        for name, value in child_environ({}, ARMED, Options("model", eager=eager)).items():
            monkeypatch.setenv(name, value)
        assert not variables.unknown()


def test_variables_that_vllm_sets_itself_are_no_reason_to_refuse():
    """vLLM sets some by the platform, the model or the executor. Workers are asked after that."""
    root = Path(pytest.importorskip("vllm").__file__).parent
    others = ("platforms/rocm.py", "platforms/xpu.py", "benchmarks/", "determinism/batch_invariant.py")
    kinds = "VLLM|TORCHINDUCTOR|TORCHDYNAMO|TORCH_COMPILE|OMP|KMP"
    given = re.compile(rf"""(?:os\.environ\[|set_env_var\()["']((?:{kinds})_\w+)["'](?:\] = |, )""")
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*.py")}
    read = [file.read_text() for path, file in files.items() if not any(other in path for other in others)]
    found = {name for text in read for name in given.findall(text)}
    listed = set(pytest.importorskip("vllm.envs").environment_variables)
    inductors = {name for name in found if name.startswith("TORCHINDUCTOR_")}
    assert len(inductors) > 2 and inductors <= variables.INDUCTOR
    others = {name for name in found if not name.startswith(("VLLM_", "TORCHINDUCTOR_"))}
    assert others <= variables.OPENMP | variables.DYNAMO
    assert found and not {n for n in found & listed - variables.KNOWN if not n.startswith(variables.BEHIND)}


def test_variables_that_choose_kernels_are_refused():
    """Each of these was read in vLLM's source: it draws, or chooses by the number of rows, or changes fp32 products."""
    envs = pytest.importorskip("vllm.envs")
    refused = set(envs.environment_variables) - variables.KNOWN
    assert refused >= {
        "VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE",
        "VLLM_FLOAT32_MATMUL_PRECISION",
        "VLLM_HUMMING_USE_F16_ACCUM",
        "VLLM_KV_CACHE_LAYOUT",
        "VLLM_MARLIN_INPUT_DTYPE",
        "VLLM_MEDIA_CACHE",
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY",
        "VLLM_USE_FUSED_MOE_GROUPED_TOPK",
        "VLLM_USE_OINK_OPS",
    }


def test_images_from_the_rust_front_end_are_refused(monkeypatch):
    asked = row("images, sound or video from vLLM's Rust").asked
    images = SimpleNamespace(is_multimodal_model=True, multimodal_config=SimpleNamespace(language_model_only=False))
    text = SimpleNamespace(is_multimodal_model=False)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert asked(SimpleNamespace(model_config=images)) and not asked(SimpleNamespace(model_config=text))
    assert row("vLLM's Rust front end").asked(SimpleNamespace(model_config=text))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    assert not asked(SimpleNamespace(model_config=images))


def test_data_parallelism_behind_the_rust_front_end_is_refused(monkeypatch):
    """The front end's load decides which engine core serves a request."""
    asked = row("data parallelism behind vLLM's Rust").asked
    one, two = (SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=n)) for n in (1, 2))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert asked(two) and not asked(one)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    assert not asked(two)
