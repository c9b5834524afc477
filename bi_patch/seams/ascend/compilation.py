"""Graphs on Ascend: piecewise or none, because attention in a full graph keeps the split of its capture."""

from bi_patch.seams import graphs
from bi_patch.seams.ascend.common import refuse
from bi_patch.seams.model import Policy

# Passes that replace two operators, which the dispatch table serves, with a fused operator.
FUSIONS = ("fuse_norm_quant", "fuse_qknorm_rope", "fuse_allreduce_rms", "fuse_muls_add")


def _graphs(config) -> None:
    mode = config.compilation_config.cudagraph_mode
    name = getattr(mode, "name", str(mode))
    if name == "FULL_AND_PIECEWISE":
        config.compilation_config.cudagraph_mode = type(mode)["PIECEWISE"]
    elif name not in ("NONE", "PIECEWISE", "None"):
        refuse("compilation.ascend_graphs", [f"cudagraph_mode {name}"], "Use PIECEWISE or NONE")


def _fusions(config) -> None:
    """Turn vLLM-Ascend's fusion passes off in the configuration that the workers read."""
    held = getattr(config, "additional_config", None)
    if not isinstance(held, dict):
        config.additional_config = held = {}
    given = held.setdefault("ascend_compilation_config", {})
    given.update(dict.fromkeys(FUSIONS, False))


def _modes(config) -> None:
    graphs.check_mode("compilation.ascend_mode", config, ("NONE", "VLLM_COMPILE"))
    if getattr(config.compilation_config, "backend", None) == "inductor":
        refuse("compilation.ascend_mode", ["the compiler backend inductor"], "Leave the backend out")


SEAMS = ()
POLICIES = (
    Policy(
        name="compilation.ascend_graphs",
        apply=_graphs,
        why="attention in a captured graph keeps the split of its capture",
    ),
    Policy(
        name="compilation.ascend_mode",
        apply=_modes,
        why="PyTorch's own compilation makes a graph for one token and another for more, and Inductor's options "
        "choose kernels",
    ),
    Policy(name="compilation.ascend_fusions", apply=_fusions, why="fused operators avoid bi_patch's dispatch table"),
)
