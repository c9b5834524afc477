"""The check of each worker, at its start: all ranks are armed alike, and are added in one order in every size."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active, agreement

_FEW = 65  # rows of a width that no layer has


def closing(
    name: str, ordered: bool, todo: str, covers: Callable[[Any, Any], None] | None = None
) -> Callable[[Any], Any]:
    """`close` of a seam on init_worker_distributed_environment: after it, sums over ranks are checked bitwise.

    name: the seam's name, for the error. ordered: the sums must be those in rank order. todo: what the error advises.
    covers: (VllmConfig, vLLM's group of tensor-parallel ranks) -> None; it raises UnsupportedFeature for several ranks
    whose sums no run of an engine has shown.
    """

    def close(original):
        @functools.wraps(original)
        def init_worker_distributed_environment(vllm_config, *args, **kwargs):
            result = original(vllm_config, *args, **kwargs)
            _check(vllm_config, name, ordered, todo, covers)
            return result

        return init_worker_distributed_environment

    return close


def _check(config: Any, name: str, ordered: bool, todo: str, covers: Callable[[Any, Any], None] | None = None) -> None:
    from vllm.distributed.parallel_state import get_tp_group, get_world_group

    agreement.check(name, get_world_group())
    group = get_tp_group()
    if group.world_size == 1:
        return
    if covers is not None:
        agreement.together(group, _refusal(covers, config, group))
    try:
        found = [(rows, width) for rows, width in _moved(config, group, ordered) if rows is not None]
    except Exception as error:  # the others must not wait for this rank
        agreement.together(group, error)
        raise
    agreement.together(
        group,
        UnsupportedFeature(
            f"{name}: {group.world_size} ranks add a row of a message of {found[0][0]} rows of {found[0][1]} elements "
            f"in another order than {'by rank' if ordered else 'a row alone'}. {todo}"
        )
        if found
        else None,
    )


def _refusal(covers: Callable[[Any, Any], None], config: Any, group: Any) -> Exception | None:
    try:
        covers(config, group)
    except Exception as error:  # of any kind: the others must not wait for this rank
        return error
    return None


def _moved(config: Any, group: Any, ordered: bool) -> Iterator[tuple[int | None, int]]:
    """For each kind of message: the smallest number of rows that are added otherwise, or None, and their width."""
    from bi_patch.ops import collectives

    for width, most, dtype in _messages(config, ordered):
        moved = collectives.moved(
            group.all_reduce,
            rank=group.rank_in_group,
            ranks=group.world_size,
            width=width,
            most=most,
            dtype=dtype,
            device=group.device,
            ordered=ordered,
        )
        yield moved, width


def _messages(config: Any, ordered: bool) -> list[tuple[int, int, Any]]:
    """(elements in a row, the largest number of rows, dtype) of the messages that the check sends."""
    import torch

    width, dtype = config.model_config.get_hidden_size(), config.model_config.dtype
    most = config.scheduler_config.max_num_batched_tokens
    asked = [(width, most, dtype)]
    if ordered:
        asked.append((width + 1, min(most, _FEW), dtype))  # rows that do not fill whole 16-byte lines
    if active.leaves:
        asked.append((width, most, torch.float32))  # roots of trees
    return asked
