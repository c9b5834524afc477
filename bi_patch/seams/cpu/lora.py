"""LoRA on CPU: each row's adapter is added by the bundled kernel, and rows without an adapter are left alone."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import adapters
from bi_patch.seams.model import Seam, Target

_CLASS = "PunicaWrapperCPU"


def _unscaled(scale: float) -> None:
    if scale != 1.0:
        raise UnsupportedFeature(
            f"lora.cpu: vLLM asks for an adapter's product with the scale {scale}, which has no order. Set BI_PATCH=0"
        )


def _linear(original):
    """PunicaWrapperCPU.add_lora_linear: add each slice's adapters by the bundled kernel."""

    @functools.wraps(original)
    def add_lora_linear(
        self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, add_inputs=True, **kwargs
    ):
        from bi_patch.ops.cpu import lora

        _unscaled(scale)
        if not add_inputs or buffer is not None:
            raise UnsupportedFeature("lora.cpu: adapters beside a stream of their own have no order. Set BI_PATCH=0")
        slots = self.token_lora_indices
        if bool((slots < 0).all()):
            return
        at = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            lora.add(y[:, at : at + size], x, a, b, slots)
            at += size

    return add_lora_linear


def _embedding(original):
    """VocabParallelEmbeddingWithLoRA.forward: add each token's adapter by the bundled kernel."""

    @functools.wraps(original)
    def forward(self, x):
        from bi_patch.ops.cpu import lora

        y = self.base_layer.forward(x)
        slots = self.punica_wrapper.token_lora_indices
        if not bool((slots < 0).all()):
            if x.numel() != slots.numel():
                raise UnsupportedFeature(
                    f"lora.cpu: {x.numel()} tokens are embedded in a step of {slots.numel()}, so nobody knows which "
                    "adapter a token has (images beside adapters of embeddings). Set BI_PATCH=0"
                )
            lora.embed(y.view(-1, y.shape[-1]), x.reshape(-1), self.lora_a_stacked, self.lora_b_stacked, slots)
        return y

    return forward


def _logits(original):
    """PunicaWrapperCPU.add_lora_logits: add each row's adapter by the bundled kernel.

    vLLM's own function takes the adapters of the requests in the batch's order, also for the rows of one prompt whose
    logprobs a request asks for.
    """

    @functools.wraps(original)
    def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs):
        from bi_patch.ops.cpu import lora

        _unscaled(scale)
        if y.dtype != lora_b_stacked.dtype:
            return  # no adapter has a part for such a head: `_set_head`
        lora.add(y, x, lora_a_stacked, lora_b_stacked, adapters.slots(self, x, "cpu"))

    return add_lora_logits


def _set_head(original):
    """LogitsProcessorWithLoRA.set_lora: a head of another type than the model's takes no adapter."""

    @functools.wraps(original)
    def set_lora(self, index, lora_a, lora_b):
        if bool(lora_b.any()):
            adapters.refuse_head(self, self.lora_b_stacked.dtype, "cpu")
        return original(self, index, lora_a, lora_b)

    return set_lora


def _refused(what: str):
    def close(original):
        @functools.wraps(original)
        def refuse(*args, **kwargs):
            raise UnsupportedFeature(f"lora.cpu: bi_patch does not cover {what} on CPU. Set BI_PATCH=0")

        return refuse

    return close


_WHY = (
    "vLLM gathers a copy of each row's adapter and multiplies the whole batch at once. In a batch with an adapter, a "
)
_WHY += "row without an adapter gets the adapter of the last slot"
_HOW = "each row's adapter is added in the order of the bundled GEMM. Other rows are not touched"
_UNTIL = "upstream's LoRA on CPU has one order for every batch, and leaves rows without an adapter alone"


def _seam(name: str, method: str, close, how: str = _HOW, **given) -> Seam:
    return Seam(
        name=f"lora.{name}",
        targets=(Target("vllm.lora.punica_wrapper.punica_cpu", f"{_CLASS}.{method}"),),
        close=close,
        why=_WHY,
        how=how,
        until=_UNTIL,
        causes=(10, 34),
        on_import=True,
        **given,
    )


SEAMS = (
    _seam("cpu_linear", "add_lora_linear", _linear, serves=("BaseLinearLayerWithLoRA",), op="bi_patch.ops.cpu.lora"),
    Seam(
        name="lora.cpu_embedding",
        targets=(Target("vllm.lora.layers.vocab_parallel_embedding", "VocabParallelEmbeddingWithLoRA.forward"),),
        close=_embedding,
        why=_WHY,
        how=_HOW,
        until=_UNTIL,
        causes=(10, 34),
        serves=("VocabParallelEmbeddingWithLoRA",),
        on_import=True,
    ),
    _seam("cpu_embedding_add", "add_lora_embedding", _refused("other embeddings"), how="they are refused by name"),
    _seam("cpu_logits", "add_lora_logits", _logits, serves=("LogitsProcessorWithLoRA",)),
    Seam(
        name="lora.cpu_head_set",
        targets=(Target("vllm.lora.layers.logits_processor", "LogitsProcessorWithLoRA.set_lora"),),
        close=_set_head,
        why="the head may compute in another type than its adapters (head_dtype), and such products have no order",
        how="such an adapter is refused by name",
        until=_UNTIL,
        causes=(10, 34),
        on_import=True,
    ),
    _seam("cpu_shrink", "add_shrink", _refused("adapters that are sharded"), how="they are refused by name"),
    _seam("cpu_expand", "add_expand", _refused("adapters that are sharded"), how="they are refused by name"),
    _seam("cpu_full", "apply_lora_full_linear", _refused("adapters of heads"), how="they are refused by name"),
    Seam(
        name="lora.cpu_prompt_logprobs",
        targets=(Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._get_prompt_logprobs_dict"),),
        close=adapters.prompt_logprobs,
        why="for the logprobs of a prompt, the head's adapter is taken from another request of the batch",
        how="the head takes the adapter of the prompt's own tokens",
        until=_UNTIL,
        causes=(10, 34),
    ),
)
