"""Which models, dtypes and modes `bi-patch bench` measures on CPU."""

from __future__ import annotations

from dataclasses import dataclass

from bi_patch.demo import models

_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Spec:
    """One engine to measure. cross: also the axes that need other engines (one start each)."""

    model: str
    dtype: str = "bfloat16"
    eager: bool = True
    cross: bool = True

    @property
    def label(self) -> str:
        return f"{self.model} {_SHORT[self.dtype]}{'' if self.eager else ' compiled'}"


COST = (
    Spec(models.SMOL),
    Spec(models.QWEN3_100M),
    Spec(models.QWEN3_100M, "float32"),
    Spec(models.SMOL, eager=False),
)

INVARIANCE = (
    Spec(models.QWEN3),
    Spec(models.LLAMA),
    Spec(models.MOE),
    Spec(models.SMOL),
    Spec(models.QWEN3, "float32"),
    Spec(models.LLAMA, "float32"),
    Spec(models.MOE, "float32"),
    Spec(models.SMOL, "float32"),
    Spec(models.QWEN3, eager=False, cross=False),
    Spec(models.LLAMA, eager=False, cross=False),
    Spec(models.MOE, eager=False, cross=False),
    Spec(models.SMOL, eager=False, cross=False),
    Spec(models.QWEN3, "float32", eager=False, cross=False),
)
