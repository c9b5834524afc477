"""torch.compile and CUDA graphs: compilation stays on, and every number of tokens runs the same compiled code."""

from bi_patch.seams import graphs
from bi_patch.seams.model import Policy, Seam, Target, Variable


def _no_breakable(original):
    """VllmConfig._uses_breakable_cudagraph_for_batch_invariance: False, because bi_patch looks tiles up at run time."""

    def _uses_breakable_cudagraph_for_batch_invariance(self) -> bool:
        return False

    return _uses_breakable_cudagraph_for_batch_invariance


def _refuse_sizes(config) -> None:
    graphs.refuse_sizes("compilation.cuda_sizes", config)


def _modes(config) -> None:
    graphs.check_mode("compilation.cuda_mode", config, ("NONE", "VLLM_COMPILE"))


def _untimed(config) -> None:
    """vLLM before 0.33 times combined kernels also where Inductor is deterministic, which then stops the start."""
    given = getattr(config.compilation_config, "inductor_compile_config", None) or {}
    if given.get("benchmark_combo_kernel"):
        given["benchmark_combo_kernel"] = False


SEAMS = (
    Seam(
        name="compilation.cuda_breakable",
        targets=(Target("vllm.config.vllm", "VllmConfig._uses_breakable_cudagraph_for_batch_invariance", ">=0.32"),),
        close=_no_breakable,
        why="upstream's mode turns torch.compile off for models for which it has tuned tiles",
        how="torch.compile and full CUDA graphs stay on, because bi_patch's linear op chooses its route at run time",
        until="upstream's mode chooses its tiles at run time under torch.compile "
        "(https://github.com/vllm-project/vllm/pull/54503)",
    ),
)

VARIABLES = (
    Variable(
        name="compilation.cuda_deterministic",
        variable="TORCHINDUCTOR_DETERMINISTIC",
        value="1",
        why="Inductor tunes reductions anew in each process, so a restart could change bits",
    ),
)

POLICIES = (
    Policy(
        name="compilation.cuda_sizes",
        apply=_refuse_sizes,
        why="vLLM compiles and tunes separate code for each of these sizes",
    ),
    Policy(
        name="compilation.cuda_mode",
        apply=_modes,
        why="PyTorch's own compilation makes a graph for one token and another for more",
    ),
    Policy(
        name="compilation.cuda_combined",
        apply=_untimed,
        why="Inductor would time kernels anew in each process to decide whether to combine them",
    ),
)
