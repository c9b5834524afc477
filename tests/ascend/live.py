"""Imports the real vLLM-Ascend, armed, over the stub: every seam must close, and bi_patch's operators must serve
vLLM-Ascend's own functions.

`live.py patches` closes the seams by the code at the end of a patched copy's modules, without import hooks. Prints JSON
lines {"case", "told"}; "told" is empty if the case passes. Fakes replace acl and torchvision, which compute nothing
here.
"""

import importlib
import json
import os
import sys
import types

import stand_ins


def say(case: str, told: object = "") -> None:
    print(json.dumps({"case": case, "told": str(told) if told else ""}), flush=True)


def refused(case: str, run, *words: str) -> None:
    from bi_patch.errors import BiPatchError

    try:
        run()
        say(case, "was not refused")
    except BiPatchError as error:
        missing = [word for word in words if word not in str(error)]
        say(case, missing and f"{missing} not in: {error}")


def main() -> None:
    stand_ins.modules()
    import torch
    import torch_npu

    if sys.argv[1:] != ["patches"]:
        import bi_patch  # arms
    importlib.import_module("vllm_ascend.worker.worker")
    import bi_patch
    from bi_patch.arming import startup

    state = bi_patch.state()
    say("the platform is found", state.plan.platform != "ascend" and state.plan.platform)
    import canonical
    import host_ops

    canonical.install()
    host_ops.install()
    import vllm_ascend

    # vLLM-Ascend replaces the code of chat streams. The patch point there is optional: it only names a seed.
    found = [f for f in startup.inspect() if f.name != "answers.chat_stream"]
    seams = sorted((f.name, f.status) for f in found)
    print(json.dumps({"seams": seams, "from": vllm_ascend.__file__, "form": state.settings.form}), flush=True)
    open_seams = [(f.name, f.reason) for f in found if f.status != startup.CLOSED]
    say("every seam is closed", open_seams)
    startup.check()
    say("the anchors are the recorded ones")
    say("HCCL is strict", os.environ.get("HCCL_DETERMINISTIC") != "strict")

    from vllm_ascend import ascend_config, batch_invariant, utils
    from vllm_ascend.worker import worker

    say("the worker holds our mode", worker.init_batch_invariance is not batch_invariant.init_batch_invariance)
    held = types.SimpleNamespace(
        weight_nz_mode=1,
        enable_matmul_allreduce=True,
        enable_reduce_sample=False,
        eplb_config=None,
        ascend_compilation_config=types.SimpleNamespace(fuse_norm_quant=True, fuse_qknorm_rope=True),
    )
    ascend_config._ASCEND_CONFIG = held
    worker.init_batch_invariance()
    say("weight_nz is off", held.weight_nz_mode)
    say("matmul_allreduce is off", held.enable_matmul_allreduce)
    say("fusions are off", held.ascend_compilation_config.fuse_qknorm_rope)
    say("custom operators are off", utils.enable_custom_op())

    x, w, b = torch.randn(4, 32).to("npu"), torch.randn(8, 32).to("npu"), torch.randn(8).to("npu")
    with torch.inference_mode():
        got = torch.ops.vllm.unquantized_gemm(x, w, b).cpu()
        say(
            "vLLM-Ascend's linear",
            float((got - torch.nn.functional.linear(x.cpu(), w.cpu(), b.cpu())).abs().max()) > 1e-4,
        )
        from vllm_ascend.ops.fused_moe import experts_selector

        experts_selector.get_weight_prefetch_method = lambda: None
        tied = torch.zeros(3, 8).to("npu")
        weights, ids = experts_selector.select_experts(x[:3], tied, 2, False, True, num_experts=8)
        say("tied experts: the lower ids", ids.cpu().tolist() != [[0, 1]] * 3 and ids.cpu().tolist())
        say("weights are renormalized", float((weights.cpu().sum(-1) - 1).abs().max()) > 1e-6)
        from vllm_ascend.ops import rotary_embedding

        cache = torch.randn(16, 16).to("npu")
        arguments = (torch.arange(4).to("npu"), x, x, cache, 16, 16)
        q, _ = torch.ops.vllm.npu_rotary_embedding(*arguments, True)
        alone, _ = torch.ops.vllm.npu_rotary_embedding(arguments[0][2:3], x[2:3], x[2:3], cache, 16, 16, True)
        say("rotary: a row alone", not torch.equal(alone.cpu()[0], q.cpu()[2]))
        refused("rotary of another style", lambda: rotary_embedding.rope_forward_oot(*arguments, False), "neox")
        from vllm.v1.sample.ops import topk_topp_sampler

        logits = torch.randn(9, 50).to("npu")
        k, p = torch.full((9,), 10).to("npu"), torch.full((9,), 0.8).to("npu")
        every = topk_topp_sampler.apply_top_k_top_p(logits.clone(), k, p).cpu()
        one = topk_topp_sampler.apply_top_k_top_p(logits[7:8].clone(), k[:1], p[:1]).cpu()
        say("top-k and top-p: a row alone", not torch.equal(one[0], every[7]))
    from vllm_ascend.attention.attention_v1 import AscendAttentionBackendImpl as Attention
    from vllm_ascend.attention.utils import using_paged_attention
    from vllm_ascend.ops.layernorm import AscendRMSNormGated
    from vllm_ascend.platform import NPUPlatform

    say("paged attention is never chosen", using_paged_attention(1, None))
    refused("attention in a full graph", lambda: Attention.full_graph_fia(None), "PIECEWISE")
    refused("gated norms", lambda: AscendRMSNormGated.forward_oot(None, x), "norm.ascend_gated")
    chosen = types.SimpleNamespace(use_mla=True, use_sparse=False, use_compress=False)
    refused("MLA's backend", lambda: NPUPlatform.get_attn_backend_cls(None, chosen), "AscendMLABackend")
    chosen.use_mla = False
    say(
        "the plain backend is kept",
        not NPUPlatform.get_attn_backend_cls(None, chosen).endswith("AscendAttentionBackend"),
    )
    refused("a vendor operator", lambda: torch_npu.npu_moe_gating_top_k(x, 2), "npu::npu_moe_gating_top_k")
    bi_patch.disarm()
    restored = batch_invariant.init_batch_invariance.__module__ == "vllm_ascend.batch_invariant"
    say("disarming puts upstream's mode back", not restored)


if __name__ == "__main__":
    main()
