"""Seams of sampling and logprobs."""

import functools

from bi_patch.seams.model import Seam, Target

_CPU_RELEASES = ">=0.32,<0.34"


def register_rows(vocab_size: int) -> None:
    """Ask for a certificate of the row order of every reduction that the sampler does over `vocab_size` logits."""
    from bi_patch.orders import rows

    rows.register_sampling(vocab_size)


def _cpu_generator(original):
    """InputBatch.add_request: a seeded request gets a generator that can take back its last draw."""

    @functools.wraps(original)
    def add_request(self, request, *args, **kwargs):
        from bi_patch.orders import draws

        if request.generator is not None:
            request.generator = draws.rewindable(request.generator)
        return original(self, request, *args, **kwargs)

    return add_request


def _cpu_sample(original):
    """TopKTopPSampler.forward_cpu: each seeded row draws from its own generator, remembered for taking back."""

    @functools.wraps(original)
    def forward_cpu(self, logits, generators, k, p):
        from bi_patch.orders import draws

        draws.remember(generators.values())
        return original(self, logits, generators, k, p)

    return forward_cpu


SEAMS = (
    Seam(
        name="sampling.cpu_generator",
        targets=(Target("vllm.v1.worker.gpu_input_batch", "InputBatch.add_request", _CPU_RELEASES),),
        close=_cpu_generator,
        why="a prompt computed in chunks draws once a chunk and takes the draw back; CPU generators cannot, and stop",
        how="seeded requests hold a generator that restores its state before the last draw",
        until="upstream draws only for requests that sample",
        platforms=frozenset({"cpu"}),
        causes=(21,),
    ),
    Seam(
        name="sampling.cpu_draw",
        targets=(Target("vllm.v1.sample.ops.topk_topp_sampler", "TopKTopPSampler.forward_cpu", _CPU_RELEASES),),
        close=_cpu_sample,
        why="the draw of a row must depend on its own seed and position alone",
        how="remembers each generator's state before the draw, so that a discarded draw leaves no trace",
        until="upstream draws only for requests that sample",
        platforms=frozenset({"cpu"}),
        causes=(21,),
    ),
)
