"""Each refusal says, in this order: the name of a seam or a feature, what is not covered and why, and what to do."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("UnsupportedFeature", "UnsupportedRequest", "bad_request")
NAME = re.compile(r"(\{[^}]*\}|[a-z][a-z0-9_]*(\.[a-z0-9_{}]+)?): ")
TO_DO = (
    *("Activate", "Arm", "Ask", "Call", "Delete", "Give", "Import", "Install", "Leave", "Let", "Load", "Lower"),
    *(
        "Name",
        "Pack",
        "Pass",
        "Remove",
        "Reset",
        "Save",
        "Send",
        "Set",
        "Shorten",
        "Start",
        "Train",
        "Turn",
        "Unset",
        "Use",
    ),
    *("Wait",),
)
CURE = re.compile(
    rf"\. ({'|'.join(TO_DO)}) |\. \{{(todo|cure)\}}|\{{cured\(found\)\}}|, or set BI_PATCH=0|: leave out "
)
# Texts that another function or another rank made.
MADE_ELSEWHERE = {("agreement.py", "{text} (rank {rank} said this)"), ("refused.py", "{message}")}


def _text(node, constants):
    """A text as the code has it, with {code} for each value. None if nothing tells the text."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else f"{{{ast.unparse(v.value)}}}" for v in node.values)
        return "".join(parts)
    if isinstance(node, ast.Name):
        return constants.get(node.id, f"{{{node.id}}}")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return _text(node.func.value, constants)
    return None


def _refusals():
    for path in sorted((ROOT / "bi_patch").rglob("*.py")):
        tree = ast.parse(path.read_text())
        given = (node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
        constants = {node.targets[0].id: node.value.value for node in given if isinstance(node.targets[0], ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in KINDS and node.args:
                text = _text(node.args[0], constants)
                if (path.name, text) not in MADE_ELSEWHERE:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


REFUSALS = dict(_refusals())


def test_many_are_found():
    assert len(REFUSALS) > 150


@pytest.mark.parametrize("place", REFUSALS)
def test_form(place):
    text = REFUSALS[place]
    assert text is not None, "write the text where the error is raised"
    assert NAME.match(text), f"no name in front: {text}"
    assert CURE.search(text), f"nothing says what to do: {text}"
    assert not text.endswith("."), f"a period at the end: {text}"
