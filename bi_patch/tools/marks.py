"""Generated blocks in Markdown pages, between `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

from collections.abc import Mapping

from bi_patch.errors import BiPatchError


class MarksMissing(BiPatchError):
    """A page has no marks for a generated block, or an opening mark without a closing one."""


def held(text: str, blocks: Mapping[str, str]) -> list[str]:
    """The names of the blocks that a page has marks for."""
    return [name for name in blocks if f"<!-- {name} -->" in text]


def renew(text: str, blocks: Mapping[str, str]) -> str:
    """The page with every block that it has marks for replaced. Raises MarksMissing where a closing mark lacks."""
    for name in held(text, blocks):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, rest = text.split(begin, 1)
        if end not in rest:
            raise MarksMissing(f"the mark {begin} has no closing mark {end}")
        text = f"{head}{begin}\n{blocks[name].rstrip()}\n{end}{rest.split(end, 1)[1]}"
    return text


def stale(text: str, blocks: Mapping[str, str]) -> list[str]:
    """The names of the blocks of a page that are not what would be written now."""
    return [name for name in held(text, blocks) if renew(text, {name: blocks[name]}) != text]
