"""The command `features`: what names a text is printed as plain text; tables otherwise."""

import pytest
from typer.testing import CliRunner

from bi_patch.errors import SettingError
from bi_patch.platforms.features.families import FAMILIES
from bi_patch.platforms.features.model import TITLES, refused, row, served, untried
from bi_patch.tools import features as tables
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


@pytest.mark.parametrize(
    ("cuda", "said"),
    [
        ((served("a.json", releases=">=0.33"), refused("no")), "CUDA: refused before vLLM 0.33"),
        ((untried(releases=">=0.32"), refused("no")), "CUDA: refused before vLLM 0.32"),
        ((served("a.json", why="eager", releases=">=0.26"), untried()), "CUDA: untried before vLLM 0.26; eager"),
        ((served("a.json"),), None),
        ((refused("no", releases=">=0.33"), served("a.json")), "CUDA: no"),
    ],
)
def test_a_row_says_what_older_releases_lack(cuda, said):
    made = row("x", cpu=served("a.json"), cuda=cuda, ascend=served("a.json"))
    assert tables._remarks(made) == ([said] if said else [])
