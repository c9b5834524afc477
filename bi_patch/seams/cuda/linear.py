"""Seams of unquantized linear layers and the language-model head."""

import functools
import os

from bi_patch.seams import active, library
from bi_patch.seams.model import Seam, Target, Variable


def _linear(original):
    """linear_batch_invariant: the certified route instead of one fixed Triton tile; one op to torch.compile."""
    from bi_patch.ops.cuda import linear

    linear.define_op()

    def linear_batch_invariant(input, weight, bias=None):
        import torch

        return torch.ops.bi_patch.linear(input, weight, bias)

    return linear_batch_invariant


def _mode(original):
    """init_batch_invariance: upstream's mode, then what it leaves: split-K, and PyTorch's own products and sums."""

    @functools.wraps(original)
    def init_batch_invariance(*args, **kwargs):
        from bi_patch.ops.cuda import aten, cublaslt, machine

        result = original(*args, **kwargs)
        machine.forbid_split_k()
        aten.override()
        cublaslt.load()  # before vLLM looks how much memory is free, or the handle would be taken from the KV cache
        return result

    return init_batch_invariance


def _load(original):
    """Worker.load_model: make all certificates of the loaded model before anything is compiled or captured."""

    @functools.wraps(original)
    def load_model(self, *args, **kwargs):
        from bi_patch.ops.cuda import certify
        from bi_patch.seams.cuda import attention, moe

        result = original(self, *args, **kwargs)
        model, config = self.get_model(), self.vllm_config
        certify.certify(
            _problems(model),
            moe.experts(model),
            attention.decoders(config),
            max_rows=config.scheduler_config.max_num_batched_tokens,
            # Tensor descriptors make another kernel of the same source.
            library=f"{library.vllm()} descriptors={os.environ.get('VLLM_TRITON_USE_TD', '')}",
            cache=active.cache,
        )
        return result

    return load_model


def _problems(model):
    """Every unquantized linear of a model, the language-model head included, as a Problem."""
    from bi_patch.ops.cuda.linear import Problem

    for module in model.modules():
        weight = getattr(module, "weight", None)
        method = type(getattr(module, "quant_method", None)).__name__
        if method not in _METHODS or weight is None or weight.ndim != 2 or not weight.is_cuda:
            continue
        bias = getattr(module, "bias", None) is not None and not getattr(module, "skip_bias_add", False)
        yield Problem(*weight.shape, weight.dtype, bias)
        if bias and getattr(module, "tp_size", 1) > 1:  # only the first rank adds the bias of a sum over ranks
            yield Problem(*weight.shape, weight.dtype, False)


_METHODS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


_LINEAR_COPIES = ("vllm.model_executor.layers.linear", "vllm.model_executor.layers.vocab_parallel_embedding")


def _mode_targets(qualname: str, copies: tuple[str, ...] = ()) -> tuple[Target, ...]:
    """A function of upstream's mode, whose module moved in 0.32."""
    return (
        Target("vllm.model_executor.layers.batch_invariant", qualname, "<0.32", copies),
        Target("vllm.model_executor.determinism.batch_invariant", qualname, ">=0.32", copies),
    )


SEAMS = (
    Seam(
        name="linear.cuda_route",
        targets=_mode_targets("linear_batch_invariant", _LINEAR_COPIES),
        close=_linear,
        why="upstream's fixed Triton tile keeps the order but costs 7 to 200 % of a decode step",
        how="cuBLASLt without split-K where certified, else the bundled Triton GEMM, as one opaque op",
        until="upstream's mode routes linears to certified vendor kernels",
        causes=(1, 17, 23),
        serves=("LinearBase", "ParallelLMHead", "LogitsProcessor"),
        op="bi_patch.ops.cuda.linear",
    ),
    Seam(
        name="linear.cuda_mode",
        targets=_mode_targets("init_batch_invariance"),
        close=_mode,
        why="a library may split K, or a sum, by the number of rows wherever it does not pass through a closed layer",
        how="every form of PyTorch's own products, sums and means has one order; split-K is forbidden by PyTorch's "
        "switch and by cuBLASLt's workspace; fp32 stays fp32",
        until="never: it is the order",
        causes=(1, 23),
    ),
    Seam(
        name="linear.cuda_certify",
        targets=(Target("vllm.v1.worker.gpu_worker", "Worker.load_model"),),
        close=_load,
        why="no switch forbids kernels that slice K inside one launch; vLLM's tiles of experts and FlashAttention's of "
        "queries follow the batch",
        how="when the model is loaded, its linears, experts' tiles and decode attention are compared, bitwise, with "
        "kernels that keep the order; what differs does not serve",
        until="never: it is the certificate",
        causes=(1, 10, 13, 19),
    ),
)

VARIABLES = (
    Variable(
        name="linear.cuda_lt_workspace",
        variable="CUBLASLT_WORKSPACE_SIZE",
        value="1",
        why="cuBLASLt splits K where its workspace can hold partial sums; PyTorch reads the size at its first product",
    ),
    Variable(
        name="linear.cuda_workspace",
        variable="CUBLAS_WORKSPACE_CONFIG",
        value=":16:8",
        why="cuBLAS splits K where its workspace can hold partial sums; PyTorch reads the size at its first product",
    ),
)
