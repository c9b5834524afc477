"""Images, on every platform: the items of a call of an encoder, and what an encoder may be made of.

An item is one image. An encoder's rows depend on company only through the other items of the same call: they choose
the kernels, and vLLM pads items of other sizes. With one item in a call, the rows depend on the item alone, whatever
else shares the step and the caches. Then the kernels only have to give equal bits in every run, which `certify` tests.

Images go through an encoder together where three things hold. Its code was read: `TOGETHER` lists the models. The
platform knows an order of its own for each layer. And `certify` finds the same bits alone and together.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

from bi_patch.errors import CertificateFailed, UnsupportedFeature
from bi_patch.seams import agreement

# Layers of encoders without layers inside, by platform-independent name of the class. A platform's load replaces some.
_LAYERS = frozenset(
    {
        "ApplyRotaryEmb",
        "AvgPool2d",
        "ColumnParallelLinear",
        "Conv2dLayer",
        "Conv3dLayer",
        "Dropout",
        "Embedding",
        "FastGELU",
        "FusedMMInputNorm",
        "GELU",
        "GELUTanh",
        "GemmaRMSNorm",
        "Identity",
        "IdentityInputNorm",
        "LayerNorm",
        "Linear",
        "LogitsProcessor",
        "MMEncoderAttention",
        "MergedColumnParallelLinear",
        "NewGELU",
        "ParallelLMHead",
        "QKVParallelLinear",
        "QuickGELU",
        "ReplicatedLinear",
        "RMSNorm",
        "RotaryEmbedding",
        "RowParallelLinear",
        "SiLU",
        "SiluAndMul",
    }
)
_UNQUANTIZED = ("NoneType", "UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
# vLLM's parts of models with parameters of their own: tokens of a class, or of the end of a row, or a product's weight.
OWNERS = frozenset({"CLIPVisionEmbeddings", "Gemma3MultiModalProjector"})
# InternVL's own parameters, in both of its forms: places, a class's token, and what multiplies a layer's output.
INTERN = frozenset(
    {"InternS1VisionEmbeddings", "InternS1VisionLayer", "InternVisionEmbeddings", "InternVisionEncoderLayer"}
)
# vLLM's classes of models whose encoder treats each image, tile and window for itself: it loops over the images, or
# gives all rows to its layers, and tells attention where an image begins. No image is padded for another one.
TOGETHER = frozenset(
    {
        "Gemma3ForConditionalGeneration",
        "Glm4vForConditionalGeneration",
        "InternS1ForConditionalGeneration",
        "InternVLChatModel",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    }
)
_MARK = "_bi_patch_together"  # of a model whose images go through its encoder together
_log = logging.getLogger("vllm.bi_patch")
_CODES = ("torch.nn.", "vllm.model_executor.layers.")
_RUNS = 3  # of a made image in `certify`
SIZES = ((640, 224), (112, 112))  # widths and heights of further made images, in pixels


def takes_images(config: Any) -> bool:
    """Whether requests of an engine may bring images, sound or video. config: its VllmConfig."""
    model = config.model_config
    if model is None or not getattr(model, "is_multimodal_model", False):
        return False
    return not getattr(getattr(model, "multimodal_config", None), "language_model_only", False)


def alone(original: Callable) -> Callable:
    """GPUModelRunner._execute_mm_encoder of model runner V1: one call for each scheduled item."""

    @functools.wraps(original)
    def _execute_mm_encoder(self, scheduler_output):
        asked = [(name, item) for name, items in scheduler_output.scheduled_encoder_inputs.items() for item in items]
        if len(asked) < 2:
            return original(self, scheduler_output)
        outputs = []
        for name, item in asked:
            one = copy.copy(scheduler_output)
            one.scheduled_encoder_inputs = {name: [item]}
            outputs += original(self, one)
        return outputs

    return _execute_mm_encoder


def alone_v2(original: Callable) -> Callable:
    """EncoderRunner.execute_mm_encoder of model runner V2: one call for each item, but one for all images if `certify`
    found equal bits."""

    @functools.wraps(original)
    def execute_mm_encoder(self, mm_kwargs):
        images = [i for i, (kind, _) in enumerate(mm_kwargs) if kind == "image"]
        found: dict[int, Any] = {}
        if len(images) > 1 and getattr(self.model, _MARK, False):
            found = dict(zip(images, original(self, [mm_kwargs[i] for i in images]), strict=True))
        rest = {i: original(self, [item]) for i, item in enumerate(mm_kwargs) if i not in found}
        return [output for i in range(len(mm_kwargs)) for output in ([found[i]] if i in found else rest[i])]

    return execute_mm_encoder


def parts(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, module) of every module of a loaded model outside of its language model."""
    language = model.get_language_model()
    inside = {id(module) for module in language.modules()}
    around = [module for module in model.modules() if module is not language and _holds(module, language)]
    inside |= {id(module) for module in around}
    yield from ((name, module) for name, module in model.named_modules() if id(module) not in inside)


def _holds(module: Any, other: Any) -> bool:
    return any(inner is other for inner in module.modules())


def check(model: Any, seam: str, owners: Collection[str] = OWNERS) -> None:
    """Raise UnsupportedFeature, with the seam's name, for a layer of an encoder that the lists lack, or that has
    quantized weights.

    owners: the platform's list of vLLM's parts of models with parameters of their own.
    """
    found = set()
    for name, module in parts(model):
        kind = type(module)
        method = type(getattr(module, "quant_method", None)).__name__
        if method not in _UNQUANTIZED:
            raise UnsupportedFeature(
                f"{seam}: bi_patch does not cover quantized weights of {type(model).__name__}'s encoder ({name}: "
                f"{method}): only its language model may be quantized. Pass --language-model-only, which turns "
                "encoders off, or set BI_PATCH=0"
            )
        layer = kind.__module__.startswith(_CODES) and kind.__module__ != "torch.nn.modules.container"
        own = next(module.parameters(recurse=False), None) is not None
        if layer and kind.__name__ not in _LAYERS:
            found.add(kind.__name__)
        elif own and not layer and kind.__name__ not in owners:
            found.add(kind.__name__)
    if found:
        raise UnsupportedFeature(
            f"{seam}: bi_patch does not cover {', '.join(sorted(found))} of {type(model).__name__}'s encoder. Pass "
            "--language-model-only, which turns encoders off, or set BI_PATCH=0"
        )


def certify(model: Any, config: Any, device: Any, seam: str, together: bool = False) -> bool:
    """Encode made images of several sizes, each several times. Raises CertificateFailed if a run has other bits.

    Videos have no certificate.

    The sizes are the model's largest and SIZES, where the processor makes other shapes of them. Before each run, the
    image is copied to memory with another alignment, and other tensors take the allocator's blocks.

    together: whether to encode the images together, too: all of them, in another order, and in other numbers. Returns
    whether each image had the bits that it has alone. If so, `alone_v2` gives the encoder all images of a step.

    Ranks that share an encoder call it at the same time, and have the same result: a rank alone would wait for others.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    budget = MultiModalBudget(config, MULTIMODAL_REGISTRY, enable_cache=False)
    # A video has no certificate of its own: its frames run through the layers that made images run through. The made
    # video of some models is very long. Requests with sound are refused (`vision.names`).
    if "image" not in budget.mm_max_toks_per_item:
        return False
    limits = config.model_config.get_multimodal_config().limit_per_prompt
    agreed = _agreement(config)
    together = agreed(together)
    made: dict[str, Item] = {}
    seen: list[dict[str, Any]] = []
    for size in (None, *SIZES):
        item = _made(budget, limits, size)
        shapes = {name: getattr(element.data, "shape", None) for name, element in item[1].items()}
        if shapes in seen:
            continue
        seen.append(shapes)
        words = f"{size[0]} x {size[1]} pixels" if size else "the largest size"
        made[words] = item
        if run := _differs(model, item, device, agreed):
            raise CertificateFailed(
                f"{seam}: {type(model).__name__}'s encoder gives other bits for the same image of {words} in run "
                f"{run} of {_RUNS}. Pass --language-model-only, which turns encoders off, or set BI_PATCH=0"
            )
    alike = together and (words := _in_company(model, list(made.values()), device, agreed)) == ""
    if together and not alike:
        _log.warning("%s: in company, an image has other bits (%s). Images are encoded one at a time", seam, words)
    object.__setattr__(model, _MARK, alike)
    return alike


def _agreement(config: Any) -> Callable[[bool], bool]:
    """Whether a finding is true on every rank that has a part of the encoder, as a function of the own finding."""
    if int(getattr(getattr(config, "parallel_config", None), "tensor_parallel_size", 1) or 1) == 1:
        return lambda own: own
    from vllm.distributed.parallel_state import get_tp_group

    return functools.partial(agreement.every, get_tp_group())


Item = tuple[str, Any]  # "image", and vLLM's MultiModalKwargsItem


def _made(budget: Any, limits: Any, size: tuple[int, int] | None) -> Item:
    """What a model's encoder gets of one made image with random pixels. limits: vLLM's options of made items, by kind.

    size: width and height, None for the model's largest. A model may bring an image to another size.
    """
    from vllm.config.multimodal import ImageDummyOptions

    held = limits.get("image")
    if size is not None:
        limits["image"] = ImageDummyOptions(width=size[0], height=size[1])
    try:
        made = budget.get_dummy_encoder_profile_inputs("image", 1)
    finally:
        if held is not None:
            limits["image"] = held
        else:
            limits.pop("image", None)
    return _with_noise(made[0], 1)


def mixes(items: int) -> list[tuple[int, ...]]:
    """Which of `items` made images go through the encoder in one call, by their place. The first one is the largest."""
    small = items - 1
    return [
        tuple(range(items)),
        tuple(reversed(range(items))),
        (small, small),
        (small, *[small - 1] * 2, small),
        (*[small] * 7, small - 1),
        tuple(range(1, items)) * 3,
    ]


def _in_company(model: Any, made: list[Item], device: Any, agreed: Callable[[bool], bool]) -> str:
    """Which image has other bits in company than alone, in words; "" for none. made: one item of each size. agreed: as
    from `_agreement`."""
    import torch

    smaller = made[1:] or made
    items = [*made, *(_with_noise(item, seed) for seed in (2, 3) for item in smaller[-2:])]
    alone = [_encode(model, [item], device) for item in items]
    if not agreed(all(len(rows) == 1 for rows in alone)):
        return "an image gives several outputs"
    for mix in mixes(len(items)):
        got = _encode(model, [items[i] for i in mix], device)
        if not agreed(len(got) == len(mix)):
            return f"{len(mix)} images give {len(got)} outputs"
        for place, (i, rows) in enumerate(zip(mix, got, strict=True)):
            if not agreed(torch.equal(rows, alone[i][0])):
                return f"image {place + 1} of {len(mix)}"
    return ""


def _encode(model: Any, items: list[Item], device: Any, by: int = 0) -> list[Any]:
    """The encoder's rows of each item, in the calls that vLLM makes of one list of items. by: as for `_moved`."""
    import torch
    from vllm.multimodal.utils import group_and_batch_mm_kwargs

    found: list[Any] = []
    with torch.inference_mode():
        for _, _, batch in group_and_batch_mm_kwargs(items, device=device):
            found += model.embed_multimodal(**{name: _moved(value, by) for name, value in batch.items()})
        return [output.clone() for output in found]


def _differs(model: Any, item: Item, device: Any, agreed: Callable[[bool], bool]) -> int:
    """The number of the first run, from 2 on, in which the encoder gives other bits than in the first; 0 for none.
    agreed: as from `_agreement`."""
    import torch

    first = None
    held = []
    for run in range(_RUNS):
        held.append(torch.empty(1000 + 37 * run, dtype=torch.uint8, device=device))
        got = _encode(model, [item], device, run)
        first = first if first is not None else got
        same = len(got) == len(first) and all(torch.equal(a, b) for a, b in zip(first, got, strict=True))
        if not agreed(same):
            return run + 1
    return 0


def _with_noise(item: Item, seed: int) -> Item:
    """An item with random pixels."""
    kind, elements = item
    made = {name: copy.copy(element) for name, element in elements.items()}
    for element in made.values():
        element.data = _noise(element.data, seed)
    return kind, type(elements)(made)


def _noise(value: Any, seed: int) -> Any:
    """Random pixels instead of vLLM's made ones, which are all equal. Other inputs stay as they are."""
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    source = torch.Generator(device="cpu").manual_seed(seed)
    return torch.rand(value.shape, generator=source).to(value) * 2 - 1


def _moved(value: Any, by: int) -> Any:
    """A copy of a tensor that begins `by` elements after the start of a block of memory."""
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    room = torch.empty(value.numel() + by, dtype=value.dtype, device=value.device)
    copied = room[by:].view(value.shape)
    copied.copy_(value)
    return copied


def no_update(model: Any) -> None:
    """Refuse new weights for a loaded model with an encoder: encoded images of old weights stay in vLLM's cache."""
    raise UnsupportedFeature(
        f"vision.weights: bi_patch does not cover new weights for an engine that takes images ({type(model).__name__}):"
        " images that the old weights encoded stay in its cache. Start another engine with them, or set BI_PATCH=0"
    )
