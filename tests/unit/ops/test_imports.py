"""No operation imports vLLM. The seams pass to the operations what they need of vLLM."""

import ast
from pathlib import Path

import bi_patch.ops

FILES = sorted(Path(next(iter(bi_patch.ops.__path__))).rglob("*.py"))


def test_no_operation_imports_vllm():
    assert len(FILES) > 20
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0].startswith("vllm") for name in names), file
