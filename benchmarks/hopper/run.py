"""One command on a Hopper host: stock vLLM, upstream's own mode and armed in turn, then the evidence files.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/hopper/run.py TAG DATE [--model Qwen3-8B]... [--results FOLDER]

Each engine has a process of its own and nothing beside it on the card. Armed also runs the invariance matrix, and
then `bi-patch verify` the axes that need further engines (--no-verify leaves them out). On an H100 6 minutes for a 1B
model and 10 for an 8B model, and about 5 more for the further engines. TAG and DATE name the files under the results;
they are written anew after every engine, so that a run which is cut short leaves what it measured.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import models

HERE = Path(__file__).resolve().parent
# Fewer captured sizes than the default make three starts shorter; they are the same for all modes.
EXTRA = '{"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]}}'
# Axes that the matrix of one engine cannot hold.
AXES = ("tied logits and routers", "preemption", "restart", "prefix cache off", "eager and compiled")
CLI = "import bi_patch_entry; bi_patch_entry.cli()"


def verify(model: str, out: Path) -> list[str]:
    """The command of `bi-patch verify`, installed or not."""
    axes = [part for axis in AXES for part in ("--axis", axis)]
    folder = models.write(model, "/tmp/models")
    return [sys.executable, "-c", CLI, "verify", folder, "--random-weights", "7", *axes, "--json", str(out)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag")
    parser.add_argument("date")
    parser.add_argument("--model", action="append", help="a name of models.py; repeatable; default: Qwen3-8B")
    parser.add_argument("--modes", default="armed,stock,upstream")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--raw", type=Path, default=Path("/tmp/bi_patch-hopper"), help="folder of each engine's file")
    parser.add_argument("--max-model-len", default="33000")
    parser.add_argument("--no-verify", action="store_true")
    a = parser.parse_args()
    a.raw.mkdir(parents=True, exist_ok=True)
    files, failed = [], []
    for model in a.model or ["Qwen3-8B"]:
        commands, modes = [], a.modes.split(",")
        for mode in modes:
            out = a.raw / f"{models.short(model)}-{mode}.json"
            command = [sys.executable, HERE / "child.py", model, mode, out, "--cost", "--extra", EXTRA]
            command += ["--max-model-len", a.max_model_len, *(["--matrix"] if mode == "armed" else [])]
            commands.append((out, command, False))
        if "armed" in modes and not a.no_verify:
            out = a.raw / f"{models.short(model)}-verify.json"
            # Its report says what was compared also where it did not pass.
            commands.append((out, verify(model, out), True))
        for out, command, kept_anyway in commands:
            out.unlink(missing_ok=True)
            wrong = subprocess.run([str(part) for part in command]).returncode
            if wrong:
                failed.append(str(out))
            if out.is_file() and (kept_anyway or not wrong):
                files.append(str(out))
                report = [sys.executable, HERE / "report.py", a.tag, a.date, "--results", a.results, *files]
                subprocess.run([str(part) for part in report], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
