"""Links of the site's pages to files outside docs/, which a page in the repository can open and the site cannot.

A picture is copied into the site. Of any other link its text stays. A link to a file that does not exist is a warning,
which `mkdocs build --strict` ends on.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from posixpath import dirname, normpath

_LOG = logging.getLogger("mkdocs.hooks.repository")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]*)(#[^()\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
PICTURES = "pictures"


def rewrite(markdown: str, page: str, root: Path) -> tuple[str, dict[str, Path], list[str]]:
    """One page with its links to files outside docs/ replaced.

    page: its path below docs/. Returns the text, the pictures to copy (path in the site -> file), and what is missing.
    """
    pictures: dict[str, Path] = {}
    missing: list[str] = []

    def replaced(found: re.Match) -> str:
        mark, text, target, _ = found.groups()
        path = normpath(f"docs/{dirname(page)}/{target}")
        if not target or "://" in target or target.startswith(("mailto:", "/")) or path.startswith("docs/"):
            return found.group(0)
        if path.startswith("..") or not (root / path).exists():
            missing.append(target)
            return text
        if not mark:
            return text
        pictures[f"{PICTURES}/{Path(path).name}"] = root / path
        return f"![{text}]({'../' * page.count('/')}{PICTURES}/{Path(path).name})"

    parts = _FENCE.split(markdown)
    made = [part if part.startswith("```") else _LINK.sub(replaced, part) for part in parts]
    return "".join(made), pictures, missing


def on_files(files, config):
    """Add every picture that a page shows to the files of the site."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    for page in files.documentation_pages():
        _, pictures, _ = rewrite(page.content_string, page.src_uri, root)
        for name, file in pictures.items():
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace the links of one page."""
    text, _, missing = rewrite(markdown, page.file.src_uri, Path(config.config_file_path).parent)
    for target in missing:
        _LOG.warning("%s links to %s, which is not in the repository", page.file.src_uri, target)
    return text
