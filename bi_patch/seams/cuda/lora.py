"""LoRA on CUDA: the bundled kernels add the adapters of linear layers, embeddings and heads."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import adapters
from bi_patch.seams.cuda.sampling import packed_logits
from bi_patch.seams.model import Seam, Target

_RELEASES = ">=0.33"


def _linear(original):
    """PunicaWrapperGPU.add_lora_linear: add all slices' adapters by the bundled kernels."""

    @functools.wraps(original)
    def add_lora_linear(
        self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, add_inputs=True, **kwargs
    ):
        from bi_patch.ops.cuda import lora

        if scale != 1.0 or not add_inputs or buffer is not None:
            raise UnsupportedFeature(
                "lora.cuda: adapters with a scale or beside a stream of their own have no order. Leave "
                "VLLM_LORA_ENABLE_DUAL_STREAM out"
            )
        meta = self.token_mapping_meta.meta_args(x.size(0), self.lora_config.specialize_active_lora)
        _, rows, counts, starts, slots, none, active = meta
        lora.add(y, x, lora_a_stacked, lora_b_stacked, rows, counts, starts, slots, none, active)

    return add_lora_linear


def _embedding(original):
    """PunicaWrapperGPU.add_lora_embedding: add each token's adapter by the bundled kernel. x: rows of its A."""

    @functools.wraps(original)
    def add_lora_embedding(self, y, x, lora_b_stacked, add_inputs=True, **kwargs):
        from bi_patch.ops.cuda import lora

        if not add_inputs:
            raise UnsupportedFeature("lora.cuda: adapters beside an embedding's output have no order. Set BI_PATCH=0")
        meta = self.token_mapping_meta.meta_args(x.size(0), self.lora_config.specialize_active_lora)
        _, rows, counts, starts, slots, none, active = meta
        lora.expand(y, x, lora_b_stacked, rows, counts, starts, slots, none, active)

    return add_lora_embedding


_HELD = "_bi_patch_slots"  # attribute of a head's stack of B: the slots that hold an adapter of the head, and a table


def _logits(original):
    """PunicaWrapperGPU.add_lora_logits: add each row's adapter by the bundled kernels, where an adapter has the head.

    vLLM's own function takes the adapters of the requests in the batch's order, also for the rows of prompts whose
    logprobs a request asks for, and for the rows of drafts.
    """

    @functools.wraps(original)
    def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs):
        from bi_patch.ops.cuda import lora

        held, table = getattr(lora_b_stacked, _HELD, ((), None))
        if not held:
            return
        if scale != 1.0 or buffer is not None or y.shape[-1] < lora_b_stacked.shape[-2]:
            raise UnsupportedFeature(
                "lora.cuda: a head's adapters with a scale or of another size have no order. Set BI_PATCH=0"
            )
        lora.add_rows(y, x, lora_a_stacked, lora_b_stacked, adapters.slots(self, x, "cuda"), table)

    return add_lora_logits


def _set_head(original):
    """LogitsProcessorWithLoRA.set_lora: note which slots hold an adapter of the head."""

    @functools.wraps(original)
    def set_lora(self, index, lora_a, lora_b):
        original(self, index, lora_a, lora_b)
        if not bool(lora_b.any()):
            return
        adapters.refuse_head(self, self.lora_b_stacked.dtype, "cuda")
        _hold(self.lora_b_stacked, lambda held: held | {index})

    return set_lora


def _reset_head(original):
    """LogitsProcessorWithLoRA.reset_lora: the slot holds no adapter of the head."""

    @functools.wraps(original)
    def reset_lora(self, index):
        original(self, index)
        _hold(self.lora_b_stacked, lambda held: held - {index})

    return reset_lora


def _hold(stack, change) -> None:
    """Change which slots of a head's stack are held. The table has -1 for every other slot."""
    import torch

    held, _ = getattr(stack, _HELD, (frozenset(), None))
    held = change(held)
    table = [slot if slot in held else -1 for slot in range(stack.shape[0])]
    setattr(stack, _HELD, (held, torch.tensor(table, dtype=torch.int32, device=stack.device)))


_UNTIL = "upstream's LoRA has one order at stock's speed"
_PUNICA = "vllm.lora.punica_wrapper.punica_gpu"
_HEAD = "vllm.lora.layers.logits_processor"
_ROWS = "for prompt logprobs, and for drafts, vLLM takes the adapters of other rows of the batch"
_KEPT = "the head takes the adapter of each row's own token"


def _seam(name: str, module: str, qualname: str, close, why: str, how: str, **given) -> Seam:
    return Seam(
        name=f"lora.{name}",
        targets=(Target(module, qualname, _RELEASES),),
        close=close,
        why=why,
        how=how,
        until=_UNTIL,
        causes=(10, 34),
        **{"on_import": True, **given},
    )


_SPLIT = "the shrink splits K by the number of rows and adds the parts by atomics; upstream's mode adds a third kernel"
_CHUNKS = "K is cut into chunks of a length that K decides, whose sums are added in ascending order"
_OP = "bi_patch.ops.cuda.lora"

SEAMS = (
    _seam(
        "cuda_linear",
        _PUNICA,
        "PunicaWrapperGPU.add_lora_linear",
        _linear,
        _SPLIT,
        _CHUNKS,
        serves=("BaseLinearLayerWithLoRA",),
        op=_OP,
    ),
    _seam(
        "cuda_embedding",
        _PUNICA,
        "PunicaWrapperGPU.add_lora_embedding",
        _embedding,
        "the expand's tiles depend on the number of rows",
        "bi_patch's kernel takes the adapter's rank in ascending order",
        serves=("VocabParallelEmbeddingWithLoRA",),
        op=_OP,
    ),
    _seam(
        "cuda_logits",
        _PUNICA,
        "PunicaWrapperGPU.add_lora_logits",
        _logits,
        f"{_SPLIT}. {_ROWS[0].upper()}{_ROWS[1:]}",
        f"{_CHUNKS}; {_KEPT}",
        serves=("LogitsProcessorWithLoRA",),
        op=_OP,
    ),
    _seam(
        "cuda_head_set",
        _HEAD,
        "LogitsProcessorWithLoRA.set_lora",
        _set_head,
        "an adapter without a part for the head adds zeros, as another adapter of the batch decides",
        "only adapters with such a part are added",
    ),
    _seam(
        "cuda_head_reset",
        _HEAD,
        "LogitsProcessorWithLoRA.reset_lora",
        _reset_head,
        "an adapter without a part for the head adds zeros, as another adapter of the batch decides",
        "only adapters with such a part are added",
    ),
    _seam(
        "cuda_stride",
        _HEAD,
        "LogitsProcessorWithLoRA._get_logits",
        packed_logits,
        "with a padded vocabulary, a single row of logits has another stride than several rows",
        "bi_patch packs the logits",
    ),
    _seam(
        "cuda_sampled_rows",
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.sample_tokens",
        adapters.sample_tokens,
        _ROWS,
        _KEPT,
    ),
    _seam(
        "cuda_prompt_logprobs",
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._get_prompt_logprobs_dict",
        adapters.prompt_logprobs,
        _ROWS,
        _KEPT,
    ),
)
