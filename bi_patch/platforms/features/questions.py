"""What rows of several files share: reasons, and questions to an engine's configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bi_patch.platforms.features.model import refused
from bi_patch.platforms.features.ranks import compiled

NO_NPU = "checked without a device; nothing has run on an NPU"
NO_SEAM = "no patch point covers it yet"


def of_model(check: Callable[[Any], object], words: str) -> Callable[[Any], str]:
    """`words` if `check` is true for the engine's model, else ""."""
    return lambda config: words if config.model_config is not None and check(config.model_config) else ""


def takes_images(model: Any) -> bool:
    """Whether a model takes images, sound or video."""
    taken = getattr(model, "multimodal_config", None)
    return model.is_multimodal_model and not getattr(taken, "language_model_only", False)


def joined(before: str, found: dict[str, Any], after: str = "") -> str:
    """The names in `found` whose value is true, between two texts; "" if there is none."""
    named = [name for name, there in found.items() if there]
    return f"{before}{', '.join(named)}{after}" if named else ""


def when_compiled(asked: Callable[[Any], str]) -> Callable[[Any], str]:
    """The words of `asked` if vLLM compiles the engine's model, else ""."""
    return lambda config: asked(config) if compiled(config) else ""


def everywhere(why: str, todo: str = "") -> dict:
    cell = refused(why, todo=todo)
    return {"cpu": cell, "cuda": cell, "ascend": cell}
