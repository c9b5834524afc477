"""One command on a Hopper host: stock vLLM, upstream's own mode and armed in turn, then the evidence files.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/hopper/run.py TAG DATE [--model Qwen3-8B]... [--results FOLDER]

Each engine has a process of its own and nothing beside it on the card. Armed also runs the invariance matrix. About 10
minutes for an 8B model. TAG and DATE name the files under the results; they are written anew after every engine, so
that a run which is cut short leaves what it measured.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Fewer captured sizes than the default make three starts shorter; they are the same for all modes.
EXTRA = '{"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]}}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag")
    parser.add_argument("date")
    parser.add_argument("--model", action="append", help="a name of models.py; repeatable; default: Qwen3-8B")
    parser.add_argument("--modes", default="armed,stock,upstream")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--raw", type=Path, default=Path("/tmp/bi_patch-hopper"), help="folder of each engine's file")
    parser.add_argument("--max-model-len", default="33000")
    a = parser.parse_args()
    a.raw.mkdir(parents=True, exist_ok=True)
    files, failed = [], []
    for model in a.model or ["Qwen3-8B"]:
        for mode in a.modes.split(","):
            out = a.raw / f"{model}-{mode}.json".replace(" ", "-")
            command = [sys.executable, HERE / "child.py", model, mode, out, "--cost", "--extra", EXTRA]
            command += ["--max-model-len", a.max_model_len, *(["--matrix"] if mode == "armed" else [])]
            if subprocess.run([str(part) for part in command]).returncode:
                failed.append(str(out))
                continue
            files.append(str(out))
            report = [sys.executable, HERE / "report.py", a.tag, a.date, "--results", a.results, *files]
            subprocess.run([str(part) for part in report], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
