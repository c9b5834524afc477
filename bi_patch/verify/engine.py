"""A live vLLM engine behind one small interface, the same in this process and in a child process."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Protocol

import msgspec

from bi_patch.verify.answers import Answer, Request


class Options(msgspec.Struct, frozen=True):
    """How an engine is started. None leaves vLLM's default.

    model: folder or name. dtype: "bfloat16" | "float32" | "auto". chunk: tokens per engine step
    (max_num_batched_tokens). chunked: chunked prefill; False needs chunk >= max_model_len.
    kv_blocks: size of the KV cache in blocks (num_gpu_blocks_override). extra: further arguments of vllm.LLM.
    """

    model: str
    dtype: str = "bfloat16"
    eager: bool = True
    max_model_len: int = 2048
    max_num_seqs: int = 64
    chunk: int | None = 2048
    chunked: bool = True
    prefix_caching: bool = True
    kv_blocks: int | None = None
    extra: dict[str, object] = {}

    def but(self, **changes: object) -> Options:
        return msgspec.structs.replace(self, **changes)


class Info(msgspec.Struct, frozen=True):
    """What an engine is: `mode` is "armed" when bi_patch's seams are closed in its process, else "stock".

    open_seams: required seams that are open (only with BI_PATCH_ALLOW_OPEN). block_size: tokens in a KV block.
    platform: what files are named by: "cpu", or a device's short name such as "h100".
    """

    mode: str
    vllm: str
    torch: str
    device: str
    threads: int
    block_size: int
    vocab_size: int
    open_seams: tuple[str, ...] = ()
    platform: str = "cpu"


class Engine(Protocol):
    """What a probe may ask of an engine."""

    options: Options
    info: Info

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Run all requests together (each arrives after its `delay` engine steps); answers in request order."""

    def reset_cache(self) -> None:
        """Forget every cached prefix."""

    def counters(self) -> dict[str, float]:
        """The engine's counters by their Prometheus names, e.g. "vllm:num_preemptions"."""

    def encode(self, text: str) -> tuple[int, ...]:
        """The token ids of a text."""


class LocalEngine:
    """An engine in this process. Arm before you make one, or do not.

    Raises what vLLM and bi_patch raise while it starts; RuntimeError when the prefix cache cannot be reset.
    """

    def __init__(self, options: Options) -> None:
        from vllm import LLM

        self.options = options
        self._llm = LLM(
            options.model,
            dtype=options.dtype,
            enforce_eager=options.eager,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.chunk,
            enable_chunked_prefill=options.chunked,
            enable_prefix_caching=options.prefix_caching,
            num_gpu_blocks_override=options.kv_blocks,
            disable_log_stats=False,  # counters() reads them
            **options.extra,
        )
        self.info = self._info()
        self._serial = 0

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        if any(r.delay for r in requests):
            outputs = self._generate_staggered(requests)
        else:
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(r.prompt)} for r in requests],
                [_sampling(r) for r in requests],
                use_tqdm=False,
            )
        return [_answer(o) for o in outputs]

    def reset_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the engine did not reset its prefix cache: requests are still running")

    def counters(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            value = getattr(metric, "value", None)
            if isinstance(value, (int, float)):
                total[metric.name] = total.get(metric.name, 0.0) + value
        return total

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._llm.get_tokenizer().encode(text))

    def _generate_staggered(self, requests: Sequence[Request]) -> list:
        """Requests join a running batch: one that is due after n steps is added before step n."""
        engine = self._llm.llm_engine
        waiting = sorted(range(len(requests)), key=lambda i: requests[i].delay)
        done: dict[int, object] = {}
        names: dict[str, int] = {}
        step = 0
        while waiting or engine.has_unfinished_requests():
            while waiting and (requests[waiting[0]].delay <= step or not engine.has_unfinished_requests()):
                index = waiting.pop(0)
                self._serial += 1
                name = f"staggered-{self._serial}"
                names[name] = index
                request = requests[index]
                engine.add_request(name, {"prompt_token_ids": list(request.prompt)}, _sampling(request))
            for output in engine.step():
                if output.finished:
                    done[names[output.request_id]] = output
            step += 1
        return [done[i] for i in range(len(requests))]

    def _info(self) -> Info:
        import torch
        import vllm
        from vllm.platforms import current_platform

        from bi_patch import arming
        from bi_patch.arming import gate

        state = arming.state()
        config = self._llm.llm_engine.vllm_config
        on_gpu = current_platform.device_type != "cpu"
        device = current_platform.get_device_name() if on_gpu else f"{_cpu_name()} ({os.cpu_count()} cores)"
        return Info(
            mode="armed" if state is not None and state.armed else "stock",
            vllm=vllm.__version__,
            torch=str(torch.__version__),
            device=device,
            threads=torch.get_num_threads(),
            block_size=config.cache_config.block_size,
            vocab_size=config.model_config.get_vocab_size(),
            open_seams=tuple(
                f.name for f in gate.inspect(load=False) if f.status == gate.OPEN and f.required
            ),
            platform=short_name(device) if on_gpu else "cpu",
        )


def short_name(device: str) -> str:
    """The word of a device's name that tells models apart, e.g. "h100" of "NVIDIA H100 80GB HBM3"."""
    parts = re.findall(r"[a-z0-9]+", device.lower())
    return next((p for p in parts if re.search(r"[a-z]\d", p)), parts[-1] if parts else "device")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


def _sampling(request: Request):
    from vllm import SamplingParams

    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        max_tokens=request.max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        ignore_eos=True,
    )


def _answer(output) -> Answer:
    """vLLM's RequestOutput as an Answer; prompt position 0 has no logprob and is left out."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    generated = list(completion.logprobs or [])
    prompt = list(output.prompt_logprobs or [])[1:]
    prompt_ids = list(output.prompt_token_ids)[1:]
    return Answer(
        tokens=tokens,
        logprobs=[entry[token].logprob for token, entry in zip(tokens, generated)],
        top=[_top(entry) for entry in generated],
        prompt_logprobs=[entry[token].logprob for token, entry in zip(prompt_ids, prompt)],
        prompt_top=[_top(entry) for entry in prompt],
        text=completion.text,
    )


def _top(entry) -> list[tuple[int, float]]:
    return [(token, value.logprob) for token, value in entry.items()]
