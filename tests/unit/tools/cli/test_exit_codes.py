"""Exit code 1 is an answer, so every error exits with 2. Errors do not read the user's input as markup."""

import pytest

COMMAND = """
import sys, bi_patch_entry
from bi_patch.tools.cli import app, main
sys.argv = ["bi-patch", *{arguments!r}]

@app.command()
def planted() -> None:
    raise {error}

main()
"""


@pytest.fixture
def bi_patch(run_python):
    """bi_patch(*arguments, error=...) returns the finished process, whose command `planted` raises the error."""

    def run(*arguments, error="AssertionError", **environ):
        return run_python(COMMAND.format(arguments=arguments, error=error), COLUMNS="200", **environ)

    return run


@pytest.mark.parametrize("error", ["ValueError('said')", "EOFError('said')", "OSError(32, 'said')", "OSError('said')"])
def test_an_unexpected_error_is_2_and_shows_where(bi_patch, error):
    done = bi_patch("planted", error=error)
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "in planted" in done.stderr and "said" in done.stderr


@pytest.mark.parametrize(
    "error, code",
    [
        ("__import__('typer').Exit(1)", 1),
        ("__import__('typer').Exit(0)", 0),
        ("KeyboardInterrupt", 130),
        ("SystemExit(1)", 2),
    ],
)
def test_an_answer_keeps_its_code_and_an_end_from_outside_is_none(bi_patch, error, code):
    done = bi_patch("planted", error=error)
    assert done.returncode == code and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["./x[/bold]y", "/tmp/[red]abc", "/tmp/[red]abc\\"])
def test_a_named_error_says_what_the_user_gave_letter_by_letter(bi_patch, name):
    for arguments in (("verify", name), ("check", name)):
        done = bi_patch(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert name.removeprefix("./") in done.stderr.replace("\\\\", "\\")


def test_a_folder_is_printed_letter_by_letter(bi_patch, tmp_path):
    done = bi_patch("certify", BI_PATCH_CACHE=str(tmp_path / "[red]a[/bold]"))
    assert done.returncode == 0 and "[red]a[/bold]" in done.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("module", "there", "named"),
    [("torch", False, True), ("vllm", False, True), ("torch", True, False), ("x", False, False)],
)
def test_an_environment_without_vllm_is_named(monkeypatch, capsys, module, there, named):
    from bi_patch.tools import cli

    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: object() if there else None)
    cli._tell(ModuleNotFoundError(f"No module named {module!r}", name=module))
    said = capsys.readouterr().err
    assert ("MissingDependency" in said) == named and module in said
