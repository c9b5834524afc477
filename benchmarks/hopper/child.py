"""One engine in one process: starts it in one mode, measures cost and invariance, writes one JSON file.

    python3 benchmarks/hopper/child.py MODEL MODE OUT.json [--cost] [--matrix] [--batches] [--eager] [--peer OTHER.json]

MODE: stock | upstream | armed. Weights are random: normal(0, fan_in**-0.5), seeded, so that processes agree.
--peer compares this engine's lone answers with those another process wrote (restart, eager against graphs).
"""

import argparse
import hashlib
import json
import os
import random
import sys
import time

COST = {
    "1 x 512/128": (1, 512, 128, 3),
    "8 x 1024/128": (8, 1024, 128, 3),
    "64 x 512/128": (64, 512, 128, 3),
    "256 x 1024/256": (256, 1024, 256, 2),
    "2 x 32000/64": (2, 32000, 64, 2),
}
BATCHES = (2, 3, 5, 8, 13, 16, 17, 32, 33, 64, 65, 100, 128, 129, 200, 255, 256, 257, 300)
TOKENS = 48


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("mode", choices=("stock", "upstream", "armed"))
    parser.add_argument("out")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--only", help="comma-separated cost workloads")
    parser.add_argument("--turns", action="store_true", help="cost, each workload when turns.py asks for it")
    parser.add_argument("--matrix", action="store_true", help="every axis")
    parser.add_argument("--batches", action="store_true", help="the axis of batch sizes alone")
    parser.add_argument("--quick", action="store_true", help="the axes that change kernels, in a minute")
    parser.add_argument("--sampled", action="store_true", help="the axes of sampling alone")
    parser.add_argument("--profile", action="store_true", help="print kernels of prefill and decode steps")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--peer")
    parser.add_argument("--max-model-len", type=int, default=33000)
    parser.add_argument("--extra", default="{}", help="JSON of further LLM arguments")
    return parser.parse_args(arguments)


def workloads(only: str | None, max_model_len: int) -> list[str]:
    """The names of the cost workloads that were asked for (all, if none was) and fit."""
    return [name for name in (only.split(",") if only else COST) if sum(COST[name][1:3]) <= max_model_len]


def environment(mode: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["BI_PATCH"] = "1" if mode == "armed" else "0"
    if mode == "stock":
        os.environ.pop("VLLM_BATCH_INVARIANT", None)
    else:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"


def randomize(model) -> int:
    """Give every parameter seeded random values; returns their number."""
    import torch

    generator = torch.Generator("cuda").manual_seed(7)
    for name, value in model.named_parameters():
        if value.ndim >= 2:
            value.data.normal_(0, value.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            value.data.normal_(0, 0.5, generator=generator)
    return sum(p.numel() for p in model.parameters())


class Engine:
    """A vLLM engine stepped by hand."""

    def __init__(self, a):
        started = time.perf_counter()
        if a.mode == "armed":
            import bi_patch  # noqa: F401  arms before vllm loads
        from vllm import LLM

        from bi_patch.tools.models import shapes

        self.llm = LLM(
            model=shapes.write(a.model, "/tmp/models"),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=a.max_model_len,
            enforce_eager=a.eager,
            **json.loads(a.extra),
        )
        self.llm.apply_model(randomize)
        self.started = time.perf_counter() - started
        self.vocabulary = shapes.SHAPES[a.model]["vocab_size"]
        self.count = 0

    @property
    def scheduler(self):
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def forget(self):
        self.llm.reset_prefix_cache()

    def prompt(self, seed: int, length: int) -> list[int]:
        rng = random.Random(seed * 7919 + length)
        return [rng.randrange(100, min(self.vocabulary, 30000)) for _ in range(length)]

    def add(self, prompt, tokens, **sampling) -> str:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        self.count += 1
        name = str(self.count)
        options = {"temperature": 0.0} | sampling
        parameters = SamplingParams(max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False, **options)
        self.llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), parameters)
        return name

    def run(self, later=()):
        """Step until done. later: (step, callable) pairs that add requests on the way. Returns outputs by name."""
        engine, done, step = self.llm.llm_engine, {}, 0
        later = sorted(later, key=lambda pair: pair[0])
        while engine.has_unfinished_requests() or later:
            while later and later[0][0] <= step:
                later.pop(0)[1]()
            for output in engine.step():
                if output.finished:
                    done[output.request_id.split("-")[0]] = output
            step += 1
        return done


def cost(engine: Engine, number: int, length: int, tokens: int, seed: int) -> dict:
    """Milliseconds a decode step, seconds of prefill (to the last request's first token), seconds in all."""
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
    # The first mark ends the prefill; the last steps may hold stragglers that began early.
    steady = marks[: max(2, tokens - 8)] if number > 64 else marks
    return {
        "decode_ms": 1000 * (steady[-1] - steady[0]) / (len(steady) - 1),
        "prefill_s": marks[0] - begin,
        "total_s": marks[-1] - begin,
    }


def traced(engine: Engine, steps: int, activities: list):
    """What torch's profiler saw of the next `steps` steps, by kernel and op; the rest is then run to its end."""
    from torch.profiler import profile as trace

    with trace(activities=activities) as held:
        for _ in range(steps):
            engine.llm.llm_engine.step()
    engine.run()
    return held.key_averages()


def gpu_cost(engine: Engine, number: int, length: int, steps: int = 16) -> tuple[float, list]:
    """Milliseconds of GPU kernels in a decode step, which is what it takes when the host costs nothing; the 16 kernels
    that take most: [microseconds a step, launches a step, name]."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    seen = set()
    engine.forget()
    for i in range(number):
        engine.add(engine.prompt(77000 + i, length), steps + 24)
    while len(seen) < number:
        seen.update(o.request_id for o in engine.llm.llm_engine.step() if o.outputs[0].token_ids)
    held = traced(engine, steps, [ProfilerActivity.CUDA])
    kernels = [e for e in held if e.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    most = [[round(e.self_device_time_total / steps, 1), e.count / steps, e.key[:120]] for e in kernels[:16]]
    return sum(e.self_device_time_total for e in kernels) / 1000 / steps, most


def measure(engine: Engine, result: dict, name: str, repeat: int) -> None:
    """One repeat of a workload, kept in `result`; before the first: kernels of its size are loaded, the GPU's time."""
    number, length, tokens, _ = COST[name]
    if repeat == 0 and number > 1:
        cost(engine, number, length, 4, 500)
    row = {"workload": name, "repeat": repeat} | cost(engine, number, length, tokens, repeat)
    if repeat == 0 and number <= 64:
        row["gpu_ms"], row["kernels"] = gpu_cost(engine, number, length)
    result["cost"].append(row)
    print("cost", result["model"], result["mode"], row, flush=True)


def take_turns(engine: Engine, result: dict) -> None:
    """Answer each line of stdin, NAME<tab>REPEAT, with a line `turn`: another engine shares the card and waits."""
    print("turn ready", flush=True)
    for line in sys.stdin:
        name, repeat = line.rstrip("\n").split("\t")
        measure(engine, result, name, int(repeat))
        print("turn done", flush=True)


def profile(engine: Engine) -> None:
    """Print the device's and the host's time by kernel and op, for a prefill of 8 x 1024 and for decode steps of 1."""
    from torch.profiler import ProfilerActivity

    for title, number, length, skip, steps in (("prefill 8 x 1024", 8, 1024, 0, 1), ("decode 1 x 512", 1, 512, 20, 10)):
        for warm in (True, False):
            engine.forget()
            for i in range(number):
                engine.add(engine.prompt(4242 + 100 * warm + i, length), skip + steps + 2)
            for _ in range(skip):
                engine.llm.llm_engine.step()
            held = traced(engine, steps, [ProfilerActivity.CUDA, ProfilerActivity.CPU])
        print(title)
        for key in ("self_cuda_time_total", "self_cpu_time_total"):
            print(held.table(sort_by=key, row_limit=22, max_name_column_width=70))


def bits(output) -> list:
    """An answer as exact values: tokens and each step's logprobs."""
    answer = output.outputs[0]
    exact = lambda value: value.hex() if hasattr(value, "hex") else value  # noqa: E731
    steps = [sorted((token, exact(entry.logprob)) for token, entry in step.items()) for step in answer.logprobs]
    return [list(answer.token_ids), steps]


def differ(a, b) -> int:
    """Positions that differ in the token or in any bit of a logprob."""
    return sum(pair_a != pair_b for pair_a, pair_b in zip(zip(*a), zip(*b)))


class Matrix:
    """Lone answers of a few prompts against the same prompts in other company."""

    LENGTHS = (37, 300, 1025, 2500)

    def __init__(self, engine: Engine):
        self.engine, self.rows = engine, []
        self.targets = [engine.prompt(1 + i, n) for i, n in enumerate(self.LENGTHS)]
        self.alone = [self.one(p) for p in self.targets]

    def one(self, prompt, tokens=TOKENS, **sampling):
        self.engine.forget()
        name = self.engine.add(prompt, tokens, logprobs=5, **sampling)
        return bits(self.engine.run()[name])

    def record(self, axis: str, pairs, note: str = "") -> None:
        pairs = list(pairs)
        row = {
            "axis": axis,
            "compared": sum(len(a[0]) for a, _ in pairs),
            "differing": sum(differ(a, b) for a, b in pairs),
        }
        self.rows.append(row | ({"note": note} if note else {}))
        print("matrix", row, flush=True)

    def crowd(self, size: int, salt: int, lengths=(8, 300), staggered: bool = False, **sampling):
        """The targets among size - len(targets) others, in random order; yields (alone, crowded)."""
        rng = random.Random(salt)
        chosen = list(range(len(self.targets)))[: min(size, len(self.targets))]
        if size < len(self.targets):
            chosen = rng.sample(range(len(self.targets)), min(size - 1, len(self.targets))) or [0]
        jobs = [("target", i) for i in chosen] + [("other", i) for i in range(size - len(chosen))]
        rng.shuffle(jobs)
        names, later = {}, []
        self.engine.forget()

        def start(kind, i):
            if kind == "target":
                names[i] = self.engine.add(self.targets[i], TOKENS, logprobs=5, **sampling)
            else:
                length = rng.randrange(*lengths)
                self.engine.add(self.engine.prompt(salt * 997 + i, length), rng.randrange(8, TOKENS + 8))

        for job in jobs:
            if staggered:
                later.append((rng.randrange(0, 60), lambda job=job: start(*job)))
            else:
                start(*job)
        done = self.engine.run(later)
        return [(i, bits(done[name])) for i, name in names.items()]

    def batches(self) -> None:
        for size in BATCHES:
            self.record(f"batch {size}", ((self.alone[i], got) for i, got in self.crowd(size, size)))

    def everything(self) -> None:
        self.record("repeat", ((a, self.one(p)) for a, p in zip(self.alone, self.targets)))
        self.batches()
        for seed in (1, 2):
            self.record("staggered 100", ((self.alone[i], g) for i, g in self.crowd(100, 50 + seed, staggered=True)))
        self.record("mixed lengths to 8k, 24", ((self.alone[i], g) for i, g in self.crowd(24, 77, (500, 8000))))
        self.cached()
        self.chunked()
        self.decode_is_prefill()
        self.sampled()

    def quick(self) -> None:
        for size in (2, 33, 128, 257):
            self.record(f"batch {size}", ((self.alone[i], got) for i, got in self.crowd(size, size)))
        self.record("staggered 100", ((self.alone[i], g) for i, g in self.crowd(100, 51, staggered=True)))
        self.record("mixed lengths to 8k, 24", ((self.alone[i], g) for i, g in self.crowd(24, 77, (500, 8000))))
        self.cached()
        self.decode_is_prefill()

    def cached(self) -> None:
        """The same prompt again: its prefix comes from the cache, whole or in part."""
        pairs = []
        for alone, prompt in zip(self.alone, self.targets):
            self.engine.forget()
            for length in (len(prompt) // 3, len(prompt)):
                self.engine.add(prompt[:length], 1)
                self.engine.run()
                name = self.engine.add(prompt, TOKENS, logprobs=5)
                pairs.append((alone, bits(self.engine.run()[name])))
        self.record("cached prefix, part and whole", pairs)

    def chunked(self) -> None:
        scheduler = self.engine.scheduler
        kept = scheduler.max_num_scheduled_tokens
        try:
            for chunk in (64, 257, 1000):
                scheduler.max_num_scheduled_tokens = chunk
                pairs = [(alone, self.one(p)) for alone, p in zip(self.alone, self.targets)]
                self.record(f"chunked prefill {chunk}", pairs)
                scheduler.max_num_scheduled_tokens = max(chunk, 512)
                self.record("chunked prefill, crowd of 40", ((self.alone[i], g) for i, g in self.crowd(40, chunk)))
        finally:
            scheduler.max_num_scheduled_tokens = kept

    def decode_is_prefill(self) -> None:
        """The token and logprobs after prompt + answer[:i], computed by prefill, against decode step i."""
        pairs = []
        for alone, prompt in zip(self.alone, self.targets):
            for i in (1, 2, 7, 15, 16, 17, 31, 40, 47):
                got = self.one(prompt + alone[0][:i], 1)
                pairs.append(([alone[0][i : i + 1], alone[1][i : i + 1]], got))
        self.record("decode = prefill", pairs)

    def sampled(self) -> None:
        kinds = {
            "temperature": {},
            "top-p": {"top_p": 0.9},
            "top-k": {"top_k": 50},
            "top-p, top-k": {"top_p": 0.95, "top_k": 1000},
            "min-p": {"min_p": 0.02},
            "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3},
        }
        for kind, options in kinds.items():
            sampling = {"temperature": 0.8, "seed": 1234} | options
            alone = [self.one(p, **sampling) for p in self.targets]
            for size in (4, 20, 90):
                crowd = self.crowd(size, 300 + size, **sampling)
                self.record(f"sampled, {kind}, {size}", ((alone[i], got) for i, got in crowd))


def main() -> None:
    a = parse()
    environment(a.mode)
    engine = Engine(a)
    import torch
    import vllm

    result = {
        "model": a.model,
        "mode": a.mode,
        "eager": a.eager,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "start_s": round(engine.started, 1),
        "cost": [],
        "matrix": [],
    }

    def save():
        with open(a.out, "w") as file:
            json.dump(result, file)

    if a.cost or a.turns:
        cost(engine, 1, 64, 16, 999)
    if a.cost:
        for name in workloads(a.only, a.max_model_len):
            for repeat in range(COST[name][3]):
                measure(engine, result, name, repeat)
            save()
    if a.turns:
        take_turns(engine, result)
    if a.profile:
        profile(engine)
    if a.matrix or a.batches or a.peer or a.sampled or a.quick:
        matrix = Matrix(engine)
        result["alone"] = [hashlib.sha256(json.dumps(x).encode()).hexdigest() for x in matrix.alone]
        result["answers"] = matrix.alone
        if a.peer:
            with open(a.peer) as file:
                peer = json.load(file)["answers"]
            again = json.loads(json.dumps(matrix.alone))
            matrix.record("eager" if a.eager else "restart", zip(peer, again))
        try:
            if a.matrix:
                matrix.everything()
            elif a.batches:
                matrix.batches()
            elif a.quick:
                matrix.quick()
            elif a.sampled:
                matrix.sampled()
        finally:
            result["matrix"] = matrix.rows
            save()
    save()
    if a.mode == "armed":
        from bi_patch.ops.cuda import linear

        print("routes", {str(p): (len(r.kinds), r.limit, r.tiles_agree) for p, r in linear.routes().items()})
    print("done", a.model, a.mode, "start", result["start_s"], flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
