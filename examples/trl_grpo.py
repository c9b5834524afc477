"""TRL's GRPOTrainer with vLLM in its process or on a server: the trainer's logprobs are the sampler's, bit for bit.

    python examples/trl_grpo.py [MODEL] [STEPS]

    VLLM_SERVER_DEV_MODE=1 VLLM_BATCH_INVARIANT=1 vllm serve MODEL --dtype bfloat16 \\
        --logprobs-mode processed_logprobs --max-logprobs -1
    python examples/trl_grpo.py MODEL STEPS http://127.0.0.1:8000

With a server, training.sync sends the weights, because TRL's own way needs a GPU on each side. It compares bits after
each update. The server must see this machine's temporary folder.

TRL logs `sampling/sampling_logp_difference/max`, which must be 0, and this example stops if a bit differs. Needs trl,
accelerate and datasets. The model's weights are in the sampler's dtype: TRL hands them to vLLM as they are. The example
does not use training.gradients: its gradients are autograd's, and depend on how a batch is cut into micro-batches.
"""

# ruff: noqa: I001  bi_patch comes before vllm
import os
import sys

# One process holds the trainer and the engine, as TRL's colocate mode wants.
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}

import bi_patch  # noqa: F401  before vllm: it arms the engine
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_client import VLLMClient

from bi_patch import training

PROMPTS = ["The number of the house is", "My favourite numbers are", "In the year", "The price of the book is"]


class ExactGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose logprobs come from the armed model."""

    def __init__(self, *args, **kwargs):
        if kwargs["args"].vllm_mode == "server":
            VLLMClient.init_communicator = lambda *_, **__: None  # of TRL's own way to send weights
        super().__init__(*args, **kwargs)
        held = self.vllm_generation
        if held.mode == "server":
            training.arm(self.model, sampler=held.server_base_url)
            held.sync_weights = lambda: training.sync(self.model, held.server_base_url)
        else:
            training.arm(self.model, sampler=held.llm)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **given
    ):
        own = self.accelerator.unwrap_model(model)
        size = batch_size or len(input_ids)
        found = [
            training.logprobs(
                own,
                input_ids[at : at + size],
                attention_mask[at : at + size],
                temperature=self.temperature,
                top_k=self.args.top_k or 0,
                top_p=self.args.top_p,
            )[:, -logits_to_keep:]
            for at in range(0, len(input_ids), size)
        ]
        logps = self.used = torch.cat(found)
        return logps, torch.zeros_like(logps) if compute_entropy else None, None  # entropy: not computed

    def _compute_loss(self, model, inputs):
        """The loss; every logprob that it used must be the sampler's."""
        loss = super()._compute_loss(model, inputs)
        sampled = inputs["sampling_per_token_logps"].float()
        found = training.compare(self.used.detach(), sampled, inputs["completion_mask"], strict=True)
        print(f"step {self.state.global_step}: {found}", flush=True)
        return loss


def vowels(completions, **given) -> list[float]:
    """The share of vowels in each completion."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def main(name: str, steps: int, server: str | None = None) -> None:
    config = GRPOConfig(
        output_dir="/tmp/trl_grpo",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,  # autocast would change dtypes between layers
        model_init_kwargs={"dtype": "bfloat16"},
        use_vllm=True,
        vllm_mode="server" if server else "colocate",
        vllm_server_base_url=server,
        vllm_max_model_length=512,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        max_steps=steps,
        learning_rate=1e-4,
        beta=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    data = Dataset.from_dict({"prompt": PROMPTS * 8})
    ExactGRPOTrainer(name, reward_funcs=vowels, args=config, train_dataset=data).train()


if __name__ == "__main__":
    given = dict(enumerate(sys.argv[1:]))
    main(given.get(0, "HuggingFaceTB/SmolLM2-135M-Instruct"), int(given.get(1, 3)), given.get(2))
