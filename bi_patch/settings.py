"""The environment variables that bi_patch reads, checked strictly: an unknown name or value is an error.

BI_PATCH              1 (default) arm; 0 leave vLLM untouched, whatever else is set
BI_PATCH_FORM         hooks (default) close seams by import hooks; patches: only the patched modules close them
BI_PATCH_PLATFORM     cpu | cuda | ascend: overrides detection, for checks on a machine without the device
BI_PATCH_CACHE        folder of certificates and built kernels (default: ~/.cache/bi_patch)
BI_PATCH_LEAVE_OPEN   seams or areas to leave open, comma separated: a planted fault; the engine refuses to start
BI_PATCH_ALLOW_OPEN   1: start although seams are open, to see what a planted fault does. Never for real use
VLLM_BATCH_INVARIANT  1 arms where bi_patch is installed; arming sets it for vLLM and for child processes
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bi_patch.errors import SettingError
from bi_patch.platforms import releases

PLATFORMS = tuple(releases.BY_PLATFORM)
FORMS = ("hooks", "patches")


@dataclass(frozen=True)
class Settings:
    enabled: bool = True
    form: str = "hooks"
    platform: str | None = None
    cache: Path = Path("~/.cache/bi_patch")
    leave_open: frozenset[str] = frozenset()
    allow_open: bool = False

    def leaves_open(self, seam: str) -> bool:
        """Whether BI_PATCH_LEAVE_OPEN names this seam or its area."""
        return seam in self.leave_open or seam.split(".", 1)[0] in self.leave_open


_DEFAULT_CACHE = "~/.cache/bi_patch"
_NAMES = {
    "BI_PATCH",
    "BI_PATCH_FORM",
    "BI_PATCH_PLATFORM",
    "BI_PATCH_CACHE",
    "BI_PATCH_LEAVE_OPEN",
    "BI_PATCH_ALLOW_OPEN",
}


def read(environ: Mapping[str, str] | None = None) -> Settings:
    """Read and check the settings.

    Raises SettingError for an unknown BI_PATCH* name, or for a value that is not listed in the module's text.
    """
    env = os.environ if environ is None else environ
    unknown = sorted(n for n in env if n.startswith("BI_PATCH") and n not in _NAMES)
    if unknown:
        raise SettingError(
            f"unknown environment variable {', '.join(unknown)}; bi_patch reads {', '.join(sorted(_NAMES))}"
        )
    enabled = _choice(env, "BI_PATCH", ("1", "0"))
    _choice(env, "VLLM_BATCH_INVARIANT", ("1", "0"))
    return Settings(
        enabled=enabled == "1",
        form=_choice(env, "BI_PATCH_FORM", FORMS),
        platform=_choice(env, "BI_PATCH_PLATFORM", ("", *PLATFORMS)) or None,
        cache=Path(env.get("BI_PATCH_CACHE") or _DEFAULT_CACHE).expanduser(),
        leave_open=frozenset(n.strip() for n in env.get("BI_PATCH_LEAVE_OPEN", "").split(",") if n.strip()),
        allow_open=_choice(env, "BI_PATCH_ALLOW_OPEN", ("0", "1")) == "1",
    )


def _choice(env: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    """The value of `name`, the first of `allowed` when unset or empty."""
    value = env.get(name, "").strip() or allowed[0]
    if value not in allowed:
        raise SettingError(f"{name}={value!r} is not understood; use {' or '.join(repr(a) for a in allowed if a)}")
    return value
