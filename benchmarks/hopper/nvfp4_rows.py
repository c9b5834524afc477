"""Says which kernel stock vLLM takes for NVFP4 weights whose checkpoint asks for activations in NVFP4, on one GPU.

    PYTHONPATH=. [VLLM_BATCH_INVARIANT=1] python3 benchmarks/hopper/nvfp4_rows.py OUT.json

For each kernel in vLLM's order: whether it runs on this GPU. For the kernel that vLLM takes, with and without scales of
activations: how far its product is from the fp64 product of activations in bf16, and of those rounded to NVFP4.
"""

import json
import os
import sys
from pathlib import Path

import bi_patch_entry

bi_patch_entry.without_arming()

import torch  # noqa: E402

N, K, M, GROUP = 512, 1024, 64, 16
MOST = 6 * 448  # the greatest e2m1 times the greatest e4m3
WHOLE, OF_ROWS = 2.0**-12, 8 / MOST  # the scale of all weights, and of all activations


def layer(rounds: bool) -> torch.nn.Module:
    """A layer as vLLM's loader leaves it for a kernel. rounds: with scales of activations."""
    generator = torch.Generator().manual_seed(1)
    made = torch.nn.Module()
    made.input_size_per_partition, made.output_size_per_partition, made.input_size = K, N, K
    made.output_partition_sizes, made.logical_widths = [N], [N]
    made.params_dtype, made.has_bias, made.orig_dtype = torch.bfloat16, False, torch.bfloat16
    codes = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
    scale = torch.rand((N, K // GROUP), generator=generator, dtype=torch.float32) * 32 + 16
    held = {
        "weight": codes,
        "weight_scale": scale.to(torch.float8_e4m3fn),
        "weight_global_scale": WHOLE,
    }
    if rounds:
        held |= {"input_global_scale": OF_ROWS, "input_global_scale_inv": 1 / OF_ROWS, "alpha": OF_ROWS * WHOLE}
    for name, value in held.items():
        value = torch.tensor(value, dtype=torch.float32) if isinstance(value, float) else value
        made.register_parameter(name, torch.nn.Parameter(value.cuda(), requires_grad=False))
    return made


def measure(rounds: bool) -> dict[str, object]:
    """The kernel that vLLM takes, and the distance of its product from two others, divided by the product's norm."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils as emulation

    x = torch.randn((M, K), generator=torch.Generator().manual_seed(2), dtype=torch.float32).bfloat16()
    of_rows = torch.tensor(1 / OF_ROWS, dtype=torch.float32)
    floats, scale = emulation.ref_nvfp4_quant(x.float(), of_rows, GROUP)
    rounded = (floats.view(M, K // GROUP, GROUP) * (scale / of_rows).unsqueeze(-1)).view(M, K)
    plain = layer(False)
    held = tuple(value.data.cpu() for value in (plain.weight, plain.weight_scale, plain.weight_global_scale))
    weight = emulation.dequantize_to_dtype(*held, torch.float32, GROUP, swizzle=False).double()
    try:
        kernel = linear.init_nvfp4_linear_kernel(use_a16=not rounds)
    except ValueError as error:
        return {"refused": str(error)}
    made = layer(rounds)
    kernel.process_weights_after_loading(made)
    got = kernel.apply_weights(made, x.cuda()).double().cpu()
    far = {
        name: float((got - rows.double() @ weight.T).norm() / got.norm())
        for name, rows in (("activations in bf16", x), ("activations rounded to NVFP4", rounded))
    }
    return {"kernel": type(kernel).__name__, "distance": far}


def main() -> None:
    from vllm.model_executor.kernels import linear

    torch.set_default_dtype(torch.bfloat16)
    kinds = linear._POSSIBLE_NVFP4_KERNELS[linear.PlatformEnum.CUDA]
    order = linear._resolve_backend_kernels(list(kinds), "NVFP4", quantization="nvfp4_w4a4")
    found = {
        "device": torch.cuda.get_device_name(),
        "VLLM_BATCH_INVARIANT": os.environ.get("VLLM_BATCH_INVARIANT", "0"),
        "kernels": [{"kernel": kind.__name__, "reason against it": kind.is_supported()[1]} for kind in order],
        "scales of activations": measure(True),
        "weights alone": measure(False),
    }
    Path(sys.argv[1]).write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({name: found[name] for name in ("scales of activations", "weights alone")}))


if __name__ == "__main__":
    main()
