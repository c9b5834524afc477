"""One command on a Hopper host: stock vLLM, upstream's own mode and armed in turn, then the evidence files.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/hopper/run.py TAG DATE [--model Qwen3-8B]... [--results FOLDER]

Each engine has a process of its own and nothing beside it on the card. Armed also runs the invariance matrix, and
then `bi-patch verify` the axes that need further engines (--no-verify leaves them out). On an H100 6 minutes for a 1B
model and 10 for an 8B model, and about 5 more for the further engines. TAG and DATE name the files under the results;
they are written anew after every engine, so that a run which is cut short leaves what it measured.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import bi_patch_entry

bi_patch_entry.without_arming()  # the engines run in processes of their own

from bi_patch.tools.models import shapes  # noqa: E402

HERE = Path(__file__).resolve().parent
# Fewer captured sizes than the default make three starts shorter; they are the same for all modes.
EXTRA = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]}}
# Axes that the matrix of one engine cannot hold.
AXES = ("tied logits and routers", "preemption", "restart", "prefix cache off", "eager and compiled")
CLI = "import bi_patch_entry; bi_patch_entry.cli()"


def options(doc: str) -> argparse.ArgumentParser:
    """The options of every command that measures engines and writes evidence."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag")
    parser.add_argument("date")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--raw", type=Path, default=Path("/tmp/bi_patch-hopper"), help="folder of each engine's file")
    parser.add_argument("--max-model-len", type=int, default=33000)
    return parser


def engine(a, model: str, mode: str, *flags: str, **extra) -> tuple[Path, list[str]]:
    """Where one engine's process writes, and its command; what an earlier run wrote there is removed."""
    a.raw.mkdir(parents=True, exist_ok=True)
    out = a.raw / f"{shapes.short(model)}-{mode}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "child.py"), model, mode, str(out), *flags]
    return out, [*command, "--extra", json.dumps(EXTRA | extra), "--max-model-len", str(a.max_model_len)]


def report(a, files: list[Path]) -> None:
    """Write the evidence files anew."""
    command = [sys.executable, HERE / "report.py", a.tag, a.date, "--results", a.results, *files]
    subprocess.run([str(part) for part in command], check=True)


def verify(model: str, out: Path) -> list[str]:
    """The command of `bi-patch verify`, installed or not."""
    axes = [part for axis in AXES for part in ("--axis", axis)]
    folder = shapes.write(model, "/tmp/models")
    return [sys.executable, "-c", CLI, "verify", folder, "--random-weights", "7", *axes, "--json", str(out)]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", action="append", help="a name of SHAPES; repeatable; default: Qwen3-8B")
    parser.add_argument("--modes", default="armed,stock,upstream")
    parser.add_argument("--no-verify", action="store_true")
    a = parser.parse_args()
    files, failed = [], []
    for model in a.model or ["Qwen3-8B"]:
        commands, modes = [], a.modes.split(",")
        for mode in modes:
            commands.append((*engine(a, model, mode, "--cost", *(["--matrix"] if mode == "armed" else [])), False))
        if "armed" in modes and not a.no_verify:
            out = a.raw / f"{shapes.short(model)}-verify.json"
            out.unlink(missing_ok=True)
            # Its report says what was compared also where it did not pass.
            commands.append((out, verify(model, out), True))
        for out, command, kept_anyway in commands:
            wrong = subprocess.run(command).returncode
            if wrong:
                failed.append(str(out))
            if out.is_file() and (kept_anyway or not wrong):
                files.append(out)
                report(a, files)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
