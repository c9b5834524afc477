"""Runs as one of two ranks: an armed model under FSDP2, on one rank and on both, beside the same model in one piece.

    fsdp_ranks.py RANK STORE

Prints one line per case: `ok NAME` or `FAIL NAME: reason`. Adapters are left out without peft.
"""

import importlib.util
import os
import sys

os.environ |= {"BI_PATCH": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from bi_patch import training  # noqa: E402
from bi_patch.errors import SamplerFailed, WeightsNotSynced  # noqa: E402
from bi_patch.ops import bits  # noqa: E402

sync = sys.modules["bi_patch.training.sync"]

SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DENSE, WITH_EXPERTS, WITH_ADAPTERS = "dense", "experts", "adapters"
RANK = int(sys.argv[1])


def made(kind=DENSE):
    torch.manual_seed(0)
    shape = SHAPE | (EXPERTS if kind == WITH_EXPERTS else {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, tie_word_embeddings=False))
    if kind == WITH_ADAPTERS:
        import peft

        # The scaling is a power of two: a gradient in bf16 is rounded before it is scaled, and after.
        asked = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"])
        model = peft.get_peft_model(model, asked)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return model.train()


def sharded(model, mesh, policy):
    inner = training.huggingface.unwrapped(model)
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(inner.lm_head, mesh=mesh, mp_policy=policy)
    fully_shard(inner, mesh=mesh, mp_policy=policy)
    return model


def batch(rank):
    ids = torch.randint(0, 320, (3, 50), generator=torch.Generator().manual_seed(rank))
    return ids, (torch.arange(50) < torch.tensor([50, 9, 21])[:, None]).long()


def trained(model, ids, mask):
    """Logprobs, and the gradients of their mean, whole and in fp32."""
    found = training.logprobs(model, ids, mask)
    (found.sum() / 100).backward()
    grads = {name: _whole(p.grad).float() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found.detach(), grads


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def report(name, wrong):
    print(f"FAIL {name}: {wrong}" if wrong else f"ok {name}", flush=True)


class Sampler:
    """Stands in for the sampler of rank 0: it keeps what it is given, and scores with a model of these weights."""

    def load(self, held):
        self.model = training.arm(made(), dtype=torch.bfloat16)
        self.model.load_state_dict(dict(held))

    def forget(self):
        pass

    def score(self, prompt):
        ids = [*prompt, 7, 8, 9]
        with torch.no_grad():
            return ids, training.logprobs(self.model, torch.tensor([ids]))[0, -3:].tolist()


def synced(name, model):
    """Both ranks gather the weights, and rank 0 alone has a sampler."""
    sync.samplers.sampler = lambda given: given
    own = Sampler() if RANK == 0 else None
    found = training.sync(model, own)
    report(f"{name}: sync", "" if found.compared == (0 if RANK else 3) else str(found))
    training.require_synced(model, own)
    training.require_synced(model)
    for what, broken, kind in (
        ("loads nothing", "load", SamplerFailed),
        ("keeps old weights", "score", WeightsNotSynced),
        ("none", "", WeightsNotSynced),
    ):
        report(f"{name}: a sampler that fails: {what}", failing(model, broken, kind))


def failing(model, broken, kind):
    """A sync in which rank 0's sampler fails, or has none: every rank must learn of it. Returns what is wrong."""
    own = Sampler() if RANK == 0 and broken else None
    if own is not None and broken == "load":
        own.load = _fails
    if own is not None and broken == "score":
        own.score = lambda prompt: ([*prompt, 7], [-9.0])
    try:
        training.sync(model, own)
    except (SamplerFailed, WeightsNotSynced) as error:
        if type(error) is not (WeightsNotSynced if RANK else kind):
            return repr(error)
    else:
        return "no error"
    if not broken:  # nobody got weights, so an earlier sync still counts
        return ""
    try:
        training.require_synced(model, own)
    except WeightsNotSynced:
        return ""
    return "synced"


def _fails(held):
    raise SamplerFailed("no memory")


def main():
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=RANK, world_size=2)
    meshes = init_device_mesh("cpu", (2, 1), mesh_dim_names=("both", "one"))
    compared(DENSE, meshes)
    import vllm._C  # noqa: F401  the kernel of experts

    compared(WITH_EXPERTS, meshes)
    if importlib.util.find_spec("peft"):
        compared(WITH_ADAPTERS, meshes)
    dist.destroy_process_group()


def compared(model_kind, meshes):
    """Report all cases of a kind of model; with experts and adapters, those of two ranks in the usual order."""
    whole = training.arm(made(model_kind), dtype=torch.bfloat16)
    own = trained(whole, *batch(RANK))
    pair = [trained(whole, *batch(rank))[1] for rank in (0, 1)]
    both = {name: (pair[0][name] + pair[1][name]) / 2 for name in own[1]}  # FSDP2 takes the mean over ranks
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # A gradient in bf16 is rounded by the layer; the masters' gradient is fp32.
    rounded = {name: [g[name].bfloat16().float() for g in pair] for name in own[1]}
    expected = {
        ("one", "masters"): own[1],
        ("both", "masters"): both,
        ("one", "bf16"): {name: rounded[name][RANK] for name in rounded},
        ("both", "bf16"): {name: (a + b) / 2 for name, (a, b) in rounded.items()},
    }
    for (ranks, kind), want in expected.items():
        policy = narrow if kind == "bf16" else MixedPrecisionPolicy()
        if model_kind != DENSE and ranks == "one":
            continue
        for order in ("arm first", "shard first") if (kind, model_kind) == ("masters", DENSE) else ("arm first",):
            name = f"{model_kind}, {ranks}, {kind}, {order}"
            model = made(model_kind)
            if order == "arm first":
                training.arm(model, dtype=torch.bfloat16)
            sharded(model, meshes[ranks], policy)
            if order == "shard first":
                training.arm(model, dtype=torch.bfloat16)
            if order == "arm first" and kind == "masters" and model_kind != WITH_ADAPTERS:
                model.gradient_checkpointing_enable()
            found, grads = trained(model, *batch(RANK))
            report(f"{name}: logprobs", bits.differing(found, own[0]))
            wrong = {n: bits.differing(grads[n], want[n]) for n in want if bits.differing(grads[n], want[n])}
            report(f"{name}: gradients", wrong)
            again = trained(model, *batch(RANK))
            report(f"{name}: a second run", sum(bits.differing(again[1][n], grads[n]) for n in grads))
            if model_kind != WITH_ADAPTERS:  # a sampler gets an adapter as a file
                held = dict(sync.weights(model, torch.bfloat16))
                wrong = [n for n, t in sync.weights(whole, torch.bfloat16) if bits.differing(held[n], t)]
                report(f"{name}: weights for a sampler", wrong)
            if ranks == "both" and model_kind == DENSE:
                synced(name, model)
            sums = sync._checksums(model)
            with torch.no_grad():
                next(model.parameters()).mul_(2.0)
            report(f"{name}: a changed shard is seen", "" if sync._checksums(model) != sums else "equal checksums")


if __name__ == "__main__":
    main()
