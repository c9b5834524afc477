"""Pages name rows of the feature table with their states: coverage.md in its example, quantization.md by scheme."""

import re
from pathlib import Path

from bi_patch.platforms.features.table import ROWS

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_rows_of_the_example_have_these_states():
    example = (DOCS / "coverage.md").read_text().split("## Look up your engine", 1)[1].split("\n## ", 1)[0]
    named = re.findall(r'^\|.*"(.+)" \| (\w+) \|$', example, re.MULTILINE)
    assert len(named) == 3
    for name, state in named:
        start = name.removesuffix("...")
        rows = [row for row in ROWS if row.name == name or start != name and row.name.startswith(start)]
        assert [row.cell("cuda").state for row in rows] == [state], name


def test_the_schemes_of_a_checkpoint_are_rows_with_these_states():
    table = (DOCS / "quantization.md").read_text().split("## Find your scheme", 1)[1].split("\n## ", 1)[0]
    named = re.findall(r"^\|.*\| (.+) \| (served|refused|untried) \|$", table, re.MULTILINE)
    states = {row.name: row.cell("cuda").state for row in ROWS}
    assert len(named) == 15
    assert {name: states.get(name) for name, _ in named} == dict(named)
