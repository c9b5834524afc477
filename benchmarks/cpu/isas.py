"""Times armed engines whose instruction set is forced below the machine's: this tree beside an older one.

    PYTHONPATH=. python3 benchmarks/cpu/isas.py OLDER_TREE OUT.json --isa avx512_bf16 --isa avx2 [--stock] [--only TEXT]

OLDER_TREE: a checkout of the commit to compare with. All engines are eager and answer the same prompts in turn (the
workloads of `bi-patch bench`). They see the same limits: vLLM, PyTorch, oneDNN, MKL and the bundled kernels take no
instruction set above the forced one. --stock adds a stock engine. A second call keeps the rows of other models and
instruction sets. "ratio" is the median of the paired ratios now / before. "differing": positions of the two trees'
answers, of those compared, whose token or logprobs differ bitwise.
A processor with AMX that is held to AVX2 is no machine that has AVX2 only: clocks, caches and ports are its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

_ASKED, _TREE = "BENCHMARK_ISA", "BENCHMARK_TREE"
# Of each: the limits of oneDNN, ATen and MKL, and the flags of /proc/cpuinfo that the kernels do not see.
_LIMITS = {
    "avx512_bf16": ("AVX512_CORE_BF16", "avx512", "AVX512", ("amx",)),
    "avx2": ("AVX2", "avx2", "AVX2", ("amx", "avx512")),
}
# What vLLM and bi_patch ask PyTorch.
_QUESTIONS = {
    "avx512_bf16": ("_is_amx_tile_supported", "_is_amx_fp16_supported", "_init_amx"),
    "avx2": (
        *("_is_amx_tile_supported", "_is_amx_fp16_supported", "_init_amx", "_is_avx512_supported"),
        *("_is_avx512_bf16_supported", "_is_avx512_vnni_supported", "_is_vnni_supported"),
    ),
}


def main() -> None:
    """The tool, or (started by it) the process of one engine."""
    if _ASKED in os.environ:
        _limit(os.environ[_ASKED])
        from bi_patch.tools.verify import worker

        worker.main()
    else:
        _measure(_arguments())


def _limit(isa: str) -> None:
    """Let this process see no instruction set above `isa`."""
    import torch

    import bi_patch

    if not Path(bi_patch.__file__).is_relative_to(os.environ[_TREE]):
        raise SystemExit(f"this process has {bi_patch.__file__}, not {os.environ[_TREE]}")
    for name in _QUESTIONS[isa]:
        if hasattr(torch.cpu, name):
            setattr(torch.cpu, name, lambda: False)
    build = importlib.import_module("bi_patch.kernels.cpu.build")
    seen = {flag for flag in build._cpu_flags() if not flag.startswith(_LIMITS[isa][3])}
    build._cpu_flags = lambda: seen
    if (best := build.detect_isa()) != isa:
        raise SystemExit(f"the kernels would take {best}, not {isa}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("older", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--isa", action="append", choices=list(_LIMITS), required=True)
    parser.add_argument("--only", action="append", help="labels of models that contain this text")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def _environ(isa: str, tree: Path, cache: str) -> dict[str, str]:
    dnn, aten, mkl, _ = _LIMITS[isa]
    here = Path(__file__).resolve().parents[2]
    return {
        **os.environ,
        _ASKED: isa,
        _TREE: str(tree.resolve()),
        "PYTHONSAFEPATH": "1",  # the folder of the call would come first
        "PYTHONPATH": os.pathsep.join([str(tree.resolve()), str(here)]),
        "BI_PATCH_CACHE": cache,
        "ONEDNN_MAX_CPU_ISA": dnn,
        "DNNL_MAX_CPU_ISA": dnn,
        "ATEN_CPU_CAPABILITY": aten,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
    }


def _measure(arguments: argparse.Namespace) -> None:
    from bi_patch.tools import provenance
    from bi_patch.tools.bench import matrix
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify.child import ARMED, STOCK, ChildEngine
    from bi_patch.tools.verify.engine import Options, cpu_name

    class Forced(ChildEngine):
        worker = "benchmarks.cpu.isas"

    here = Path(__file__).resolve().parents[2]
    cache = os.environ.get("BI_PATCH_CACHE", str(Path("~/.cache/bi_patch").expanduser()))
    made = provenance.here()
    found = {
        "device": cpu_name(),
        "forced": "an Intel processor with AMX, held to lower instruction sets; no machine that has only these",
        "commit": made.commit,
        "dirty": made.dirty,
        "before": _commit(arguments.older),
        "command": made.command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "time": time.strftime("%H:%M:%S", time.gmtime()),
        "repeats": arguments.repeats,
        "rows": _kept(arguments.out, made.commit, _commit(arguments.older)),
    }
    specs = [s for s in matrix.COST if s.eager and any(text in s.label for text in arguments.only or [""])]
    for isa in arguments.isa:
        for spec in specs:
            options = Options(
                str(recipes.path(spec.model)),
                dtype=spec.dtype,
                max_model_len=3072,
                chunk=2048,
                prefix_caching=False,
            )
            with ExitStack() as stack:
                wanted = {"before": (ARMED, arguments.older, "-older"), "now": (ARMED, here, "")}
                if arguments.stock:
                    wanted["stock"] = (STOCK, here, "")
                engines = {}
                for name, (mode, tree, end) in wanted.items():
                    engine = Forced(mode, options, environ=_environ(isa, tree, cache + end))
                    engines[name] = stack.enter_context(engine)
                info = engines["now"].info
                found |= {"vllm": info.vllm, "torch": info.torch, "threads": info.threads}
                found["rows"] = [r for r in found["rows"] if (r["isa"], r["model"]) != (isa, spec.label)]
                for row in _rows(engines, info.vocab_size, arguments.repeats):
                    found["rows"].append({"isa": isa, "model": spec.label, **row})
                    print(isa, spec.label, *row.values(), flush=True)
                    arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def _rows(engines, vocab: int, repeats: int):
    """A row for each workload: medians in ms of each engine, ratios with their ranges, and answers that differ."""
    from bi_patch.tools.bench.cost import LOADS
    from bi_patch.tools.verify.answers import Difference, compare

    for load in LOADS:
        times: dict[str, list[float]] = {name: [] for name in engines}
        found = Difference()
        for repeat in range(repeats + 1):
            # The first round warms up, is not timed, and asks for what is compared.
            requests = [r.but(logprobs=None if repeat else 5) for r in load.requests(vocab, repeat)]
            answers = {}
            for name in list(engines)[:: -1 if repeat % 2 else 1]:
                answers[name] = engines[name].generate(requests)
                if repeat:
                    times[name].append(engines[name].seconds * 1000)
            if not repeat:
                found = sum(map(compare, answers["before"], answers["now"]), found)
        row = {"workload": load.name, "unit": "ms"}
        row |= {name: round(statistics.median(all_), 1) for name, all_ in times.items()}
        row |= _ratio("ratio", times["now"], times["before"])
        if "stock" in times:
            row |= _ratio("to_stock", times["now"], times["stock"])
        yield row | {"compared": found.compared, "differing": found.differing}


def _ratio(name: str, over: list[float], under: list[float]) -> dict[str, object]:
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    return {name: round(statistics.median(ratios), 3), f"{name}_range": [round(ratios[0], 3), round(ratios[-1], 3)]}


def _kept(out: Path, commit: str | None, before: str) -> list[dict[str, object]]:
    """The rows of an earlier call for the same commits."""
    if not out.exists():
        return []
    held = json.loads(out.read_text())
    return held["rows"] if (held["commit"], held["before"]) == (commit, before) else []


def _commit(tree: Path) -> str:
    return subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    import bi_patch_entry

    bi_patch_entry.without_arming()
    main()
