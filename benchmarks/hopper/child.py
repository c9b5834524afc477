"""Starts one engine in one mode, measures its cost, and writes one JSON file.

    PYTHONPATH=. python3 benchmarks/hopper/child.py MODEL MODE OUT.json --cost [--only WORKLOADS] [--eager] [--profile]

MODEL is a name of bi_patch/tools/models/shapes.py, or such a name with another number of layers: "Qwen3-30B-A3B, 12
layers". MODE is stock, upstream, armed, or parts: armed with BI_PATCH_TP_INVARIANT=8. The weights are random, from a
normal distribution with a fixed seed and a standard deviation of fan_in**-0.5. report.py makes result files from the
JSON files.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable

import peers

COST = {
    "1 x 512/128": (1, 512, 128, 3),
    "8 x 1024/128": (8, 1024, 128, 3),
    "64 x 512/128": (64, 512, 128, 3),
    "128 x 512/128": (128, 512, 128, 3),
    "256 x 512/128": (256, 512, 128, 3),
    "256 x 1024/256": (256, 1024, 256, 2),
    "2 x 32000/64": (2, 32000, 64, 2),
}
# Only by name: fewer decode steps.
SHORT = {name.replace("/128", "/64"): (*size[:2], 64, 3) for name, size in COST.items() if "/128" in name}
WORKLOADS = COST | SHORT
MODES = ("stock", "upstream", "armed", "parts")
ARMED = ("armed", "parts")


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("out")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--only", help="comma-separated cost workloads")
    parser.add_argument("--turns", action="store_true", help="measure a workload's cost when turns.py asks for it")
    parser.add_argument("--profile", action="store_true", help="print the kernels of prefill and decode steps")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--max-model-len", type=int, default=33000)
    parser.add_argument("--scheme", help="a name of schemes.py: quantized weights of the model's shape")
    parser.add_argument("--layers", type=int, default=4, help="of a quantized model")
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel ranks, each on a GPU of its own")
    parser.add_argument("--extra", default="{}", help="further arguments of vllm.LLM, as JSON")
    return parser.parse_args(arguments)


def workloads(only: str | None, max_model_len: int) -> list[str]:
    """The names of the workloads in `only` (of COST if None) that fit into max_model_len. Exits for an unknown name."""
    names = only.split(",") if only else list(COST)
    if unknown := [name for name in names if name not in WORKLOADS]:
        sys.exit(f"no such workload: {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    return [name for name in names if sum(WORKLOADS[name][1:3]) <= max_model_len]


def shape(model: str) -> dict[str, object]:
    """The config.json of a name of SHAPES, or of such a name with another number of layers. Exits for other names."""
    from bi_patch.tools.models import shapes

    if model in shapes.SHAPES:
        return shapes.SHAPES[model]
    name, _, layers = model.removesuffix(" layers").partition(", ")
    if name not in shapes.SHAPES or not layers.isdecimal():
        sys.exit(f"no such model: {model}")
    return shapes.SHAPES[name] | {"num_hidden_layers": int(layers)}


def environment(mode: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["BI_PATCH"] = "1" if mode in ARMED else "0"
    os.environ["BI_PATCH_TP_INVARIANT"] = "8" if mode == "parts" else "0"
    # vLLM would compile DeepGEMM's kernels for 1,100 shapes, which takes minutes. `warm` compiles those of a workload.
    os.environ.setdefault("VLLM_DEEP_GEMM_WARMUP", "skip")
    if mode == "stock":
        os.environ.pop("VLLM_BATCH_INVARIANT", None)
    else:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"


def randomize(model) -> int:
    """Fill every weight and bias with seeded random values; returns the number of parameters."""
    import torch

    generator = torch.Generator(next(model.parameters()).device).manual_seed(7)
    for name, value in model.named_parameters():
        if value.ndim >= 2:
            value.data.normal_(0, value.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            value.data.normal_(0, 0.5, generator=generator)
        elif name.endswith("A_log"):  # rates of decay of recurrent layers, as in trained models
            value.data.uniform_(0, 2, generator=generator)
        elif name.endswith(".A"):
            value.data.uniform_(-8, -1, generator=generator)
    return sum(p.numel() for p in model.parameters())


class Engine:
    """A vLLM engine whose steps this script runs one by one."""

    def __init__(self, a):
        started = time.perf_counter()
        if a.mode in ARMED:
            import bi_patch  # noqa: F401  arms before vllm loads
        from vllm import LLM

        from bi_patch.tools.models import shapes

        quantized, launched, own = {}, {}, a.mode  # engines that start side by side write no common folder
        if a.ranks > 1:
            own += f" rank {os.environ['RANK']}"
            peers.own_nccl()
            launched = peers.LAUNCHED | {"tensor_parallel_size": a.ranks}
        # New weights are refused with quantized layers and with BI_PATCH_TP_INVARIANT: these models are filled at load.
        filled = bool(a.scheme) or a.mode == "parts"
        if filled:
            from bi_patch.tools.verify import weights

            weights.make_random(7)
        if a.scheme:
            import schemes

            quantized = schemes.arguments(a.scheme)
            name = f"{schemes.label(a.scheme, a.layers)} {own}"
            folder = shapes.save(name, schemes.config(a.scheme, a.layers), "/tmp/models")
        else:
            folder = shapes.save(f"{a.model} {own}", shape(a.model), "/tmp/models")
        self.llm = LLM(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=a.max_model_len,
            enforce_eager=a.eager,
            **json.loads(a.extra),
            **quantized,
            **launched,
        )
        if not filled:
            self.llm.apply_model(randomize)
        self.started = time.perf_counter() - started
        self.vocabulary = shape(a.model)["vocab_size"]
        self.count, self.ranks = 0, a.ranks
        self.on_step = None  # called with the outputs of a step

    def forget(self):
        self.llm.reset_prefix_cache()

    def prompt(self, seed: int, length: int) -> list[int]:
        rng = random.Random(seed * 7919 + length)
        return [rng.randrange(100, min(self.vocabulary, 30000)) for _ in range(length)]

    def add(self, prompt: list[int], tokens: int) -> str:
        """Add a greedy request for exactly `tokens` tokens; returns the request's name."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        self.count += 1
        name = str(self.count)
        parameters = SamplingParams(
            temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        self.llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), parameters)
        return name

    def step(self) -> list:
        outputs = self.llm.llm_engine.step()
        if self.on_step:
            self.on_step(outputs)
        return outputs

    def run(self) -> None:
        """Step until no request is left."""
        while self.llm.llm_engine.has_unfinished_requests():
            self.step()


def cost(engine: Engine, number: int, length: int, tokens: int, seed: int) -> dict:
    """Run one workload; returns milliseconds per decode step, seconds of prefill, and seconds in total.

    Prefill ends with the first token of the last request.
    """
    import torch

    engine.forget()
    for i in range(number):
        engine.add(engine.prompt(seed * 1000 + i, length), tokens)
    core = engine.llm.llm_engine
    torch.cuda.synchronize()
    begin = time.perf_counter()
    first, marks = set(), []
    while core.has_unfinished_requests():
        outputs = core.step()
        now = time.perf_counter()
        first.update(o.request_id for o in outputs if o.outputs and len(o.outputs[0].token_ids) > 0)
        if len(first) == number:
            marks.append(now)
    # The first mark ends the prefill. Of many requests, those that began early end early: the last steps are smaller.
    steady = marks[: max(2, tokens - 8 - number * length // 8192)] if number > 64 else marks
    return {
        "decode_ms": 1000 * (steady[-1] - steady[0]) / (len(steady) - 1),
        "prefill_s": marks[0] - begin,
        "total_s": marks[-1] - begin,
    }


def traced(engine: Engine, until: Callable[[], bool], activities: list):
    """Profile the engine's steps until `until()` says so; returns the profile."""
    from torch.profiler import profile as trace

    with trace(activities=activities) as held:
        while not until():
            engine.step()
    return held


def kernels(held) -> list:
    """The GPU kernels of a profile, the longest first."""
    from torch.autograd import DeviceType

    found = [e for e in held.key_averages() if e.device_type == DeviceType.CUDA]
    return sorted(found, key=lambda e: -e.self_device_time_total)


def typical(held, steps: int) -> float:
    """Microseconds of the GPU's kernels in one of `steps` equal steps of a profile: of each launch of a step the median
    over the steps. Another process that has the GPU in between adds to few of them. Of kernels that not every step
    launches as often: the mean."""
    from torch.autograd import DeviceType

    launches: dict[str, list[tuple[float, float]]] = {}
    for event in held.events():
        if event.device_type == DeviceType.CUDA:
            launches.setdefault(event.name, []).append((event.time_range.start, event.self_device_time_total))
    total = 0.0
    for found in launches.values():
        us = [time for _, time in sorted(found)]
        each, rest = divmod(len(us), steps)
        total += sum(us) / steps if rest else sum(statistics.median(us[at::each]) for at in range(each))
    return total


def gpu_cost(engine: Engine, number: int, length: int, steps: int = 16) -> dict:
    """Milliseconds of GPU kernels per decode step and seconds of them in the prefill; the 16 kernels that take the most
    time in a decode step, each as [microseconds per step, launches per step, name], and those of the prefill.

    Without any cost of the host, a step and a prefill would take this time.
    """
    from torch.profiler import ProfilerActivity

    seen: set[str] = set()
    engine.forget()
    # The first requests decode while the last ones are still in their prefill.
    tokens = steps + 24 + number * length // 8192
    for i in range(number):
        engine.add(engine.prompt(77000 + i, length), tokens)
    engine.on_step = lambda outputs: seen.update(o.request_id for o in outputs if o.outputs[0].token_ids)
    prefill = kernels(traced(engine, lambda: len(seen) == number, [ProfilerActivity.CUDA]))
    left = iter(range(steps, -1, -1))
    held = traced(engine, lambda: not next(left), [ProfilerActivity.CUDA])
    decode = kernels(held)
    engine.on_step = None
    engine.run()

    def most(found: list, count: int) -> list:
        return [[round(e.self_device_time_total / count, 1), e.count / count, e.key[:120]] for e in found[:16]]

    return {
        "gpu_ms": sum(e.self_device_time_total for e in decode) / 1000 / steps,
        "gpu_typical_ms": typical(held, steps) / 1000,
        "gpu_prefill_s": sum(e.self_device_time_total for e in prefill) / 1e6,
        "kernels": most(decode, steps),
        "prefill_kernels": most(prefill, 1),
    }


def warm(engine: Engine, name: str, whole: bool = False) -> None:
    """Load the kernels of a workload's sizes. Some libraries compile kernels when they are first used.

    whole: run all steps of the workload, for a library that compiles kernels for each number of rows.
    """
    number, length, tokens, _ = WORKLOADS[name]
    cost(engine, number, length, tokens if whole else 4, 500)


def measure(engine: Engine, result: dict, name: str, repeat: int) -> None:
    """Measure one repeat of a workload and append it to `result`. The first repeat also profiles the GPU."""
    number, length, tokens, _ = WORKLOADS[name]
    row = {"workload": name, "repeat": repeat} | cost(engine, number, length, tokens, repeat)
    if repeat == 0:
        row |= of_gpu(engine, number, length)
    result["cost"].append(row)
    print("cost", result["model"], result["mode"], row, flush=True)


def of_gpu(engine: Engine, number: int, length: int) -> dict:
    """GPU times of a workload, {} where an engine of several ranks has none."""
    if engine.ranks == 1:
        return gpu_cost(engine, number, length)
    import bursts

    try:
        return bursts.gpu_cost(engine, number, length)
    except bursts.NotOneGraph as error:  # the same on every rank
        print(f"no GPU time: {error}", flush=True)
        return {}


def save(result: dict, out: str) -> None:
    """Write the file whole, so that a reader never sees half of it."""
    with open(f"{out}.part", "w") as file:
        json.dump(result, file)
    os.replace(f"{out}.part", out)


def take_turns(measure: Callable[[str, int], None]) -> None:
    """Measure the workload of each line of stdin, NAME<tab>REPEAT, then print "turn done".

    Other engines share the GPU and wait meanwhile. Of an engine of several ranks, rank 0 speaks.
    """
    print("turn ready", flush=True)
    for line in peers.lines():
        name, repeat = line.rstrip("\n").split("\t")
        measure(name, int(repeat))
        print("turn done", flush=True)


def profile(engine: Engine) -> None:
    """Print the GPU's and the host's time by kernel and op: for a prefill of 8 x 1024, and for decode steps of one
    request."""
    from torch.profiler import ProfilerActivity

    for title, number, length, skip, steps in (("prefill 8 x 1024", 8, 1024, 0, 1), ("decode 1 x 512", 1, 512, 20, 10)):
        for warm in (True, False):
            engine.forget()
            for i in range(number):
                engine.add(engine.prompt(4242 + 100 * warm + i, length), skip + steps + 2)
            for _ in range(skip):
                engine.step()
            left = iter(range(steps, -1, -1))
            held = traced(engine, lambda left=left: not next(left), [ProfilerActivity.CUDA, ProfilerActivity.CPU])
            held = held.key_averages()
            engine.run()
        print(title)
        for key in ("self_cuda_time_total", "self_cpu_time_total"):
            print(held.table(sort_by=key, row_limit=22, max_name_column_width=70))


def main() -> None:
    a = parse()
    workloads(a.only, a.max_model_len)  # exits for an unknown name before an engine starts
    if not (a.cost or a.turns or a.profile):
        sys.exit("nothing to measure: give --cost, --turns or --profile")
    environment(a.mode)
    if a.ranks > 1:
        a.out = peers.fork(a.ranks, a.out)
    engine = Engine(a)
    import torch
    import vllm

    result = head(torch.cuda.get_device_name(), vllm.__version__, torch.__version__, torch.get_num_threads())
    name = a.model
    if a.scheme:
        import schemes

        name = schemes.label(a.scheme, a.layers)
    name += f", TP {a.ranks}" * (a.ranks > 1)
    result |= {"model": name, "mode": a.mode, "eager": a.eager, "start_s": round(engine.started, 1), "cost": []}

    deep = bool(a.scheme) and "block" in a.scheme  # DeepGEMM may serve it
    if a.cost or a.turns:
        cost(engine, 1, 64, 16, 999)
    if a.cost:
        for name in workloads(a.only, a.max_model_len):
            warm(engine, name, deep)
            for repeat in range(WORKLOADS[name][3]):
                measure(engine, result, name, repeat)
            save(result, a.out)
    if a.turns:
        for name in workloads(a.only, a.max_model_len):
            warm(engine, name, deep)

        def turn(name: str, repeat: int) -> None:
            measure(engine, result, name, repeat)
            save(result, a.out)

        if a.ranks > 1:
            peers.pin()
        take_turns(turn)
    if a.profile:
        profile(engine)
    save(result, a.out)
    if a.mode in ARMED:
        from bi_patch.ops.cuda import linear, scaled_linear

        routes = linear.routes() | scaled_linear.routes()
        print("routes", {str(p): (len(r.kinds), r.limit, r.tiles_agree) for p, r in routes.items()})
    print("done", a.model, a.mode, "start", result["start_s"], flush=True)
    sys.stdout.flush()
    os._exit(0)


def head(device: str, vllm: str, torch: str, threads: int) -> dict:
    """The device, the libraries, and the identity of bi_patch and of this command."""
    import msgspec

    from bi_patch.tools import provenance

    made_by = msgspec.to_builtins(provenance.here())
    return {"device": device, "vllm": vllm, "torch": torch, "threads": threads, "provenance": made_by}


if __name__ == "__main__":
    main()
