"""Compiles the C++ sources into one library for this machine's ISA and loads the library into torch.

The library is cached. Its name contains a digest of everything that can change its code, and it reaches the cache
directory by one rename, so several processes may build at once.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

from .fakes import register_fakes

CSRC = Path(__file__).parent / "csrc"
ISAS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable")

# The flags in /proc/cpuinfo that an ISA requires, and the compiler flags for the ISA.
_CPU_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
}
_CPU_FLAGS["avx512_bf16"] = _CPU_FLAGS["avx512"] | {"avx512_bf16"}
_CPU_FLAGS["amx_bf16"] = _CPU_FLAGS["avx512_bf16"] | {"amx_tile", "amx_bf16"}
_CFLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
_CFLAGS["avx512_bf16"] = [*_CFLAGS["avx512"], "-mavx512bf16"]
_CFLAGS["amx_bf16"] = [*_CFLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16", "-DBI_AMX"]

# No -ffast-math and no contraction: the compiler could contract one template instance and not another.
_COMMON = ["-fPIC", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-w"]
_FILES = ("gemm", "gemm_amx", "attention", "latent", "lora", "norm", "pointwise", "pooling", "softmax_topk")
_KERNELS = tuple(f"{name}.cpp" for name in _FILES)

_loaded: tuple[str, str] | None = None


class KernelBuildError(RuntimeError):
    """Compiling or loading the CPU kernels failed; the message says what to do."""


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def runnable_isas() -> list[str]:
    """The members of `ISAS` that this machine can run, best first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["portable"]
    have = _cpu_flags()
    isas = [i for i in ISAS if _CPU_FLAGS.get(i, set()) <= have]
    # The operating system must also allow this process to use tile registers.
    if "amx_bf16" in isas and not torch.cpu._init_amx():
        isas.remove("amx_bf16")
    return isas


def detect_isa() -> str:
    """The best ISA that this machine can run."""
    return runnable_isas()[0]


def _compiler() -> tuple[str, str]:
    """Path and version line of the C++ compiler."""
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        raise KernelBuildError(f"no C++ compiler: {name!r} is not on PATH; install g++ 11 or newer, or set CXX")
    run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise KernelBuildError(f"{path} --version failed: {run.stderr.strip()}; set CXX to a working compiler")
    return path, run.stdout.splitlines()[0] if run.stdout else ""


def _torch_dir() -> Path:
    return Path(torch.__file__).parent


def _gomp() -> list[str]:
    """Linker arguments for OpenMP: torch's own runtime if it ships one, because two runtimes have two thread pools."""
    found = sorted((_torch_dir() / "lib").glob("libgomp*.so*"))
    return [str(found[0])] if found else ["-lgomp"]


def _digest(*parts: str) -> str:
    """Digest of every source, this file, torch's version and folder, and `parts`."""
    h = hashlib.sha256()
    for part in (torch.__version__, str(_torch_dir()), *_COMMON, *_gomp(), *parts):
        h.update(part.encode() + b"\0")
    for path in sorted(CSRC.iterdir()):
        h.update(path.name.encode() + b"\0" + path.read_bytes())
    h.update(Path(__file__).read_bytes())
    return h.hexdigest()[:16]


def _run(cmd: list[str]) -> None:
    run = subprocess.run(cmd, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        tail = "\n".join((run.stderr or run.stdout).splitlines()[-30:])
        raise KernelBuildError(
            f"compiling the CPU kernels failed; g++ 11 or newer is needed (set CXX to choose one).\n"
            f"command: {' '.join(cmd)}\n{tail}"
        )


def _compile(cxx: str, isa: str, defines: tuple[str, ...], work: Path, bindings: Path) -> Path:
    """Compile and link in folder `work`. `bindings`: the cached object of ops.cpp, the same for every ISA."""
    tdir = _torch_dir()
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    jobs = [
        [
            cxx,
            *_COMMON,
            *defines,
            "-std=c++17",
            "-O3",
            *_CFLAGS[isa],
            "-c",
            str(CSRC / f),
            "-o",
            str(work / f"{f}.o"),
        ]
        for f in (*_KERNELS, "recurrent.cpp")
    ]
    objects = [job[-1] for job in jobs]
    if not bindings.exists():
        # First, because it takes longest. torch's headers need C++20 from 2.13 on.
        made = str(work / "ops.o")
        jobs.insert(
            0,
            [
                cxx,
                *_COMMON,
                "-std=c++20",
                "-O1",
                abi,
                f"-I{tdir}/include",
                "-c",
                str(CSRC / "ops.cpp"),
                "-o",
                made,
            ],
        )
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(_run, jobs))
    if (work / "ops.o").exists():
        os.replace(work / "ops.o", bindings)
    out = work / "lib.so"
    lib = tdir / "lib"
    _run(
        [
            cxx,
            "-shared",
            str(bindings),
            *objects,
            "-o",
            str(out),
            f"-L{lib}",
            f"-Wl,-rpath,{lib}",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
            *_gomp(),
        ]
    )
    return out


def build(cache_dir: Path, isa: str | None = None, defines: tuple[str, ...] = ()) -> Path:
    """Return the path of the library for `isa` (default: this machine's best); compile it if it is not cached.

    `defines`: extra compiler flags, for tests. Raises KernelBuildError for an unknown ISA, a missing compiler, a cache
    directory that cannot be created, or a failed compilation.
    """
    if isa is None:
        isa = detect_isa()
    elif isa not in ISAS:
        raise KernelBuildError(f"unknown ISA {isa!r}; one of {', '.join(ISAS)}")
    cxx, version = _compiler()
    cache_dir = Path(cache_dir)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise KernelBuildError(f"cannot make the kernel cache {cache_dir}: {e}; choose a writable one") from e
    target = cache_dir / f"bi_cpu-{isa}-{_digest(version, isa, *_CFLAGS[isa], *defines)}.so"
    bindings = cache_dir / f"bindings-{_digest(version)}.o"
    if target.exists():
        return target
    with FileLock(str(target) + ".lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir, prefix="build-") as tmp:
                os.replace(_compile(cxx, isa, defines, Path(tmp), bindings), target)
    return target


def load(cache_dir: Path, isa: str | None = None, defines: tuple[str, ...] = ()) -> str:
    """Build the library if needed, register `torch.ops.bi_cpu.*` with fakes, and return the ISA.

    `isa` and `defines` as for `build`. A process loads one ISA: a second call returns that ISA. Raises
    KernelBuildError as `build` does, for an ISA that this machine cannot run, and for a different ISA.
    """
    global _loaded
    if _loaded is not None:
        if isa not in (None, _loaded[0]):
            raise KernelBuildError(f"this process already runs the {_loaded[0]} kernels, not {isa}")
        return _loaded[0]
    runnable = runnable_isas()
    isa = isa or runnable[0]
    if isa not in runnable:
        raise KernelBuildError(f"this machine cannot run {isa!r}; it runs {', '.join(runnable)}")
    path = build(cache_dir, isa, defines)
    try:
        torch.ops.load_library(str(path))
    except OSError as e:
        raise KernelBuildError(f"cannot load {path}: {e}; delete it to build it again") from e
    register_fakes(isa)
    _loaded = (isa, str(path))
    return isa


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), *sys.argv[2:3]))
