"""Engines of several tensor-parallel ranks that share ONE GPU: their bits, where a host has no second GPU.

    PYTHONPATH=. python3 benchmarks/hopper/shared.py [LABEL ...] [--results FOLDER] [--models FOLDER]

Each rank is a process of its own with vLLM's external launcher. vLLM's one-stage all-reduce adds over CUDA IPC, as
between GPUs; the ranks take turns on the GPU. NCCL refuses two ranks on a GPU, so the host carries what is gathered
(logits, and roots of more than two ranks, which no CUDA graph then holds). So this shows bits, no times. Without a GPU,
the ranks are processes of the CPU. Exit code 1: a position differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import bi_patch_entry

AXES = (
    *("batch size", "mixed lengths", "co-batch contents", "prefix cache", "shared prefix", "chunk budget"),
    *("decode = prefill", "prompt logprobs", "seeded sampling"),
)
MEMORY = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}
GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}}
WHOLE = {"enable_expert_parallel": True}  # each rank has whole experts


class Case(NamedTuple):
    """ranks: of each engine; several engines are compared with each other. parts: BI_PATCH_TP_INVARIANT. model: a name
    of SHAPES, of which two layers are used, or of recipes.NAMES."""

    ranks: tuple[int, ...]
    eager: bool = True
    parts: int = 0
    model: str = "Qwen3-8B"
    engine: dict[str, object] = {}  # further arguments of vllm.LLM


CASES = {
    "Qwen3-8B, 2 layers, TP 2 on one GPU": Case((2,)),
    "Qwen3-8B, 2 layers, TP 2 on one GPU, compiled": Case((2,), eager=False),
    "Qwen3-8B, 2 layers, TP 4 on one GPU": Case((4,)),
    "Qwen3-8B, 2 layers, TP 1 and 2 equal, on one GPU": Case((2, 1), parts=8),
    "Qwen3-8B, 2 layers, TP 1, 2 and 4 equal, on one GPU": Case((2, 1, 4), parts=8),
    "Qwen3-8B, 2 layers, one rank, K in eight parts": Case((1,), parts=8),
    "Qwen3-8B, 2 layers, one rank, K in eight parts, compiled": Case((1,), eager=False, parts=8),
    "Qwen3-30B-A3B, 2 layers, TP 2 on one GPU": Case((2,), model="Qwen3-30B-A3B"),
    "Qwen3-30B-A3B, 2 layers, TP 2 on one GPU, compiled": Case((2,), eager=False, model="Qwen3-30B-A3B"),
    "Qwen3-30B-A3B, 2 layers, experts over 2 ranks on one GPU": Case((2,), model="Qwen3-30B-A3B", engine=WHOLE),
    "Qwen3-30B-A3B, 2 layers, experts over 2 ranks on one GPU, compiled": Case(
        (2,), eager=False, model="Qwen3-30B-A3B", engine=WHOLE
    ),
    "DeepSeek-V2-Lite, 2 layers, TP 2 on one GPU": Case((2,), model="DeepSeek-V2-Lite"),
    "tiny-qwen3 bf16 TP 2, external launcher": Case((2,), model="tiny-qwen3"),
    "tiny-qwen3 bf16 TP 2, external launcher, compiled": Case((2,), eager=False, model="tiny-qwen3"),
}


def share() -> None:
    """Let this process's rank share the GPU with others. Call after arming, before the engine is made."""
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        return
    from vllm.distributed.device_communicators import cuda_communicator, custom_all_reduce, pynccl
    from vllm.platforms import current_platform

    from bi_patch.seams.common import communicator as policy
    from bi_patch.seams.cuda import communicator

    policy._EAGER_RANKS = 4  # bi_patch refuses them, because no engine of several GPUs was measured

    def absent(self, group, device, library_path=None):
        self.available, self.disabled = False, True
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    def host(group, x):
        """Every rank's x, as bytes on the host."""
        own = x.detach().contiguous().cpu().view(-1).view(torch.uint8)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group=group)
        return [part.view(x.dtype).view(x.shape) for part in parts]

    def all_gather(self, x, dim=-1):
        return torch.cat(host(self.cpu_group, x), dim).to(x.device)

    pynccl.PyNcclCommunicator.__init__ = absent
    custom_all_reduce._can_p2p = lambda *_: True
    custom_all_reduce.CustomAllreduce._init_mnnvl_buffer = lambda self, size: None
    cuda_communicator.CudaCommunicator.all_gather = all_gather
    communicator._torch_gather = lambda group, out, x: out.copy_(torch.stack(host(group, x)).to(x.device))
    platform = type(current_platform)
    platform.dist_backend = "gloo"
    platform.is_fully_connected = classmethod(lambda cls, ids: True)


def rank(model: str, case: dict, out: Path) -> None:
    """One rank: run the axes and keep the answers. Every rank does the same, as vLLM's external launcher asks."""
    import bi_patch

    bi_patch.arm()
    share()
    import msgspec

    from bi_patch.tools.verify.engine import LocalEngine, Options
    from bi_patch.tools.verify.probes import PROBES, Workload
    from bi_patch.tools.verify.probes.crossing import everything

    ranks = int(os.environ["WORLD_SIZE"])
    extra = MEMORY | ({} if case["eager"] else GRAPHS) | {"seed": 0} | case["engine"]
    if ranks > 1:
        extra |= {"tensor_parallel_size": ranks, "distributed_executor_backend": "external_launcher"}
    engine = LocalEngine(
        Options(
            model,
            eager=case["eager"],
            max_model_len=1024,
            max_num_seqs=64,
            chunk=512,
            tokenizer=False,
            extra=extra,
        )
    )
    assert engine.info.mode == "armed" and not engine.info.open_seams, engine.info
    load = Workload.random(
        engine.info.vocab_size,
        generate=4,
        sizes=(2, 17, 64),
        prefix=200,
        lengths=(3, 40, 290),
        filler_lengths=(2, 5, 9, 17),
        score_sizes=(17,),
    )
    engine.reset_cache()
    answers = engine.generate(everything(engine, load))
    result = {
        "device": engine.info.device,
        "vllm": engine.info.vllm,
        "torch": engine.info.torch,
        "threads": engine.info.threads,
        "answers": msgspec.to_builtins(answers),
        "rows": [],
    }
    for probe in PROBES:
        if probe.name in case["axes"] and not probe.missing(engine):
            began = time.monotonic()
            found = probe.run(engine, load)
            result["rows"].append([found.axis, found.compared, found.differing, str(found.first or "")])
            print(found.axis, found.compared, found.differing, round(time.monotonic() - began, 1), flush=True)
            out.write_text(json.dumps(result))
    out.write_text(json.dumps(result))
    sys.stdout.flush()
    if engine.info.platform != "cpu":  # the CPU's shared memory has to be given back
        os._exit(0)


def engine(model: Path, case: Case, ranks: int, axes: Sequence[str], folder: Path, limit: float) -> list[dict]:
    """Start the ranks of one engine; returns what each rank kept, less those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running, files = [], []
    for number in range(ranks):
        environ = os.environ | {
            "RANK": str(number),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_SKIP_P2P_CHECK": "1",
            "VLLM_BATCH_INVARIANT": "1",
            "BI_PATCH": "1",
            "BI_PATCH_TP_INVARIANT": str(case.parts),
        }
        files.append(folder / f"{ranks}-{number}.json")
        files[-1].unlink(missing_ok=True)
        asked = json.dumps({"eager": case.eager, "axes": axes, "engine": case.engine})
        command = [sys.executable, __file__, "--rank", str(model), asked, str(files[-1])]
        log = (folder / f"{ranks}-{number}.log").open("w")
        running.append(subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT))
    began = time.monotonic()
    try:
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running) or time.monotonic() - began > limit:
                break
            time.sleep(0.5)
    finally:
        failed = [process.poll() for process in running]
        for process in running:
            process.kill()
    if any(code != 0 for code in failed):
        text = (folder / f"{ranks}-0.log").read_text()[-1500:]
        print(f"ranks ended with {failed} after {time.monotonic() - began:.0f} s: {text}", flush=True)
    return [json.loads(file.read_text()) for file in files if file.exists()]


def differing(one: list, other: list) -> tuple[int, int]:
    """Positions compared, and how many differ, of two lists of answers."""
    import msgspec

    from bi_patch.tools.verify.answers import Answer, compare

    pairs = zip(msgspec.convert(one, list[Answer]), msgspec.convert(other, list[Answer]), strict=True)
    found = [compare(a, b) for a, b in pairs]
    return sum(f.compared for f in found), sum(f.differing for f in found)


def measure(label: str, results: Path, root: Path, limit: float, axes: Sequence[str] = AXES) -> bool:
    """Measure one case and write its rows. Returns whether everything was measured and no position differs."""
    from parallel import folder

    from bi_patch import settings
    from bi_patch.tools import evidence
    from bi_patch.tools.models import recipes

    class Ranks(evidence.Invariance, kw_only=True):
        variant = property(lambda self: "launcher")

    case = CASES[label]
    if case.model in recipes.NAMES:
        model = recipes.path(case.model, cache=settings.read().cache)
    else:
        model = folder(case.model, root, 2)
    rows: list[evidence.InvarianceRow] = []
    kept: dict[int, dict] = {}
    good = True

    def add(axis: str, compared: int, differing: int, first: str = "") -> None:
        print(f"{label}: {axis}: {differing} of {compared} differ {first}", flush=True)
        rows.append(evidence.InvarianceRow(label, axis, compared, differing, first if differing else ""))

    for ranks in case.ranks:
        held = engine(model, case, ranks, axes if len(case.ranks) == 1 else (), root / label.replace(" ", "-"), limit)
        good &= len(held) == ranks
        if not held:
            continue
        for row in held[0]["rows"]:
            add(*row)
        if ranks > 1 and len(held) == ranks:
            found = [differing(held[0]["answers"], other["answers"]) for other in held[1:]]
            add(f"each of {ranks} ranks", sum(pair[0] for pair in found), sum(pair[1] for pair in found))
        for other, before in kept.items():
            add(f"tensor parallel {other} and {ranks}", *differing(before["answers"], held[0]["answers"]))
        kept[ranks] = held[0]
        fields = ("device", "vllm", "torch", "threads")
        found = evidence.new(Ranks, SimpleNamespace(**{name: held[0][name] for name in fields}))
        found.rows, found.command = rows, "benchmarks/hopper/shared.py"  # the cases share a file
        evidence.write(found, results)
    return good and bool(rows) and not evidence.total_differing(rows)


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the ranks end, too
    bi_patch_entry.without_arming()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", nargs="*", default=list(CASES))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", type=Path, default=Path("/tmp/models"))
    parser.add_argument("--limit", type=float, default=300, help="seconds of an engine")
    parser.add_argument("--axes", default=",".join(AXES), help="comma-separated axes of verify")
    args = parser.parse_args()
    good = True
    for label in args.labels:
        start = time.perf_counter()
        good &= measure(label, args.results, args.models, args.limit, args.axes.split(","))
        print(f"{label}: {time.perf_counter() - start:.0f} s", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
