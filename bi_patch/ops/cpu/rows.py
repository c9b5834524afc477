"""Row certificates: a library's kernel that bi_patch keeps must give a row the same bits for every number of rows.

Layers register their operations while the model is built. Once the weights are loaded, bi_patch.ops.cpu.certify runs
every distinct operation on random rows, alone and among other rows, and compares the outputs bitwise. No bundled kernel
can replace an operation that fails, so the engine stops.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Evidence, Key
from bi_patch.ops.cpu import machine
from bi_patch.ops.row_checks import FEW, ROWS, RowCheck

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# Rounding to 16 bits hides another order in most outputs. So small numbers of rows run at many places of the data.
_PLACES = 32
_THREADS = (1, 3)  # besides the engine's own number of threads
DATA = f"random rows at {_PLACES} places; {' and '.join(map(str, _THREADS))} threads, in a pool of their own"

_registered: dict[tuple[str, str], RowCheck] = {}


def register(check: RowCheck) -> None:
    """Ask for a certificate. The same operation and problem, registered twice, is certified once."""
    _registered.setdefault((check.operation, check.problem), check)


def take_registered() -> list[RowCheck]:
    """Remove all registered operations and return them, in the order of registration."""
    taken = list(_registered.values())
    _registered.clear()
    return taken


def key(check: RowCheck, library: str) -> Key:
    """The key of a certificate. library: the version of the library whose kernel runs, e.g. "vllm 0.33.0"."""
    libraries, digest = machine.libraries(library), machine.kernels_digest()
    return Key(check.operation, check.problem, machine.device(), libraries, digest, DATA)


def certificate(check: RowCheck, key: Key) -> Certificate:
    """Run the operation for each number of rows, at many places, and compare with the same rows of the largest run.

    The numbers of rows and threads decide where PyTorch cuts a tensor. So a few places are compared under other numbers
    of threads, too.
    """
    import torch

    start = time.perf_counter()
    most = max(check.rows)
    inputs = check.make(most, torch.Generator().manual_seed(0))
    want = check.run(*(t.clone() for t in inputs))

    def compare(m: int, places: list[int]) -> tuple[int, int]:
        """The compared and the differing elements of m rows at these places."""
        compared = unequal = 0
        for at in places:
            got = check.run(*(t[at : at + m].clone() for t in inputs))
            unequal += sum(bits.differing(g, w[at : at + m]) for g, w in zip(got, want, strict=True))
            compared += sum(g.numel() for g in got)
        return compared, unequal

    def few() -> list[tuple[int, int]]:
        return [compare(m, [_places(m, most)[0], _places(m, most)[-1]]) for m in check.rows]

    others = [threads for threads in _THREADS if threads != torch.get_num_threads()]
    runs = [[compare(m, _places(m, most)) for m in check.rows], *(_on(threads, few) for threads in others)]
    differing = {m: sum(run[i][1] for run in runs) for i, m in enumerate(check.rows)}
    first = next((f"{m} rows: {unequal} elements differ" for m, unequal in differing.items() if unequal), "")
    passed = [m for m, unequal in differing.items() if not unequal]
    seconds = round(time.perf_counter() - start, 3)
    counts = sum(compared for run in runs for compared, _ in run), sum(differing.values())
    evidence = Evidence(list(check.rows), *counts, first)
    return Certificate(key, "kept", not counts[1], passed, evidence, seconds, certificates.today())


def _on(threads: int, work: Callable[[], T]) -> T:
    """What `work` returns where operators run on so many threads. Raises RuntimeError if their number cannot be set.

    vLLM pins its worker's threads to cores, and replaces torch.set_num_threads by a function that only warns, for a
    pool that shrinks and grows again loses its pins. So `work` runs in a new thread, which has a pool of its own.
    """
    import torch

    own, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run() -> T:
        torch._C.set_num_threads(threads)
        try:
            if torch.get_num_threads() != threads:
                raise RuntimeError(f"PyTorch's number of threads stays {torch.get_num_threads()} instead of {threads}")
            with torch.inference_mode(inference):
                return work()
        finally:
            torch._C.set_num_threads(own)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _places(rows: int, of: int) -> list[int]:
    """The first row of each group of `rows` out of `of` rows: up to _PLACES groups, the first and the last included."""
    last = of - rows
    count = min(_PLACES, -(-of // rows))
    return sorted({last * i // max(1, count - 1) for i in range(count)})


def register_norm(layer: torch.nn.Module, size: int) -> None:
    """Register a norm of `size` elements: plain, per head, and with a residual if the layer takes one."""
    import inspect

    import torch

    dtype = torch.get_default_dtype()
    kind = type(layer).__name__
    with_residual = "residual" in inspect.signature(type(layer).forward_native).parameters

    def run(x, *residual):
        out = layer.forward_native(x, *residual)
        return out if isinstance(out, tuple) else (out,)

    problem = f"{kind} {size} {str(dtype).removeprefix('torch.')}"
    register(RowCheck("cpu.norm", problem, ROWS, lambda m, g: (torch.randn(m, size, generator=g).to(dtype),), run))
    register(
        RowCheck(
            "cpu.norm",
            f"{problem} per head",
            ROWS,
            lambda m, g: (torch.randn(m, 12, size, generator=g).to(dtype),),
            lambda x: run(x[:, 2:7]),  # a strided view, like the query and key in the output of the QKV projection
        )
    )
    if with_residual:
        register(
            RowCheck(
                "cpu.norm",
                f"{problem} with residual",
                ROWS,
                lambda m, g: torch.randn(2, m, size, generator=g).to(dtype).unbind(),
                run,
            )
        )


def register_layer_norm(layer: torch.nn.Module, sizes: tuple[int, ...]) -> None:
    """Register a LayerNorm over the last of `sizes`, run on rows of these sizes in the dtype of its weight."""
    import torch

    weight = getattr(layer, "weight", None)
    dtype = torch.get_default_dtype() if weight is None else weight.dtype
    problem = f"{type(layer).__name__} {'x'.join(map(str, sizes))} {str(dtype).removeprefix('torch.')}"
    register(
        RowCheck(
            "cpu.norm",
            problem,
            ROWS,
            lambda m, g: (torch.randn(m, *sizes, generator=g).to(dtype),),
            lambda x: (_first(layer(x)),),
        )
    )


def _first(output: torch.Tensor | tuple) -> torch.Tensor:
    """The first output: some layers return a residual, too."""
    return output[0] if isinstance(output, tuple) else output


def register_router(router: Callable, kind: str, experts: int, top_k: int, hidden: int, dtype: torch.dtype) -> None:
    """Register a router on fp32 logits and on logits of the model's dtype.

    router: (hidden states [rows, hidden], logits [rows, experts], input ids) -> weights, ids [rows, top_k]. It gets no
    input ids. kind: what decides its operations, in words. dtype: of the hidden states.
    """
    import torch

    def run(x, logits):
        return tuple(router(x, logits, None))

    def make(m, generator, of_logits):
        x, logits = (torch.randn(m, size, generator=generator) for size in (hidden, experts))
        return x.to(dtype), logits.to(of_logits)

    for kept in dict.fromkeys((torch.float32, dtype)):
        problem = f"{kind} E={experts} k={top_k} hidden={hidden} {str(kept).removeprefix('torch.')}"
        register(RowCheck("cpu.routing", problem, ROWS, functools.partial(make, of_logits=kept), run))


def register_moe(experts: object, layer: torch.nn.Module) -> None:
    """Register the fused experts of one layer, run on random rows with random expert ids and expert weights."""
    import torch

    config = experts.moe_config
    hidden, count, top_k = config.hidden_dim, config.num_experts, config.experts_per_token
    dtype = config.in_dtype

    def make(m, generator):
        held = layer.w13_weight.dtype
        if held != dtype:
            raise TypeError(f"{held} weights for {dtype} rows; use unquantized weights of the model's dtype")
        scores = torch.rand(m, count, generator=generator)
        weights, ids = scores.topk(top_k)
        return torch.randn(m, hidden, generator=generator).to(dtype), weights, ids.to(torch.int32)

    def run(x, weights, ids):
        out = torch.empty_like(x)
        experts.apply(
            out,
            x,
            layer.w13_weight,
            layer.w2_weight,
            weights,
            ids,
            config.activation,
            count,
            None,
            None,
            None,
            torch.empty(0),
            torch.empty(0),
            None,
            False,
        )
        return (out,)

    problem = (
        f"{type(experts).__name__} E={count} k={top_k} hidden={hidden} "
        f"intermediate={config.intermediate_size_per_partition} {str(dtype).removeprefix('torch.')}"
    )
    register(RowCheck("cpu.moe", problem, ROWS, make, run))


def register_sampling(vocab: int) -> None:
    """Register what sampling does with rows of `vocab` logits: log_softmax, softmax, sums, top-k, argmax, the draw."""
    import torch

    def logits(m, generator):
        return (torch.randn(m, vocab, generator=generator) * 4,)

    def tied(m, generator):
        return (torch.randn(m, vocab, generator=generator).mul(4).round(),)

    def draw(x):
        return (torch.ops._C.fused_gumbel_argmax(x, x[:, 0].mul(1000).abs().to(torch.int64)),)

    for name, make, run in (
        ("log_softmax", logits, lambda x: (x.log_softmax(dim=-1, dtype=torch.float32),)),
        ("softmax", logits, lambda x: (x.softmax(dim=-1, dtype=torch.float32),)),
        ("sums of top-p", logits, lambda x: (x.softmax(dim=-1).cumsum(dim=-1),)),
        ("top 20 with ties", tied, lambda x: tuple(torch.topk(x, min(20, vocab), dim=-1))),
        ("argmax with ties", tied, lambda x: (torch.ops._C.greedy_argmax(x),)),
        ("seeded draw", logits, draw),
    ):
        register(RowCheck("cpu.sampling", f"{name} vocab={vocab}", FEW, make, run))
