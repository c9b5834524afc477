"""Seams of sampling and logprobs."""

import functools

from bi_patch.seams.model import Seam, Target
from bi_patch.seams.overlay import Overlay, with_globals


def _generator(original):
    """InputBatch.add_request: a seeded request gets a generator that can take back its last draw."""

    @functools.wraps(original)
    def add_request(self, request, *args, **kwargs):
        from bi_patch.ops.cpu import draws

        if request.generator is not None:
            request.generator = draws.rewindable(request.generator)
        return original(self, request, *args, **kwargs)

    return add_request


def _sample(original):
    """TopKTopPSampler.forward_cpu: each seeded row draws from its own generator, remembered for taking back."""

    @functools.wraps(original)
    def forward_cpu(self, logits, generators, k, p):
        from bi_patch.ops.cpu import draws

        draws.remember(generators.values())
        return original(self, logits, generators, k, p)

    return forward_cpu


def _sorted_topk(original):
    """A function that calls torch.topk, with ties broken by the lower token."""
    import torch

    from bi_patch.ops.topk import topk

    static = isinstance(original, staticmethod)
    function = with_globals(original.__func__ if static else original, torch=Overlay(torch, topk=topk))
    return staticmethod(function) if static else function


SEAMS = (
    Seam(
        name="sampling.cpu_gather_logprobs",
        targets=(Target("vllm.v1.sample.sampler", "Sampler.gather_logprobs"),),
        close=_sorted_topk,
        why="the number of top logprobs picked is the most any request asks for, and ties follow it",
        how="ties go to the lower token",
        until="upstream's top logprobs are stable",
        causes=(8, 13),
    ),
    Seam(
        name="sampling.cpu_generator",
        targets=(Target("vllm.v1.worker.gpu_input_batch", "InputBatch.add_request"),),
        close=_generator,
        why="a prompt computed in chunks draws once a chunk and takes the draw back; CPU generators cannot, and stop",
        how="seeded requests hold a generator that restores its state before the last draw",
        until="upstream draws only for requests that sample",
        causes=(21,),
    ),
    Seam(
        name="sampling.cpu_draw",
        targets=(Target("vllm.v1.sample.ops.topk_topp_sampler", "TopKTopPSampler.forward_cpu"),),
        close=_sample,
        why="the draw of a row must depend on its own seed and position alone",
        how="remembers each generator's state before the draw, so that a discarded draw leaves no trace",
        until="upstream draws only for requests that sample",
        causes=(21,),
        serves=("TopKTopPSampler",),
    ),
)
