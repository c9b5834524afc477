"""The command line of bench: what would measure or show nothing is an error."""

import pytest
from typer.testing import CliRunner

from bi_patch.errors import SettingError
from bi_patch.tools.bench.matrix import Spec
from bi_patch.tools.cli import app, bench, status  # noqa: F401  two commands, so that each has its name


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "nosuchmodel"], "nosuchmodel"),
        (["--only", "bf16", "--only", "nosuchmodel"], "nosuchmodel"),
        (["--no-cost", "--no-invariance"], "nothing to measure"),
        (["--tables", "--results", "/nope"], "/nope"),
        (["--readme", "README.md"], "--tables"),
    ],
)
def test_nothing_to_do_is_named(arguments, said):
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(done.exception, SettingError) and said in str(done.exception)


def test_a_file_without_marks_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "README.md").write_text("no tables here")
    name = "invariance-2026-01-02-cpu-vllm-0.32.0.json"
    (tmp_path / name).write_text('{"device": "d", "vllm": "0.32.0", "torch": "t", "date": "x", "rows": []}')
    arguments = ["bench", "--tables", "--results", str(tmp_path), "--readme", str(tmp_path / "README.md")]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, SettingError) and "<!-- invariance-cpu -->" in str(done.exception)


def test_the_first_model_of_each_part_is_quick():
    costs, matrix = bench._chosen(specs("one", "two"), specs("two", "three"), ["two"], True)
    assert [s.label for s in (*costs, *matrix)] == ["two bf16", "two bf16"]


def specs(*names):
    return tuple(Spec(name) for name in names)
