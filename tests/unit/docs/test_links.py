"""Links of the pages: those that the site's build does not see, and the hook that replaces links out of docs/."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = ("README.md", "CHANGELOG.md", *(p.relative_to(ROOT).as_posix() for p in ROOT.glob("[a-z]*/**/README.md")))
LINK = re.compile(r"\]\(([^()\s]+)\)")


@pytest.fixture(scope="module")
def repository():
    spec = importlib.util.spec_from_file_location("repository", ROOT / "docs/hooks/repository.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_outside_docs_leads_somewhere(page):
    file = ROOT / page
    for target in LINK.findall(file.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = file.parent / path if path else file
        assert found.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(found), f"{page}: {target}"


def test_a_link_out_of_docs_keeps_its_text(repository):
    text = "See [the kernels](../kernels) and [`patches`](../patches/README.md#use), [RL](rl.md), [web](https://a.b)."
    made, pictures, missing = repository.rewrite(text, "index.md", ROOT)
    assert made == "See the kernels and `patches`, [RL](rl.md), [web](https://a.b)."
    assert not pictures and not missing


def test_a_picture_out_of_docs_is_copied_into_the_site(repository):
    made, pictures, missing = repository.rewrite("![cost](../../benchmarks/results/cost-cpu.svg)", "log/a.md", ROOT)
    assert made == "![cost](../pictures/cost-cpu.svg)"
    assert pictures == {"pictures/cost-cpu.svg": ROOT / "benchmarks/results/cost-cpu.svg"} and not missing


@pytest.mark.parametrize("target", ["../no/such/file.md", "../../outside.md"])
def test_a_link_to_nothing_is_told(repository, target):
    assert repository.rewrite(f"[x]({target})", "index.md", ROOT)[2] == [target]


def test_code_is_left_alone(repository):
    text = "```\n[x](../no/such/file.md)\n```"
    assert repository.rewrite(text, "index.md", ROOT) == (text, {}, [])


def test_every_named_error_has_a_heading_in_troubleshooting():
    named = re.findall(r"^class (\w+)\(", (ROOT / "bi_patch/errors.py").read_text(encoding="utf-8"), re.MULTILINE)
    heads = re.findall(r"^## (.*)$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) - {"BiPatchError"} <= {word for head in heads for word in head.split(", ")}


def test_every_script_of_the_benchmarks_is_named_by_a_page_or_by_another_script():
    folder = ROOT / "benchmarks"
    pages = {path: path.read_text(encoding="utf-8") for path in (*folder.rglob("README.md"), *folder.rglob("*.py"))}
    for path, text in pages.items():
        if path.suffix == ".py" and "__main__" in text:
            others = "".join(other for at, other in pages.items() if at != path)
            assert re.search(rf"\b{re.escape(path.name)}", others), path
