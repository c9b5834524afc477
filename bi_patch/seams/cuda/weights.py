"""Weight updates on CUDA: a worker runs no step with weights that its engine core does not know of."""

from bi_patch.seams import weights
from bi_patch.seams.model import Seam, Target


def _step(name: str, module: str, **given) -> Seam:
    return Seam(
        name=f"weights.{name}",
        targets=(Target(module, "GPUModelRunner.execute_model"),),
        close=weights.before_step,
        why="a load in a worker that the engine core did not ask for leaves the core's cached keys and values",
        how="a step after such a load is refused by name",
        until="upstream keys cached blocks by the weights (https://github.com/vllm-project/vllm/pull/46125)",
        causes=(31,),
        **given,
    )


SEAMS = (
    _step("cuda_step", "vllm.v1.worker.gpu_model_runner"),
    _step("cuda_step_v2", "vllm.v1.worker.gpu.model_runner", on_import=True),
)
