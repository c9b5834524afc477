"""What poolers may be made of, on every platform: an allow-list of vLLM's poolers and of PyTorch's layers in heads.

A pooler outside of the list may sum over the batch. The engine refuses it by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Policy, Seam, Target

# vLLM's pooler classes. Each pools a sequence's own rows; what they compute is a patch point or pointwise.
_POOLERS = frozenset(
    {
        "BertPooler",
        "BgeM3Pooler",
        "BOSEOSFilter",
        "DispatchPooler",
        "ModernBertPooler",
        "SequencePooler",
        "TokenPooler",
        # methods
        "AllPool",
        "CLSPool",
        "LastPool",
        "MeanPool",
        "StepPool",
        # heads
        "ClassifierPoolerHead",
        "EmbeddingPoolerHead",
        "TokenClassifierPoolerHead",
        "TokenEmbeddingPoolerHead",
        # activations
        "LambdaPoolerActivation",
        "PoolerClassify",
        "PoolerIdentity",
        "PoolerMultiLabelClassify",
        "PoolerNormalize",
    }
)
# Tasks whose answer has a vector for each token of the prompt.
OF_TOKENS = frozenset({"token_embed", "token_classify", "embed&token_classify", "plugin"})
# PyTorch's layers that a platform covers, in a pooling model and its heads.
_LAYERS = frozenset(
    {
        "Dropout",
        "Embedding",
        "GELU",
        "Identity",
        "LayerNorm",
        "Linear",
        "ModuleDict",
        "ModuleList",
        "ReLU",
        "Sequential",
        "Sigmoid",
        "SiLU",
        "Tanh",
    }
)
_HEADS = "vllm.model_executor.layers.pooler."
_CODES = (
    _HEADS,
    "vllm.model_executor.models.bert",
    "vllm.model_executor.models.modernbert",
    "vllm.model_executor.models.roberta",
)


def policies(platform: str) -> tuple[Policy, ...]:
    """The rules of a platform, with its name in theirs."""
    name = f"pooling.{platform}_whole"
    return (
        Policy(
            name=name,
            apply=functools.partial(_refuse_parts, policy=name),
            why="a pooler that needs all rows of a prompt gets only some if the prompt is cached or comes in chunks",
        ),
    )


def _refuse_parts(config: Any, policy: str) -> None:
    """Refuse chunks and cached prefixes where the model or its pooler needs whole prompts. policy: its name."""
    if not is_pooling(config):
        return
    model = config.model_config
    asked = {
        "--enable-chunked-prefill": config.scheduler_config.enable_chunked_prefill
        and not model.is_chunked_prefill_supported,
        "--enable-prefix-caching": config.cache_config.enable_prefix_caching and not model.is_prefix_caching_supported,
    }
    found = [option for option, wrong in asked.items() if wrong]
    if found:
        raise UnsupportedFeature(
            f"{policy}: {model.architectures[0]} with this pooling needs whole prompts. Leave out "
            f"{' and '.join(found)}, or set BI_PATCH=0"
        )


def seam(
    platform: str,
    name: str,
    module: str,
    qualname: str,
    close: Callable,
    why: str,
    how: str,
    serves: tuple[str, ...],
) -> Seam:
    """A patch point in a pooler. module: below vLLM's folder of poolers. The rest: as of a Seam."""
    return Seam(
        name=f"pooling.{platform}_{name}",
        targets=(Target(f"vllm.model_executor.layers.pooler.{module}", qualname),),
        close=close,
        why=why,
        how=how,
        until="upstream pools each sequence alone, in one order",
        causes=(33,),
        serves=serves,
    )


def is_pooling(config: Any) -> bool:
    """Whether an engine pools. config: its VllmConfig."""
    return getattr(config.model_config, "runner_type", "") == "pooling"


def modules(model: Any) -> Iterator[Any]:
    """Every module of a model, also those of poolers that vLLM keeps in a plain dict, each once."""
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        for module in waiting.pop().modules():
            if id(module) in seen:
                continue
            seen.add(id(module))
            yield module
            waiting.extend(getattr(module, "poolers_by_task", {}).values())


def no_update(model: Any) -> None:
    """Refuse new weights for a loaded pooling model: a vector of a prompt in chunks could be of old and new weights."""
    raise UnsupportedFeature(
        f"pooling.weights: bi_patch does not cover new weights for an engine that pools ({type(model).__name__}): "
        "nothing tells whose weights a vector is of. Start another engine with them, or set BI_PATCH=0"
    )


def check(model: Any, seam: str) -> None:
    """Raise UnsupportedFeature, with the seam's name, if a pooling model has a pooler or a layer that is not covered.

    model: the loaded torch.nn.Module, with its `pooler`.
    """
    found = sorted({*_poolers(model), *_layers(model)})
    if found:
        raise UnsupportedFeature(
            f"{seam}: bi_patch does not cover {', '.join(found)} of {type(model).__name__}: it may compute over all "
            "rows of a batch. Use another model, or set BI_PATCH=0"
        )


def _poolers(model: Any) -> Iterator[str]:
    """The poolers that the list lacks."""
    from vllm.model_executor.layers.pooler import Pooler

    for module in modules(model.pooler):
        kind = type(module)
        if not (isinstance(module, Pooler) or kind.__module__.startswith(_HEADS)):
            continue
        if kind.__name__ not in _POOLERS or not kind.__module__.startswith(_CODES):
            yield f"the pooler {kind.__name__}"
        if kind.__name__ == "LambdaPoolerActivation" and not _covered(module.fn):
            yield f"the activation {_name(module.fn)}"


def _layers(model: Any) -> Iterator[str]:
    """The layers of PyTorch that the list lacks."""
    for module in modules(model):
        if type(module).__module__.startswith("torch.nn.") and not _covered(module):
            yield f"the layer {type(module).__name__}"


def _covered(layer: Any) -> bool:
    return type(layer).__module__.startswith("torch.nn.") and type(layer).__name__ in _LAYERS


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
