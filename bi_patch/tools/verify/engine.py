"""The interface Engine to a live vLLM engine, and LocalEngine, the implementation in this process."""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from bi_patch.platforms.features import images
from bi_patch.tools.evidence.kinds import short_name
from bi_patch.tools.verify import streams
from bi_patch.tools.verify.answers import Answer, Image, Request
from bi_patch.tools.verify.case import Pause

SERVER = "server"  # Info.platform of a running server
HITS, PREEMPTIONS = "vllm:prefix_cache_hits", "vllm:num_preemptions"  # counters


class Options(msgspec.Struct, frozen=True):
    """How an engine is started. None leaves vLLM's default.

    model: folder or name. dtype: e.g. "bfloat16", "float32" or "auto". chunk: tokens per engine step
    (max_num_batched_tokens). chunked: chunked prefill; False needs chunk >= max_model_len.
    kv_blocks: size of the KV cache in blocks (num_gpu_blocks_override). extra: further arguments of vllm.LLM.
    tokenizer: False for a model without a tokenizer. random_weights: the seed of random weights (see verify.weights),
    None to load the model's own. tied: make rows of the head and of the routers equal in pairs. digests: requests may
    use verify's logits processors: digests of logits, and tokens chosen by position. threads: OpenMP threads of a CPU
    engine, None for the environment's number.
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
    tokenizer: bool = True
    random_weights: int | None = None
    tied: bool = False
    digests: bool = False
    threads: int | None = None

    def but(self, **changes: object) -> Options:
        return msgspec.structs.replace(self, **changes)


class Info(msgspec.Struct, frozen=True):
    """What an engine is.

    mode: "armed" when bi_patch armed the engine's process, "server" for a running server, else "stock". open_seams:
    required seams that are open (only with BI_PATCH_ALLOW_OPEN). block_size: tokens in a KV block. platform: "cpu", a
    device's short name such as "h100", or SERVER; names of files contain it. capture_sizes: the row count of each
    captured graph. kv_blocks: blocks of the KV cache, 0 where the number is unknown; one of them is vLLM's null block.
    kv_groups: tokens in a block of each of vLLM's KV groups; a request takes blocks of every group, all from one pool.
    Empty where unknown: one group. kv_longest: blocks that vLLM plans for one request of max_model_len, 0 where
    unknown. devices: the host's number of devices. leaves: BI_PATCH_TP_INVARIANT of an armed engine.
    quantization: vLLM's name of the method, "" for none. pooling: the task of a pooling model, such as "embed" or
    "classify", "" for a model that generates. whole: every prompt is computed in one step. cached: vLLM keeps prefixes.
    matryoshka: an embedding's length may be chosen, up to `width`. two_forms: prompts and generated tokens have forms
    of their own, whose bits differ (BI_PATCH_MLA=two). images: the most tokens of an image, 0 for an engine that takes
    no images. whole_images: vLLM computes all tokens of an image in one step. videos: whether requests may bring
    videos. chunks: with a prefix cache, vLLM takes this model's prompts in chunks only (states of recurrent layers are
    kept where a chunk ends).
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
    capture_sizes: tuple[int, ...] = ()
    kv_blocks: int = 0
    kv_groups: tuple[int, ...] = ()
    kv_longest: int = 0
    devices: int = 1
    leaves: int = 0
    quantization: str = ""
    max_num_seqs: int = 0
    max_model_len: int = 0
    pooling: str = ""
    whole: bool = False
    cached: bool = True
    matryoshka: bool = False
    width: int = 0
    two_forms: bool = False
    images: int = 0
    whole_images: bool = False
    videos: bool = False
    chunks: bool = False

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds, 0 where the number is unknown."""
        return self.kv_blocks // len(self.kv_groups or (1,)) * self.block_size

    def blocks(self, tokens: int) -> int:
        """The KV blocks that a request of this many tokens takes at most, in all groups together."""
        return sum(-(-tokens // size) for size in self.kv_groups or (self.block_size,))


class Engine(Protocol):
    """What a probe needs from an engine."""

    options: Options
    info: Info

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Run all requests together; each arrives after its `delay` engine steps. Answers are in request order.

        A request with `abort` is given up that many steps after its arrival.
        """

    def reset_cache(self) -> None:
        """Forget every cached prefix."""

    def counters(self) -> dict[str, float]:
        """The engine's counters by their Prometheus names, e.g. "vllm:num_preemptions"."""

    def encode(self, text: str) -> tuple[int, ...]:
        """The token ids of a text."""

    def set_chunk(self, tokens: int | None) -> None:
        """Set the budget of tokens per engine step, at most the budget at the start; None restores that budget.

        A server raises ServerFailed: its budget cannot be changed.
        """

    def set_logprobs(self, mode: str | None) -> None:
        """Set what logprobs hold, one of vLLM's values of --logprobs-mode; None restores the mode of the start.

        A server raises ServerFailed: its mode cannot be changed.
        """

    def ask(self, do: str, data: bytes) -> bytes:
        """Run an instrument of verify.instruments. Arguments and result are msgpack. A server raises ServerFailed."""

    def alive(self) -> bool:
        """Whether the engine can answer another request."""


class LocalEngine:
    """An engine in this process. For an armed engine, arm the process before you make the engine.

    Raises what vLLM and bi_patch raise while the engine starts; RuntimeError when the prefix cache cannot be reset.
    """

    def __init__(self, options: Options) -> None:
        from vllm import LLM

        from bi_patch.tools.verify import weights

        self.options = options
        made: dict[str, object] = {}
        if options.threads is not None:
            import torch

            torch.set_num_threads(options.threads)  # OpenMP's variable counts up to the number of cores only
        if options.random_weights is not None:
            weights.make_random(options.random_weights)
            made["load_format"] = "dummy"
        if options.tied:
            weights.make_tied()
        pools = _pools(options)
        made["enable_chunked_prefill"] = _unless_pooled(options.chunked, pools)
        made["enable_prefix_caching"] = _unless_pooled(options.prefix_caching, pools)
        if options.digests and not pools:
            from bi_patch.tools.verify.rows import Counting, Digests

            made["logits_processors"] = [Digests, Counting]
        self._llm = LLM(
            options.model,
            skip_tokenizer_init=not options.tokenizer,
            dtype=options.dtype,
            enforce_eager=options.eager,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.chunk,
            num_gpu_blocks_override=options.kv_blocks,
            disable_log_stats=False,  # counters() reads them
            **{**made, **options.extra},
        )
        counts = (options.extra.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
        several = options.random_weights is not None and any(count != 1 for count in counts)
        # Not by llm.apply_model, which may write weights, so that engines with quantized weights refuse it.
        if several and not all(self.core.model_executor.collective_rpc(weights.filled)):
            raise RuntimeError("a worker did not make random weights: only workers of the executor mp do")
        info = self._info()
        self._placeholders, most = image_tokens(self._llm)
        self.info = msgspec.structs.replace(info, images=most, videos="video" in self._placeholders)
        self._serial = 0
        self._cached = 0
        self._chunk: int | None = None  # the engine's own budget, kept from the first change on
        self._logprobs: str | None = None  # the engine's own mode, kept from the first change on
        self._pause: Pause | None = None  # of the next answers

    @property
    def llm(self):
        """The vllm.LLM."""
        return self._llm

    @property
    def core(self):
        """vLLM's engine core. Raises AttributeError where the core runs in another process."""
        return self._llm.llm_engine.engine_core.engine_core

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        try:
            return self._generate(requests)
        except Exception:
            # Requests that a failed step leaves in the scheduler would prevent a reset of the cache.
            engine = self._llm.llm_engine
            with contextlib.suppress(Exception):
                engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise

    def _generate(self, requests: Sequence[Request]) -> list[Answer]:
        if self.info.pooling:
            return self._pooled(requests)
        names = [self._digest_name() if r.digest and self.options.digests else "" for r in requests]
        parameters = [_sampling(r, name, self.options.tokenizer) for r, name in zip(requests, names)]
        calls = self._paused()
        if calls or any(r.delay or r.abort or r.parts for r in requests):
            outputs = self._generate_staggered(requests, parameters, calls)
        else:
            adapters = [_adapter(r.lora) for r in requests]
            outputs = self._llm.generate(
                [self._prompt(r) for r in requests],
                parameters,
                use_tqdm=False,
                **({"lora_request": adapters} if any(adapters) else {}),
            )
        self._cached += sum(o.num_cached_tokens or 0 for o in outputs if o is not None)
        return [Answer([]) if o is None else _answer(o, _digests(name)) for o, name in zip(outputs, names)]

    def _pooled(self, requests: Sequence[Request]) -> list[Answer]:
        outputs = self._generate_staggered(requests, [_pooling(r, self.info.pooling) for r in requests])
        self._cached += sum(max(o.num_cached_tokens or 0, 0) for o in outputs if o is not None)
        return [
            Answer([]) if o is None else Answer([], pooled=o.outputs.data.float().flatten().tolist()) for o in outputs
        ]

    def set_chunk(self, tokens: int | None) -> None:
        if tokens is not None and self.info.whole:
            raise RuntimeError("every prompt is computed in one step: one above the budget would wait for ever")
        scheduler = self.core.scheduler
        if self._chunk is None:
            self._chunk = scheduler.max_num_scheduled_tokens
        scheduler.max_num_scheduled_tokens = min(tokens or self._chunk, self._chunk)

    def set_logprobs(self, mode: str | None) -> None:
        from bi_patch.tools.verify import runner

        sampler = runner.model_runner(self).sampler
        if self._logprobs is None:
            self._logprobs = sampler.logprobs_mode
        for part in (sampler, getattr(sampler, "topk_topp_sampler", None)):  # model runner V2 has the first only
            if part is not None:
                part.logprobs_mode = mode or self._logprobs

    def reset_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the engine did not reset its prefix cache: requests are still running")
        if self.info.images:
            self._llm.reset_mm_cache()
            self._llm.llm_engine.reset_encoder_cache()

    def _prompt(self, request: Request) -> dict[str, object]:
        """vLLM's prompt: the tokens, with the model's own tokens for an image or a video at the place of each."""
        if not request.images:
            return {"prompt_token_ids": list(request.prompt)}
        tokens: list[int] = []
        last = 0
        made: dict[str, list[object]] = {}
        for image in request.images:
            kind = "video" if image.frames else "image"
            tokens += [*request.prompt[last : image.at], *self._placeholders[kind]]
            last = image.at
            made.setdefault(kind, []).append(_video(image) if image.frames else _pixels(image))
        return {"prompt_token_ids": [*tokens, *request.prompt[last:]], "multi_modal_data": made}

    def sleep(self, level: int) -> None:
        """Put the engine to sleep and wake it. level: 1 keeps the weights on the host, 2 drops and loads them again."""
        self.sleep_and_wake(level)
        if level > 1:
            self.rpc("reload_weights")
        self.reset_cache()

    def sleep_and_wake(self, level: int) -> None:
        """Put the engine to sleep and wake it. After level 2, the weights are undefined."""
        self._llm.sleep(level=level)
        self._llm.wake_up()

    def rpc(self, method: str | Callable, **arguments: object) -> None:
        """Run a method of the workers, or a function of a worker, in every worker."""
        self._llm.collective_rpc(method, kwargs=arguments)

    def generate_around(self, requests: Sequence[Request], steps: int, call: Callable[[], None]) -> list[Answer]:
        """Answer all requests together, and run `call` after this many engine steps."""
        parameters = [_sampling(r, "", self.options.tokenizer) for r in requests]
        return [_answer(output) for output in self._generate_staggered(requests, parameters, {steps: call})]

    def pause(self, pause: Pause) -> None:
        """Let the engine pause while it makes the next answers."""
        self._pause = pause

    def _paused(self) -> dict[int, Callable[[], None]]:
        """What to call before which steps for the pause of the next answers."""
        pause, self._pause = self._pause, None
        if pause is None:
            return {}

        def begin() -> None:
            self._llm.sleep(level=0, mode="keep")
            if pause.forget:
                self._llm.reset_prefix_cache(reset_running_requests=True)

        return {pause.step: begin, pause.step + pause.STEPS: self._llm.wake_up}

    def counters(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            value = getattr(metric, "value", None)
            if isinstance(value, (int, float)):
                total[metric.name] = total.get(metric.name, 0.0) + value
        # vLLM before 0.33 loses its counts when a step has no output, such as the step after a request finished.
        return total | {HITS: float(self._cached)}

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._llm.get_tokenizer().encode(text))

    def ask(self, do: str, data: bytes) -> bytes:
        from bi_patch.tools.verify import instruments

        return instruments.SERVED[do](self, data)

    def alive(self) -> bool:
        return True

    def _digest_name(self) -> str:
        self._serial += 1
        return f"row-{self._serial}"

    def _generate_staggered(
        self,
        requests: Sequence[Request],
        parameters: Sequence[object],
        calls: Mapping[int, Callable[[], None]] | None = None,
    ) -> list:
        """Let requests join and leave a running batch: a request with a delay of n is added before engine step n.

        The output of an aborted request is None. calls: step -> a function that runs before the step.
        """
        engine = self._llm.llm_engine
        waiting = sorted(range(len(requests)), key=lambda i: requests[i].delay)
        done: dict[int, object] = {}
        streamed: dict[str, streams.Stream] = {}
        names: dict[str, int] = {}
        ends: dict[str, int] = {}  # the step before which a request is aborted
        step = 0
        while waiting or engine.has_unfinished_requests():
            if calls and step in calls:
                calls[step]()
            while waiting and (requests[waiting[0]].delay <= step or not engine.has_unfinished_requests()):
                index = waiting.pop(0)
                self._serial += 1
                name = f"staggered-{self._serial}"
                names[name] = index
                request = requests[index]
                if request.abort:
                    ends[name] = step + request.abort
                adapter = _adapter(request.lora)
                if request.parts:
                    streamed[name] = streams.Stream(engine, name, request, parameters[index], lora_request=adapter)
                    continue
                engine.add_request(name, self._prompt(request), parameters[index], lora_request=adapter)
            for name in [name for name, end in ends.items() if end == step]:
                if names[name] not in done:
                    engine.abort_request([name])
            for output in engine.step():
                if output.request_id in streamed:
                    output = streamed[output.request_id].take(output)
                if output is not None and output.finished:
                    done[names[output.request_id]] = output
            step += 1
        return [done.get(i) if requests[i].abort else done[i] for i in range(len(requests))]

    def _kv_specs(self) -> list:
        """vLLM's KV spec of each KV group; empty where the core runs in another process."""
        try:
            groups = self.core.scheduler.kv_cache_config.kv_cache_groups
        except AttributeError:
            return []
        return [group.kv_cache_spec for group in groups]

    def _info(self) -> Info:
        import torch
        import vllm
        from vllm.platforms import current_platform

        from bi_patch import arming
        from bi_patch.arming import startup

        state = arming.state()
        config = self._llm.llm_engine.vllm_config
        specs = self._kv_specs()
        on_gpu = current_platform.device_type != "cpu"
        device = current_platform.get_device_name() if on_gpu else f"{cpu_name()} ({os.cpu_count()} cores)"
        return Info(
            mode="armed" if state is not None and state.armed else "stock",
            vllm=vllm.__version__,
            torch=str(torch.__version__),
            device=device,
            threads=torch.get_num_threads(),
            block_size=config.cache_config.block_size,
            vocab_size=config.model_config.get_vocab_size(),
            open_seams=tuple(f.name for f in startup.inspect(large=False) if f.status == startup.OPEN and f.required),
            platform=short_name(device) if on_gpu else "cpu",
            capture_sizes=_captured(config),
            kv_blocks=config.cache_config.num_gpu_blocks or 0,
            kv_groups=tuple(spec.block_size for spec in specs),
            kv_longest=sum(-(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes) for spec in specs),
            devices=torch.accelerator.device_count() if on_gpu else 1,
            leaves=0 if state is None else state.settings.tp_invariant,
            quantization=str(config.model_config.quantization or ""),
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_model_len=config.model_config.max_model_len,
            two_forms=_two_forms(config),
            whole=not config.scheduler_config.enable_chunked_prefill,
            cached=bool(config.cache_config.enable_prefix_caching),
            whole_images=bool(getattr(config.scheduler_config, "disable_chunked_mm_input", False)),
            chunks=getattr(config.cache_config, "mamba_cache_mode", "none") == "align",
            **_pooling_info(self._llm, config),
        )


def _pools(options: Options) -> bool:
    """Whether vLLM runs the model as a pooling model."""
    runner = options.extra.get("runner", "auto")
    if runner != "auto":
        return runner == "pooling"
    from bi_patch.tools.verify.probes.base import config

    names = config(options.model).get("architectures") or ()
    if any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in names):
        return False
    from vllm.engine.arg_utils import EngineArgs

    trusted = bool(options.extra.get("trust_remote_code"))
    args = EngineArgs(options.model, skip_tokenizer_init=not options.tokenizer, trust_remote_code=trusted)
    return args.create_model_config().runner_type == "pooling"


def _unless_pooled(wanted: bool, pools: bool) -> bool | None:
    """`wanted`, or None for vLLM's own choice: it knows which pooling models can be computed in parts."""
    return None if pools and wanted else wanted


def _two_forms(config) -> bool:
    """Whether attention of this process computes prompts and generated tokens in forms of their own."""
    from bi_patch.seams import active

    armed = active.plan is not None and active.plan.platform == "cuda"
    return armed and active.mla == "two" and bool(config.model_config.use_mla)


def _pooling_info(llm, config) -> dict[str, object]:
    """The fields of Info about pooling. llm: a vllm.LLM. config: its VllmConfig."""
    model = config.model_config
    if model.runner_type != "pooling":
        return {}
    return {
        "pooling": llm.pooling_task or "",
        "matryoshka": bool(model.is_matryoshka),
        "width": model.embedding_size,
    }


def image_tokens(llm) -> tuple[dict[str, tuple[int, ...]], int]:
    """The tokens that stand for an image or a video in a prompt, and the most tokens of an image. {} and 0 without."""
    config = llm.llm_engine.vllm_config
    model = config.model_config
    if not getattr(model, "is_multimodal_model", False):
        return {}, 0
    if getattr(model.multimodal_config, "language_model_only", False):
        return {}, 0
    from vllm.model_executor.model_loader import get_model_cls
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget
    from vllm.platforms import current_platform

    budget = MultiModalBudget(config, MULTIMODAL_REGISTRY, enable_cache=False)
    most = budget.mm_max_toks_per_item
    kind = get_model_cls(model)
    text = kind.get_placeholder_str("image", 1)
    # Mistral's models leave it to their processor, which also knows the token of a LLaVA with a Pixtral encoder.
    if not text or kind.__name__ == "LlavaForConditionalGeneration":
        text = getattr(budget.processor.info.get_hf_processor(), "image_token", text)
    if "image" not in most or not text:
        return {}, 0
    texts = {"image": text}
    if "video" in most and images.takes_videos(config, current_platform.device_type):
        texts["video"] = kind.get_placeholder_str("video", 1)
    encode = llm.get_tokenizer().encode
    return {k: tuple(encode(t, add_special_tokens=False)) for k, t in texts.items()}, most["image"] + _MARKS


def _pixels(image: Image):
    """A made image as PIL's: random pixels, in larger squares of one colour, so that no resizing makes them alike."""
    import random

    from PIL import Image as Pictures

    source = random.Random(image.seed)
    small = Pictures.frombytes("RGB", (8, 8), source.randbytes(8 * 8 * 3))
    return small.resize((image.width, image.height), Pictures.Resampling.NEAREST)


def _video(image: Image):
    """A made video as vLLM's: frames [frames, height, width, 3], each another made image, and what a file tells."""
    import numpy

    frames = [
        numpy.asarray(_pixels(msgspec.structs.replace(image, seed=image.seed + 1000 * i))) for i in range(image.frames)
    ]
    told = {
        "fps": 2.0,
        "duration": image.frames / 2,
        "total_num_frames": image.frames,
        "frames_indices": list(range(image.frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    return numpy.stack(frames), told


def _pooling(request: Request, task: str):
    from vllm import PoolingParams

    return PoolingParams(task=task, dimensions=request.dimensions, use_activation=request.activation)


_MARKS = 64  # tokens around an image's rows, such as the ends of its lines


def cpu_name() -> str:
    """The processor's name, "CPU" where Linux does not tell; with AMX tiles for bf16 it ends with ", AMX"."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "CPU"
    held = dict((part.strip() for part in line.split(":", 1)) for line in told.splitlines() if ":" in line)
    return held.get("model name", "CPU") + (", AMX" if "amx_bf16" in held.get("flags", "").split() else "")


def _captured(config) -> tuple[int, ...]:
    """The row counts of captured graphs, ascending; empty when graphs are off."""
    compilation = config.compilation_config
    if config.model_config.enforce_eager or not getattr(compilation.cudagraph_mode, "value", 0):
        return ()
    return tuple(sorted(compilation.cudagraph_capture_sizes or ()))


def _adapter(folder: str):
    if not folder:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(folder, zlib.crc32(folder.encode()) % 2**31 + 1, folder)


def _digests(name: str) -> list[str]:
    if not name:
        return []
    from bi_patch.tools.verify import rows

    return rows.take(name)


def _sampling(request: Request, digest: str = "", text: bool = True):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(**json.loads(request.grammar)) if request.grammar else None
    return SamplingParams(
        structured_outputs=grammar,
        temperature=request.temperature,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=dict(request.bias) or None,
        allowed_token_ids=list(request.allowed) or None,
        extra_args=_extra(request, digest),
        detokenize=text,
        top_p=request.top_p,
        seed=request.seed,
        max_tokens=request.max_tokens,
        logprobs=request.alternatives,
        logprob_token_ids=list(request.asked) or None,
        prompt_logprobs=request.prompt_logprobs,
        stop=list(request.stop),
        stop_token_ids=list(request.stop_tokens),
        ignore_eos=True,
    )


def _extra(request: Request, digest: str) -> dict[str, object] | None:
    """The arguments of verify's logits processors (see verify.rows)."""
    given = {"bi_patch_digest": digest or None, "bi_patch_first": request.first}
    return {name: value for name, value in given.items() if value is not None} or None


def _answer(output, digests: list[str] | None = None) -> Answer:
    """vLLM's RequestOutput as an Answer; prompt position 0 has no logprob and is left out."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    generated = list(completion.logprobs or [])
    prompt = list(output.prompt_logprobs or [])[1:]
    prompt_ids = list(output.prompt_token_ids)[1:]
    return Answer(
        tokens=tokens,
        logprobs=[_logprob(entry, token) for token, entry in zip(tokens, generated)],
        top=[_top(entry) for entry in generated],
        prompt_logprobs=[_logprob(entry, token) for token, entry in zip(prompt_ids, prompt)],
        prompt_top=[_top(entry) for entry in prompt],
        text=completion.text,
        digests=digests or [],
        experts=_experts(completion),
        seed=getattr(completion, "seed", None),
        weights_changed=getattr(completion, "weights_changed", False),
    )


def _experts(completion) -> list[str]:
    """The routed experts of each position as text; vLLM gives an array [positions, layers, experts per token]."""
    found = getattr(completion, "routed_experts", None)
    return [] if found is None else [row.tobytes().hex() for row in found]


def _logprob(entry, token: int) -> float:
    """The token's logprob; NaN where the engine's entry lacks the token, as a stale entry does."""
    return entry[token].logprob if token in entry else math.nan


def _top(entry) -> list[tuple[int, float]]:
    return [(token, value.logprob) for token, value in entry.items()]
