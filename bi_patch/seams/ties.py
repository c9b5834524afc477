"""Ties in one order: a function of vLLM that calls torch.topk prefers the lower token."""

from bi_patch.seams.overlay import Overlay, with_globals


def sorted_topk(original):
    """The function `original`, which calls torch.topk, with a topk that prefers the lower token in a tie."""
    import torch

    from bi_patch.ops.topk import topk

    static = isinstance(original, staticmethod)
    function = with_globals(original.__func__ if static else original, torch=Overlay(torch, topk=topk))
    return staticmethod(function) if static else function
