"""Tables in pages: what stands between `<!-- cost-cpu -->` and `<!-- /cost-cpu -->` is the table of that mark."""

from __future__ import annotations

import re
from collections.abc import Mapping

from bi_patch.errors import BiPatchError
from bi_patch.tools.evidence.kinds import KINDS

_MARK = re.compile(rf"<!-- ((?:{'|'.join(kind.kind for kind in KINDS)})-\S+) -->")


class MarkMissing(BiPatchError):
    """A page has a mark without its end, or the mark of a table that no result file supplies."""


def marks(text: str) -> list[str]:
    """The marks of a page in order."""
    return _MARK.findall(text)


def renewed(text: str, tables: Mapping[str, str]) -> str:
    """The page with the table of each of its marks. tables: Markdown by mark. Raises MarkMissing."""
    for mark in marks(text):
        head, end, rest = _split(text, mark)
        if mark not in tables:
            raise MarkMissing(f"no result file supplies the table {mark}; there are {', '.join(tables)}")
        text = f"{head}<!-- {mark} -->\n{tables[mark].strip()}\n{end}{rest}"
    return text


def outdated(text: str, tables: Mapping[str, str]) -> list[str]:
    """The marks whose text in the page is not their table's, those that have no table included. Raises MarkMissing."""
    wrong = []
    for mark in marks(text):
        head, _, rest = _split(text, mark)
        held = text[len(head) + len(f"<!-- {mark} -->") : len(text) - len(rest) - len(f"<!-- /{mark} -->")]
        if mark not in tables or held.strip() != tables[mark].strip():
            wrong.append(mark)
    return wrong


def _split(text: str, mark: str) -> tuple[str, str, str]:
    """What stands before the mark, the mark's end, and what stands after the end."""
    head, rest = text.split(f"<!-- {mark} -->", 1)
    end = f"<!-- /{mark} -->"
    if end not in rest:
        raise MarkMissing(f"the mark <!-- {mark} --> has no {end}")
    return head, end, rest.split(end, 1)[1]
