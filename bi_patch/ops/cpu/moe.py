"""The choice of experts on CPU: the bundled kernel for softmax, and certified routers, which compiled code cannot open.

In the bundled kernel, the lower expert wins a tie.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch


def softmax_topk(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts of each row of logits [rows, experts] by softmax. The lower id wins a tie.

    Returns weights (fp32) and ids (int32), both [rows, top_k]. renormalize: divide each row's weights by their sum.
    """
    import torch

    return torch.ops.bi_cpu.softmax_topk(logits, top_k, renormalize)


# (hidden states [rows, hidden], logits [rows, experts], input ids [rows] or None) -> weights, ids [rows, top_k].
Router = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor | None"], "tuple[torch.Tensor, torch.Tensor]"]
_routers: dict[int, Router] = {}  # a router lives as long as its layer
_handles = itertools.count()


def keep(router: Router, owner: object) -> int:
    """Keep a router for `route` as long as its owner lives. Returns the router's handle."""
    define(
        "cpu_route(Tensor hidden, Tensor logits, Tensor? input_ids, int handle, int top_k) -> (Tensor, Tensor)",
        lambda hidden, logits, input_ids, handle, top_k: _run(_routers[handle], hidden, logits, input_ids),
        "CPU",
        _fake,
    )
    handle = next(_handles)
    _routers[handle] = router
    weakref.finalize(owner, _routers.pop, handle, None)
    return handle


def route(hidden, logits, input_ids, handle: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a kept router as one operator. Returns weights (fp32) and ids (int32), both [rows, top_k]."""
    import torch

    return torch.ops.bi_patch.cpu_route(hidden, logits, input_ids, handle, top_k)


def _run(router: Router, hidden, logits, input_ids):
    import torch

    weights, ids = router(hidden, logits, input_ids)
    return weights.to(torch.float32).contiguous(), ids.to(torch.int32).contiguous()


def _fake(hidden, logits, input_ids, handle, top_k):
    import torch

    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)
