"""Makes weights instead of loading them: seeded random weights for a folder without weights, and rows tied on purpose.

vLLM's own dummy weights are within 0.001 of zero: so small that rounding hides most differences.
"""

from __future__ import annotations

import functools


def make_random(seed: int) -> None:
    """Make load_format="dummy" in this process fill models with `fill(model, seed)`. Call before the engine starts."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    original = getattr(DummyModelLoader.load_weights, "__wrapped__", DummyModelLoader.load_weights)

    @functools.wraps(original)
    def load_weights(self, model, *args, **kwargs):
        original(self, model, *args, **kwargs)  # also sets up what quantized layers need besides values
        fill(model, seed)

    DummyModelLoader.load_weights = load_weights


def make_tied() -> None:
    """Make this process call `tie` on every model that it loads, before weights are packed. Call before the engine."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    for loader in _subclasses(BaseModelLoader):
        original = loader.__dict__.get("load_weights")
        if original is not None:
            loader.load_weights = _then_tied(original)


def fill(model, seed: int) -> None:
    """Fill a model: matrices normal(0, fan_in ** -0.5), biases normal(0, 0.5), norms normal(1, 0.1); no integers."""
    import torch

    generators: dict[object, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        value = parameter.data
        if not value.is_floating_point():
            continue
        generator = generators.setdefault(value.device, torch.Generator(value.device).manual_seed(seed))
        wide = value if value.element_size() > 1 else torch.empty(value.shape, device=value.device)
        if value.ndim >= 2:
            wide.normal_(0, value.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            wide.normal_(0, 0.5, generator=generator)
        elif "norm" in name:
            wide.normal_(1, 0.1, generator=generator)
        else:
            continue
        if wide is not value:
            value.copy_(wide)


def tie(model) -> None:
    """Make rows 2i and 2i + 1 equal in the output head and in every router: every best value becomes an exact tie."""
    for name, parameter in model.named_parameters():
        value = parameter.data
        if not _is_scored(name) or value.ndim != 2 or not value.is_floating_point():
            continue
        even = value.shape[0] // 2 * 2
        value[1:even:2] = value[0:even:2]


def _is_scored(name: str) -> bool:
    """Whether the model picks among the rows of this parameter: the head (also a tied embedding) and routers."""
    return name.endswith(
        ("lm_head.weight", "embed_tokens.weight", "mlp.gate.weight", "router.weight", "block_sparse_moe.gate.weight")
    )


def _then_tied(original):
    @functools.wraps(original)
    def load_weights(self, model, *args, **kwargs):
        made = original(self, model, *args, **kwargs)
        tie(model)
        return made

    return load_weights


def _subclasses(kind: type) -> list[type]:
    from vllm.model_executor.model_loader import default_loader, dummy_loader  # noqa: F401  imported so that __subclasses__ lists them

    found = [kind]
    for each in found:
        found += each.__subclasses__()
    return list(dict.fromkeys(found))
