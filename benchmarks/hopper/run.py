"""One command on a Hopper host: stock vLLM, upstream's own mode and armed in turn, then the evidence files.

    PYTHONPATH=. python3 benchmarks/hopper/run.py TAG DATE [--models Qwen3-8B,Qwen3-1.7B] [--raw FOLDER]

Each engine has a process of its own and nothing beside it on the card. Armed also runs the invariance matrix. About 7
minutes for an 8B model. TAG and DATE name the files under benchmarks/results/.
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
    parser.add_argument("--models", default="Qwen3-8B")
    parser.add_argument("--raw", type=Path, default=Path("/tmp/bi_patch-hopper"))
    parser.add_argument("--max-model-len", default="33000")
    a = parser.parse_args()
    a.raw.mkdir(parents=True, exist_ok=True)
    files, failed = [], []
    for model in a.models.split(","):
        for mode in ("armed", "stock", "upstream"):
            out = a.raw / f"{model}-{mode}.json"
            command = [sys.executable, HERE / "child.py", model, mode, out, "--cost", "--extra", EXTRA]
            command += ["--max-model-len", a.max_model_len, *(["--matrix"] if mode == "armed" else [])]
            code = subprocess.run([str(part) for part in command]).returncode
            (files if code == 0 else failed).append(str(out))
    if files:
        subprocess.run([sys.executable, str(HERE / "report.py"), a.tag, a.date, *files], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
