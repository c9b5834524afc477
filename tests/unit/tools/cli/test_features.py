"""The command `features`: what names a text is printed as plain text; tables otherwise."""

from typer.testing import CliRunner

from bi_patch.errors import SettingError
from bi_patch.platforms.features.families import FAMILIES
from bi_patch.platforms.features.model import TITLES
from bi_patch.tools.cli import app, features, status  # noqa: F401  two commands, so that each has its name


def run(*arguments):
    return CliRunner().invoke(app, ["features", *arguments])


def test_what_names_a_text_is_printed_with_its_states_and_reasons():
    row = FAMILIES[0]
    said = run("--about", row.name.upper()).output
    states = ", ".join(f"{title} {row.cell(platform).state}" for platform, title in TITLES.items())
    assert said.startswith(f"{row.name}\n  {states}\n  ") and "|" not in said
    assert FAMILIES[1].name not in said


def test_a_text_that_nothing_names_is_an_error():
    assert "nosuchthing" in str(run("--about", "nosuchthing").exception)
    assert isinstance(run("--about", "LoRA", "README.md").exception, SettingError)


def test_every_table_is_printed():
    said = run().output
    assert all(f"| {head} | " in said for head in ("feature", "both together", "layers", "weights", "models", "device"))
