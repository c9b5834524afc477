"""vLLM's rotary embeddings that patch points replace: the module of their base class, the classes, and such a patch
point."""

from bi_patch.seams.model import Seam, Target

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


def seam(name: str, qualname: str, close, module: str = BASE, **attributed) -> Seam:
    """The patch point of one forward, on any platform. name: behind "rotary.". attributed: other fields of the Seam."""
    return Seam(
        name=f"rotary.{name}",
        targets=(Target(module, qualname),),
        close=close,
        why="compiled code rounds where a fused kernel ends, and eager code rounds after every operation",
        how="one bundled kernel serves compiled and eager code, and rounds once",
        until="upstream's compiled and eager code give equal bits at the same speed",
        causes=(17,),
        **attributed,
    )
