"""Arming at interpreter start, in real processes without vLLM: when nothing happens, what stops vLLM, and the cost."""

import json
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from bi_patch.platforms import releases

ROOT = Path(__file__).resolve().parents[3]
PROJECT = ROOT / "pyproject.toml"
LOADED = "import sys, json; print(json.dumps(['bi_patch' in sys.modules, 'bi_patch_entry' in sys.modules]))"


def pth() -> Path:
    return Path(sysconfig.get_path("purelib")) / "bi_patch_autoload.pth"


@pytest.mark.parametrize(
    "environ",
    [{}, {"VLLM_BATCH_INVARIANT": "0"}, {"VLLM_BATCH_INVARIANT": "1", "BI_PATCH": "0"}],
    ids=["unset", "zero", "off"],
)
def test_inert_unless_asked_for(run_python, environ):
    done = run_python(LOADED, **environ)
    assert json.loads(done.stdout) == [False, False] and not done.stderr


def test_the_switch_arms_at_start(run_python):
    done = run_python("import bi_patch; print(bi_patch.state().armed)", VLLM_BATCH_INVARIANT="1")
    assert done.stdout.split() == ["True"], done.stderr
    assert json.loads(run_python(LOADED, VLLM_BATCH_INVARIANT="1").stdout) == [True, True]


@pytest.mark.alone
def test_start_costs_nothing_without_the_switch(run_python):
    """The .pth file adds a few ms at most to the least time that an interpreter takes to start."""
    code = (
        "import time, site, sys; start = time.perf_counter()\n"
        "keep = site.addpackage\n"
        "skip = sys.argv[1] == 'without'\n"
        "site.addpackage = lambda d, n, k: None if skip and n.startswith('bi_patch') else keep(d, n, k)\n"
        "site.main(); print(time.perf_counter() - start)"
    )

    times = {"with": [], "without": []}
    for _ in range(15):
        for kind, kept in times.items():
            out = subprocess.run([sys.executable, "-S", "-c", code, kind], capture_output=True, text=True, check=True)
            kept.append(float(out.stdout) * 1000)
    cost = min(times["with"]) - min(times["without"])
    print(
        f"start {min(times['without']):.2f} ms, with bi_patch {cost:+.2f} ms, medians "
        f"{statistics.median(times['without']):.2f} and {statistics.median(times['with']):.2f} ms"
    )
    assert pth().is_file()
    assert cost < 3.0


@pytest.mark.parametrize(
    "environ, said",
    [
        ({"BI_PATCH": "maybe"}, "BI_PATCH='maybe'"),
        ({"BI_PATCH_NEW": "1"}, "BI_PATCH_NEW"),
        ({"BI_PATCH_LEAVE_OPEN": "no.such"}, "no.such"),
    ],
)
def test_a_bad_setting_stops_vllm_not_python(run_python, environ, said):
    """Python ignores errors in .pth files, so the import of vLLM must raise them."""
    assert run_python("print('fine')", VLLM_BATCH_INVARIANT="1", **environ).stdout.strip() == "fine"
    done = run_python("import vllm", VLLM_BATCH_INVARIANT="1", **environ)
    assert done.returncode != 0 and "SettingError" in done.stderr and said in done.stderr


@pytest.mark.parametrize("broken", ["wrapt.py", "vllm/_version.py"], ids=["importing bi_patch", "arming"])
def test_an_error_without_a_name_stops_vllm_too(run_python, fake_vllm, tmp_path, broken):
    path = fake_vllm(releases.ALL[-1])
    (tmp_path / broken).write_bytes(b"\xff")  # neither Python nor text
    asked = {"PYTHONPATH": path, "VLLM_BATCH_INVARIANT": "1"}
    assert run_python("print('fine')", **asked).stdout.strip() == "fine"
    done = run_python("import vllm; print(vllm.loaded)", **asked)
    assert done.returncode != 0 and not done.stdout
    assert "ArmingFailed" in done.stderr and "0xff" in done.stderr and "BI_PATCH=0" in done.stderr
    assert run_python("import vllm; print(vllm.loaded)", **asked, BI_PATCH="0").stdout.strip() == "True"


def test_a_refused_vllm_can_still_be_looked_for(run_python, fake_vllm):
    code = "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations)"
    done = run_python(code, PYTHONPATH=fake_vllm("0.99.0"), VLLM_BATCH_INVARIANT="1")
    assert "vllm" in done.stdout, done.stderr


@pytest.mark.parametrize("release", ["0.99.0", "0.31.0"])
def test_an_unknown_release_is_refused_either_way(run_python, fake_vllm, release):
    path = fake_vllm(release)
    done = run_python("import bi_patch", PYTHONPATH=path)
    assert "UnsupportedRelease" in done.stderr and release in done.stderr and releases.ALL[-1] in done.stderr
    done = run_python("import vllm; print(vllm.loaded)", PYTHONPATH=path, VLLM_BATCH_INVARIANT="1")
    assert done.returncode != 0 and "UnsupportedRelease" in done.stderr
    done = run_python("import vllm; print(vllm.loaded)", PYTHONPATH=path, VLLM_BATCH_INVARIANT="1", BI_PATCH="0")
    assert done.stdout.strip() == "True"


def test_without_vllm_importing_is_harmless(run_python):
    code = (
        "import importlib.util as u; keep = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'vllm' else keep(name, *a)\n"
        "import bi_patch; print(bi_patch.state())"
    )
    assert run_python(code).stdout.strip() == "None"


def test_a_contradicting_variable_is_an_error(run_python):
    done = run_python("import bi_patch", VLLM_USE_V2_MODEL_RUNNER="1")
    assert "SettingError" in done.stderr and "VLLM_USE_V2_MODEL_RUNNER" in done.stderr


def test_disarming_puts_the_environment_back(run_python):
    code = (
        "import os, bi_patch; armed = os.environ['VLLM_BATCH_INVARIANT'], os.environ['VLLM_USE_V2_MODEL_RUNNER']\n"
        "bi_patch.disarm(); print(armed, os.environ.get('VLLM_BATCH_INVARIANT'), bi_patch.state())"
    )
    assert run_python(code).stdout.strip() == "('1', '0') None None"


def test_the_state_says_what_is_armed_in_a_line(run_python):
    code = (
        "import os, bi_patch; state = bi_patch.state()\n"
        "text = f'vLLM {state.plan.release} on {state.plan.platform}, {state.closed} of {state.closed + state.open}'\n"
        "assert repr(state) == f'<bi_patch armed: {text} patch points closed in process {os.getpid()}>', repr(state)\n"
        "assert state.armed and state.closed == 0 and state.open == len(state.plan.seams) > 0; print(state)"
    )
    done = run_python(code)
    assert done.stdout.startswith("<bi_patch armed: vLLM 0."), done.stderr


def test_disarming_and_arming_again_works_before_vllm_is_loaded(run_python):
    code = (
        "import os, bi_patch; bi_patch.disarm(); again = bi_patch.arm()\n"
        "print(again is bi_patch.state(), again.armed, os.environ['VLLM_BATCH_INVARIANT'])"
    )
    assert run_python(code).stdout.split() == ["True", "True", "1"]


def test_the_switch_set_inside_python_arms_its_children_only(run_python):
    code = (
        "import os, subprocess, sys; os.environ['VLLM_BATCH_INVARIANT'] = '1'; print('bi_patch' in sys.modules)\n"
        f"print(subprocess.run([sys.executable, '-c', {LOADED!r}], capture_output=True, text=True).stdout)"
    )
    assert run_python(code).stdout.split("\n")[:2] == ["False", "[true, true]"]


def test_sitecustomize_hands_on_to_the_next(run_python, tmp_path):
    from bi_patch.arming.children import SITE

    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.theirs = True\n")
    done = run_python(
        "import bi_patch; print(theirs, bi_patch.state().armed)",
        PYTHONPATH=f"{SITE}:{tmp_path}",
        VLLM_BATCH_INVARIANT="1",
    )
    assert done.stdout.strip() == "True True", done.stderr


@pytest.fixture
def not_installed(tmp_path):
    """The interpreter of an environment that can import bi_patch and vLLM but reads no .pth file of bi_patch."""
    venv.create(tmp_path / "venv")
    (folder,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (folder / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(tmp_path / "venv" / "bin" / "python")


def test_children_are_armed_where_bi_patch_is_not_installed(run_python, not_installed):
    code = (
        "import os, subprocess, sys; before = os.environ.pop('PYTHONPATH', None); import bi_patch\n"
        f"child = subprocess.run([sys.executable, '-c', {LOADED!r}], capture_output=True, text=True).stdout\n"
        "path = os.environ['PYTHONPATH']; bi_patch.disarm()\n"
        "print(child.strip(), 'arming/site' in path, 'PYTHONPATH' not in os.environ)"
    )
    done = run_python(code, python=not_installed)
    assert done.stdout.strip() == "[true, true] True True", done.stderr


@pytest.fixture
def target_folder(tmp_path):
    """A folder as `pip install --target` makes it: the package and its .pth file, which no interpreter reads."""
    folder = tmp_path / "target"
    shutil.copytree(ROOT / "bi_patch", folder / "bi_patch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("bi_patch_entry.py", "bi_patch_autoload.pth"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_importing_from_a_target_folder_arms_children(run_python, not_installed, target_folder):
    """With the folder on PYTHONPATH, the switch alone does nothing. An import of bi_patch also arms children, and the
    children's children."""

    def run(code, **environ):
        environ |= {"PYTHONPATH": str(target_folder), "PYTHONSAFEPATH": "1"}  # not from the current folder
        return run_python(code, python=not_installed, **environ)

    def starting(code):
        return f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"

    assert json.loads(run(LOADED, VLLM_BATCH_INVARIANT="1").stdout) == [False, False]
    done = run("import bi_patch; " + starting(starting(LOADED)))
    assert json.loads(done.stdout) == [True, True], done.stderr
    done = run("import bi_patch; " + starting("import bi_patch; print(bi_patch.__file__, bi_patch.state().armed)"))
    assert done.stdout.split() == [str(target_folder / "bi_patch" / "__init__.py"), "True"], done.stderr


def test_no_list_of_plugins_starts_an_unarmed_engine(run_python, not_installed, target_folder):
    """On PYTHONPATH alone, the switch arms nothing. PyTorch then calls bi_patch, and the engine's module is refused."""
    engine = target_folder / "vllm" / "v1" / "engine"
    engine.mkdir(parents=True)
    for folder in (engine.parents[1], engine.parent, engine):
        (folder / "__init__.py").touch()
    (engine.parents[1] / "__init__.py").write_text("import torch\n")
    (engine.parents[1] / "_version.py").write_text(f"__version__ = version = '{releases.ALL[-1]}'\n")
    (engine / "core.py").write_text("print('an engine core')\n")
    told = target_folder / "bi_patch-0.2.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: bi_patch\nVersion: 0.2.0\n")
    declared = re.findall(r'^\[project.entry-points."torch.backends"\]\nbi_patch = "(.*)"', PROJECT.read_text(), re.M)
    (told / "entry_points.txt").write_text(f"[torch.backends]\nbi_patch = {declared[0]}\n")

    def run(code, **environ):
        environ |= {"PYTHONPATH": str(target_folder), "PYTHONSAFEPATH": "1", "VLLM_PLUGINS": "another"}
        return run_python(code, python=not_installed, **environ)

    done = run("import vllm.v1.engine.core", VLLM_BATCH_INVARIANT="1")
    assert done.returncode != 0 and "SeamOpen" in done.stderr and not done.stdout, done.stderr
    armed = {"VLLM_BATCH_INVARIANT": "1", "BI_PATCH_PLATFORM": "cpu", "BI_PATCH_LEAVE_OPEN": "engine"}
    for code, environ in (
        ("import vllm.v1.engine.core", {"VLLM_BATCH_INVARIANT": "1", "BI_PATCH": "0"}),
        ("import torch, bi_patch, vllm.v1.engine.core", armed),
    ):
        done = run(code, **environ)
        assert done.stdout.strip() == "an engine core", done.stderr


def test_run_from_a_target_folder_arms_the_command(run_python, not_installed, target_folder):
    command = ["bi-patch", "run", "--", not_installed, "-c", LOADED]
    code = f"import sys, bi_patch_entry; sys.argv = {command!r}; bi_patch_entry.cli()"
    done = run_python(code, python=not_installed, PYTHONPATH=str(target_folder), PYTHONSAFEPATH="1")
    assert json.loads(done.stdout) == [True, True], done.stderr


def test_children_that_cannot_be_reached_are_an_error(run_python, not_installed):
    done = run_python("import bi_patch", "-I", python=not_installed)
    assert "SettingError" in done.stderr and "would not all be armed" in done.stderr


def test_run_arms_a_child_and_keeps_its_exit_code(run_python):
    program = str(Path(sys.executable).with_name("bi-patch"))
    code = "import bi_patch, sys; sys.exit(7 if bi_patch.state().armed else 1)"
    assert subprocess.run([program, "run", "--", sys.executable, "-c", code]).returncode == 7
    done = subprocess.run([program, "run", "--", "no-such-program"], capture_output=True, text=True)
    assert done.returncode == 2 and "no-such-program" in done.stderr
