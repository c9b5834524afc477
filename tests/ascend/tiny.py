"""A tiny Qwen3, dense and with experts, on npu:0 through the routes; its rows must not depend on what runs
beside them.

The layers are those of Qwen3 (grouped queries, norms of heads, SwiGLU, tied shapes only in size), written
with the operators that
vLLM-Ascend calls: F.linear, npu_rms_norm, npu_add_rms_norm, npu_fused_infer_attention_score over a paged
cache, npu_swiglu,
npu_grouped_matmul, npu_moe_token_unpermute, log_softmax. Every sum goes through the kernels in the
interpreter. Prints JSON.
"""

import json
import sys

import canonical
import host_ops
import torch
import torch_npu

from bi_patch.orders import ascend_ops, ascend_routes

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, VOCAB, LAYERS, EXPERTS, TOP_K, BLOCK = (
    32,
    4,
    2,
    16,
    48,
    96,
    2,
    4,
    2,
    128,
)
F = torch.nn.functional


class Model:
    """Weights, and a paged cache of 8 blocks a layer, on the NPU."""

    def __init__(self, experts: bool, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(7)

        def weight(*shape, scale=0.3):
            return (torch.randn(*shape, generator=generator) * scale).to(dtype).to("npu")

        self.experts, self.dtype = experts, dtype
        width = (HEADS + 2 * KV_HEADS) * HEAD
        self.embedding, self.head, self.norm = (
            weight(VOCAB, HIDDEN),
            weight(VOCAB, HIDDEN),
            weight(HIDDEN, scale=1),
        )
        self.layers = [
            {
                "norm": weight(HIDDEN, scale=1), "qkv": weight(width, HIDDEN), "bias": weight(width),
                "q_norm": weight(HEAD, scale=1), "k_norm": weight(HEAD, scale=1), "o": weight(HIDDEN, HEADS * HEAD),
                "norm_2": weight(HIDDEN, scale=1), "router": weight(EXPERTS, HIDDEN),
                "up": weight(EXPERTS if experts else 1, 2 * INNER, HIDDEN),
                "down": weight(EXPERTS if experts else 1, HIDDEN, INNER),
            }
            for _ in range(LAYERS)
        ]  # fmt: skip
        angles = torch.arange(512.0)[:, None] * torch.logspace(0, -3, HEAD // 2)
        self.rotary = torch.cat((angles.cos(), angles.sin()), -1).to(dtype).to("npu")
        self.clear()

    def clear(self):
        shape = (8, BLOCK, KV_HEADS, HEAD)
        self.cache = [[torch.zeros(shape, dtype=self.dtype).to("npu") for _ in "kv"] for _ in range(LAYERS)]

    def step(self, work: list[tuple[list[int], list[int], int]]) -> torch.Tensor:
        """Log-probabilities of every token. work: for each sequence its tokens, its blocks, and how many
        came before."""
        tokens = torch.tensor([t for ids, _, _ in work for t in ids]).to("npu")
        places = [range(before, before + len(ids)) for ids, _, before in work]
        slots = [
            blocks[p // BLOCK] * BLOCK + p % BLOCK
            for (_, blocks, _), at in zip(work, places, strict=True)
            for p in at
        ]
        positions = torch.tensor([p for at in places for p in at]).to("npu")
        ends, lengths = [], []
        for ids, _, before in work:
            ends.append((ends[-1] if ends else 0) + len(ids))
            lengths.append(before + len(ids))
        table = torch.zeros(len(work), 4, dtype=torch.int32)
        for line, (_, blocks, _) in zip(table, work, strict=True):
            line[: len(blocks)] = torch.tensor(blocks)
        table = table.to("npu")
        hidden = F.embedding(tokens, self.embedding)
        residual = None
        for layer, (keys, values) in zip(self.layers, self.cache, strict=True):
            if residual is None:
                residual, x = hidden, torch_npu.npu_rms_norm(hidden, layer["norm"], 1e-6)[0]
            else:
                x, _, residual = torch_npu.npu_add_rms_norm(hidden, residual, layer["norm"], 1e-6)
            qkv = F.linear(x, layer["qkv"], layer["bias"])
            q, k, v = qkv.split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], -1)
            q = torch_npu.npu_rms_norm(q.reshape(-1, HEADS, HEAD), layer["q_norm"], 1e-6)[0].view(
                -1, HEADS * HEAD
            )
            k = torch_npu.npu_rms_norm(k.reshape(-1, KV_HEADS, HEAD), layer["k_norm"], 1e-6)[0].view(
                -1, KV_HEADS * HEAD
            )
            q, k = ascend_ops.rotate(positions, q, k, self.rotary, HEAD)
            host_ops.view(keys).flatten(0, 1)[slots] = host_ops.view(k).view(-1, KV_HEADS, HEAD)
            host_ops.view(values).flatten(0, 1)[slots] = host_ops.view(v).reshape(-1, KV_HEADS, HEAD)
            attended, _ = torch_npu.npu_fused_infer_attention_score(
                q.view(-1, HEADS, HEAD), keys.view(8, BLOCK, -1), values.view(8, BLOCK, -1), block_table=table,
                input_layout="TND", block_size=BLOCK, actual_seq_lengths=ends, actual_seq_lengths_kv=lengths,
                num_key_value_heads=KV_HEADS, num_heads=HEADS, scale=HEAD**-0.5, sparse_mode=3,
            )  # fmt: skip
            hidden = F.linear(attended.view(-1, HEADS * HEAD), layer["o"])
            x, _, residual = torch_npu.npu_add_rms_norm(hidden, residual, layer["norm_2"], 1e-6)
            hidden = self._experts(x, layer) if self.experts else self._dense(x, layer)
        x, _, _ = torch_npu.npu_add_rms_norm(hidden, residual, self.norm, 1e-6)
        return F.linear(x, self.head).log_softmax(-1, dtype=torch.float32)

    def _dense(self, x, layer):
        return F.linear(torch_npu.npu_swiglu(F.linear(x, layer["up"][0])), layer["down"][0])

    def _experts(self, x, layer):
        weights, ids = F.linear(x, layer["router"]).softmax(-1, dtype=torch.float32).topk(TOP_K)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        chosen = ids.cpu().flatten()
        order = chosen.argsort(stable=True)
        rows = x.index_select(0, (order // TOP_K).to("npu"))
        counts = torch.bincount(chosen, minlength=EXPERTS).to("npu")
        how = {"split_item": 2, "group_type": 0, "group_list_type": 1, "group_list": counts}
        up = torch_npu.npu_grouped_matmul([rows], [layer["up"].transpose(1, 2)], **how)[0]
        down = torch_npu.npu_grouped_matmul(
            [torch_npu.npu_swiglu(up)], [layer["down"].transpose(1, 2)], **how
        )[0]
        return torch_npu.npu_moe_token_unpermute(down, order.argsort().to("npu"), weights)


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.cpu().view(torch.int32) != b.cpu().view(torch.int32)).sum())


def main(experts: bool, dtype: torch.dtype) -> None:
    model = Model(experts, dtype)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (5, 131, 1, 9)]
    blocks = [[3], [0, 5], [1], [6]]
    alone = []
    for prompt, held in zip(prompts, blocks, strict=True):
        model.clear()
        alone.append(model.step([(prompt, held, 0)]))
    model.clear()
    together = model.step([(prompt, held, 0) for prompt, held in zip(prompts, blocks, strict=True)])
    parts = together.split([len(p) for p in prompts])
    found = {"batch": sum(differing(a, b) for a, b in zip(alone, parts, strict=True))}
    model.clear()
    chunked = [
        model.step([(prompts[1][:77], blocks[1], 0), (prompts[0], blocks[0], 0)])[:77],
        model.step([(prompts[1][77:], blocks[1], 77)]),
    ]
    found["chunked prefill"] = differing(torch.cat([c.cpu() for c in chunked]), alone[1])
    model.clear()
    model.step([(prompts[1][:-1], blocks[1], 0), (prompts[3][:-1], blocks[3], 0)])
    last = [(prompts[i][-1:], blocks[i], len(prompts[i]) - 1) for i in (3, 1)]
    decoded = model.step(last)
    found["decode"] = differing(decoded, torch.stack([alone[3][-1].cpu(), alone[1][-1].cpu()]))
    finite = bool(torch.isfinite(together.cpu()).all())
    print(json.dumps({"compared": together.numel(), "differing": found, "finite": finite}), flush=True)


def leaves_follow_the_rows() -> None:
    """A planted fault: keys are cut more finely for few tokens, as a split-KV heuristic does."""
    from bi_patch.kernels.ascend import attention

    stock = attention.attention

    def attend(query, *args, **kwargs):
        attention.LEAF = 64 if query.shape[0] < 80 else 128
        return stock(query, *args, **kwargs)

    attention.attention = attend


if __name__ == "__main__":
    if "fault" in sys.argv:
        leaves_follow_the_rows()
    canonical.install()
    host_ops.install()
    ascend_routes.install()
    with torch.inference_mode():
        main(sys.argv[1] == "experts", getattr(torch, sys.argv[2]))
