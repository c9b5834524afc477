"""The command `features`: a line for each row; what names a text with its reasons."""

import pytest
from typer.testing import CliRunner

from bi_patch.errors import SettingError
from bi_patch.platforms.features import table
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
    assert "prints all of it" in str(run("--about", "LoRA", "--about", "nosuchthing").exception)
    assert "may name a wider group" in str(run("--about", "LoRA", "--about", "AWQ").exception)
    assert isinstance(run("--about", "LoRA", "README.md").exception, SettingError)


def test_what_names_two_texts_is_printed():
    said, more = run("--about", "LoRA", "--about", "tensor parallelism").output, run("--about", "LoRA").output
    assert "LoRA with pipeline parallelism, tensor parallelism" in said
    assert "LoRA with preemption" in more and "LoRA with preemption" not in said


def test_every_row_is_a_line():
    lines = run().output.splitlines()
    assert [line.split()[3] for line in lines if line.startswith("CPU ")] == [
        *("FEATURE", "BOTH", "LAYERS", "WEIGHTS", "MODELS")
    ]
    for feature in table.ROWS:
        states = [feature.cell(platform).state for platform in TITLES]
        assert any(line.endswith(f"  {feature.name}") and line.startswith(states[0]) for line in lines), feature.name


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
