"""A small vLLM and a small set of seams, so that tests of the checks need no real release."""

import dataclasses
import zipfile
from pathlib import Path

import pytest

from bi_patch.seams.model import Seam, Target
from bi_patch.seams.plan import Planned
from bi_patch.tools.upstream import check, record, sources

RELEASE = "0.32.0"
MODULES = {
    "vllm/__init__.py": "from .ops import scale\n",
    "vllm/_version.py": "__version__ = version = '0.32.0'\n",
    "vllm/ops.py": (
        '"""Operations."""\n\n\ndef scale(x, by=2):\n    """Scale."""\n'
        "    y = x * by\n    z = y + 1\n    return z\n"
        "\n\nA = 1\nB = 2\nC = 3\n"
    ),
    "vllm/core/__init__.py": "",
    # No final newline, a form feed, and a line separator: git treats all as text.
    "vllm/core/sched.py": (
        'import os\n\x0c\nMARK = "\u2028"\n\n\nclass Scheduler:\n    def schedule(self):\n        return os.getpid()'
    ),
    "vllm/core/dos.py": "class Dos:\r\n    def run(self):\r\n        return 1\r\n",
    "vllm/user.py": "from vllm.ops import scale\n\n\ndef use():\n    return scale(1)\n",
    "vllm/lazy.py": "def use():\n    from vllm.ops import scale\n\n    return scale(1)\n",
}


def planned(name: str, module: str, qualname: str, copies: tuple[str, ...] = ()) -> Planned:
    target = Target(module, qualname, copies=copies)
    seam = Seam(
        name=name,
        targets=(target,),
        close=lambda original: original,
        why=f"why {name}",
        how=f"how {name}",
        until="never",
    )
    return Planned(seam, target)


PLANNED = (
    planned("engine.scale", "vllm.ops", "scale", copies=("vllm.user",)),
    planned("scheduler.schedule", "vllm.core.sched", "Scheduler.schedule"),
    planned("scheduler.run", "vllm.core.dos", "Dos.run"),
)


@dataclasses.dataclass
class Small:
    """A tree that tests may change, and the folder of the series recorded for the tree."""

    tree: Path
    series: Path
    planned: tuple[Planned, ...] = PLANNED

    def source(self) -> sources.Source:
        return sources.open_source(str(self.tree))

    def check(self) -> check.Report:
        return check.against(self.source(), RELEASE, self.planned, self.series)

    def write(self) -> None:
        record.write(self.source(), self.planned, self.series)

    def add(self, name: str, module: str, qualname: str, copies: tuple[str, ...] = ()) -> None:
        self.planned += (planned(name, module, qualname, copies),)

    def change(self, file: str, old: str, new: str) -> None:
        path = self.tree / file
        content = path.read_bytes()
        assert old.encode() in content
        path.write_bytes(content.replace(old.encode(), new.encode()))

    def patch(self, name: str) -> Path:
        return self.series / f"{name}.patch"

    def contents(self) -> dict[str, bytes]:
        """The recorded files, by name."""
        return {path.name: path.read_bytes() for path in self.series.iterdir()}

    def wheel(self, path: Path) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in MODULES.items():
                archive.writestr(name, text)
            archive.writestr("vllm-0.32.0.dist-info/METADATA", "Name: vllm\nVersion: 0.32.0\n")
        return path


@pytest.fixture
def small(tmp_path: Path) -> Small:
    """The small vLLM with a series recorded for it."""
    made = Small(tmp_path / "tree", tmp_path / "patches" / "vllm-0.32.0")
    for name, text in MODULES.items():
        path = made.tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    made.write()
    return made
