"""The check of each worker, at its start: all ranks are armed alike, and are added in one order in every size."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.platforms.features.ranks import norms
from bi_patch.seams import active, agreement, stages

_FEW = 65  # rows of a width that no layer has


def closing(
    name: str, ordered: bool, todo: str, begin: Callable[[Any, Any], None] | None = None
) -> Callable[[Any], Any]:
    """`close` of a seam on init_worker_distributed_environment: after it, sums over ranks are checked bitwise.

    name: the seam's name, for the error. ordered: the sums must be those in rank order. todo: what the error advises.
    begin: (VllmConfig, vLLM's group of tensor-parallel ranks) -> None, before several ranks are checked. It makes their
    certificates, and raises UnsupportedFeature for ranks whose sums no run of an engine has shown.
    """

    def close(original):
        @functools.wraps(original)
        def init_worker_distributed_environment(vllm_config, *args, **kwargs):
            result = original(vllm_config, *args, **kwargs)
            _check(vllm_config, name, ordered, todo, begin)
            return result

        return init_worker_distributed_environment

    return close


def _check(config: Any, name: str, ordered: bool, todo: str, begin: Callable[[Any, Any], None] | None) -> None:
    from vllm.distributed.parallel_state import get_tp_group, get_world_group

    world = get_world_group()
    agreement.check(name, world)
    stages.watch(world)
    group = get_tp_group()
    # All ranks agree after each check: one that stopped alone would leave the ranks of other groups waiting.
    if group.world_size > 1:
        if begin is not None:
            agreement.together(world, _moves(begin, config, group))
        agreement.together(world, _moves(_whole, config, group, name, ordered, todo))
    sharing = _sharing(config)
    if sharing is not None:
        agreement.together(world, _moves(_slices, config, sharing, name, todo))


def _whole(config: Any, group: Any, name: str, ordered: bool, todo: str) -> None:
    found = [(rows, width) for rows, width in _moved(config, group, ordered) if rows is not None]
    if found:
        raise UnsupportedFeature(
            f"{name}: {group.world_size} ranks add a row of a message of {found[0][0]} rows of {found[0][1]} elements "
            f"in another order than {'by rank' if ordered else 'a row alone'}. {todo}"
        )


def ranks_of_experts(config: Any) -> int:
    """The number of data-parallel ranks that share a layer of experts."""
    several = int(getattr(config.parallel_config, "data_parallel_size", 1) or 1)
    return several if getattr(getattr(config, "model_config", None), "is_moe", False) else 1


def _sharing(config: Any) -> Any:
    """vLLM's group of ranks that share the rows of experts: they keep slices of a sum. None if no ranks do."""
    from vllm.distributed import parallel_state

    if ranks_of_experts(config) == 1:
        return None
    # Tensor-parallel ranks have rows of their own, too.
    split = getattr(config.parallel_config, "use_sequence_parallel_moe", False)
    return parallel_state.get_ep_group() if split else parallel_state.get_dp_group()


def others(config: Any) -> int:
    """The most rows that other ranks may add to this rank's rows in a layer of experts."""
    ranks = ranks_of_experts(config)
    if ranks == 1:
        return 0
    tokens = config.scheduler_config.max_num_batched_tokens
    return (ranks - 1) * (tokens + config.parallel_config.tensor_parallel_size)  # filled up to a multiple of ranks


def alike(name: str, config: Any, certify: Callable[[], Iterable[Any]]) -> None:
    """Make certificates, and compare those of ranks that share the rows of experts: any may serve a row.

    name: the seam's, for the error. certify: makes the certificates of this rank. Every rank calls it. Raises what
    `certify` raises, on every rank that shares experts. Raises UnsupportedFeature on all of these ranks if other
    certificates failed on one than on another.
    """
    if ranks_of_experts(config) == 1:
        certify()
        return
    from vllm.distributed.parallel_state import get_world_group

    world, made = get_world_group(), []
    agreement.together(world, _refusal(lambda: made.extend(certify())))
    agreement.together(world, _refusal(_same, name, _sharing(config), made))


def _same(name: str, group: Any, made: list[Any]) -> None:
    import torch.distributed as dist

    said: list[Any] = [None] * group.world_size
    dist.all_gather_object(said, sorted(str(c.key.problem) for c in made if not c.passed), group=group.cpu_group)
    differing = sorted({problem for failed in said for problem in failed if not all(problem in f for f in said)})
    if differing:
        raise UnsupportedFeature(
            f"{name}: {group.world_size} ranks that share experts have other certificates "
            f"({', '.join(differing[:3])}), so a row would get other bits on another rank. Delete the folder of "
            "certificates, use ranks of one kind of device, or set BI_PATCH=0 for every rank"
        )


def _slices(config: Any, group: Any, name: str, todo: str) -> None:
    from bi_patch.ops import collectives

    width, most, dtype = messages(config, False)[0]
    sizes = collectives.moved_slices(
        lambda rows, sizes: group.reduce_scatterv(rows, 0, sizes),
        rank=group.rank_in_group,
        ranks=group.world_size,
        width=width,
        most=most,
        dtype=dtype,
        device=group.device,
    )
    if sizes is not None:
        raise UnsupportedFeature(
            f"{name}: {group.world_size} ranks that share experts add a row of slices of {sizes} rows in another order "
            f"than by rank. {todo}"
        )


def _moves(check: Callable[..., None], *given: Any) -> UnsupportedFeature | None:
    """What a check found that exchanges messages, or None. Raises another error at once, for the ranks that wait for
    this rank's next message do not come to `together`. They hear of it where ranks hear what stops a rank's start."""
    try:
        check(*given)
    except UnsupportedFeature as error:
        return error
    return None


def _refusal(check: Callable[..., None], *given: Any) -> Exception | None:
    """What this rank's own check raises, or None."""
    try:
        check(*given)
    except Exception as error:  # of any kind: the others must not wait for this rank
        return error
    return None


def _moved(config: Any, group: Any, ordered: bool) -> Iterator[tuple[int | None, int]]:
    """For each kind of message: the smallest number of rows that are added otherwise, or None, and their width."""
    from bi_patch.ops import collectives

    for width, most, dtype in messages(config, ordered):
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


def messages(config: Any, ordered: bool) -> list[tuple[int, int, Any]]:
    """(elements in a row, the largest number of rows, dtype) of the messages that the check sends."""
    import torch

    width, dtype = config.model_config.get_hidden_size(), config.model_config.dtype
    most = config.scheduler_config.max_num_batched_tokens
    asked = [(width, most, dtype)]
    if ordered:
        asked.append((width + 1, min(most, _FEW), dtype))  # rows that do not fill whole 16-byte lines
    if norms(config):
        asked.append((2, most, torch.float32))  # sums of squares of a row's queries and keys
    if active.leaves:
        asked.append((width, most, torch.float32))  # roots of trees
    return asked
