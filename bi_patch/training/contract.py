"""The contract between a trainer and its sampler: what decides bits must be equal on both sides.

The sampler's side is a dict that an armed engine makes (bi_patch.arming.contract). `of` asks for it, `check` compares.
"""

from __future__ import annotations

import json
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bi_patch import identity, installed, running
from bi_patch.errors import ContractBroken, UnsupportedRequest
from bi_patch.training import adapters, devices, forwards

# What a request may ask for beside the defaults of vLLM's SamplingParams. Everything else could change the logits in a
# way that the trainer does not repeat, or does not concern logits and is not listed because nobody looked.
SAMPLING = frozenset(
    {
        "n",
        "temperature",
        "top_k",
        "top_p",
        "seed",
        "logprobs",
        "prompt_logprobs",
        "max_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "include_stop_str_in_output",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "output_kind",
        "skip_reading_prefix_cache",
    }
)
_LAYER = re.compile(r"\blayers\.(\d+)\.")  # the number of a layer in vLLM's name of its attention
_SUMS = ("none", "ascending in fp32, rounded once")


@dataclass(frozen=True)
class Form:
    """What of a contract chooses kernels. runner: "V1" or "V2". processed: whether logprobs show the transforms.

    backends: vLLM's attention backend of each layer; () lets bi_patch choose.
    """

    runner: str = "V2"
    processed: bool = False
    backends: tuple[str, ...] = ()


def form(contract: dict[str, Any]) -> Form:
    """The form of a contract that `check` has passed."""
    layers = {int(_LAYER.search(name)[1]): backend for name, backend in contract["attention"].items()}
    backends = tuple(layers[number] for number in sorted(layers))
    return Form(contract["runner"], contract["logprobs_mode"] == "processed_logprobs", backends)


def of(sampler: Any) -> dict[str, Any]:
    """The contract of a sampler: an LLM or AsyncLLM of this process, a server's URL, a saved file, or a contract.

    Raises ContractBroken for a sampler that bi_patch did not arm, or whose contract lacks a field.
    """
    if isinstance(sampler, dict):
        return _said(sampler, "the given contract")
    if isinstance(sampler, str) and sampler.startswith(("http://", "https://")):
        with urllib.request.urlopen(f"{sampler.rstrip('/').removesuffix('/v1')}/version", timeout=30) as answer:
            said = json.load(answer).get("bi_patch")
        return _said(said and said.get("contract"), f"the server {sampler}")
    if isinstance(sampler, (str, Path)):
        return _said(json.loads(Path(sampler).expanduser().read_text()), f"the contract in {sampler}")
    return _of_engine(sampler)


def save(contract: dict[str, Any], path: str | Path) -> None:
    """Write a contract as JSON, for a trainer on another machine."""
    Path(path).expanduser().write_text(json.dumps(contract, indent=1) + "\n")


def check(contract: dict[str, Any], model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Raise ContractBroken with the first thing in which the trainer differs from the sampler.

    contract: the sampler's. model: the trainer's transformers model, on its device. dtype: what it computes in. Call it
    after the device's kernels are loaded.
    """
    device = next(model.parameters()).device.type
    folder = devices.implementation(device)
    own = {
        "platform": device,
        "digest": identity.digest(),
        **folder.kernels(),
        "torch": str(torch.__version__),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": None,
    }
    if folder.CALLS_VLLM or forwards.family_of(model).experts:
        found = installed.find(device)
        own["vllm"] = None if found is None else str(found.release)
    for name, value in own.items():
        _same(name, value, contract.get(name))
    if adapters.has(model):
        _same("lora", True, contract["lora"])
    for name, value in contract["model"].items():
        _same(f"model.{name}", _plain(getattr(model.config, name, None)), value)
    _among("kv_cache_dtype", contract.get("kv_cache_dtype"), ("auto", own["dtype"]))
    _among("logprobs_mode", contract.get("logprobs_mode"), ("raw_logprobs", "processed_logprobs"))
    _among("rank_sums", contract.get("rank_sums"), _SUMS)
    _same("mla", None, contract["mla"])  # the trainer has no such layers
    numbers = {name: _LAYER.search(name) for name in contract["attention"]}
    layers = sorted(int(found[1]) if found else -1 for found in numbers.values())
    _same("the layers of attention", list(range(model.config.num_hidden_layers)), layers)
    _among("runner", contract["runner"], ("V1", "V2"))
    attention, size = devices.implementation(device, "attention"), forwards.head_size(model.config)
    for layer, backend in contract["attention"].items():
        window = _window(model.config, int(numbers[layer][1]))
        _among(f"attention of {layer}", backend, attention.backends(dtype, size, window))


def check_sampling(params: Any) -> None:
    """Raise UnsupportedRequest for a request that the trainer cannot repeat. params: vLLM's SamplingParams."""
    plain = type(params)()
    for name in type(params).__struct_fields__:
        if name not in SAMPLING and not name.startswith("_") and getattr(params, name) != getattr(plain, name):
            raise UnsupportedRequest(
                f"training.sampling: the trainer does not repeat {name}={getattr(params, name)!r}. Leave "
                f"{name} out: only temperature, top_k, top_p and seed are repeated"
            )


def _window(config: Any, layer: int) -> int:
    """The tokens that a token sees in a layer; 0 for all."""
    kinds = getattr(config, "layer_types", None)
    whole = kinds is not None and kinds[layer] != "sliding_attention"
    return 0 if whole else getattr(config, "sliding_window", None) or 0


def _of_engine(sampler: Any) -> dict[str, Any]:
    config = getattr(getattr(sampler, "llm_engine", sampler), "vllm_config", None)
    if config is None:
        raise ContractBroken(
            f"training.contract: {type(sampler).__name__} is no sampler. Give an LLM, a URL or a saved contract"
        )
    return _said(running.contracts.get(config.instance_id), "the sampler")


def _said(contract: dict[str, Any] | None, who: str) -> dict[str, Any]:
    if not contract:
        raise ContractBroken(
            f"training.contract: {who} is not armed by this release of bi_patch, so nobody knows what decides its "
            "bits. Start it with the trainer's bi_patch"
        )
    missing = [name for name in running.FIELDS if name not in contract]
    missing += [f"model.{name}" for name in running.MODEL if name not in (contract.get("model") or ())]
    if missing or not contract["attention"]:
        raise ContractBroken(
            f"training.contract: {who} lacks {', '.join(missing) or 'attention'}, so nobody knows what decides its "
            "bits. Start it with the trainer's bi_patch"
        )
    return contract


def _same(name: str, own: Any, theirs: Any) -> None:
    if own != theirs:
        raise ContractBroken(
            f"training.contract: {name} is {own!r} in the trainer and {theirs!r} in the sampler. Make them equal"
        )


def _among(name: str, value: Any, known: tuple) -> None:
    if value not in known:
        raise ContractBroken(
            f"training.contract: the sampler's {name} is {value!r}, and the trainer repeats only "
            f"{', '.join(map(repr, known))}. Start the sampler with another"
        )


def _plain(value: Any) -> Any:
    """A value of a configuration as the sampler's contract has it."""
    return json.loads(json.dumps(value, default=str))
