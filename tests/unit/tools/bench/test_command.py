"""The command line of bench: a call that would measure or show nothing is an error; tables are written and checked."""

import json

import pytest
from typer.testing import CliRunner

from bi_patch import identity
from bi_patch.errors import SettingError
from bi_patch.tools.bench import plot
from bi_patch.tools.bench.matrix import Spec
from bi_patch.tools.cli import app, bench, status  # noqa: F401  two commands, so that each has its name
from bi_patch.tools.evidence import EvidenceMissing
from bi_patch.tools.marks import MarksMissing

MARKS = "<!-- invariance-cpu -->\n<!-- /invariance-cpu -->\n"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "nosuchmodel"], "nosuchmodel"),
        (["--only", "bf16", "--only", "nosuchmodel"], "nosuchmodel"),
        (["--no-cost", "--no-invariance"], "nothing to measure"),
        (["--write", "README.md"], "--tables"),
        (["--check"], "--tables"),
        (["--tables", "--check", "--write", "README.md"], "choose one"),
    ],
)
def test_nothing_to_do_is_named(arguments, said):
    done = run(*arguments)
    assert isinstance(done.exception, SettingError) and said in str(done.exception)


def test_a_folder_without_results_is_named():
    done = run("--tables", "--results", "/nope")
    assert isinstance(done.exception, EvidenceMissing) and "/nope" in str(done.exception)


def test_the_first_model_of_each_part_is_quick():
    costs, matrix = bench._chosen(specs("one", "two"), specs("two", "three"), ["two"], True)
    assert [s.label for s in (*costs, *matrix)] == ["two bf16", "two bf16"]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source tree with a result file and a page. `write(**changes)` writes the file with changed fields."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(f"# Results\n\n{MARKS}")

    def write(**changes):
        row = {"model": "m", "axis": "batch size", "compared": 1000, "differing": 0}
        found = {"device": "AMD (2 cores)", "vllm": "0.32.0", "torch": "2.13.0", "date": "2026-01-02", "rows": [row]}
        path = tmp_path / "benchmarks" / "results" / "invariance-2026-01-02-cpu-vllm-0.32.0.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found | changes))

    write()
    return tmp_path, write


def test_tables_are_written_into_pages_and_checked(tree):
    folder, write = tree
    page = folder / "docs" / "results.md"
    done = run("--tables", "--check")
    assert done.exit_code == 1 and "docs/results.md: these tables are outdated: invariance-cpu" in done.output
    assert run("--tables", "--write", str(page)).exit_code == 0
    assert "| m | 1 | 1,000 | 0 |" in page.read_text() and "2026-01-02, commit not recorded" in page.read_text()
    assert run("--tables", "--check").exit_code == 0
    write(date="2026-01-03")
    assert run("--tables", "--check").exit_code == 1


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "notice: invariance-cpu: invariance-2026-01-02-cpu-vllm-0.32.0.json does not say which code"),
        ({"digest": "ab" * 32, "commit": "0123456789"}, "measured other code: commit 0123456, digest abababababab"),
        ({"digest": identity.digest()}, "measured the code of this tree"),
    ],
)
def test_other_code_is_a_notice_and_no_failure(tree, changes, said):
    folder, write = tree
    write(**changes)
    run("--tables", "--write", "docs/results.md")
    done = run("--tables", "--check")
    assert done.exit_code == 0 and said in done.output


def test_a_file_that_supplies_no_table_is_a_notice(tree):
    folder, write = tree
    old = folder / "benchmarks" / "results" / "invariance-2026-01-01-cpu-vllm-0.32.0.json"
    newest = old.with_name("invariance-2026-01-02-cpu-vllm-0.32.0.json").read_text()
    old.write_text(newest.replace("2026-01-02", "2026-01-01"))
    run("--tables", "--write", "docs/results.md")
    done = run("--tables", "--check")
    assert done.exit_code == 0 and f"notice: benchmarks/results/{old.name} supplies no table" in done.output


def test_a_folder_stands_for_its_pages_with_marks(tree):
    folder, _ = tree
    (folder / "README.md").write_text("<!-- summary-invariance-total -->\n<!-- /summary-invariance-total -->\n")
    (folder / "docs" / "other.md").write_text("no tables here")
    done = run("--tables", "--write", ".")
    assert done.exit_code == 0 and "other.md" not in done.output
    assert "**0 of 1,000 positions differ.**" in (folder / "README.md").read_text()
    assert "| m | 1 | 1,000 | 0 |" in (folder / "docs" / "results.md").read_text()
    assert run("--tables", "--check").exit_code == 0
    (folder / "empty").mkdir()
    assert isinstance(run("--tables", "--write", "empty").exception, SettingError)


def test_a_page_without_marks_or_with_unknown_ones_is_named(tree):
    folder, _ = tree
    (folder / "README.md").write_text("no tables here")
    done = run("--tables", "--write", "README.md")
    assert isinstance(done.exception, MarksMissing) and "<!-- invariance-cpu -->" in str(done.exception)
    (folder / "README.md").write_text("<!-- cost-h100 -->\n<!-- /cost-h100 -->\n")
    done = run("--tables", "--write", "README.md")
    assert isinstance(done.exception, MarksMissing) and "no result file supplies cost-h100" in str(done.exception)
    done = run("--tables", "--check")
    assert done.exit_code == 1 and "README.md: these tables are outdated: cost-h100" in done.output


def test_tables_need_no_matplotlib(tree, monkeypatch):
    def missing(*_):
        raise plot.PlotsMissing("not installed")

    monkeypatch.setattr(plot, "cost", missing)
    folder, _ = tree
    row = {"model": "m", "workload": "w", "unit": "ms", "stock": 1.0, "upstream": None, "armed": 1.0, "repeats": 1}
    found = {"device": "AMD (2 cores)", "vllm": "0.32.0", "torch": "2.13.0", "date": "2026-01-02", "rows": [row]}
    (folder / "benchmarks" / "results" / "cost-2026-01-02-cpu-vllm-0.32.0.json").write_text(json.dumps(found))
    done = run("--tables")
    assert done.exit_code == 0 and "| m | w | 1.00 ms | - | 1.00 ms | 1.00 |" in done.output
    assert "No plots: not installed" in done.output


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def specs(*names):
    return tuple(Spec(name) for name in names)
