"""Images, on every platform: one item for each call of an encoder, and what an encoder may be made of.

An item is one image. An encoder's rows depend on company only through the other items of the same call: they choose
the kernels, and vLLM pads items of other sizes. With one item in a call, the rows depend on the item alone, whatever
else shares the step and the caches. Then the kernels only have to give equal bits in every run, which `certify` tests.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

from bi_patch.errors import CertificateFailed, UnsupportedFeature

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
# vLLM's parts of models with parameters of their own: tokens of a class, or of the end of a row, or a product's weight.
OWNERS = frozenset({"CLIPVisionEmbeddings", "Gemma3MultiModalProjector"})
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
    """EncoderRunner.execute_mm_encoder of model runner V2: one call for each item."""

    @functools.wraps(original)
    def execute_mm_encoder(self, mm_kwargs):
        return [output for item in mm_kwargs for output in original(self, [item])]

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
    """Raise UnsupportedFeature, with the seam's name, for a layer of an encoder that the lists lack.

    owners: the platform's list of vLLM's parts of models with parameters of their own.
    """
    found = set()
    for _, module in parts(model):
        kind = type(module)
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


def certify(model: Any, config: Any, device: Any, seam: str) -> None:
    """Encode made images of several sizes, each several times. Raises CertificateFailed if a run has other bits.

    Videos have no certificate.

    The sizes are the model's largest and SIZES, where the processor makes other shapes of them. Before each run, the
    image is copied to memory with another alignment, and other tensors take the allocator's blocks.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    budget = MultiModalBudget(config, MULTIMODAL_REGISTRY, enable_cache=False)
    # A video has no certificate of its own: its frames run through the layers that made images run through. The made
    # video of some models is very long. Requests with sound are refused (`vision.names`).
    if "image" not in budget.mm_max_toks_per_item:
        return
    limits = config.model_config.get_multimodal_config().limit_per_prompt
    seen: list[dict[str, Any]] = []
    for size in (None, *SIZES):
        batch = _made(budget, limits, size, device)
        shapes = {name: getattr(value, "shape", None) for name, value in batch.items()}
        if shapes in seen:
            continue
        seen.append(shapes)
        if run := _differs(model, batch, device):
            words = f"{size[0]} x {size[1]} pixels" if size else "the largest size"
            raise CertificateFailed(
                f"{seam}: {type(model).__name__}'s encoder gives other bits for the same image of {words} in run "
                f"{run} of {_RUNS}. Pass --language-model-only, which turns encoders off, or set BI_PATCH=0"
            )


def _made(budget: Any, limits: Any, size: tuple[int, int] | None, device: Any) -> dict[str, Any]:
    """What a model's encoder gets of one made image with random pixels. limits: vLLM's options of made items, by kind.

    size: width and height, None for the model's largest. A model may bring an image to another size.
    """
    from vllm.config.multimodal import ImageDummyOptions
    from vllm.multimodal.utils import group_and_batch_mm_kwargs

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
    _, _, batch = next(group_and_batch_mm_kwargs(made, device=device))
    return {name: _noise(value) for name, value in batch.items()}


def _differs(model: Any, batch: dict[str, Any], device: Any) -> int:
    """The number of the first run, from 2 on, in which the encoder gives other bits than in the first; 0 for none."""
    import torch

    first = None
    held = []
    for run in range(_RUNS):
        held.append(torch.empty(1000 + 37 * run, dtype=torch.uint8, device=device))
        with torch.inference_mode():
            got = model.embed_multimodal(**{name: _moved(value, run) for name, value in batch.items()})
        got = [output.clone() for output in got]
        first = first if first is not None else got
        if len(got) != len(first) or not all(torch.equal(a, b) for a, b in zip(first, got, strict=True)):
            return run + 1
    return 0


def _noise(value: Any) -> Any:
    """Random pixels instead of vLLM's made ones, which are all equal. Other inputs stay as they are."""
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    source = torch.Generator(device="cpu").manual_seed(1)
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
