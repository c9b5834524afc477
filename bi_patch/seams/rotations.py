"""vLLM's rotary embeddings that patch points replace: the module of their base class, and the classes."""

BASE = "vllm.model_executor.layers.rotary_embedding.base"
# The classes that inherit forward from RotaryEmbedding.
CLASSES = frozenset(
    {
        "RotaryEmbedding",
        "Llama3RotaryEmbedding",
        "LinearScalingRotaryEmbedding",
        "NTKScalingRotaryEmbedding",
        "DynamicNTKAlphaRotaryEmbedding",
        "DynamicNTKScalingRotaryEmbedding",
        "YaRNScalingRotaryEmbedding",
    }
)
