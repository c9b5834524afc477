"""Pooling on a Hopper GPU: the kernels alone, and the cost of an engine that pools.

    PYTHONPATH=. python3 benchmarks/hopper/pooling.py kernels OUT.json
    PYTHONPATH=. python3 benchmarks/hopper/pooling.py cost MODEL stock|upstream|armed OUT.json [--eager]

`kernels` compares rows alone with rows in company, for the bundled pooling kernels and two attention kernels that use
no cache, and times them. `cost` starts one engine and embeds sets of prompts. MODEL is a name of
bi_patch/tools/models/pooling.py; the weights are random.
"""

import argparse
import fcntl
import json
import os
import random
import statistics
import sys
import time

SETS = {"1 x 64": (1, 64, 20), "1 x 448": (1, 448, 20), "64 x 64": (64, 64, 5), "256 x 256": (256, 256, 3)}


def kernels(out: str) -> None:
    import torch

    import bi_patch_entry

    bi_patch_entry.without_arming()
    from bi_patch.kernels.triton import pooling

    rows: list[dict] = []

    def keep(**row) -> None:
        rows.append(row)
        print(row, flush=True)
        with open(out, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)

    def timed(call, repeats: int = 30) -> float:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return round((time.perf_counter() - start) / repeats * 1e6, 1)

    def differing(a, b) -> int:
        return int(
            (
                a.view(torch.int16 if a.element_size() == 2 else torch.int32)
                != b.view(torch.int16 if b.element_size() == 2 else torch.int32)
            ).sum()
        )

    g = torch.Generator("cuda").manual_seed(1)
    for cols in (1, 255, 768, 1024, 4096):
        x = torch.randn(300, cols, generator=g, device="cuda")
        whole = pooling.l2_normalize(x, 1e-12)
        bad = sum(
            differing(pooling.l2_normalize(x[i : i + n], 1e-12), whole[i : i + n])
            for n in (1, 2, 7, 64, 255)
            for i in (0, 3, 300 - n)
        )
        stock = torch.nn.functional.normalize(x, dim=-1)
        bad_stock = sum(
            differing(torch.nn.functional.normalize(x[i : i + n], dim=-1), stock[i : i + n])
            for n in (1, 2, 7, 64, 255)
            for i in (0, 3, 300 - n)
        )
        keep(
            what="l2_normalize",
            cols=cols,
            differing=bad,
            differing_stock=bad_stock,
            error=float((whole.double() - torch.nn.functional.normalize(x.double(), dim=-1)).abs().max()),
            us=timed(lambda x=x: pooling.l2_normalize(x, 1e-12)),
            us_stock=timed(lambda x=x: torch.nn.functional.normalize(x, dim=-1)),
        )
    lengths = [1, 3, 40, 257, 512, 31, 64]
    for cols in (768, 1024):
        x = torch.randn(sum(lengths), cols, generator=g, device="cuda").bfloat16()
        starts = torch.tensor([0, *lengths], device="cuda").cumsum(0)
        whole = pooling.mean_rows(x, starts)
        alone = [
            pooling.mean_rows(x[a:b], torch.tensor([0, b - a], device="cuda"))[0]
            for a, b in zip(starts.tolist(), starts.tolist()[1:])
        ]
        many = torch.randn(256 * 256, cols, generator=g, device="cuda").bfloat16()
        ends = torch.arange(0, 256 * 257, 256, device="cuda")
        ids = torch.arange(256, device="cuda").repeat_interleave(256)

        def stock(many=many, ids=ids, cols=cols):
            held = torch.zeros(256, cols, device="cuda")
            chunk = max(1, (16 << 20) // (4 * cols))
            for s in range(0, len(many), chunk):
                held.index_add_(0, ids[s : s + chunk], many[s : s + chunk].float())
            return held / 256

        keep(
            what="mean_rows",
            cols=cols,
            differing=differing(torch.stack(alone), whole),
            differing_stock=differing(stock(), stock()),
            us=timed(lambda m=many, e=ends: pooling.mean_rows(m, e)),
            us_stock=timed(stock),
        )
    _attention(keep, timed, differing)


def _attention(keep, timed, differing) -> None:
    import torch
    from vllm.v1.attention.backends.flash_attn import flash_attn_varlen_func
    from vllm.v1.attention.ops.triton_prefill_attention import context_attention_fwd

    g = torch.Generator("cuda").manual_seed(2)

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    def triton(q, k, v, lens, window=0):
        out = torch.empty_like(q)
        start = ints([0, *torch.tensor(lens).cumsum(0).tolist()])
        context_attention_fwd(
            q=q,
            k=k,
            v=v,
            o=out,
            b_start_loc=start,
            b_seq_len=ints(lens),
            max_input_len=max(lens),
            is_causal=False,
            softmax_scale=q.shape[-1] ** -0.5,
            sliding_window_q=window,
            sliding_window_k=window,
        )
        return out

    def flash(q, k, v, lens, window=-1):
        start = ints([0, *torch.tensor(lens).cumsum(0).tolist()])
        return flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=start,
            cu_seqlens_k=start,
            max_seqlen_q=max(lens),
            max_seqlen_k=max(lens),
            softmax_scale=q.shape[-1] ** -0.5,
            causal=False,
            window_size=[window, window],
            fa_version=3,
            num_splits=1,
        )

    for heads, size, window in ((16, 64, 0), (12, 64, 64), (16, 128, 0), (8, 96, 0)):
        for name, attend in (("triton", triton), ("flash 3", flash)):
            given = window or (-1 if name == "flash 3" else 0)
            bad = compared = 0
            try:
                for length in (1, 5, 64, 127, 128, 129, 200, 300, 512, 1500):
                    mine = [torch.randn(length, heads, size, generator=g, device="cuda").bfloat16() for _ in range(3)]
                    alone = attend(*mine, [length], given)
                    for before, after in (
                        ([7], []),
                        ([], [900]),
                        ([64, 3], [5] * 40),
                        ([1] * 130, [2000]),
                        ([2000], [512] * 3),
                        ([length] * 20, [length] * 20),
                    ):
                        others = [
                            [
                                torch.randn(n, heads, size, generator=g, device="cuda").bfloat16()
                                for n in (*before, *after)
                            ]
                            for _ in range(3)
                        ]
                        packed = [torch.cat([*o[: len(before)], m, *o[len(before) :]]) for o, m in zip(others, mine)]
                        got = attend(*packed, [*before, length, *after], given)
                        at = sum(before)
                        bad += differing(got[at : at + length].contiguous(), alone)
                        compared += alone.numel()
                times = {}
                for count, length in ((1, 64), (64, 64), (256, 256), (16, 2048)):
                    many = [
                        torch.randn(count * length, heads, size, generator=g, device="cuda").bfloat16()
                        for _ in range(3)
                    ]
                    times[f"{count} x {length}"] = timed(
                        lambda m=many, n=length, c=count, f=attend, w=given: f(*m, [n] * c, w)
                    )
                keep(
                    what=f"attention {name}",
                    heads=heads,
                    size=size,
                    window=window,
                    compared=compared,
                    differing=bad,
                    us=times,
                )
            except Exception as error:
                keep(what=f"attention {name}", heads=heads, size=size, window=window, error=str(error)[-300:])


def cost(a) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["BI_PATCH"] = "1" if a.mode == "armed" else "0"
    os.environ.pop("VLLM_BATCH_INVARIANT", None)
    if a.mode != "stock":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    started = time.perf_counter()
    if a.mode == "armed":
        import bi_patch  # noqa: F401  arms before vllm loads
    else:
        import bi_patch_entry

        bi_patch_entry.without_arming()
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import stamp
    from vllm import LLM, PoolingParams

    from bi_patch.tools.models import pooling
    from bi_patch.tools.verify import weights

    weights.make_random(7)
    shape = pooling.POOLING[a.model]
    llm = LLM(
        model=pooling.write(a.model, "/tmp/models"),
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=min(2048, int(shape["max_position_embeddings"]) - 2),
        enforce_eager=a.eager,
        **{"gpu_memory_utilization": 0.6, **pooling.ARGUMENTS.get(a.model, {}), **json.loads(a.extra)},
    )
    found = {**stamp.head(), "model": a.model, "mode": a.mode, "start_s": round(time.perf_counter() - started, 1)}
    found["pooling"] = []
    names = 0
    for name, (count, length, repeats) in SETS.items():
        times = []
        turn = open(a.lock or os.devnull, "w")
        fcntl.flock(turn, fcntl.LOCK_EX)
        for repeat in range(repeats + 1):
            source = random.Random(repeat * 1000 + count + length)
            llm.reset_prefix_cache()
            for _ in range(count):
                names += 1
                prompt = [source.randrange(100, min(int(shape["vocab_size"]), 30000)) for _ in range(length)]
                llm.llm_engine.add_request(
                    str(names), {"prompt_token_ids": prompt}, PoolingParams(task=llm.pooling_task)
                )
            start = time.perf_counter()
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
            times.append(time.perf_counter() - start)
        turn.close()
        times = times[1:]  # the first warms up
        found["pooling"].append(
            {
                "workload": name,
                "median_ms": round(statistics.median(times) * 1e3, 3),
                "all_ms": [round(t * 1e3, 3) for t in times],
            }
        )
        print(found["pooling"][-1], flush=True)
        with open(a.out, "w") as file:
            json.dump(found, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("kernels").add_argument("out")
    asked = kinds.add_parser("cost")
    asked.add_argument("model")
    asked.add_argument("mode", choices=("stock", "upstream", "armed"))
    asked.add_argument("out")
    asked.add_argument("--eager", action="store_true")
    asked.add_argument("--lock", help="a file: engines that start side by side time one at a time")
    asked.add_argument("--extra", default="{}", help="further arguments of vllm.LLM, as JSON")
    a = parser.parse_args()
    kernels(a.out) if a.kind == "kernels" else cost(a)


if __name__ == "__main__":
    main()
