"""Names the first operation in which trainer and sampler differ, by running one sequence through both, alone.

Both models name their modules alike. vLLM has q, k and v in one linear, and gate and up in another; their parts are
compared. The rotation and the activation have no modules of their own: what the next operation gets is compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import torch

from bi_patch.ops import bits
from bi_patch.tools.parity.batches import ALONE
from bi_patch.tools.verify import layers
from bi_patch.tools.verify.answers import Request

# The trainer's linears that are a part of one of vLLM's: (name of the whole, its parts in order).
_WHOLE = (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj")))


class Found(msgspec.Struct, frozen=True):
    """The first operation that differs. module: its path, "" for an operation outside the layers."""

    op: str
    module: str = ""
    differing: int = 0
    elements: int = 0

    def words(self) -> str:
        where = f" ({self.module})" if self.module else ""
        count = f": {self.differing:,} of {self.elements:,} elements differ on equal inputs" if self.elements else ""
        return f"{self.op}{where}{count}"


@dataclass(frozen=True)
class _Call:
    """One operation of the trainer. key: of the sampler's values. rows: [tokens, ...]."""

    op: str
    module: str
    key: str
    rows: torch.Tensor


def find(session) -> Found | None:
    """The first operation that differs for the sample that `session.looking` holds. None if nothing differs."""
    sample, processed = session.looking
    if session.engine.options.eager:
        ids = sample.ids
        own, theirs = _trainer(session, ids), _sampler(session, ids)
        for call in own:
            value = theirs.get(call.key)
            if value is None or value.numel() != call.rows.numel():
                continue
            value = value.reshape(call.rows.shape)
            differing = bits.differing(call.rows, value.to(call.rows.dtype))
            if differing:
                return Found(call.op, call.module, differing, call.rows.numel())
    session.engine.reset_cache()
    if processed:
        raw = _logprobs(session, sample, {})
        return Found("log-softmax" if raw else "temperature, top-k or top-p")
    if _answers_otherwise(session, sample):
        return Found("prefix cache: a cold answer has other logprobs")
    return Found("log-softmax") if _logprobs(session, sample, {}) else None


def words(session) -> str:
    """The first operation that differs, in words."""
    found = find(session)
    if found is None:
        return "not found: one sequence alone, on a cold cache, has equal bits"
    if not session.engine.options.eager and found.op == "log-softmax":
        return "not found in compiled code: run parity with --eager"
    return found.words()


def _logprobs(session, sample, transforms) -> int:
    """How many raw logprobs of the sample's tokens differ between sampler and trainer, on a cold cache."""
    (answer,) = session.engine.generate([Request(tuple(sample.ids), max_tokens=1, prompt_logprobs=0)])
    own = session.trainer.logprobs([sample], ALONE)[0].detach()
    want = torch.tensor(answer.prompt_logprobs[-len(own) :], dtype=torch.float32)
    return bits.differing(own.cpu().contiguous(), want)


def _answers_otherwise(session, sample) -> bool:
    """Whether the sampler, on a cold cache, gives the sample's tokens other logprobs than it gave before."""
    (answer,) = session.engine.generate([Request(tuple(sample.ids), max_tokens=1, prompt_logprobs=0)])
    return answer.prompt_logprobs[-len(sample.answer.tokens) :] != sample.answer.logprobs


def _trainer(session, ids: list[int]) -> list[_Call]:
    """The operations of the trainer's forward pass in the order in which they run."""
    calls: list[_Call] = []
    model = session.trainer.model

    def after(path):
        def hook(module, args, result):
            rows = _rows(result, len(ids))
            if path.endswith("down_proj"):
                calls.append(
                    _Call("activation", path.removesuffix(".down_proj"), f"{path}:in", _rows(args[0], len(ids)))
                )
            if rows is not None:
                calls.append(_Call(_kind(module), path, f"{path}:out", rows))

        return hook

    def attention(module, query, key, value, result):
        path = next(name for name, held in model.named_modules() if held is module)
        for name, x in (("query", query), ("key", key)):
            calls.append(_Call("rotation", path, f"{path}:{name}", x.transpose(1, 2).reshape(len(ids), -1)))
        calls.append(_Call("attention", path, f"{path}:attention", result.reshape(len(ids), -1)))

    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            if not list(module.children()) and list(module.parameters(recurse=False)):
                stack.callback(module.register_forward_hook(after(path)).remove)
        stack.enter_context(_watched(model, attention))
        with torch.no_grad():
            model(torch.tensor([ids], device=session.trainer.device), use_cache=False)
    return calls


@contextlib.contextmanager
def _watched(model, seen) -> Iterator[None]:
    """Call `seen` with what each call of the attention function got and returned."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.config._attn_implementation
    held = ALL_ATTENTION_FUNCTIONS.get(name)
    if held is None:  # eager attention is no entry of the table
        yield
        return

    def attend(module, query, key, value, *args, **kwargs):
        result = held(module, query, key, value, *args, **kwargs)
        seen(module, query, key, value, result[0])
        return result

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = held


def _sampler(session, ids: list[int]) -> dict[str, torch.Tensor]:
    """The values of the sampler's operations by key, for the sequence alone on a cold cache."""
    found: dict[str, torch.Tensor] = {}
    model, count = layers.model(session.engine), len(ids)

    def keep(key, value):
        """Add the rows of one step: a long sequence takes several."""
        x, held = _first(value), found.get(key)
        missing = count - (0 if held is None else len(held))
        if isinstance(x, torch.Tensor) and x.dim() > 1 and missing > 0:
            rows = x.detach()[:missing].flatten(1).clone()
            found[key] = rows if held is None else torch.cat((held, rows))

    def after(path):
        def hook(module, args, result):
            if path.endswith(".attn"):
                where = path.removesuffix(".attn")
                for name, x in zip(("query", "key"), args):
                    keep(f"{where}:{name}", x)
                keep(f"{where}:attention", result)
                return
            if path.endswith("down_proj"):
                keep(f"{path}:in", args[0])
            for whole, parts in _WHOLE:
                if path.endswith(whole):
                    sizes = _sizes(session, module, whole)
                    for part, value in zip(parts, _first(result).split(sizes, -1)):
                        keep(f"{path.removesuffix(whole)}{part}:out", value)
            keep(f"{path}:out", result)

        return hook

    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            if path and (not list(module.children()) or path.endswith(".attn")):
                stack.callback(module.register_forward_hook(after(path)).remove)
        session.engine.generate([Request(tuple(ids), max_tokens=1, prompt_logprobs=0)])
    hidden = found.get("model.norm:out")
    if hidden is not None:
        with torch.inference_mode():
            keep("lm_head:out", model.compute_logits(hidden))
    return found


def _sizes(session, module, whole) -> list[int]:
    if whole == "gate_up_proj":
        return list(module.output_sizes)
    return [module.num_heads * module.head_size] + 2 * [module.num_kv_heads * module.head_size]


def _first(result):
    return result[0] if isinstance(result, tuple) else result


def _rows(result, count: int) -> torch.Tensor | None:
    """A result as [tokens, ...]; None if it has no row for each token."""
    x = _first(result)
    if not isinstance(x, torch.Tensor):
        return None
    x = x.detach()
    if x.dim() > 2 and x.shape[0] == 1 and x.shape[1] == count:
        x = x[0]
    return x[:count].reshape(count, -1).contiguous() if x.shape[0] >= count else None


def _kind(module) -> str:
    name = type(module).__name__
    return {"Linear": "linear", "Embedding": "embedding"}.get(name, "RMSNorm" if name.endswith("RMSNorm") else name)
