"""Seams of unquantized linear layers and the language-model head."""

import functools
import os

from bi_patch.seams import active, library
from bi_patch.seams.model import Seam, Target, Variable


def _linear(original):
    """linear_batch_invariant: call the certified route instead of one fixed Triton tile. torch.compile sees one op."""
    from bi_patch.ops.cuda import linear

    linear.define_op()

    def linear_batch_invariant(input, weight, bias=None):
        import torch

        return torch.ops.bi_patch.linear(input, weight, bias)

    return linear_batch_invariant


def _mode(original):
    """init_batch_invariance: run upstream's mode, then forbid split-K and fix PyTorch's own products and sums."""

    @functools.wraps(original)
    def init_batch_invariance(*args, **kwargs):
        from bi_patch.ops import vector_math
        from bi_patch.ops.cuda import aten, cublaslt, machine

        vector_math.settle()  # some tables are computed on the host
        result = original(*args, **kwargs)
        machine.forbid_split_k()
        aten.override()
        cublaslt.load()  # before vLLM measures free memory: a later handle would take memory from the KV cache
        return result

    return init_batch_invariance


def _load(original):
    """Worker.load_model: make all certificates of the loaded model, before vLLM compiles or captures anything. The
    kernels of sampling are compiled while the model loads."""

    @functools.wraps(original)
    def load_model(self, *args, **kwargs):
        from vllm.config import set_current_vllm_config

        from bi_patch.ops.cuda import certify, lora
        from bi_patch.seams import leaves, ranks, weights
        from bi_patch.seams import pooling as poolers
        from bi_patch.seams import vision as images
        from bi_patch.seams.cuda import (
            activation,
            attention,
            chunks,
            eighths,
            moe,
            norm,
            packed_linear,
            pooling,
            quantized,
            rows,
            vision,
        )
        from bi_patch.seams.cuda import leaves as parts
        from bi_patch.seams.cuda import packed_products as products
        from bi_patch.seams.cuda import scaled_linear as scaled

        config = self.vllm_config
        if getattr(config, "lora_config", None) is not None:
            lora.register()  # compiled code cannot define an operator
        # A pooling model samples nothing.
        vocab = 0 if poolers.is_pooling(config) else config.model_config.get_vocab_size()
        # With tensor descriptors, Triton makes another kernel from the same source.
        version = f"{library.vllm()} descriptors={os.environ.get('VLLM_TRITON_USE_TD', '')}"
        with set_current_vllm_config(config):
            ahead = certify.begin(lambda: rows.of_sampling(vocab) if vocab else (), version, active.cache)
        result = original(self, *args, **kwargs)
        model = self.get_model()
        vision.prepare(model, config)
        norm.replace_layer_norms(model)
        pooling.prepare(model, config)
        hooks = (_before_update(config), _settle)
        if poolers.is_pooling(config):
            hooks = (poolers.no_update, poolers.no_update)
        elif images.takes_images(config):
            hooks = (images.no_update, images.no_update)
        if active.leaves:
            parts.prepare(model)
            hooks = (leaves.no_update, leaves.no_update)
        weights.watch_model(model, *hooks, lambda model: weights.refuse_with_lora(config))
        quantized.check(model)
        eighths.reserve(config)
        with set_current_vllm_config(config):  # attention asks for the layout of the KV cache

            def make():
                made = certify.certify(
                    [
                        *(*_problems(model, config), *scaled.problems(model)),
                        *(*packed_linear.problems(model), *products.problems(model)),
                    ],
                    moe.experts(model),
                    attention.decoders(config),
                    chunks.layers(config),
                    [*parts.checks(model), *rows.checks(model, config.model_config.dtype, vocab)],
                    max_rows=config.scheduler_config.max_num_batched_tokens,
                    library=version,
                    cache=active.cache,
                    ahead=ahead,
                    others=ranks.others(config),
                    activations=activation.forms(model, config),
                )
                eighths.require(config)
                return made

            ranks.alike("linear.cuda_certify", config, make)
            vision.certify(model, config)
        return result

    return load_model


def _before_update(config):
    """A function that refuses new weights of a quantized model, and of an engine with LoRA."""
    from bi_patch.seams import weights
    from bi_patch.seams.cuda import quantized

    def before(model):
        weights.refuse_with_lora(config)
        quantized.refuse_update(model)

    return before


def _settle(model) -> None:
    """Make anew what the layers of a model with new weights derive from its weights, or refuse the weights."""
    from bi_patch.seams import scales
    from bi_patch.seams.cuda import quantized, scaled_linear

    quantized.refuse_update(model)
    scales.check_caches(model)
    scaled_linear.keep_products(model)


def _problems(model, config):
    """A Problem for every unquantized linear layer of a model, for its language-model head, and for each product of an
    encoder of images."""
    from bi_patch.ops.cuda.linear import Problem
    from bi_patch.seams.cuda import vision

    for module in model.modules():
        weight = getattr(module, "weight", None)
        method = type(getattr(module, "quant_method", None)).__name__
        if method not in _METHODS or weight is None or weight.ndim != 2 or not weight.is_cuda:
            continue
        bias = getattr(module, "bias", None) is not None and not getattr(module, "skip_bias_add", False)
        yield Problem(*weight.shape, weight.dtype, bias)
        if bias and getattr(module, "tp_size", 1) > 1:  # in a sum over ranks, only the first rank adds the bias
            yield Problem(*weight.shape, weight.dtype, False)
    for weight, bias in vision.linears(model, config):
        yield Problem(*weight.shape, weight.dtype, bias)


_METHODS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


_LINEAR_COPIES = ("vllm.model_executor.layers.linear", "vllm.model_executor.layers.vocab_parallel_embedding")


def _mode_targets(qualname: str, copies: tuple[str, ...] = ()) -> tuple[Target, ...]:
    """The targets of a function of upstream's mode: its module moved in vLLM 0.32."""
    return (
        Target("vllm.model_executor.layers.batch_invariant", qualname, "<0.32", copies),
        Target("vllm.model_executor.determinism.batch_invariant", qualname, ">=0.32", copies),
    )


SEAMS = (
    Seam(
        name="linear.cuda_route",
        targets=_mode_targets("linear_batch_invariant", _LINEAR_COPIES),
        close=_linear,
        why="upstream's fixed Triton tile keeps the order, but makes a decode step 7 to 200 % slower",
        how="a linear layer runs on cuBLASLt without split-K if its certificate allows that, else on the bundled "
        "Triton GEMM",
        until="upstream's mode runs linear layers on fast vendor kernels "
        "(https://github.com/vllm-project/vllm/issues/27433)",
        causes=(1, 17, 23),
        serves=("LinearBase", "ParallelLMHead", "LogitsProcessor"),
        op="bi_patch.ops.cuda.linear",
    ),
    Seam(
        name="linear.cuda_mode",
        targets=_mode_targets("init_batch_invariance"),
        close=_mode,
        why="products and sums outside of vLLM's layers reach libraries that may split K or a sum by the number of "
        "rows",
        how="PyTorch's own products, sums and means run in one order. PyTorch's switch and cuBLASLt's workspace forbid "
        "split-K. fp32 products stay fp32",
        until="never: this patch point fixes the reduction order",
        causes=(1, 23),
    ),
    Seam(
        name="linear.cuda_certify",
        targets=(Target("vllm.v1.worker.gpu_worker", "Worker.load_model"),),
        close=_load,
        why="no switch forbids kernels that slice K inside one launch, and the batch decides the tiles of experts and "
        "of attention",
        how="after the model is loaded, bi_patch compares its linear layers, experts' tiles, gated activations and "
        "decode attention bitwise with kernels that keep the order. A kernel that differs does not serve. Attention, "
        "norms, routers and sampling are compared with themselves, in chunks and among other rows. If they differ, the "
        "engine stops",
        until="never: this patch point makes the certificates",
        causes=(1, 10, 13, 19),
    ),
)

VARIABLES = (
    Variable(
        name="linear.cuda_lt_workspace",
        variable="CUBLASLT_WORKSPACE_SIZE",
        value="1",
        why="cuBLASLt splits K if its workspace can hold partial sums, and PyTorch reads the size at its first product",
    ),
    Variable(
        name="linear.cuda_workspace",
        variable="CUBLAS_WORKSPACE_CONFIG",
        value=":16:8",
        why="cuBLAS splits K if its workspace can hold partial sums, and PyTorch reads the size at its first product",
    ),
)
