"""Seams of unquantized linear layers and the language-model head."""

import functools

from bi_patch.seams import active
from bi_patch.seams.model import CPU, CPU_RELEASES, CUDA, Seam, Setting, Target


def _cpu_dispatch(original):
    """dispatch_cpu_unquantized_gemm: gives a layer its GEMM; ours gives it a certified route."""

    @functools.wraps(original)
    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        from bi_patch.orders import cpu_linear

        weight = layer.weight
        if weight.is_meta or weight.ndim != 2:
            return original(layer, remove_weight)
        bias = getattr(layer, "bias", None)
        bias_kept = None if bias is None else bias.detach().clone()
        held = weight.detach()
        original(layer, remove_weight)
        # Upstream's choice is the vendor candidate; it may have widened the layer's bias to fp32 for it.
        layer.cpu_linear = cpu_linear.route(held, bias_kept, layer.cpu_linear, layer, active.cache)

    return dispatch_cpu_unquantized_gemm


def _cuda_linear(original):
    """linear_batch_invariant: the certified route instead of one fixed Triton tile; one op to torch.compile."""
    from bi_patch.orders import cuda_linear

    cuda_linear.define_op()

    def linear_batch_invariant(input, weight, bias=None):
        import torch

        return torch.ops.bi_patch.linear(input, weight, bias)

    return linear_batch_invariant


def _cuda_mode(original):
    """init_batch_invariance: upstream's mode, then what it leaves: split-K, and PyTorch's own products and sums."""

    @functools.wraps(original)
    def init_batch_invariance(*args, **kwargs):
        from bi_patch.orders import cublaslt, cuda, cuda_aten

        result = original(*args, **kwargs)
        cuda.forbid_split_k()
        cuda_aten.override()
        cublaslt.load()  # before vLLM looks how much memory is free, or the handle would be taken from the KV cache
        return result

    return init_batch_invariance


def _cuda_load(original):
    """Worker.load_model: certify every linear of the loaded model before anything is compiled or captured."""

    @functools.wraps(original)
    def load_model(self, *args, **kwargs):
        from bi_patch.orders import cuda_linear

        result = original(self, *args, **kwargs)
        rows = self.vllm_config.scheduler_config.max_num_batched_tokens
        cuda_linear.certify(_cuda_problems(self.get_model()), rows, active.cache)
        return result

    return load_model


def _cuda_problems(model):
    """Every unquantized linear of a model, the language-model head included, as a Problem."""
    from bi_patch.orders.cuda_linear import Problem

    for module in model.modules():
        weight = getattr(module, "weight", None)
        method = type(getattr(module, "quant_method", None)).__name__
        if method not in _CUDA_METHODS or weight is None or weight.ndim != 2 or not weight.is_cuda:
            continue
        bias = getattr(module, "bias", None) is not None and not getattr(module, "skip_bias_add", False)
        yield Problem(*weight.shape, weight.dtype, bias)
        if bias and getattr(module, "tp_size", 1) > 1:  # only the first rank adds the bias of a sum over ranks
            yield Problem(*weight.shape, weight.dtype, False)


_CUDA_METHODS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
_LINEAR_COPIES = ("vllm.model_executor.layers.linear", "vllm.model_executor.layers.vocab_parallel_embedding")


def _mode_targets(qualname: str, copies: tuple[str, ...] = ()) -> tuple[Target, ...]:
    """A function of upstream's mode, whose module moved in 0.32."""
    return (
        Target("vllm.model_executor.layers.batch_invariant", qualname, "<0.32", copies),
        Target("vllm.model_executor.determinism.batch_invariant", qualname, ">=0.32,<0.34", copies),
    )


SEAMS = (
    Seam(
        name="linear.cuda_route",
        targets=_mode_targets("linear_batch_invariant", _LINEAR_COPIES),
        close=_cuda_linear,
        why="upstream's fixed Triton tile keeps the order but costs 7 to 200 % of a decode step",
        how="cuBLASLt without split-K where certified, else the bundled Triton GEMM, as one opaque op",
        until="upstream's mode routes linears to certified vendor kernels",
        platforms=CUDA,
        causes=(1, 17, 23),
    ),
    Seam(
        name="linear.cuda_mode",
        targets=_mode_targets("init_batch_invariance"),
        close=_cuda_mode,
        why="a library may split K, or a sum, by the number of rows wherever it does not pass through a closed layer",
        how="every form of PyTorch's own products, sums and means has one order; split-K is forbidden by PyTorch's "
        "switch and by cuBLASLt's workspace; fp32 stays fp32",
        until="never: it is the order",
        platforms=CUDA,
        causes=(1, 23),
    ),
    Seam(
        name="linear.cuda_certify",
        targets=(Target("vllm.v1.worker.gpu_worker", "Worker.load_model"),),
        close=_cuda_load,
        why="kernels that slice K inside one launch are masked by no switch",
        how="every algorithm that may serve some M is compared with the bundled GEMM, bitwise",
        until="never: it is the certificate",
        platforms=CUDA,
        causes=(1, 19),
    ),
    Seam(
        name="linear.cpu_dispatch",
        targets=(Target("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", CPU_RELEASES),),
        close=_cpu_dispatch,
        why="the CPU GEMM is chosen by weight size and splits or blocks K by the number of rows",
        how="every linear, lm_head included, gets the fastest route that is certified against the bundled GEMM",
        until="upstream's CPU GEMMs keep one order for every number of rows",
        platforms=CPU,
        causes=(1, 17),
    ),
)

SETTINGS = (
    Setting(
        name="linear.cuda_lt_workspace",
        variable="CUBLASLT_WORKSPACE_SIZE",
        value="1",
        why="cuBLASLt splits K where its workspace can hold partial sums; PyTorch reads the size at its first product",
        platforms=CUDA,
    ),
    Setting(
        name="linear.cuda_workspace",
        variable="CUBLAS_WORKSPACE_CONFIG",
        value=":16:8",
        why="cuBLAS splits K where its workspace can hold partial sums; PyTorch reads the size at its first product",
        platforms=CUDA,
    ),
)
