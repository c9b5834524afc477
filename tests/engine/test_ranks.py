"""Tensor parallelism on CPU with real ranks: equal to itself, and with fixed parts equal for every number of ranks."""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bi_patch.tools.faults import ranks as faults
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.models import recipes
from bi_patch.tools.parity.child import ParityEngine
from bi_patch.tools.parity.plan import NAMES, Plan
from bi_patch.tools.verify.answers import Request, compare
from bi_patch.tools.verify.child import ARMED, PATIENT
from bi_patch.tools.verify.probes import FEATURE_PROBES, PROBES, Change, Workload

pytestmark = pytest.mark.engine

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
AXES = ("batch size", "position and order", "prefix cache", "chunk budget")


def two_ranks(start, extra=None, model=recipes.QWEN3, **options):
    given = {"tensor_parallel_size": 2} | (extra or {})
    return start(ARMED, model, environ=ONE_THREAD, threads=1, extra=given, **options)


def invariant(engine, axes):
    load = Workload.random(
        engine.info.vocab_size, generate=4, sizes=(1, 2, 5, 16), prefix=130, lengths=(3, 40, 290), long=900
    )
    for probe in (p for p in PROBES if p.name in axes and not p.missing(engine)):
        result = probe.run(engine, load)
        assert result.compared > 0 and result.differing == 0, f"{result.axis}: {result.first}"


def test_two_ranks(start):
    """Few steps: vLLM's ranks wait for each other in busy loops, which take long where other work has the cores."""
    with two_ranks(start, {"logprobs_mode": "processed_logprobs"}, kind=ParityEngine) as engine:
        assert not engine.info.open_seams
        made = random.Random(3)
        prompts = [tuple(made.randrange(2000) for _ in range(n)) for n in (3, 40, 290, 7, 19)]
        requests = [Request(prompt, max_tokens=3, logprobs=5) for prompt in prompts]
        alone = [engine.generate([request])[0] for request in requests[:3]]
        engine.reset_cache()
        together = engine.generate(requests)
        for one, other in zip(alone, together, strict=False):
            found = compare(one, other)
            assert found.compared and not found.differing, found.first
        axis = engine.line("padded right", Plan(tokens=3))  # a trainer on one device
        assert axis.compared and not axis.differing, axis.shown
        invariant(engine, {"prefix cache", "chunk budget", "decode = prefill"})


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"tensor_parallel_size": 4}], ids=["2", "4"])
def test_a_trainer_on_one_device_has_the_bits_of_several_ranks(start, extra):
    with two_ranks(start, extra | {"logprobs_mode": "processed_logprobs"}, kind=ParityEngine) as engine:
        plan = Plan(steps=2, micro=(12, 5), group=3, tokens=8, updates=1)
        axes = [engine.line(name, plan) for name in NAMES]
        assert all(axis.compared and not axis.differing for axis in axes), [a.shown or a.reason for a in axes]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"tensor_parallel_size": 4}], ids=["2", "4"])
def test_every_axis_compiled(start, extra):
    with two_ranks(start, extra, eager=False) as engine:
        invariant(engine, {probe.name for probe in PROBES})


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", [recipes.INT8, recipes.AWQ, recipes.GPTQ, recipes.W4A16])
def test_quantized_weights(start, name, eager):
    with two_ranks(start, model=name, eager=eager) as engine:
        invariant(engine, {*AXES, "mixed lengths", "co-batch contents", "decode = prefill", "seeded sampling"})


@pytest.mark.slow
def test_new_weights_reach_both_ranks(start):
    """An engine of two ranks that gets weights answers as one that was started with them."""
    probe = next(p for p in FEATURE_PROBES if p.name == "weight update")
    with two_ranks(start) as engine:
        assert not probe.missing(engine)
        load = Workload.random(engine.info.vocab_size, generate=8, prefix=200, lengths=(3, 40, 290))
        expected = probe.collect(engine, load)
        requests, (change,) = probe.requests(engine, load), probe.changes(engine)
    with two_ranks(start, model=change.options["model"]) as other:
        got = probe.collect(other, load, change)
        pairs = list(probe.cases(change, requests, expected, got))
    assert len(pairs) > 4 and not [case.label for case in pairs if case.differs]


def test_two_by_two_ranks(start):
    """Tensor-parallel ranks in two stages of a pipeline. In eager mode, stock vLLM stops at the first request."""
    with two_ranks(start, {"pipeline_parallel_size": 2}) as engine:
        assert not engine.info.open_seams
        made = random.Random(3)
        requests = [Request(tuple(made.randrange(2000) for _ in range(n)), max_tokens=3) for n in (3, 290, 19)]
        alone = [engine.generate([request])[0] for request in requests]
        engine.reset_cache()
        for one, other in zip(alone, engine.generate(requests), strict=True):
            found = compare(one, other)
            assert found.compared and not found.differing, found.first


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("stages", [1, 2], ids=["cut", "staged"])
@pytest.mark.parametrize("family", ["DeepSeek V2", "Qwen3-Next", "Falcon-H1", "Mamba"])
def test_latent_attention_and_recurrent_layers(tmp_path, family, stages, eager):
    """The cases of the benchmark: two ranks cut each layer, or have layers of their own."""
    four = stages == 2 and family != "DeepSeek V2"
    label = f"{family}{', four layers,' * four} bf16 {('TP', 'PP')[stages - 1]} 2{' compiled' * (not eager)}"
    measure("ranks.py", label, "--results", tmp_path)


def measure(program, *options):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-P", root / "benchmarks/cpu" / program, *options]
    subprocess.run(command, check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, timeout=900)


def test_data_parallel_ranks_answer_as_one_engine(tmp_path):
    """A real engine of two ranks, against one engine; exit code 1: bits differ."""
    measure("engines.py", "--only", "ranks", "--case", "DP 2", "--results", tmp_path)


@pytest.mark.slow
def test_stages_answer_as_one_engine(tmp_path):
    measure("engines.py", "--only", "ranks", "--case", "PP 2", "--results", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tiny-qwen3 bf16 TP 2 DP 2", "tiny-qwen3 bf16 TP 2 PP 2", "tiny-qwen3 bf16 DP 4"])
def test_four_ranks_answer_as_fewer(tmp_path, case):
    """Eager and compiled engines, also with equal bits for every number of tensor-parallel ranks."""
    measure("engines.py", "--only", "replicas", "--case", case, "--results", tmp_path)


@pytest.mark.slow
def test_ranks_of_an_external_launcher(tmp_path):
    """Each rank makes an engine of its own, as with torchrun. Exit code 1: bits differ, or a rank failed."""
    measure("launcher.py", "tiny-qwen3 bf16 TP 2, external launcher", "--results", tmp_path)


# The ranks of an engine, whose process or whose other rank has another environment.
ONE_OF_TWO = """
import bi_patch
import os, sys
from vllm import LLM

if __name__ == "__main__":
    if not os.environ.get("RANK"):  # the engine is armed, and the workers that it starts are not
        del os.environ["VLLM_BATCH_INVARIANT"]
        os.environ["BI_PATCH"] = "0"
    given = dict(tensor_parallel_size=2, enforce_eager=True, max_model_len=256, seed=0)
    if os.environ.get("RANK"):
        given["distributed_executor_backend"] = "external_launcher"
    LLM(sys.argv[1], dtype="bfloat16", **given)
"""


# The ranks of a launcher, of which one has no certificate. Its process stays: nothing else wakes a rank that waits.
ONE_FAILS = """
import bi_patch
import os, sys, time
from vllm import LLM

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        from bi_patch.errors import CertificateFailed
        from bi_patch.ops.cpu import certify

        def fails(*_):
            raise CertificateFailed("planted: an order moved")

        certify.certify = fails
    given = dict(tensor_parallel_size=2, enforce_eager=True, max_model_len=256, seed=0)
    try:
        LLM(sys.argv[1], dtype="bfloat16", distributed_executor_backend="external_launcher", **given)
    except Exception as error:
        print(f"{time.time()} stopped: {type(error).__name__}: {error}", flush=True)
        sys.stdin.read()
"""


# An engine of which one worker fails in a call, and answers it with the error, while the other waits for this worker.
ONE_WAITS = """
import bi_patch
import sys, time
import torch.distributed as dist
from bi_patch.errors import CertificateFailed
from vllm import LLM
from vllm.v1.worker.cpu_worker import CPUWorker


def fails(self):
    if self.rank == 1:
        print(f"{time.time()} planted", flush=True)
        raise CertificateFailed("planted: an order moved")
    dist.barrier()


CPUWorker.compile_or_warm_up_model = fails  # in the workers, too, which import this file
if __name__ == "__main__":
    LLM(sys.argv[1], dtype="bfloat16", tensor_parallel_size=2, enforce_eager=True, max_model_len=256, seed=0)
"""


def one_of_two(folder, model, text=ONE_OF_TWO, **environ):
    """Start a process of ONE_OF_TWO, ONE_FAILS or ONE_WAITS."""
    script = folder / "script.py"
    script.write_text(text)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    clean |= PATIENT | ONE_THREAD | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-P", script, model(recipes.QWEN3)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=clean | environ, **pipes)


@pytest.mark.slow
def test_an_engine_stops_if_its_workers_are_not_armed(model, tmp_path):
    process = one_of_two(tmp_path, model)
    said = process.communicate(timeout=900)[0]
    assert process.returncode != 0, said[-4000:]
    assert "SeamOpen: bi_patch cannot promise batch invariance: of 2 workers, 0 (not armed), 1 (not armed)" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"BI_PATCH": "0"}, "within 30 s, not every one of 2 ranks said that it is armed"),
        ({"BI_PATCH_TP_INVARIANT": "8"}, "2 ranks differ in settings (0: BI_PATCH_TP_INVARIANT=0"),
    ],
    ids=["not armed", "another setting"],
)
def test_ranks_of_a_launcher_stop_if_they_are_not_armed_alike(model, tmp_path, free_port, other, reason):
    """An engine sees its own rank only; its rank asks the others."""
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [one_of_two(tmp_path, model, RANK=str(r), **place, **(other if r else {})) for r in range(2)]
    try:
        said = [rank.communicate(timeout=900)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode for rank in ranks), [text[-3000:] for text in said]
    armed = said if "BI_PATCH" not in other else said[:1]
    assert all(f"SeamOpen: communicator.cpu_order: {reason}" in text for text in armed), [t[-3000:] for t in said]


@pytest.mark.slow
def test_a_rank_without_a_certificate_stops_the_other(model, tmp_path, free_port):
    """The other has its certificates, and waits for the first in its next step; or it hears of it before."""
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [one_of_two(tmp_path, model, ONE_FAILS, RANK=str(r), **place) for r in range(2)]
    try:
        well, ended = ranks[0].communicate(timeout=900)[0], time.time()
    finally:
        ranks[1].kill()
    failed = ranks[1].communicate()[0]
    told = re.search(r"^(\S+) stopped: CertificateFailed: planted: an order moved$", failed, re.MULTILINE)
    assert told and ended - float(told[1]) < 30, (failed[-3000:], well[-3000:])
    assert "planted: an order moved (rank 1 said this, and stopped)" in well, well[-3000:]


@pytest.mark.slow
def test_a_worker_that_fails_stops_the_worker_that_waits_for_it(model, tmp_path):
    process = one_of_two(tmp_path, model, ONE_WAITS)
    try:
        said, ended = process.communicate(timeout=900)[0], time.time()
    finally:
        process.kill()
    began = float(re.search(r"(\d+\.\d+) planted", said)[1])
    assert process.returncode and ended - began < 30, said[-4000:]
    assert "planted: an order moved (rank 1 said this, and stopped). This rank waits" in said, said[-4000:]


@pytest.mark.slow
def test_several_api_servers_are_armed_and_give_the_same_answers(model, serve):
    import asyncio

    import psutil
    from unhurried import client as client_of

    folder = model(recipes.QWEN3)
    given = {"temperature": 0, "logprobs": 2, "max_tokens": 6, "extra_body": {"ignore_eos": True}}
    prompts = [[(7 * i + j) % 1900 for j in range(3 + 11 * i)] for i in range(12)]

    async def ask(prompt):
        async with client_of(f"{server.url}/v1") as client:
            answer = await client.completions.create(model=folder, prompt=prompt, **given)  # by any of the servers
        return answer.choices[0].text, answer.choices[0].logprobs.token_logprobs

    async def main():
        alone = [await ask(prompt) for prompt in prompts]
        for _ in range(3):
            assert await asyncio.gather(*map(ask, prompts)) == alone

    with serve(folder, "--api-server-count", "2", "--max-model-len", "512", "--enforce-eager") as server:
        tree = psutil.Process(server.pid).children(recursive=True)
        named = {process: " ".join(process.cmdline()) for process in tree}
        servers = [process for process, name in named.items() if "ApiServer" in name or "APIServer" in name]
        assert len(servers) >= 2, list(named.values())
        for process in (p for p, name in named.items() if "VLLM::" in name):
            assert any("/wrapt/" in held.path for held in process.memory_maps()), named[process]
        asyncio.run(main())


@pytest.mark.slow
def test_other_sums_over_four_ranks_are_caught(start):
    batches = next(probe for probe in PROBES if probe.name == "batch size")
    with two_ranks(start, {"tensor_parallel_size": 4}, kind=FaultyEngine, dtype="float32") as engine:
        load = Workload.random(engine.info.vocab_size, generate=4, sizes=(1, 2, 5, 16), prefix=130, lengths=(3, 40))
        for name in ("", *faults.WAYS, ""):
            assert engine.plant_over_ranks(name) == 4
            engine.reset_cache()
            result = batches.run(engine, load)
            assert result.compared > 0 and bool(result.differing) == bool(name), (name, result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "eager"), [("bfloat16", True), ("float32", True), ("bfloat16", False)], ids=["bf16", "fp32", "compiled"]
)
def test_every_number_of_ranks_gives_the_same_bits(start, dtype, eager):
    probe = next(p for p in FEATURE_PROBES if p.name == "tensor parallel size")
    environ = ONE_THREAD | {"BI_PATCH_TP_INVARIANT": "8"}
    with start(ARMED, recipes.QWEN3, environ=environ, dtype=dtype, eager=eager) as engine:
        load = Workload.random(engine.info.vocab_size, generate=8, lengths=(3, 40, 290))
        expected = probe.collect(engine, load)
        options, changes = engine.options, probe.changes(engine)
    assert len(changes) == 2
    for change in changes:
        given = {name: getattr(options, name) for name in ("dtype", "eager", "max_model_len", "chunk")} | change.options
        with start(ARMED, recipes.QWEN3, environ=environ, **given) as other:
            result = probe.judge(change, expected, probe.collect(other, load, change))
        assert result.compared > 0 and result.differing == 0, f"{change.label}: {result.first}"


@pytest.mark.slow
def test_parts_added_one_by_one_are_caught(start):
    """The axis "tensor parallel size" finds parts that are not added in a tree: 2 ranks then differ from 1."""
    (name,) = faults.TREES
    probe = next(p for p in FEATURE_PROBES if p.name == "tensor parallel size")
    given = {"environ": ONE_THREAD | {"BI_PATCH_TP_INVARIANT": "8"}, "kind": FaultyEngine, "dtype": "float32"}
    answers = []
    for ranks in (1, 2):
        with start(ARMED, recipes.QWEN3, extra={"tensor_parallel_size": ranks}, **given) as engine:
            assert engine.plant_over_ranks(name) == ranks
            load = Workload.random(engine.info.vocab_size, generate=4, lengths=(3, 40))
            answers.append(probe.collect(engine, load))
    result = probe.judge(Change("tensor parallel 2", {}), *answers)
    assert result.compared > 0 and result.differing > 0
