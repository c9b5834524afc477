"""Builds stub CANN libraries, with which the real torch_npu imports on a machine without an NPU: `stub_cann.py OUT`.

The stub defines every symbol that torch_npu's libraries need and no other library provides, as a function that returns
0. stub_cann.c defines the functions that must do more. The build takes a second; `make .venv-ascend` runs it. To use
the stub, run Python with LD_LIBRARY_PATH=OUT, TASK_QUEUE_ENABLE=0 and TORCH_DEVICE_BACKEND_AUTOLOAD=0, and without
ASCEND_HOME_PATH.
"""

import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MAIN = "libascendcl.so"
# The names of the libraries that torch_npu loads. The first library holds all functions.
NAMES = (
    MAIN,
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libatb.so",
)
_SYSTEM = (
    "libstdc++.so.6",
    "libm.so.6",
    "libc.so.6",
    "libgcc_s.so.1",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
)
_PYTHON = re.compile(r"_?Py[A-Z_]|_Py")


def symbols(library: Path, kind: str) -> Iterator[tuple[str, str]]:
    """The (type, name) of each dynamic symbol of a library. kind: `--undefined-only` or `--defined-only`."""
    listed = subprocess.run(["nm", "-D", kind, str(library)], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        *_, letter, name = line.split()
        yield letter, name


def missing(packages: Path) -> list[str]:
    """The symbols that torch_npu in `packages` needs and that neither torch_npu, torch nor the system defines."""
    folder = packages / "torch_npu"
    own = [*folder.glob("_C*.so"), *(folder / "lib").glob("*.so")]
    needed = {
        name
        for library in own
        for letter, name in symbols(library, "--undefined-only")
        if letter not in "wv" and "@" not in name
    }
    places = [Path(p) for p in ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64")]
    system = [next((p / name for p in places if (p / name).exists()), None) for name in _SYSTEM]
    others = [*own, *(packages / "torch" / "lib").glob("*.so*"), *(p for p in system if p)]
    have = {name.split("@")[0] for library in others for _, name in symbols(library, "--defined-only")}
    return sorted(name for name in needed - have if not _PYTHON.match(name))


def build(packages: Path, out: Path) -> int:
    """Write the stub libraries into `out`; returns the number of stubbed symbols."""
    names = missing(packages)
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        f'__attribute__((visibility("default"), weak)) long stub{i}(void) __asm__("{name}");\n'
        f"long stub{i}(void) {{ return 0; }}"
        for i, name in enumerate(names)
    ]
    (out / "stubs.c").write_text("\n".join(lines) + "\n")
    (out / "empty.c").write_text("static int nothing;\n")
    compiler = ["cc", "-O1", "-shared", "-fPIC", "-w"]
    sources = [str(out / "stubs.c"), str(Path(__file__).with_suffix(".c"))]
    subprocess.run([*compiler, "-o", str(out / MAIN), *sources, f"-Wl,-soname,{MAIN}"], check=True)
    for name in NAMES[1:]:
        linked = [f"-Wl,-soname,{name}", f"-L{out}", "-Wl,--no-as-needed", "-lascendcl"]
        subprocess.run([*compiler, "-o", str(out / name), str(out / "empty.c"), *linked], check=True)
    return len(names)


if __name__ == "__main__":
    print(build(Path(sysconfig.get_paths()["purelib"]), Path(sys.argv[1])), "symbols of CANN stubbed")
