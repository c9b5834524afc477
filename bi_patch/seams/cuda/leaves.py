"""Row-parallel layers on CUDA in fixed parts of K, for BI_PATCH_TP_INVARIANT."""

import functools

from bi_patch.ops.row_checks import ROWS, RowCheck
from bi_patch.seams import active, leaves
from bi_patch.seams.model import Seam, Target


def _forward(original):
    """RowParallelLinear.forward: one operator gives the whole sum over K, of all ranks."""
    from bi_patch.ops.cuda import leaves as ops

    if active.leaves:
        ops.define_op()

    @functools.wraps(original)
    def forward(self, input_):
        if not active.leaves:
            return original(self, input_)
        import torch

        x = input_
        if not self.input_is_parallel:
            x = input_.chunk(self.tp_size, dim=-1)[self.tp_rank].contiguous()
        bias = None if self.skip_bias_add else self.bias
        out = torch.ops.bi_patch.row_parallel(x, self.weight, bias, active.leaves // self.tp_size, self.tp_size)
        if not self.return_bias:
            return out
        return out, self.bias if self.skip_bias_add else None

    return forward


def prepare(model) -> None:
    """Check the layers of a loaded model, and connect its ranks. Raises UnsupportedFeature for what does not fit."""
    from bi_patch.kernels.triton.leaves import step
    from bi_patch.ops.cuda import linear

    for layer in model.modules():
        if not leaves.is_row_parallel(layer):
            continue
        leaves.check(layer)
        method = type(layer.quant_method).__name__
        if method != "UnquantizedLinearMethod":
            leaves.refuse(f"{method} is not covered")
        try:
            step(layer.input_size // active.leaves)
        except ValueError as error:
            leaves.refuse(str(error))
        if not linear.packed(layer.weight, layer.weight.shape[1]):
            leaves.refuse("the rows of a weight have gaps or no aligned address")
    leaves.one_zero(model)
    _connect()


def _connect() -> None:
    from vllm.distributed.parallel_state import get_tp_group

    from bi_patch.ops.cuda import leaves as ops
    from bi_patch.ops.cuda import ranks
    from bi_patch.seams.cuda.adder import adder
    from bi_patch.seams.cuda.communicator import carrier

    held = get_tp_group()
    if held.world_size == 1:
        return
    communicator = held.device_communicator
    carries, adds = carrier(communicator), adder(communicator)
    ops.connect(ops.Ranks(lambda x: ranks.all_reduce(x, communicator.ca_comm, carries, adds), carries.gather))


def checks(model):
    """A RowCheck for each distinct product: a row's root among other rows, which also compares the kernel's forms."""
    import torch

    from bi_patch.kernels.triton.leaves import product

    for layer in model.modules():
        if active.leaves and leaves.is_row_parallel(layer):
            own = active.leaves // layer.tp_size
            n, k = layer.weight.shape

            def make(rows, generator, k=k, dtype=layer.weight.dtype):
                return (torch.randn((rows, k), generator=generator, device="cuda").to(dtype),)

            def run(x, weight=layer.weight, own=own):
                return (product(x, weight, None, own, torch.float32),)

            name = f"N={n} K={k} in {own} parts {str(layer.weight.dtype).removeprefix('torch.')}"
            yield RowCheck("cuda.leaves", name, (*ROWS, 2049), make, run)


# In the area of the other sums over ranks: communicator.SEAMS has it.
SEAM = Seam(
    name="communicator.cuda_leaves",
    targets=(Target("vllm.model_executor.layers.linear", "RowParallelLinear.forward", releases=">=0.32"),),
    close=_forward,
    why="the number of ranks decides how the sum over K of a row-parallel layer is cut and rounded",
    how="with BI_PATCH_TP_INVARIANT, K is cut into fixed parts, which are added in a fixed tree in fp32; else the "
    "layer stays as it is",
    until="upstream has a mode with equal bits for every tensor-parallel size",
    causes=(14,),
    op="bi_patch.ops.cuda.leaves",
)
