"""Gives a sampler the trainer's weights, and shows by one comparison of bits that the sampler serves them."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bi_patch.errors import BiPatchError, UnsupportedFeature, WeightsNotSynced
from bi_patch.ops import bits
from bi_patch.training import adapters, huggingface, samplers
from bi_patch.training.compare import compare
from bi_patch.training.logprobs import logprobs

_ELSEWHERE = "the sampler of another rank"
PROBE = tuple(range(11, 59, 3))  # the tokens of the comparison, where the caller gives none


@dataclass(frozen=True)
class Synced:
    """What one sync did. sent: tensors. compared: logprobs that were compared; all of them were equal."""

    version: str
    sent: int
    seconds: float
    compared: int


# For each model and sampler: the checksum of each weight that the sampler got. A sampler is an address, or a weakref.
_synced: weakref.WeakKeyDictionary[torch.nn.Module, dict[object, dict[str, int] | None]] = weakref.WeakKeyDictionary()


def sync(
    model: torch.nn.Module,
    sampler: object | None,
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
    compare: the sampler continues the probe greedily, and the trainer computes the logprobs of the answer. That shows
    the weights that these few tokens reach: not each expert, nor each row of an embedding.

    Under FSDP2, every rank calls it, because the ranks gather the weights together. A rank without a sampler gives
    None, and the same `probe` and `check`.

    Raises WeightsNotSynced if a logprob differs, if another rank failed, or if no rank has a sampler. Raises
    SamplerFailed if the sampler cannot load weights.
    """
    if adapters.has(huggingface.unwrapped(model)):
        raise UnsupportedFeature(
            "training.lora: an engine with adapters takes no new weights. Save the adapter (model.save_pretrained), "
            "and give each request a LoRARequest with a number that no earlier adapter had"
        )
    start = time.perf_counter()
    if sampler is None and _mesh(model) is None:
        raise WeightsNotSynced("training.sync: only a rank of FSDP2 may leave out the sampler, which another rank has")
    dtype = dtype or _computes(model)
    with _together(model, sampler):
        to = None if sampler is None else samplers.sampler(sampler)
    held = list(weights(model, dtype))
    synced = _synced.setdefault(huggingface.unwrapped(model), {})
    synced[_key(sampler)] = None  # until the end, nobody knows what the sampler serves
    sums = _checksums(model)
    ids, sampled = list(probe or PROBE), []
    with _together(model, sampler):
        if to is not None:
            to.load(held)
            to.forget()
            if version:
                to.name(version)
            if check:
                ids, sampled = to.score(ids)
    compared = 0
    if check:
        with torch.no_grad():  # every rank takes part in one forward pass
            own = logprobs(model, torch.tensor([ids], device=next(model.parameters()).device))
        with _together(model, sampler):
            compared = _compare(own[0, -len(sampled) :], sampled) if sampled else 0
    synced[_key(sampler)] = sums
    return Synced(version, len(held), time.perf_counter() - start, compared)


def weights(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights as a checkpoint of this model names them, floats rounded to `dtype`. A tied head is left out.

    Wrappers of torch.compile and DistributedDataParallel add nothing to the names. The ranks of FSDP2 gather each
    weight together, so each of them must take all.
    """
    model = huggingface.unwrapped(model)
    held = {name: p.detach() for name, p in model.named_parameters()}
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    held |= {name: t for name, t in model.state_dict().items() if name not in named}  # buffers
    if hasattr(model, "config"):
        from transformers.core_model_loading import revert_weight_conversion

        held = revert_weight_conversion(model, held)
    for name, tensor in held.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield name, whole.to(dtype) if whole.is_floating_point() else whole


def require_synced(model: torch.nn.Module, sampler: object = None) -> None:
    """Raise WeightsNotSynced unless `model` has the weights of its last sync, bit for bit, and that sync succeeded.

    sampler: as in `sync`; None means every sampler that this model was synced with. It reads each weight once.
    """
    model = huggingface.unwrapped(model)
    held = {key: sums for key, sums in _synced.get(model, {}).items() if not _gone(key)}
    asked = list(held.values()) if sampler is None else [held[key] for key in [_key(sampler)] if key in held]
    if not asked:
        raise WeightsNotSynced("this model was never synced with a sampler: call training.sync after each update")
    if None in asked:
        raise WeightsNotSynced("the last training.sync failed, so the sampler's weights are unknown: sync again")
    now = _checksums(model)
    for last in asked:
        changed = [name for name in now | last if now.get(name) != last.get(name)]
        if changed:
            raise WeightsNotSynced(
                f"{len(changed)} weights changed since the last training.sync, first {changed[0]}: the sampler serves "
                "older weights"
            )


def _key(sampler: object) -> object:
    if sampler is None:
        return _ELSEWHERE
    return sampler.rstrip("/") if isinstance(sampler, str) else weakref.ref(sampler)


def _gone(key: object) -> bool:
    return isinstance(key, weakref.ref) and key() is None


def _checksums(model: torch.nn.Module) -> dict[str, int]:
    """The checksum of each parameter and buffer. A write through `.data` changes no version of PyTorch's, but this."""
    held = huggingface.unwrapped(model).state_dict()
    sums = bits.checksums(t.to_local() if isinstance(t, DTensor) else t for t in held.values())
    return dict(zip(held, sums, strict=True))


def _mesh(model: torch.nn.Module) -> DeviceMesh | None:
    """The mesh of ranks that share the weights, or None."""
    return next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)


@contextlib.contextmanager
def _together(model: torch.nn.Module, sampler: object | None) -> Iterator[None]:
    """A block that ends on every rank that shares the weights in one way: a failure of one rank is raised on all."""
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    mesh = _mesh(model)
    if mesh is not None:
        flags = torch.tensor([failed is not None, sampler is not None], dtype=torch.int32, device=mesh.device_type)
        for dimension in range(mesh.ndim):
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
    if failed is not None:
        raise failed
    if mesh is not None and flags[0]:
        raise WeightsNotSynced(
            "training.sync failed on another rank, whose error gives the reason: the sampler's weights are unknown"
        )
    if mesh is not None and not flags[1]:
        raise WeightsNotSynced("training.sync: no rank has a sampler, so nobody got the weights")


def _computes(model: torch.nn.Module) -> torch.dtype:
    state = huggingface.armed(model)
    if state is None:
        raise BiPatchError("training.sync: the model is not armed. Call bi_patch.training.arm first")
    return state.dtype


def _compare(own: torch.Tensor, sampled: list[float]) -> int:
    """The number of equal logprobs. own: the trainer's [tokens]. Raises WeightsNotSynced if one differs."""
    found = compare(own, torch.tensor(sampled, dtype=torch.float32))
    if found.differing:
        raise WeightsNotSynced(
            f"training.sync: after the sync, {found.differing} of {found.compared} logprobs differ between sampler and "
            f"trainer, by up to {found.worst:.3g}. The sampler still serves other weights in part, or the model is not "
            "armed for this sampler. `bi-patch parity` names the first operation that differs"
        )
    return found.compared
