"""Measures stock vLLM, upstream's own mode and armed vLLM in turn on a Hopper host, and writes the result files.

    PYTHONPATH=. python3 benchmarks/hopper/run.py [--model Qwen3-8B]... [--level default] [--results FOLDER]

Each engine runs in its own process, alone on the GPU. Then `bi-patch verify` compares the armed engine's answers along
its axes; --no-verify skips this step. On an H100, the three engines take 6 minutes for a 1B model and 10 minutes for an
8B model. `bi-patch verify --help` says how long a level takes. The script writes the result files again after every
engine, so an interrupted run keeps what it has measured.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import bi_patch_entry

bi_patch_entry.without_arming()  # the engines run in processes of their own

import child  # noqa: E402

from bi_patch.tools.models import shapes  # noqa: E402

HERE = Path(__file__).resolve().parent
# Fewer captured sizes than vLLM's default make the starts shorter. All modes capture the same sizes.
EXTRA = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]}}
# Both engines keep the states of recurrent layers in fp32. vLLM's own prefill runs its Triton kernels.
RECURRENT = {
    "mamba_ssm_cache_dtype": "float32",
    "block_size": 1024,
    "additional_config": {"gdn_prefill_backend": "triton"},
}
CLI = "import bi_patch_entry; bi_patch_entry.cli()"


def options(doc: str) -> argparse.ArgumentParser:
    """A parser with the options of run.py and turns.py."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--raw", type=Path, default=Path("/tmp/bi_patch-hopper"), help="folder of each engine's file")
    parser.add_argument("--max-model-len", type=int, default=33000)
    return parser


def engine(a, model: str, mode: str, *flags: str, **extra) -> tuple[Path, list[str]]:
    """The file that one engine's process writes, and its command. Removes the file of an earlier run."""
    a.raw.mkdir(parents=True, exist_ok=True)
    out = a.raw / f"{shapes.short(model)}-{mode}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "child.py"), model, mode, str(out), *flags]
    if {"linear_num_value_heads", "mamba_d_state", "linear_attn_config"} & set(child.shape(model)):
        extra = RECURRENT | extra
    return out, [*command, "--extra", json.dumps(EXTRA | extra), "--max-model-len", str(a.max_model_len)]


def report(a, files: list[Path], note: str = "") -> bool:
    """Write the result files again from `files`. Returns False if report.py failed."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    made = [sys.executable, HERE / "report.py", "--results", a.results, "--command", command, "--note", note, *files]
    return not subprocess.run([str(part) for part in made]).returncode


def verify(model: str, level: str, out: Path) -> list[str]:
    """The command line of `bi-patch verify`. It works without an installed bi-patch command."""
    folder = shapes.write(model, "/tmp/models")
    asked = [] if level == "default" else [f"--{level}"]
    return [sys.executable, "-c", CLI, "verify", folder, "--random-weights", "7", *asked, "--json", str(out)]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", action="append", choices=shapes.SHAPES, help="repeatable; default: Qwen3-8B")
    parser.add_argument("--modes", default="armed,stock,upstream")
    parser.add_argument("--level", choices=("quick", "default", "full"), default="default", help="of verify")
    parser.add_argument("--no-verify", action="store_true")
    a = parser.parse_args()
    files, failed = [], []
    for model in a.model or ["Qwen3-8B"]:
        modes = a.modes.split(",")
        commands = [(*engine(a, model, mode, "--cost"), False) for mode in modes]
        if "armed" in modes and not a.no_verify:
            out = a.raw / f"{shapes.short(model)}-verify.json"
            out.unlink(missing_ok=True)
            # The report also counts if verify found differences.
            commands.append((out, verify(model, a.level, out), True))
        for out, command, kept_anyway in commands:
            wrong = subprocess.run(command).returncode
            if wrong:
                failed.append(str(out))
            if out.is_file() and (kept_anyway or not wrong):
                if report(a, [*files, out]):
                    files.append(out)
                else:
                    failed.append(f"report of {out}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
