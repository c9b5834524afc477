"""torch.compile on CPU: every number of tokens runs the same compiled code."""

from bi_patch.seams import graphs
from bi_patch.seams.model import Policy


def _refuse_sizes(config) -> None:
    graphs.refuse_sizes("compilation.cpu_sizes", config)


def _modes(config) -> None:
    # vLLM's CPU platform turns VLLM_COMPILE into DYNAMO_TRACE_ONCE, which keeps the first graph and drops its guards.
    graphs.check_mode("compilation.cpu_mode", config, ("NONE", "DYNAMO_TRACE_ONCE", "VLLM_COMPILE"))


POLICIES = (
    Policy(
        name="compilation.cpu_sizes",
        apply=_refuse_sizes,
        why="vLLM compiles separate code for each of these sizes",
    ),
    Policy(
        name="compilation.cpu_mode",
        apply=_modes,
        why="PyTorch's own compilation makes a graph for one token and another for more",
    ),
)
