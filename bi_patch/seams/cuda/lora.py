"""LoRA on CUDA: the bundled kernels add the adapters of linear layers; embeddings and heads are refused."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda.sampling import packed_rows
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


def _no_logits(original):
    """PunicaWrapperGPU.add_lora_logits: no adapter changes a head, so nothing is added."""

    @functools.wraps(original)
    def add_lora_logits(self, *args, **kwargs):
        return None

    return add_lora_logits


def _zero_only(what: str):
    def close(original):
        @functools.wraps(original)
        def set_lora(self, index, lora_a, lora_b):
            if bool(lora_b.any()):
                raise UnsupportedFeature(
                    f"lora.cuda: on CUDA, bi_patch does not cover adapters of {what}. Use an adapter of linear layers"
                )
            return original(self, index, lora_a, lora_b)

        return set_lora

    return close


def _packed(original):
    """LogitsProcessorWithLoRA._get_logits: return logits whose row stride is the same for any number of rows."""

    @functools.wraps(original)
    def _get_logits(self, *args, **kwargs):
        logits = original(self, *args, **kwargs)
        return logits if logits is None else packed_rows(logits)

    return _get_logits


_UNTIL = "upstream's LoRA has one order at stock's speed"


def _head(name: str, module: str, qualname: str, close, why: str, how: str) -> Seam:
    return Seam(
        name=f"lora.{name}",
        targets=(Target(f"vllm.lora.layers.{module}", qualname, _RELEASES),),
        close=close,
        why=why,
        how=how,
        until="bi_patch's kernels cover them",
        causes=(10, 34),
        on_import=True,
    )


_ROWS = "for prompt logprobs, vLLM takes the adapters of other rows of the batch"

SEAMS = (
    Seam(
        name="lora.cuda_linear",
        targets=(Target("vllm.lora.punica_wrapper.punica_gpu", "PunicaWrapperGPU.add_lora_linear", _RELEASES),),
        close=_linear,
        why="the shrink splits K by the number of rows and adds the parts by atomics; upstream's mode adds a third "
        "kernel",
        how="K is cut into chunks of a length that K decides, whose sums are added in ascending order",
        until=_UNTIL,
        causes=(10, 34),
        serves=("BaseLinearLayerWithLoRA",),
        op="bi_patch.ops.cuda.lora",
        on_import=True,
    ),
    Seam(
        name="lora.cuda_logits",
        targets=(Target("vllm.lora.punica_wrapper.punica_gpu", "PunicaWrapperGPU.add_lora_logits", _RELEASES),),
        close=_no_logits,
        why=_ROWS,
        how="adapters of heads are refused, so nothing is added to logits",
        until=_UNTIL,
        causes=(10, 34),
        on_import=True,
    ),
    _head(
        "cuda_head",
        "logits_processor",
        "LogitsProcessorWithLoRA.set_lora",
        _zero_only("heads"),
        _ROWS,
        "adapters of heads are refused by name",
    ),
    _head(
        "cuda_embedding",
        "vocab_parallel_embedding",
        "VocabParallelEmbeddingWithLoRA.set_lora",
        _zero_only("embeddings"),
        "nobody has compared their bits",
        "adapters of embeddings are refused by name",
    ),
    _head(
        "cuda_stride",
        "logits_processor",
        "LogitsProcessorWithLoRA._get_logits",
        _packed,
        "with a padded vocabulary, a single row of logits has another stride than several rows",
        "bi_patch packs the logits",
    ),
)
