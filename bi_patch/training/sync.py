"""Gives a sampler the trainer's weights, and shows by one comparison of bits that the sampler serves them."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bi_patch.errors import BiPatchError, WeightsNotSynced
from bi_patch.training import huggingface, samplers
from bi_patch.training.compare import compare
from bi_patch.training.logprobs import logprobs

PROBE = tuple(range(11, 59, 3))  # the tokens of the comparison, where the caller gives none


@dataclass(frozen=True)
class Synced:
    """What one sync did. sent: tensors. compared: logprobs that were compared; all of them were equal."""

    version: str
    sent: int
    seconds: float
    compared: int


# For each model: the parameters' versions at its last sync.
_last: weakref.WeakKeyDictionary[torch.nn.Module, tuple] = weakref.WeakKeyDictionary()


def sync(
    model: torch.nn.Module,
    sampler: object,
    *,
    version: str = "",
    dtype: torch.dtype | None = None,
    probe: Sequence[int] | None = None,
    check: bool = True,
) -> Synced:
    """Load the weights of the armed `model` into `sampler`, forget its cached prefixes, and compare bits once.

    sampler: a vllm.LLM, or the address of a server with VLLM_SERVER_DEV_MODE=1 that reads this machine's temporary
    folder. version: a name that later answers of the sampler carry. dtype: the sampler's, by default the dtype in which
    the armed model computes; fp32 weights are rounded to it. probe: token ids of the comparison. check: whether to
    compare: the sampler continues the probe greedily, and the trainer computes the logprobs of the answer.

    Raises WeightsNotSynced if a logprob differs, SamplerFailed if the sampler cannot load weights.
    """
    start = time.perf_counter()
    to = samplers.sampler(sampler)
    held = list(weights(model, dtype or _computes(model)))
    to.load(held)
    to.forget()
    if version:
        to.name(version)
    _last[model] = _versions(model)
    compared = _compare(model, to, list(probe or PROBE)) if check else 0
    return Synced(version, len(held), time.perf_counter() - start, compared)


def weights(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights as a checkpoint of this model names them, floats rounded to `dtype`. A tied head is left out."""
    held = {name: p.detach() for name, p in model.named_parameters()}
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    held |= {name: t for name, t in model.state_dict().items() if name not in named}  # buffers
    if hasattr(model, "config") and hasattr(model, "_weight_conversions"):
        from transformers.core_model_loading import revert_weight_conversion

        held = revert_weight_conversion(model, held)
    for name, tensor in held.items():
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def require_synced(model: torch.nn.Module) -> None:
    """Raise WeightsNotSynced if a parameter of `model` was written since its last sync, or if there was no sync."""
    last = _last.get(model)
    if last is None:
        raise WeightsNotSynced("this model was never synced with a sampler: call training.sync after each update")
    now = _versions(model)
    changed = [name for (name, *_), a, b in zip(now, now, last) if a != b] if len(now) == len(last) else ["parameters"]
    if changed:
        raise WeightsNotSynced(
            f"{len(changed)} parameters changed since the last training.sync, first {changed[0]}: the sampler serves "
            "older weights"
        )


def _versions(model: torch.nn.Module) -> tuple:
    return tuple((name, p.data_ptr(), p._version) for name, p in model.named_parameters())


def _computes(model: torch.nn.Module) -> torch.dtype:
    state = huggingface.armed(model)
    if state is None:
        raise BiPatchError("training.sync: the model is not armed. Call bi_patch.training.arm first")
    return state.dtype


def _compare(model: torch.nn.Module, to: samplers.Sampler, probe: list[int]) -> int:
    ids, sampled = to.score(probe)
    with torch.no_grad():
        own = logprobs(model, torch.tensor([ids], device=next(model.parameters()).device))
    found = compare(own[0, -len(sampled) :], torch.tensor(sampled, dtype=torch.float32))
    if found.differing:
        raise WeightsNotSynced(
            f"training.sync: after the sync, {found.differing} of {found.compared} logprobs differ between sampler and "
            f"trainer, by up to {found.worst:.3g}. The sampler still serves other weights in part, or the model is not "
            "armed for this sampler. `bi-patch parity` names the first operation that differs"
        )
    return found.compared
