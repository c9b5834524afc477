"""`bi-patch verify` on real engines: armed, stock, without weights or tokenizer, killed, interrupted, and in pytest."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from unhurried import QUICK

from bi_patch import identity
from bi_patch.tools.models import recipes, shapes
from bi_patch.tools.verify import report
from bi_patch.tools.verify.child import STOCK
from bi_patch.tools.verify.levels import DEFAULT
from bi_patch.tools.verify.local import local
from bi_patch.tools.verify.measure import Watcher, verify

pytestmark = pytest.mark.engine
pytest_plugins = "pytester"

HOME = os.path.expanduser("~")
CLI = [sys.executable, "-c", "import bi_patch_entry; bi_patch_entry.cli()", "verify"]


@pytest.fixture
def bare(model, tmp_path):
    """make(name): a folder with only the model's config.json: no weights, no tokenizer."""

    def make(name):
        shutil.copy(Path(model(name)) / "config.json", tmp_path)
        return tmp_path

    return make


@pytest.mark.alone
def test_quick_on_the_command_line(model, tmp_path):
    """A quick run has a time limit, and no axis may be left out for lack of time."""
    done = subprocess.run(
        [*CLI, model(recipes.QWEN3), "--quick", "--json", "report.json", "--html", "page.html"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = report.read(tmp_path / "report.json")
    assert found.provenance.command.startswith("bi-patch verify") and found.provenance.digest == identity.digest()
    assert found.complete and found.mode == "armed" and found.differing == 0 and found.compared > 4000
    assert {a.state for a in found.axes} == {report.PASSED, report.NOT_APPLICABLE, report.LEFT_OUT}
    assert found.starts == 2 and "batch size" in done.stdout and "left" in done.stdout
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_stock_differs(model):
    axes = ("shared prefix", "logprobs in any order", "long prompt")
    found = verify(local(model(recipes.QWEN3), QUICK, mode=STOCK), QUICK, only=axes)
    assert found.exit_code == report.DIFFERS, found.verdict
    assert any(axis.case is not None and axis.ulps > 0 for axis in found.axes)


def test_config_alone_with_logits_and_tied(bare):
    folder = bare(recipes.MOE)
    with pytest.raises(recipes.ModelMissing, match="--random-weights"):
        local(str(folder), QUICK)
    axes = ("mixed lengths", "tied logits and routers", "sleep and wake")
    system = local(str(folder), DEFAULT, random_weights=7, logits=True, eager=True)
    assert not system.options.tokenizer
    found = verify(system, DEFAULT, only=axes)
    states = {axis.name: (axis.state, axis.reason) for axis in found.axes if axis.name in axes}
    assert found.exit_code == report.INVARIANT, (found.verdict, states)
    assert states["sleep and wake"][0] == report.NOT_APPLICABLE
    by_name = {axis.name: axis for axis in found.axes}
    assert by_name["mixed lengths"].digests > 0 and by_name["tied logits and routers"].digests > 0


def test_a_model_with_sliding_windows_is_preempted(tmp_path):
    """Its layers' KV is in two groups, which take blocks from one pool: a request needs blocks of both."""
    system = local(shapes.write(shapes.GEMMA_2, tmp_path), QUICK, random_weights=7)
    axes = ("preemption", "thread count")  # of one further engine: few KV blocks, three threads
    found = verify(system, QUICK, only=axes)
    by_name = {axis.name: axis for axis in found.axes}
    assert found.exit_code == report.INVARIANT and found.starts == 2, found.verdict
    assert all(by_name[name].state == report.PASSED and by_name[name].compared > 100 for name in axes)


class Killer(Watcher):
    """Kills the engine's process when the second axis begins."""

    def __init__(self):
        self.started = []

    def measuring(self, axis, left):
        if axis.name == "position and order" and axis.pairs == 2:
            os.kill(self.started[0]._process.pid, signal.SIGKILL)


def test_a_killed_engine_is_named_and_what_was_compared_is_kept(model):
    killer, system = Killer(), local(model(recipes.QWEN3), QUICK)
    start = system.start
    system.start = lambda options, fresh=False: killer.started.append(start(options, fresh=fresh)) or killer.started[-1]
    found = verify(system, QUICK, watcher=killer)
    assert found.exit_code == report.UNCHECKED and "memory" in found.stopped and "-9" in found.stopped
    assert found.axes[0].state == report.PASSED and found.compared > 0
    Path(killer.started[0]._log.name).unlink(missing_ok=True)


def test_an_interrupted_run_leaves_its_report(model, tmp_path):
    process = subprocess.Popen(
        [*CLI, model(recipes.QWEN3), "--eager", "--json", "report.json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "batch size" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=900) == report.UNCHECKED, rest
    kept = json.loads((tmp_path / "report.json").read_text())
    assert not kept["complete"] and "interrupted" in kept["stopped"] and kept["axes"][0]["compared"] > 0
    assert "interrupted" in rest and kept["verdict"][0].startswith("Incomplete: the armed engine")


def test_the_pytest_fixture(model, monkeypatch, pytester):
    """The fixture in a user's own tests. bi_patch must be installed, because pytest finds the plugin by its entry
    point."""
    monkeypatch.setenv("HOME", HOME)  # with pytester's empty HOME, vLLM would fill its caches again
    pytester.makepyfile(f"""
        import sys

        def test_nothing_is_armed():
            assert not any(name.split(".")[0] in ("bi_patch", "torch", "vllm") for name in sys.modules)

        def test_invariant(verify_invariance):
            sys.path.append({str(Path(__file__).parent)!r})
            import unhurried
            from bi_patch.tools.verify import levels

            levels.LEVELS["quick"] = unhurried.QUICK
            report = verify_invariance({model(recipes.QWEN3)!r}, axes=["mixed lengths", "co-batch contents"])
            assert report.compared > 0

        def test_stock(verify_invariance):
            verify_invariance({model(recipes.QWEN3)!r}, axes=["long prompt", "shared prefix"], mode={STOCK!r})
    """)
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", timeout=900)
    done.assert_outcomes(passed=2, failed=1)
    done.stdout.fnmatch_lines(["*NOT batch-invariant*", "*shared prefix*"])
    done.stdout.no_fnmatch_line("*Traceback*")
