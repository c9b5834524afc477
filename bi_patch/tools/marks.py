"""Generated blocks in Markdown pages, between `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

from collections.abc import Mapping

from bi_patch.errors import BiPatchError


class MarksMissing(BiPatchError):
    """A page has no marks for a generated block, or an opening mark without a closing one."""


def held(text: str, blocks: Mapping[str, str]) -> list[str]:
    """The names of the blocks for which a page has marks."""
    return [name for name in blocks if f"<!-- {name} -->" in text]


def renew(text: str, blocks: Mapping[str, str]) -> str:
    """The page with the content of every marked block replaced. Raises MarksMissing where a closing mark is missing."""
    for name in held(text, blocks):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, rest = text.split(begin, 1)
        if end not in rest:
            raise MarksMissing(f"the mark {begin} has no closing mark {end}")
        text = f"{head}{begin}\n{blocks[name].rstrip()}\n{end}{rest.split(end, 1)[1]}"
    return text


def stale(text: str, blocks: Mapping[str, str]) -> list[str]:
    """The names of the marked blocks whose content in the page differs from `blocks`."""
    return [name for name in held(text, blocks) if renew(text, {name: blocks[name]}) != text]
