"""The example of docs/coverage.md names rows of the feature table, with their states."""

import re
from pathlib import Path

from bi_patch.platforms.features.table import ROWS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "coverage.md"


def test_the_rows_of_the_example_have_these_states():
    example = PAGE.read_text().split("## Look up your engine", 1)[1].split("\n## ", 1)[0]
    named = re.findall(r'^\|.*"(.+)" \| (\w+) \|$', example, re.MULTILINE)
    assert len(named) == 3
    for name, state in named:
        start = name.removesuffix("...")
        rows = [row for row in ROWS if row.name == name or start != name and row.name.startswith(start)]
        assert [row.cell("cuda").state for row in rows] == [state], name
