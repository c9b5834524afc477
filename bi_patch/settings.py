"""The environment variables that bi_patch reads. It checks them strictly: an unknown name or value is an error.

BI_PATCH              1 (default): arm. 0: leave vLLM as it is, whatever else is set
BI_PATCH_FORM         hooks (default): import hooks close the patch points. patches: only patched modules close them
BI_PATCH_PLATFORM     cpu, cuda or ascend: use this platform instead of the detected platform, e.g. without its device
BI_PATCH_UNSEEDED     the seed of a sampled request that has none. random (default): a random seed. derive: a seed
                      derived from the request. refuse: the request is a bad request
BI_PATCH_CACHE        the folder of certificates and built kernels (default: ~/.cache/bi_patch)
BI_PATCH_LEAVE_OPEN   patch points or areas to leave open, separated by commas, to plant a fault. No engine starts
BI_PATCH_ALLOW_OPEN   1: let an engine start with open patch points, to see what a planted fault does. Not for real use
BI_PATCH_MLA          attention of MLA models on CUDA. two (default): prompts and generated tokens have forms of their
                      own, as in vLLM. one: every token takes one form, so decode equals prefill, which is slower
BI_PATCH_TP_INVARIANT 2, 4 or 8: equal bits for every tensor-parallel size up to this number on CPU, and for up to
                      four ranks on CUDA, two in eager mode. 0 (default): equal bits for one size
BI_PATCH_ALLOW_CODE   dotted names of code from outside vLLM that you vouch for, separated by commas: worker classes,
                      models, plugins, logits processors. bi_patch refuses others by name
VLLM_BATCH_INVARIANT  1: arm each Python process that starts where bi_patch is installed. Arming sets it, for vLLM and
                      for child processes

A patch point (`Seam` in the code) is one place in vLLM that bi_patch replaces.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bi_patch.errors import SettingError
from bi_patch.platforms import releases

PLATFORMS = tuple(releases.BY_PLATFORM)
FORMS = ("hooks", "patches")
LEAVES = ("0", "2", "4", "8")
UNSEEDED = ("random", "derive", "refuse")
MLA = ("two", "one")


@dataclass(frozen=True)
class Settings:
    enabled: bool = True
    form: str = "hooks"
    platform: str | None = None
    cache: Path = Path("~/.cache/bi_patch")
    leave_open: frozenset[str] = frozenset()
    allow_open: bool = False
    unseeded: str = "random"
    mla: str = "two"
    allow_code: frozenset[str] = frozenset()
    tp_invariant: int = 0

    def leaves_open(self, seam: str) -> bool:
        """Whether BI_PATCH_LEAVE_OPEN names the seam or its area."""
        return seam in self.leave_open or seam.split(".", 1)[0] in self.leave_open


_DEFAULT_CACHE = "~/.cache/bi_patch"
_NAMES = {
    "BI_PATCH",
    "BI_PATCH_FORM",
    "BI_PATCH_PLATFORM",
    "BI_PATCH_CACHE",
    "BI_PATCH_LEAVE_OPEN",
    "BI_PATCH_ALLOW_OPEN",
    "BI_PATCH_UNSEEDED",
    "BI_PATCH_MLA",
    "BI_PATCH_ALLOW_CODE",
    "BI_PATCH_TP_INVARIANT",
}


def read(environ: Mapping[str, str] | None = None) -> Settings:
    """Read and check the settings. environ: the variables to read, by default those of this process.

    Raises SettingError for an unknown name that begins with BI_PATCH, and for a value that this module does not list.
    """
    env = os.environ if environ is None else environ
    unknown = sorted(n for n in env if n.startswith("BI_PATCH") and n not in _NAMES)
    if unknown:
        raise SettingError(
            f"unknown environment variable {', '.join(unknown)}. bi_patch reads only {', '.join(sorted(_NAMES))}"
        )
    enabled = _choice(env, "BI_PATCH", ("1", "0"))
    _choice(env, "VLLM_BATCH_INVARIANT", ("1", "0"))
    return Settings(
        enabled=enabled == "1",
        form=_choice(env, "BI_PATCH_FORM", FORMS),
        platform=_choice(env, "BI_PATCH_PLATFORM", ("", *PLATFORMS)) or None,
        cache=Path(env.get("BI_PATCH_CACHE") or _DEFAULT_CACHE).expanduser(),
        leave_open=_names(env, "BI_PATCH_LEAVE_OPEN"),
        allow_open=_choice(env, "BI_PATCH_ALLOW_OPEN", ("0", "1")) == "1",
        unseeded=_choice(env, "BI_PATCH_UNSEEDED", UNSEEDED),
        mla=_choice(env, "BI_PATCH_MLA", MLA),
        tp_invariant=int(_choice(env, "BI_PATCH_TP_INVARIANT", LEAVES)),
        allow_code=frozenset(n.replace(":", ".") for n in _names(env, "BI_PATCH_ALLOW_CODE")),
    )


def _names(env: Mapping[str, str], name: str) -> frozenset[str]:
    return frozenset(n.strip() for n in env.get(name, "").split(",") if n.strip())


def _choice(env: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    """The value of `name`, or the first of `allowed` if the variable is unset or empty."""
    value = env.get(name, "").strip() or allowed[0]
    if value not in allowed:
        raise SettingError(
            f"{name}={value!r} is not a value that bi_patch knows. Use {' or '.join(repr(a) for a in allowed if a)}"
        )
    return value
