"""The bundled CUDA kernels on the CPU: g++ compiles them over emulated instructions (emulate.h)."""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[3] / "kernels" / "cuda"


@pytest.fixture(scope="session")
def emulated() -> Callable[..., ctypes.CDLL]:
    """emulated(folder, name, launch, defines, headers=()): kernels/cuda/NAME.cu after headers as a library in a folder.

    launch: the parameters of each kernel, in C. run_KERNEL(blocks_x, blocks_y, *parameters) runs the kernel's grid;
    run_deep_KERNEL(blocks_x, blocks_y, blocks_z, *parameters) a grid of three sizes.
    defines: of the preprocessor.
    """

    def build(folder: Path, name: str, launch: dict[str, str], defines: dict, headers=()) -> ctypes.CDLL:
        text = "".join(f'#include "{file}"\n' for file in ("emulate.h", *(KERNELS / h for h in headers)))
        text += f'#include "{KERNELS / name}.cu"\n'
        for kernel, parameters in launch.items():
            names = ", ".join(part.replace("*", " ").split()[-1] for part in parameters.split(","))
            text += (
                f'extern "C" void run_deep_{kernel}(int blocks_x, int blocks_y, int blocks_z, {parameters}) {{\n'
                f"  run_grid(blocks_x, blocks_y, blocks_z, THREADS, [&] {{ {kernel}({names}); }});\n}}\n"
                f'extern "C" void run_{kernel}(int blocks_x, int blocks_y, {parameters}) {{\n'
                f"  run_deep_{kernel}(blocks_x, blocks_y, 1, {names});\n}}\n"
            )
        source = folder / f"{name}.cpp"
        source.write_text(text)
        library = source.with_suffix(".so")
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas"]
        command += [f"-I{HERE}", str(source), "-o", str(library)]
        subprocess.run([*command, *(f"-D{define}={value}" for define, value in defines.items())], check=True)
        return ctypes.CDLL(str(library))

    return build
