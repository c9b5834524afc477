"""The models, dtypes and modes (eager or compiled) that `bi-patch bench` measures on CPU."""

from __future__ import annotations

from dataclasses import dataclass

from bi_patch.tools.models import recipes
from bi_patch.tools.verify.levels import FULL
from bi_patch.tools.verify.probes import PROBES

LEVEL = FULL
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Spec:
    """One model, dtype and mode. cross: whether to measure the axes that start further engines, too."""

    model: str
    dtype: str = "bfloat16"
    eager: bool = True
    cross: bool = True

    @property
    def label(self) -> str:
        return f"{self.model} {_SHORT[self.dtype]}{'' if self.eager else ' compiled'}"

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes to measure; empty for all axes of the level."""
        return () if self.cross else tuple(probe.name for probe in PROBES)


COST = (
    Spec(recipes.SMOL),
    Spec(recipes.QWEN3_100M),
    Spec(recipes.QWEN3_100M, "float32"),
    Spec(recipes.SMOL, eager=False),
)

INVARIANCE = (
    Spec(recipes.QWEN3),
    Spec(recipes.LLAMA),
    Spec(recipes.MOE),
    Spec(recipes.SMOL),
    Spec(recipes.QWEN3, "float32"),
    Spec(recipes.LLAMA, "float32"),
    Spec(recipes.MOE, "float32"),
    Spec(recipes.SMOL, "float32"),
    Spec(recipes.QWEN3, eager=False, cross=False),
    Spec(recipes.LLAMA, eager=False, cross=False),
    Spec(recipes.MOE, eager=False, cross=False),
    Spec(recipes.SMOL, eager=False, cross=False),
    Spec(recipes.QWEN3, "float32", eager=False, cross=False),
)
