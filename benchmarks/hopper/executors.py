"""Two ranks of one engine that another executor starts: torchrun's place (external_launcher), or Ray. For parallel.py.

Each engine answers axes of verify and one batch of requests. The batch's answers are compared with those of an engine
of the executor mp and, of an external launcher, between the ranks.

    PYTHONPATH=. python3 benchmarks/hopper/executors.py MODEL OPTIONS OUT.json

is one engine, or one rank of an external launcher, whose place is in its environment. OPTIONS: JSON of Options.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

RANKS, SECONDS = 2, 400
AXES = ("batch size", "mixed lengths", "co-batch contents", "prefix cache", "chunk budget", "decode = prefill")
MP, LAUNCHED = "mp", "external_launcher"
ENVIRON = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_BATCH_INVARIANT": "1", "BI_PATCH": "1", "HF_HUB_OFFLINE": "1"}


def answer(model: str, options: dict, out: Path) -> None:
    """In an engine's process: run the axes, keep their results and the answers of a batch, and end the process."""
    import bi_patch

    bi_patch.arm()
    from bi_patch.tools.bench import launched
    from bi_patch.tools.verify.engine import LocalEngine, Options

    engine = LocalEngine(Options(model, **options))
    made = out.with_suffix(".part")
    made.write_text(json.dumps(launched.kept(engine, AXES)))
    made.rename(out)
    sys.stdout.flush()
    os._exit(0)  # Ray would end its workers twice, which aborts this process


def started(model: str, options: dict, files: Sequence[Path], environ: dict[str, str]) -> list[subprocess.Popen]:
    """Start an engine, or a rank for each file."""
    places = [{}]
    if len(files) > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        place = {"WORLD_SIZE": str(len(files)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        places = [place | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(len(files))]
    return [
        subprocess.Popen([sys.executable, __file__, model, json.dumps(options), str(file)], env=environ | place)
        for place, file in zip(places, files, strict=True)
    ]


def measure(label: str, model: str, engine: dict, memory: dict, eager: bool, scratch: Path) -> tuple[list, object]:
    """The rows of a case, and the device and libraries. engine: arguments of vllm.LLM, the executor among them.

    Raises RuntimeError if an engine or a rank fails, TimeoutExpired if one takes longer than SECONDS.
    """
    import msgspec

    from bi_patch.tools import evidence
    from bi_patch.tools.bench import launched
    from bi_patch.tools.verify.answers import Answer, compare

    executor = engine["distributed_executor_backend"]
    files, running = {}, []
    for name, count in ((MP, 1), (executor, RANKS if executor == LAUNCHED else 1)):
        files[name] = [scratch / f"{os.getpid()}-{name}-{number}.json" for number in range(count)]
        extra = memory | engine | {"distributed_executor_backend": name, "seed": 0}
        options = {"eager": eager, "max_model_len": 1024, "chunk": 512, "tokenizer": False, "extra": extra}
        running += started(model, options, files[name], os.environ | ENVIRON)
    launched.wait(running, SECONDS)
    plain, *held = [json.loads(file.read_text()) for file in (*files[MP], *files[executor])]
    rows = list(held[0]["rows"])
    for axis, other in (("executor", plain), *(("both ranks", rank) for rank in held[1:])):
        pairs = zip(*(msgspec.convert(part["answers"], list[Answer]) for part in (other, held[0])), strict=True)
        found = [compare(*pair) for pair in pairs]
        first = next((str(f.first) for f in found if f.differing), "")
        rows.append([axis, sum(f.compared for f in found), sum(f.differing for f in found), first])
    for axis, compared, differ, first in rows:
        print(f"{label}: {axis}: {differ} of {compared} differ {first}", flush=True)
    return [evidence.InvarianceRow(label, *row) for row in rows], SimpleNamespace(**held[0]["info"])


if __name__ == "__main__":
    answer(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
