"""What tests of several patch points share."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def float_experts(monkeypatch):
    """Layers of experts in floats of 4 bits, without a GPU.

    begin(seam, check): the kernel's products are computed by PyTorch from the weights that check(x, data, bias) returns
    [E, n, k], and vLLM's order of rows by the bundled one. end(held, experts, swiglu): the layer `held` runs vLLM's
    experts `experts`, with certificates of all forms.
    """
    import torch
    from vllm.model_executor.layers.fused_moe import moe_align_block_size as module

    from bi_patch.kernels.cuda import packed
    from bi_patch.ops.cuda import packed_experts as ops
    from bi_patch.seams.cuda import packed_products

    cached = [packed_products.own]

    def begin(seam, check):
        def product_of_experts(x, data, rows, bias, form, out):
            weight = check(x, data, bias)
            tiles = rows.sorted_ids[: int(rows.padded)].view(-1, 8 * form.tiles).tolist()
            for ids, expert in zip(tiles, rows.experts.tolist(), strict=False):
                ids = [i for i in ids if i < rows.ids]
                got = x[[i // rows.each for i in ids]].float() @ weight[expert].T
                got += 0 if bias is None else bias[expert].float()
                out[ids] = (got * (1 if rows.weights is None else rows.weights[ids, None])).to(out.dtype)

        monkeypatch.setattr(packed, "product_of_experts", product_of_experts)
        monkeypatch.setattr(
            module, "moe_align_block_size", lambda ids, block, experts, *_, **__: ops.sort(ids, block, experts)
        )
        monkeypatch.setattr(ops, "_able", {})
        cached.append(seam.own)
        for made in cached:
            made.cache_clear()

    def end(held, experts, swiglu):
        experts.activation = lambda kind, output, input: output.copy_(swiglu(input.float()).to(output.dtype))
        experts.moe_sum = lambda input, output, topk_ids, expert_map: output.copy_(input.float().sum(1))
        experts.post_gemm2_hook = None
        held.quant_method.moe_kernel = SimpleNamespace(fused_experts=experts)
        for problem in packed_products.problems(torch.nn.ModuleList([held])):
            ops._able[problem] = tuple(range(len(packed.FORMS_OF_EXPERTS)))

    yield SimpleNamespace(begin=begin, end=end)
    for made in cached:
        made.cache_clear()
