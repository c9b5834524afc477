"""The check of each worker, at its start, that ranks are added in one order, for every size of a message."""

import functools
from collections.abc import Callable
from typing import Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active

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
    from vllm.distributed.parallel_state import get_tp_group

    from bi_patch.ops import collectives

    group = get_tp_group()
    if group.world_size == 1:
        return
    if covers is not None:
        covers(config, group)
    for width, most, dtype in _messages(config, ordered):
        found = collectives.moved(
            group.all_reduce,
            rank=group.rank_in_group,
            ranks=group.world_size,
            width=width,
            most=most,
            dtype=dtype,
            device=group.device,
            ordered=ordered,
        )
        if found is not None:
            raise UnsupportedFeature(
                f"{name}: {group.world_size} ranks add a row of a message of {found} rows of {width} elements in "
                f"another order than {'by rank' if ordered else 'a row alone'}. {todo}"
            )


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
