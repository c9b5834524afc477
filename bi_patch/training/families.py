"""What bi_patch knows of each model family of transformers, as data. A family that is not here is refused by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One family of models.

    prefix: what its classes are named by, e.g. "Llama" of LlamaMLP. offset: what its norms add to their weight.
    experts: whether its layers choose among experts. fused: whether a sampler on CUDA norms the heads of queries and
    keys in the kernel that rotates them. turned: whether transformers norms them as [batch, heads, length, size].
    """

    prefix: str
    offset: float = 0.0
    experts: bool = False
    fused: bool = False
    turned: bool = False


# By the model_type of the configuration.
FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", fused=True),
    "gemma2": Family("Gemma2", offset=1.0),
    "gemma3_text": Family("Gemma3", offset=1.0, turned=True),
    "mixtral": Family("Mixtral", experts=True),
    "qwen3_moe": Family("Qwen3Moe", experts=True, fused=True),
}

# How transformers names an activation -> its kind in bi_patch.training.ops.gated.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}

# Rotations whose tables transformers and vLLM compute alike, in any batch. For "linear", transformers divides the
# frequencies and vLLM the positions, so the tables are equal for a factor that is a power of two.
ROTATIONS = ("default", "linear", "llama3", "yarn")

# Linear layers whose K a tensor-parallel sampler shares among its ranks.
ROW_PARALLEL = ("o_proj", "down_proj")
