"""The files of a LoRA adapter, as vLLM reads them when a step needs the adapter. Every platform shares this.

An error inside a step ends the engine. So a request is refused before, by what the files say.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_SAFE = "adapter_model.safetensors"
_NAMES = ("adapter_config.json", _SAFE, "adapter_model.bin", "adapter_model.pt")


_folders: dict[str, Path] = {}  # each request asks, and a hub must not


def folder(path: str) -> Path | None:
    """The folder of an adapter's path, from the hub if vLLM would take it from there. None if vLLM finds none."""
    if path not in _folders:
        from vllm.lora.utils import get_adapter_absolute_path

        found = Path(get_adapter_absolute_path(path))
        if not found.is_dir():
            return None
        _folders[path] = found
    return _folders[path]


def stamp(where: Path) -> tuple:
    """Sizes and times of the files: while these stay, the files are the same."""
    return tuple(
        (file.name, held.st_size, held.st_mtime_ns, held.st_ino) for file in _files(where) for held in (file.stat(),)
    )


def digest(where: Path) -> str:
    """A digest of what the files hold."""
    made = hashlib.blake2b()
    for file in _files(where):
        made.update(file.name.encode() + file.stat().st_size.to_bytes(8, "little"))
        with file.open("rb") as given:
            while part := given.read(1 << 20):
                made.update(part)
    return made.hexdigest()


def may_have_head(where: Path) -> bool:
    """Whether an adapter may change the language model's head. True for files whose names cannot be read quickly."""
    return _may_have_head(where, stamp(where))


@functools.lru_cache(maxsize=1024)
def _may_have_head(where: Path, stamped: tuple) -> bool:
    from safetensors import SafetensorError, safe_open

    if not (where / _SAFE).is_file():
        return True
    try:
        with safe_open(where / _SAFE, "pt") as held:
            return any("lm_head" in name for name in held.keys())  # noqa: SIM118  no mapping
    except SafetensorError:
        return True


def _files(where: Path) -> list[Path]:
    return [where / name for name in _NAMES if (where / name).is_file()]
