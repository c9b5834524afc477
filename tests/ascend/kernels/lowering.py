"""Lowers a triton-ascend kernel to Linalg, and to HIVM with the open part of AscendNPU-IR's compiler.

This needs no NPU and no CANN. `bishengir-compile` writes the HIVM module and then fails, because hivmc, which makes a
binary from the module, is closed. So the tests ignore the exit code and read the module and the messages.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

# One chip of each family.
TARGETS = ("Ascend910B3", "Ascend910_9391", "Ascend950PR_9589")
_OPTIONS = (
    "--enable-auto-multi-buffer=True",
    "--enable-auto-bind-sub-block=True",
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
)
_ATOMIC = re.compile(r"atomic", re.IGNORECASE)


class Hivm(NamedTuple):
    """The compiler's output. module: the HIVM text, or "". errors: all messages except that about hivmc."""

    module: str
    errors: list[str]


def linalg(
    function, signature: dict[str, str], constants: dict[str, object], target: str = TARGETS[0]
) -> tuple[str, str]:
    """The TTIR and the Linalg text of a kernel. signature: the type of each argument that is no `constexpr`."""
    from triton._C.libtriton import ir
    from triton.backends.ascend import compiler

    wanted = GPUTarget("npu", target, 0)
    backend = compiler.AscendBackend(wanted)
    source = ASTSource(fn=function, signature=signature, constants=constants)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {"target": wanted, **options.__dict__}
    module = compiler.make_ttir(module, metadata, options)
    return str(module), compiler.ttir_to_linalg(module, metadata, options, named_ops=True)


def hivm(text: str, folder: Path, target: str) -> Hivm:
    """Lower a Linalg module to HIVM for a target."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "in.mlir").write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", text))
    command = [_compiler(target), str(folder / "in.mlir"), f"--target={target}", *_OPTIONS]
    command += [f"--save-temps={folder}", "-o", str(folder / "kernel")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    written = sorted(folder.glob("*.hivm*.mlir"))
    said = (done.stdout + done.stderr).splitlines()
    wrong = [line for line in said if "overflow" in line.lower() or ("error" in line.lower() and not _expected(line))]
    return Hivm(written[-1].read_text() if written else "", wrong)


def loops_over_depth(ttir: str) -> list[str]:
    """The text of every innermost loop with a dot, which orders K, without names, shapes of rows and locations."""
    found = []
    lines = ttir.splitlines()
    for number, line in enumerate(lines):
        if "tt.dot" not in line:
            continue
        indent = len(line) - len(line.lstrip())
        start = next(
            i
            for i in range(number, -1, -1)
            if "scf.for" in lines[i] and len(lines[i]) - len(lines[i].lstrip()) < indent
        )
        depth = len(lines[start]) - len(lines[start].lstrip())
        end = next(
            i
            for i in range(start + 1, len(lines))
            if lines[i].strip().startswith("}") and len(lines[i]) - len(lines[i].lstrip()) == depth
        )
        body = re.sub(r" loc\(.*?\)", "", "\n".join(lines[start : end + 1]))
        body = re.sub(r"%[\w#:]+", "%", body)
        found.append(re.sub(r"tensor<\d+x", "tensor<", body))
    return found


def has_atomics(text: str) -> bool:
    return any(_ATOMIC.search(line) for line in text.splitlines() if not line.lstrip().startswith(("module", "#")))


def limits(module: str) -> dict[str, int]:
    """The properties of the target in the HIVM module: numbers of cores, and sizes of memories in bits."""
    return {name: int(value) for name, value in re.findall(r'"(\w+)", (\d+) : i32', module[:8000])}


def _compiler(target: str) -> str:
    packages = Path(sysconfig.get_paths()["purelib"])
    newer = target.startswith(("Ascend950", "Ascend910_95"))
    program = packages / "ascendnpuir" / "bin" / ("bishengir-compile-a5" if newer else "bishengir-compile")
    if not os.access(program, os.X_OK):
        program.chmod(program.stat().st_mode | 0o111)  # wheels do not keep mode bits
    return str(program)


def _expected(line: str) -> bool:
    return "hivmc" in line or "Failed to run BiShengIR pipeline" in line


if __name__ == "__main__":
    print(triton.__version__, sys.version)
