"""The two trainers of parity: a Hugging Face model armed by bi_patch.training, and the same model as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from bi_patch.tools.parity.batches import batches
from bi_patch.tools.verify.engine import LocalEngine

if TYPE_CHECKING:
    from bi_patch.tools.parity.session import Sample


class Trainer:
    """A Hugging Face model beside its sampler. Without arming: attention by sdpa, gradients by autograd.

    model: on the sampler's device, in its dtype.
    """

    masters = False  # whether the model's own weights are fp32 master weights

    def __init__(self, engine: LocalEngine) -> None:
        from transformers import AutoModelForCausalLM

        self.engine = engine
        config = engine.llm.llm_engine.vllm_config
        self.dtype, self.device = config.model_config.dtype, torch.device(config.device_config.device)
        held = torch.float32 if self.masters else self.dtype
        self.model = AutoModelForCausalLM.from_pretrained(engine.options.model, dtype=held).to(self.device).eval()

    def logprobs(
        self,
        samples: Sequence[Sample],
        layout: str,
        *,
        chunk: int | None = None,
        grad: bool = False,
        **transforms: float,
    ) -> list[torch.Tensor]:
        """The logprobs of each sample's sampled tokens [tokens] fp32. transforms: temperature, top_k, top_p."""
        found = []
        with torch.set_grad_enabled(grad):
            for batch in batches([s.ids for s in samples], layout):
                part = samples[len(found) : len(found) + len(batch.places)]
                # [batch, length]; index 0 of a sequence means nothing
                own = self._logprobs(batch.to(self.device), chunk, transforms)
                sizes = [len(sample.answer.tokens) for sample in part]
                ends = [row * own.shape[1] + at + len(s.ids) for s, (row, at) in zip(part, batch.places, strict=True)]
                asked = [i for end, size in zip(ends, sizes) for i in range(end - size, end)]
                picked = own.reshape(-1).index_select(0, torch.tensor(asked, device=self.device))
                found += picked.split(sizes)
        return found

    def _logprobs(self, batch, chunk, transforms) -> torch.Tensor:
        logits = self.model(
            batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).logits.float()
        logits = logits / transforms.get("temperature", 1.0)
        found = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
        return torch.nn.functional.pad(found, (1, 0))

    @contextlib.contextmanager
    def training(self, checkpointing: bool = False) -> Iterator[None]:
        """Training mode within this block."""
        self.model.train()
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            self.model.gradient_checkpointing_disable()
            self.model.eval()

    @contextlib.contextmanager
    def gradients(self) -> Iterator[dict[str, torch.Tensor]]:
        """A dict that holds the fp32 gradient of each parameter by name after the block."""
        found: dict[str, torch.Tensor] = {}
        self.model.zero_grad()
        yield found
        for name, parameter in self.model.named_parameters():
            found[name] = parameter.grad.float()
            parameter.grad = None

    def sync(self, version: str) -> None:
        """Give the sampler the weights by hand: load them and reset the prefix cache."""
        held = [(name, p.detach().clone()) for name, p in self.model.named_parameters()]
        self.engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(held)})
        self.engine.reset_cache()

    def saved(self) -> dict[str, torch.Tensor]:
        """A copy of the weights."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def restore(self, held: dict[str, torch.Tensor]) -> None:
        self.write(held)

    @torch.no_grad()
    def write(self, values: dict[str, torch.Tensor]) -> None:
        """Write values into the weights, rounded to the weights' dtype."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(values[name].to(parameter.dtype))

    @torch.no_grad()
    def perturb(self, seed: int) -> None:
        """Add noise to every weight, of a fiftieth of its spread."""
        draw = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.add_((noise.to(parameter.device) * parameter.float().std() * 0.02).to(parameter.dtype))


@contextlib.contextmanager
def _chunks(device: torch.device, rows: int | None) -> Iterator[None]:
    """Within this block, the trainer's head computes this many rows of logits at a time; None: as always."""
    from bi_patch.training import devices

    head = devices.implementation(device.type, "head")
    held = head.CHUNK
    head.CHUNK = rows or held
    try:
        yield
    finally:
        head.CHUNK = held


class Armed(Trainer):
    """The model armed for its sampler. Its weights are fp32 master weights, which every operator rounds."""

    masters = True

    def __init__(self, engine: LocalEngine) -> None:
        from bi_patch import training

        super().__init__(engine)
        training.arm(self.model, sampler=engine.llm, dtype=self.dtype)

    def _logprobs(self, batch, chunk, transforms) -> torch.Tensor:
        from bi_patch import training

        with _chunks(self.device, chunk):
            return training.logprobs(
                self.model, batch.ids, attention_mask=batch.mask, position_ids=batch.positions, **transforms
            )

    @contextlib.contextmanager
    def gradients(self) -> Iterator[dict[str, torch.Tensor]]:
        from bi_patch import training

        found: dict[str, torch.Tensor] = {}
        with training.gradients(self.model):
            yield found
        for name, parameter in self.model.named_parameters():
            found[name] = parameter.main_grad
            parameter.main_grad = None

    def sync(self, version: str) -> None:
        from bi_patch import training

        training.sync(self.model, self.engine.llm, version=version, check=False)
