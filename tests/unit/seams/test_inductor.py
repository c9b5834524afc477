"""Options of Inductor that are set in the process: those of a list are free, others are refused with their names."""

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops import casts
from bi_patch.seams import inductor
from bi_patch.seams.common import compilation


@pytest.fixture
def options():
    return importlib.import_module("torch._inductor.config")


def test_pytorchs_own_options_are_free(options):
    assert inductor.changed(options) == []
    inductor.check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_autotune", True),
        ("coordinate_descent_tuning", True),
        ("cpp.simdlen", 8),
        ("triton.persistent_reductions", False),
        ("epilogue_fusion", False),
        ("joint_custom_pre_pass", "the name of a pass"),
    ],
)
def test_an_option_that_nobody_examined_is_refused_by_name(options, name, value):
    with options.patch({name: value}), pytest.raises(UnsupportedFeature, match=f"compilation.options: .* sets {name} "):
        inductor.check()
    inductor.check()


def test_options_for_some_graphs_are_refused_too():
    """Dynamo reads TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS into such an option, and a program can set it."""
    dynamo = importlib.import_module("torch._dynamo.config")
    assert all(getattr(dynamo, name) == "" for name in inductor._ROUTES)
    with dynamo.patch(debug_inductor_config_override=">=0:emulate_precision_casts=False"):
        with pytest.raises(UnsupportedFeature, match="compilation.options: .*sets debug_inductor_config_override in"):
            inductor.check()
    inductor.check()


def test_several_are_named_at_once(options):
    with options.patch({"max_autotune": True, "cpp.simdlen": 8}):
        assert inductor.changed(options) == ["cpp.simdlen", "max_autotune"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fx_graph_cache", False),
        ("compile_threads", 1),
        ("trace.enabled", True),
        ("assume_32bit_indexing", True),
        ("custom_should_partition_ops", ["vllm::unified_attention"]),
        ("deterministic", True),
        ("batch_invariant", True),
        ("emulate_precision_casts", True),
        ("joint_custom_pre_pass", print),  # the policy plugins.code looks at code
    ],
)
def test_caches_logs_and_what_keeps_an_order_are_free(options, name, value):
    with options.patch({name: value}):
        inductor.check()


def test_every_name_of_the_lists_is_an_option(options):
    named = inductor._FREE | inductor._OF_VLLM | set(inductor._KEPT) | set(inductor.CODE)
    assert named - set(options._config) == set()


def test_rounding_that_a_hold_asked_for_may_not_be_taken_back(options):
    hold = casts.Hold()
    try:
        inductor.check()
        with options.patch(emulate_precision_casts=False):
            with pytest.raises(UnsupportedFeature, match="sets emulate_precision_casts in this process"):
                inductor.check()
    finally:
        hold.release()


def test_a_thread_that_began_before_a_hold_may_start_an_engine():
    """PyTorch 2.13 keeps the values of options by thread."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(inductor.check).result()
        hold = casts.Hold()
        try:
            thread.submit(inductor.check).result()
            assert thread.submit(casts.kept).result()
        finally:
            hold.release()
        thread.submit(inductor.check).result()


def made(deterministic: bool, default: bool):
    return SimpleNamespace(
        deterministic=deterministic, _config={"deterministic": SimpleNamespace(default=default, alias=None)}
    )


def test_options_that_were_loaded_before_arming_become_deterministic(monkeypatch):
    """`import torch._inductor` before bi_patch: PyTorch has read the variable already, without arming's value."""
    held = made(False, False)
    monkeypatch.setitem(inductor.sys.modules, "torch._inductor.config", held)
    inductor.check()
    assert held.deterministic is False  # nothing asks for it, as on CPU
    monkeypatch.setenv("TORCHINDUCTOR_DETERMINISTIC", "1")
    inductor.check()
    assert held.deterministic is True
    assert held._config["deterministic"].default is True  # other threads read the default


CHILD = """
import os
os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
import torch
from bi_patch.seams import inductor
from torch._inductor import config
seen = []
def backend(graph, inputs):
    seen.append(config.deterministic)
    return graph
inductor.check()
for n in (2, 3):
    torch.compile(lambda x, n=n: (x * n).sum(), backend=backend)(torch.ones(4))
torch.use_deterministic_algorithms(False)
seen.append(config.deterministic)
inductor.check()
inductor.check()
print(seen, torch.are_deterministic_algorithms_enabled())
"""


def test_inductor_stays_deterministic_after_a_graph():
    """Dynamo gives PyTorch's own flag back after each graph, and its call turns Inductor's option off."""
    environ = {**os.environ, "BI_PATCH": "0"}
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, env=environ, timeout=120)
    assert done.stdout.split("\n")[-2:] == ["[True, True, True] False", ""], done.stderr


def test_a_process_without_inductor_has_set_nothing(monkeypatch):
    monkeypatch.delitem(inductor.sys.modules, "torch._inductor.config", raising=False)
    inductor.check()


def a_pass(graph):
    """Code from outside vLLM that Inductor runs on each graph."""


def test_a_compilation_checks_again_before_it_starts(options):
    calls = []
    (seam,) = (s for s in compilation.SEAMS if s.name == "compilation.start")
    start = seam.close(lambda *args, **kwargs: calls.append((args, kwargs)))
    start("config", tag="model")
    with options.patch(max_autotune=True), pytest.raises(UnsupportedFeature, match="max_autotune"):
        start("config")
    with options.patch(post_grad_custom_post_pass=a_pass), pytest.raises(UnsupportedFeature, match="a_pass"):
        start("config")
    assert calls == [(("config",), {"tag": "model"})]


def test_where_another_compiler_makes_the_graphs_options_are_free(options, monkeypatch):
    monkeypatch.setattr(inductor.active, "plan", SimpleNamespace(platform="ascend"))
    (seam,) = (s for s in compilation.SEAMS if s.name == "compilation.start")
    with options.patch(max_autotune=True, post_grad_custom_post_pass=a_pass):
        inductor.check()
        assert seam.close(lambda: "compiled")() == "compiled"
