"""What `sync` needs from a sampler, for a vllm.LLM object and for the address of a server."""

from __future__ import annotations

import contextlib
import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bi_patch.errors import SamplerFailed, UnsupportedFeature
from bi_patch.files import HANDED_OVER

if TYPE_CHECKING:
    import torch

Weights = Iterable[tuple[str, "torch.Tensor"]]
_SCORED = 8  # tokens that the comparison samples


class Sampler(Protocol):
    """A running engine that takes new weights."""

    def load(self, weights: Weights) -> None:
        """Load weights with their names in a checkpoint. Raises SamplerFailed."""

    def name(self, version: str) -> None:
        """Let later answers name this version of the weights."""

    def forget(self) -> None:
        """Forget cached prefixes, whose keys and values are of the old weights."""

    def score(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        """Continue a prompt greedily. Returns prompt and answer, and the logprob of each token of the answer."""


def sampler(given: object) -> Sampler:
    """A sampler for a vllm.LLM or for a server's address. Raises UnsupportedFeature for anything else."""
    if isinstance(given, str):
        return Server(given)
    if hasattr(given, "collective_rpc") and hasattr(given, "llm_engine"):
        return Engine(given)
    raise UnsupportedFeature(
        f"training.sampler: {type(given).__name__} is no sampler. Give a vllm.LLM, or a server's address"
    )


class Engine:
    """A vllm.LLM. Its core may run in this process or in another one."""

    def __init__(self, llm) -> None:
        self._llm = llm

    def load(self, weights: Weights) -> None:
        engine = self._llm.llm_engine
        alone = engine.vllm_config.parallel_config.world_size == 1
        if alone and hasattr(engine.engine_core, "engine_core"):  # the core, the worker and its model are here
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            return
        with written(weights) as folder:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})

    def name(self, version: str) -> None:
        if hasattr(self._llm, "update_weight_version"):  # vLLM 0.32 and later
            self._llm.update_weight_version(version)

    def forget(self) -> None:
        self._llm.reset_prefix_cache()

    def score(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        asked = type(self._llm.get_default_sampling_params())(temperature=0.0, max_tokens=_SCORED, logprobs=0)
        asked.ignore_eos = True
        (answer,) = self._llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
        tokens = list(answer.outputs[0].token_ids)
        return prompt + tokens, [step[token].logprob for step, token in zip(answer.outputs[0].logprobs, tokens)]


class Server:
    """A server of `vllm serve` with VLLM_SERVER_DEV_MODE=1, which reads weights from a folder that both sides see."""

    def __init__(self, address: str, timeout: float = 600.0) -> None:
        self._address, self._timeout = address.rstrip("/"), timeout

    def load(self, weights: Weights) -> None:
        with written(weights) as folder:
            self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})

    def name(self, version: str) -> None:
        with contextlib.suppress(SamplerFailed):  # a server without vLLM's routes for RL has no versions
            self._ask("/update_weight_version", {"new_version": version})

    def forget(self) -> None:
        self._ask("/reset_prefix_cache", None)

    def score(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        (model, *_) = (held["id"] for held in self._ask("/v1/models", None, "GET")["data"])
        asked = {"model": model, "prompt": prompt, "temperature": 0.0, "max_tokens": _SCORED, "logprobs": 0}
        (choice,) = self._ask("/v1/completions", asked | {"ignore_eos": True, "return_token_ids": True})["choices"]
        return prompt + choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def _ask(self, path: str, body: dict | None, method: str = "POST"):
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=self._timeout) as reply:
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            hint = "; set VLLM_SERVER_DEV_MODE=1 for the server" if error.code == 404 else ""
            raise SamplerFailed(f"{self._address}{path}: HTTP {error.code}{hint}: {error.read()[:300]!r}") from error
        except (OSError, ValueError) as error:
            raise SamplerFailed(f"{self._address}{path}: {error}") from error


@contextlib.contextmanager
def written(weights: Weights) -> Iterator[Path]:
    """A folder with the weights as safetensors, deleted at the end of the block."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix=HANDED_OVER) as folder:
        held = {name: tensor.contiguous() for name, tensor in weights}
        save_file(held, Path(folder) / "model.safetensors", {"format": "pt"})
        yield Path(folder)
