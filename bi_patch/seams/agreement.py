"""Ranks of an engine agree before they serve: all are armed, by one bi_patch, on one kind of device.

An engine asks the workers that it starts. Where an external launcher or Ray starts the ranks, an engine may see its own
rank only. So the ranks ask each other, as soon as vLLM has connected them.
"""

from __future__ import annotations

import importlib
import os
from datetime import timedelta
from importlib.metadata import version
from typing import Any

from bi_patch import identity
from bi_patch.errors import SeamOpen, UnsupportedFeature
from bi_patch.seams import active

SECONDS = 30
_DEVICE = "device"
_CURE = (
    "Install the same bi_patch for every rank, and set VLLM_BATCH_INVARIANT=1 and the same settings in the environment "
    "in which the launcher, Ray or the other nodes start. Or set BI_PATCH=0 for every rank"
)


def check(name: str, group: Any) -> None:
    """Compare what all ranks of `group`, vLLM's group of the engine's ranks, say of themselves. Every rank calls it.

    name: the seam's, for the errors. Raises SeamOpen on every armed rank if another does not answer within SECONDS
    seconds, or has another bi_patch, vLLM or setting. Raises UnsupportedFeature for different kinds of devices.
    """
    import torch.distributed as dist

    if group.world_size == 1:
        return
    try:
        if dist.get_backend(group.cpu_group) == dist.Backend.GLOO:  # no other has a barrier that ends with a reason
            dist.monitored_barrier(group.cpu_group, timedelta(seconds=SECONDS), wait_all_ranks=True)
    except RuntimeError as error:
        raise SeamOpen(
            f"{name}: within {SECONDS} s, not every one of {group.world_size} ranks said that it is armed ({error}). "
            f"{_CURE}"
        ) from error
    said: list[Any] = [None] * group.world_size
    dist.all_gather_object(said, _own(), group=group.cpu_group)
    for what in said[0]:
        values = [held.get(what) for held in said]
        if others := [f"{rank}: {value}" for rank, value in enumerate(values) if value != values[0]]:
            kind, cure = (SeamOpen, _CURE)
            if what == _DEVICE:
                kind, cure = UnsupportedFeature, "Use ranks of one kind of device, or set BI_PATCH=0 for every rank"
            raise kind(
                f"{name}: {group.world_size} ranks differ in {what} (0: {values[0]}; {', '.join(others)}). {cure}"
            )


def together(group: Any, own: Exception | None) -> None:
    """Raise what this rank of `group` found, or what another found. A rank that went on would wait for the others."""
    import torch.distributed as dist

    said: list[Any] = [None] * group.world_size
    dist.all_gather_object(said, "" if own is None else str(own) or type(own).__name__, group=group.cpu_group)
    if own is not None:
        raise own
    for rank, text in enumerate(said):
        if text:
            raise UnsupportedFeature(f"{text} (rank {rank} said this)")


def every(group: Any, own: bool) -> bool:
    """Whether all ranks of `group` say True. Every rank calls it, so that all of them go on in the same way."""
    import torch.distributed as dist

    if group.world_size == 1:
        return own
    said: list[Any] = [None] * group.world_size
    dist.all_gather_object(said, own, group=group.cpu_group)
    return all(said)


def _own() -> dict[str, str]:
    """What decides this rank's bits, by its name in an error."""
    plan = active.plan
    if plan is None:
        raise SeamOpen("communicator: a rank that is not armed cannot answer for bi_patch")
    return {
        "bi_patch": identity.digest(),
        "vLLM": f"{plan.release} for {plan.platform}",
        **settings(plan.platform),
        "PyTorch": version("torch"),
        _DEVICE: _device(plan.platform),
    }


def settings(platform: str) -> dict[str, str]:
    """The settings of this process that decide bits, by their name in an error."""
    return {
        "settings": f"BI_PATCH_TP_INVARIANT={active.leaves} BI_PATCH_MLA={active.mla}",
        "open patch points": os.environ.get("BI_PATCH_LEAVE_OPEN", "") or "none",
        "variables of libraries": ", ".join(_machine(platform).switches()) or "none",
    }


def _device(platform: str) -> str:
    found = _machine(platform).device()
    return found.rpartition(", ")[0] if platform == "cpu" else found  # ranks may have other numbers of threads


def _machine(platform: str) -> Any:
    return importlib.import_module(f"bi_patch.ops.{platform}.machine")
