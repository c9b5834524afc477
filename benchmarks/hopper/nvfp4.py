"""Compares rows of vLLM's kernels for NVFP4 weights among different numbers of rows, and times them, on one Hopper GPU.

    PYTHONPATH=. python3 benchmarks/hopper/nvfp4.py OUT.json [--seconds 60]

Weights are e2m1 in groups of 16, with scales in e4m3 and one in fp32; activations stay in bf16. The kernels: Marlin,
which vLLM takes on Hopper, and Humming's batch-invariant schedules, if the package humming-kernels is there. The sizes
are those of Qwen3-8B. Random data, and data whose sums are zero: there every other order of a sum shows.
"""

import argparse
import json
import os
import time
from pathlib import Path

import bi_patch_entry

bi_patch_entry.without_arming()
os.environ["VLLM_BATCH_INVARIANT"] = "1"  # Humming's kernels read it

import torch  # noqa: E402

SIZES = {"o": (4096, 4096), "qkv": (6144, 4096), "down": (4096, 12288), "gate_up": (24576, 4096)}
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 1025)
TIMED = (1, 8, 64, 256, 2048)
MOST, GROUP = 2048, 16


def weights(n: int, k: int, cancel: bool, generator) -> dict[str, torch.Tensor]:
    """Packed weights [n, k / 2] of two e2m1 each, scales [n, k / 16] e4m3. cancel: each group of K occurs twice."""
    width = k // 2 if cancel else k
    packed = torch.randint(0, 256, (n, width // 2), generator=generator, device="cuda", dtype=torch.uint8)
    scale = torch.rand((n, width // GROUP), generator=generator, device="cuda") * 0.75 + 0.25
    if cancel:
        order = torch.randperm(k // GROUP, generator=generator, device="cuda") % (width // GROUP)
        packed = packed.view(n, -1, GROUP // 2)[:, order].reshape(n, k // 2)
        scale = scale[:, order]
        return {"weight": packed, "weight_scale": scale.to(torch.float8_e4m3fn), "order": order}
    return {"weight": packed, "weight_scale": scale.to(torch.float8_e4m3fn)}


def activations(k: int, order, generator) -> torch.Tensor:
    """Rows [MOST, k] in bf16. order: of the groups whose products cancel, or None."""
    x = torch.randn((MOST, k), generator=generator, device="cuda").to(torch.bfloat16)
    if order is None:
        return x
    groups, half = x.view(MOST, -1, GROUP), order.numel() // 2
    where = torch.argsort(order, stable=True).view(half, 2)
    groups[:, where[:, 1]] = -groups[:, where[:, 0]]
    return groups.reshape(MOST, k)


def layer(n: int, k: int, held) -> torch.nn.Module:
    """A layer as vLLM's loader leaves it for the kernels."""
    made = torch.nn.Module()
    made.input_size_per_partition, made.output_size_per_partition = k, n
    made.output_partition_sizes, made.logical_widths = [n], [n]
    made.params_dtype, made.has_bias, made.orig_dtype = torch.bfloat16, False, torch.bfloat16
    held = {name: held[name].clone() for name in ("weight", "weight_scale")}
    held["weight_global_scale"] = torch.tensor(1 / 64.0, device="cuda")
    for name, value in held.items():
        made.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return made


def marlin(n: int, k: int, held):
    from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearLayerConfig
    from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel

    kernel, made = MarlinNvFp4LinearKernel(NvFp4LinearLayerConfig()), layer(n, k, held)
    kernel.process_weights_after_loading(made)
    return lambda x: kernel.apply_weights(made, x)


def humming(n: int, k: int, held):
    from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearLayerConfig
    from vllm.model_executor.kernels.linear.nvfp4.humming import HummingNvFp4LinearKernel

    kernel, made = HummingNvFp4LinearKernel(NvFp4LinearLayerConfig()), layer(n, k, held)
    made.weight_global_scale.data = made.weight_global_scale.data.reshape(1)
    kernel.process_weights_after_loading(made)
    return lambda x: kernel.apply_weights(made, x)


def differing(run, x) -> dict[str, int]:
    """By the number of rows, the elements that differ from those of MOST rows; only numbers of rows that have any."""
    want, found = run(x), {}
    for m in ROWS:
        for at in (0, MOST - m):
            count = int((run(x[at : at + m].clone()) != want[at : at + m]).sum())
            if count:
                found[str(m)] = found.get(str(m), 0) + count
    return found


def microseconds(run, x) -> dict[str, float]:
    found = {}
    for m in TIMED:
        rows, times = x[:m].clone(), []
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(8):
                run(rows)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 8 * 1e3)
        found[str(m)] = round(sorted(times)[len(times) // 2], 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    a = parser.parse_args()
    begin, found = time.monotonic(), {"device": torch.cuda.get_device_name(), "rows": list(ROWS), "kernels": []}
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        for size, (n, k) in SIZES.items():
            for kernel in (marlin, humming):
                row = {"kernel": kernel.__name__, "size": size, "n": n, "k": k}
                try:
                    for cancel in (True, False):
                        generator = torch.Generator("cuda").manual_seed(n + k)
                        held = weights(n, k, cancel, generator)
                        x = activations(k, held.pop("order", None), generator)
                        run = kernel(n, k, held)
                        row["sums of zero" if cancel else "random"] = differing(run, x)
                    row["microseconds"] = microseconds(run, x)
                except Exception as error:  # a kernel that is missing must not cost the others
                    row["error"] = f"{type(error).__name__}: {error}"[:600]
                found["kernels"].append(row)
                a.out.write_text(json.dumps(found, indent=1))
                print(f"{time.monotonic() - begin:.0f} s {row}", flush=True)
            if time.monotonic() - begin > a.seconds:
                break


if __name__ == "__main__":
    main()
