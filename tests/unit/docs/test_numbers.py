"""Figures of the pages: result files that a page names exist, and pages for users leave them to the logs and tables."""

import re
from pathlib import Path

import pytest

from bi_patch.tools.evidence.kinds import KINDS

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks/results"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
USERS = ["README.md", "CHANGELOG.md"]
USERS += [
    f"docs/{name}.md" for name in ("cpu", "hopper", "index", "quantization", "quickstart", "rl", "training", "verify")
]
FILE = re.compile(r"[a-z0-9-]*-20\d\d-\d\d-\d\d[\w.*-]*\.(?:json|txt)")
TABLE = re.compile(r"<!-- (\S+) -->.*?<!-- /\1 -->", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_result_file_that_a_page_names_exists(page):
    for name in FILE.findall(page.read_text(encoding="utf-8")):
        assert any(RESULTS.rglob(name)), f"{name} is not in {RESULTS}"


def test_every_result_file_has_a_reader():
    """Tables choose among the files of verify's and bench's kinds. Any other current file must be named by a page."""
    named = "\n".join(page.read_text(encoding="utf-8") for page in (*PAGES, *(ROOT / "kernels").rglob("*.md")))
    kinds = tuple(kind.kind for kind in KINDS)
    files = [file.name for file in RESULTS.iterdir() if file.is_file() and not file.name.startswith(kinds)]
    files += [file.name for file in RESULTS.glob("*.svg")]
    assert not [name for name in files if name not in named]


@pytest.mark.parametrize("page", USERS)
def test_pages_for_users_name_no_result_files(page):
    """Measurements belong into generated tables or into docs/log, so that a figure has one place."""
    text = TABLE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    assert not FILE.findall(text)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
