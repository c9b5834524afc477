"""benchmarks/hopper: engines start side by side, and are measured in turns once none starts any more."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

HOPPER = Path(__file__).resolve().parents[4] / "benchmarks" / "hopper"
# An engine that starts nothing: it notes what it measures, and can be late or fail.
ENGINE = """
import subprocess, sys, time
import child
mode, out, notes, late, fails = sys.argv[1:6]
if fails == "compiles":
    compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with open(notes, "a") as file:
        file.write(f"{compiler.pid}\\n")
time.sleep(float(late))
def measure(name, repeat):
    if name == fails:
        sys.exit("no such kernel")
    with open(notes, "a") as file:
        file.write(f"{mode} {name} {repeat}\\n")
    child.save({"cost": name}, out)
print("a line of its log", flush=True)
if fails == "certificate":
    print("WARNING bi_patch: the certificate of cuda.linear N=1 failed (no memory); another serves", flush=True)
child.take_turns(measure)
"""


@pytest.fixture
def hopper(monkeypatch):
    """The modules of benchmarks/hopper, for one test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(HOPPER))
    import engines
    import nursery

    yield engines, nursery
    for name in set(sys.modules) - before:
        if str(HOPPER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def group(hopper, tmp_path):
    """Makes a group of two engines that start nothing, named by `model`."""
    engines, nursery = hopper
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)

    with nursery.nurseries(("stock", "upstream"), modules=()) as made:

        def make(model, *, late=0.0, fails="-", workloads=("a", "b")):
            children = []
            for mode, held in made.items():
                out = tmp_path / f"{model}-{mode}.json"
                slow = late if mode == "stock" else 0
                command = [str(script), mode, str(out), str(tmp_path / "notes"), str(slow), fails]
                children.append(engines.Child(held, model, mode, command, out))
            return engines.Group(children, workloads, 2)

        yield make


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def begun(held, *modes):
    """Wait until the engines of these modes, by default of all modes, have said that they are ready."""
    limit = time.monotonic() + 600
    for child in held.children:
        while child.mode in (modes or MODES) and child._answers.empty():
            assert time.monotonic() < limit
            time.sleep(0.01)


MODES = frozenset({"stock", "upstream"})


def test_engines_take_turns_to_go_first(hopper, group, tmp_path):
    engines, _ = hopper
    held = group("one")
    assert engines.ready([held], time.monotonic() + 600, MODES) == [held]
    engines.measure(held)
    order = (tmp_path / "notes").read_text().splitlines()
    assert order[:4] == ["stock a 0", "upstream a 0", "upstream a 1", "stock a 1"] and len(order) == 8
    assert len(held.files) == 2 and not held.missing
    assert list(held.children[0].lines) == ["a line of its log\n"]
    held.kill()
    assert all(gone(child.process) for child in held.children)


def test_a_certificate_that_failed_is_named(hopper, group):
    engines, _ = hopper
    held = group("one", fails="certificate")
    assert engines.ready([held], time.monotonic() + 600, MODES) == [held]
    said = "the certificate of cuda.linear N=1 failed (no memory); another serves"
    assert held.missing == [f"one stock: {said}", f"one upstream: {said}"]
    held.kill()
    kept = [child.out.with_suffix(".log").read_text() for child in held.children]
    assert kept == [f"WARNING bi_patch: {said}\n"] * 2


def test_who_is_late_is_left_out_and_ends(hopper, group):
    engines, _ = hopper
    late, punctual = group("late", late=3600), group("punctual")
    processes = [child.process for child in late.children]
    begun(punctual)
    assert engines.ready([punctual, late], time.monotonic() + 1.5, MODES) == [punctual]
    assert all(map(gone, processes)) and late.missing == ["late: no engine of mode stock started"]
    engines.measure(punctual)
    assert punctual.files and not late.files


def test_what_a_late_engine_compiles_ends_with_it(hopper, group, tmp_path):
    engines, _ = hopper
    late, notes, limit = group("late", late=3600, fails="compiles"), tmp_path / "notes", time.monotonic() + 600
    while not notes.exists() or len(notes.read_text().splitlines()) < len(late.children):
        assert time.monotonic() < limit
        time.sleep(0.01)
    compilers = [psutil.Process(int(line)) for line in notes.read_text().splitlines()]
    assert not engines.ready([late], time.monotonic(), MODES)
    assert not any(map(engines._runs, compilers))


def test_an_engine_that_is_not_needed_may_be_late(hopper, group):
    engines, _ = hopper
    held = group("one", late=3600)
    begun(held, "upstream")
    assert engines.ready([held], time.monotonic() + 1.5, frozenset({"upstream"})) == [held]
    assert [child.mode for child in held.children] == ["upstream"] and held.missing


def test_a_failure_keeps_what_was_measured(hopper, group):
    engines, _ = hopper
    held = group("one", fails="b")
    engines.ready([held], time.monotonic() + 600, MODES)
    engines.measure(held)
    assert len(held.files) == 2 and "'ended', not 'turn done'" in held.missing[0]


def test_nothing_begins_after_the_limit(hopper, group):
    engines, _ = hopper
    held = group("one")
    engines.ready([held], time.monotonic() + 600, MODES)
    engines.measure(held, until=time.monotonic())
    assert not held.files and not held.missing


def test_the_rounds_fit_on_one_gpu(hopper):
    import costs

    for number, entries in enumerate(costs.ROUNDS):
        assert sum(entry.memory for entry in entries) <= (131 if number else 106)
        assert sum(len(entry.modes) for entry in entries) <= 11
    names = [entry.name for entries in costs.ROUNDS for entry in entries]
    assert len(set(names)) == len(names)


def test_named_models_of_several_rounds_start_together(hopper):
    import argparse

    import costs

    def names(**given):
        a = argparse.Namespace(**{"rounds": costs.OF_ONE, "only": ["MXFP4", "NVFP4"], "together": False} | given)
        return [[entry.name for entry in entries] for entries in costs.plan(a)]

    oss, four = "gpt-oss-20b MXFP4, 6 layers", "Qwen3-8B NVFP4, 6 layers"
    experts = "Qwen3-30B-A3B NVFP4 experts, 6 layers"
    assert names() == [[oss], [four], [experts]] and names(together=True) == [[oss, four, experts]]
    assert names(only=["nothing"]) == names(only=["nothing"], together=True) == []


def test_what_no_round_has_is_told_before_anything_starts(hopper, monkeypatch, capsys):
    import costs

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["costs.py", *words])
        costs.main()
        return capsys.readouterr().out

    assert run("--plan", "--rounds", "8", "--only", "NVFP4", "--modes", "stock,armed") == (
        "Qwen3-8B NVFP4, 6 layers: stock, armed\n\n"
    )
    assert run("--plan", "--together", "--only", "Qwen3-8B, 8 layers", "--only", "AWQ") == (
        "Qwen3-8B AWQ, 6 layers: stock, armed\nQwen3-8B, 8 layers: stock, armed, parts\n\n"
    )
    for words in (["--rounds", "7", "--only", "NVFP4"], ["--only", "NVFP4", "--only", "NVFP5"], ["--modes", "armd"]):
        with pytest.raises(SystemExit):
            run(*words)
        assert f"no round has {words[-2]} '{words[-1]}'" in capsys.readouterr().err


def test_the_environment_of_a_mode(hopper, monkeypatch):
    import child

    monkeypatch.setattr(os, "environ", {"BI_PATCH_TP_INVARIANT": "4", "VLLM_BATCH_INVARIANT": "1"})
    names = ("BI_PATCH", "BI_PATCH_TP_INVARIANT", "VLLM_BATCH_INVARIANT")
    seen = {}
    for mode in child.MODES:
        child.environment(mode)
        seen[mode] = [os.environ.get(name, "") for name in names]
    assert seen == {
        "stock": ["0", "0", ""],
        "upstream": ["0", "0", "1"],
        "armed": ["1", "0", "1"],
        "parts": ["1", "8", "1"],
    }


def test_a_shape_with_another_number_of_layers(hopper):
    import child

    assert child.shape("Qwen3-30B-A3B, 12 layers")["num_hidden_layers"] == 12
    assert child.shape("DeepSeek-V3, 4 layers")["num_hidden_layers"] == 4
    for name in ("Qwen3-30B-A3B, few layers", "Qwen4"):
        with pytest.raises(SystemExit, match="no such model"):
            child.shape(name)
