"""Drives a running vLLM server as an Engine: requests go over HTTP through the OpenAI client.

Prompts are token ids. A new `cache_salt` acts as an empty cache: only requests with the same salt share prefixes.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import secrets
import urllib.error
import urllib.request
from collections.abc import Sequence

from bi_patch.errors import MissingDependency, ServerFailed
from bi_patch.tools.verify import connections
from bi_patch.tools.verify.answers import Answer, Request, checked
from bi_patch.tools.verify.engine import SERVER, Info, Options
from bi_patch.tools.verify.report import SENT_AGAIN

_WATCH = 5.0  # seconds between two health checks while requests run
STEP = 0.02  # seconds of delay for each engine step of Request.delay
_VOCABULARIES = (120_000, 32_000, 8_000, 1_900, 250)


class ServerEngine:
    """An Engine over HTTP; use as a context manager. See verify.engine.Engine for the methods.

    url: http://host:port with or without /v1. model: the served name, by default the server's first. timeout: seconds
    for one answer. said: what the server said about itself (model, bi_patch, context length, block size, prefix
    caching), and how many requests were sent again (SENT_AGAIN).
    Raises ServerFailed when the server is down, dies, or answers with an error; MissingDependency without the package
    openai.
    """

    def __init__(self, url: str, *, model: str = "", timeout: float = 600.0) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingDependency("verifying a server needs the OpenAI client: pip install openai") from error
        self._openai = openai
        self.url = re.sub(r"/v1/?$", "", url.rstrip("/"))
        served = self._models()
        entry = next((m for m in served if not model or m["id"] == model), None)
        if entry is None:
            raise ServerFailed(f"{self.url} does not serve {model!r}, but {', '.join(m['id'] for m in served)}")
        self._loop = asyncio.new_event_loop()
        self._client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            max_retries=0,
            timeout=timeout,
            http_client=connections.client(openai, lambda: asyncio.to_thread(self.alive), self._again),
        )
        self._salt = secrets.token_hex(8)
        cache = self._cache()
        self._version = json.loads(self._get("/version"))
        self.said = _said(entry, cache, self._version)
        self.options = Options(
            entry["id"],
            max_model_len=entry.get("max_model_len") or 2048,
            max_num_seqs=1024,
            prefix_caching=cache.get("enable_prefix_caching", "True") == "True",
        )
        self.info = self._info(cache)

    def __enter__(self) -> ServerEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        try:
            self._loop.run_until_complete(self._client.close())
        finally:
            self._loop.close()

    def alive(self) -> bool:
        """Whether the server answers its health check."""
        try:
            self._get("/health")
        except ServerFailed:
            return False
        return True

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        async def together() -> list[Answer]:
            asked = asyncio.gather(*(self._ask(r) for r in requests))
            watch = asyncio.ensure_future(self._dies())
            try:
                await asyncio.wait({asked, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not asked.done():
                    watch.result()
                return list(await asked)
            finally:
                for task in (asked, watch):
                    task.cancel()
                await asyncio.gather(asked, watch, return_exceptions=True)

        return checked(requests, self._loop.run_until_complete(together()))

    async def _dies(self) -> None:
        """Raise ServerFailed when the server no longer answers. A server that shuts down may keep connections open."""
        missed = 0
        while True:
            await asyncio.sleep(_WATCH)
            try:
                await asyncio.to_thread(self._get, "/health")
                missed = 0
            except ServerFailed as error:
                missed += 1
                # A busy server may answer late; a refused connection or an error means that the server died.
                if missed >= 6 or "answered" in str(error) or "refused" in str(error):
                    raise ServerFailed(f"{error}; the server died while requests were running") from error

    def reset_cache(self) -> None:
        self._salt = secrets.token_hex(8)

    def _again(self) -> None:
        self.said[SENT_AGAIN] = self.said.get(SENT_AGAIN, 0) + 1

    def counters(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for line in self._get("/metrics").splitlines():
            found = re.match(r"(vllm:\w+?)(?:_total)?(?:\{[^}]*\})? ([-+.\deE]+)$", line)
            if found:
                total[found[1]] = total.get(found[1], 0.0) + float(found[2])
        return total

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(json.loads(self._get("/tokenize", {"model": self.options.model, "prompt": text}))["tokens"])

    def set_chunk(self, tokens: int | None) -> None:
        raise ServerFailed(f"{self.url}: a running server's chunk budget cannot be changed")

    def set_logprobs(self, mode: str | None) -> None:
        raise ServerFailed(f"{self.url}: a running server's logprobs mode cannot be changed")

    def ask(self, do: str, data: bytes) -> bytes:
        raise ServerFailed(f"{self.url}: a server answers requests only and cannot run {do!r}")

    async def _ask(self, request: Request) -> Answer:
        await asyncio.sleep(request.delay * STEP)
        if not request.abort:
            return await self._complete(request)
        try:
            await asyncio.wait_for(self._complete(request), request.abort * STEP)
        except TimeoutError:
            pass  # closing the connection aborts the request
        return Answer([])

    async def _complete(self, request: Request) -> Answer:
        extra: dict[str, object] = {
            "ignore_eos": True,
            "top_k": request.top_k,
            "min_p": request.min_p,
            "cache_salt": self._salt,
            "repetition_penalty": request.repetition_penalty,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if request.prompt_logprobs is not None:
            extra["prompt_logprobs"] = request.prompt_logprobs
        if request.stop_tokens:
            extra["stop_token_ids"] = list(request.stop_tokens)
        if request.asked:
            extra["logprob_token_ids"] = list(request.asked)
        if request.grammar:
            extra["structured_outputs"] = json.loads(request.grammar)
        try:
            answer = await self._client.completions.create(
                model=request.lora or self.options.model,
                prompt=list(request.prompt),
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                logprobs=request.alternatives,
                presence_penalty=request.presence_penalty,
                stop=list(request.stop) or None,
                extra_body=extra,
            )
        except self._openai.APIStatusError as error:
            raise ServerFailed(
                f"{self.url} answered {error.status_code} to a request of {len(request.prompt)} tokens: "
                f"{str(error.message)[:400]}"
            ) from error
        except self._openai.APIError as error:
            raise ServerFailed(
                f"{self.url} gave no answer to a request of {len(request.prompt)} tokens ({_named(error)}): "
                "is the server still running? Its own log says why it stopped"
            ) from error
        return _answer(answer.choices[0], request, self.url)

    def _models(self) -> list[dict]:
        try:
            served = json.loads(self._get("/v1/models"))["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerFailed(f"{self.url}/v1/models is not the answer of an OpenAI-compatible server") from error
        if not served:
            raise ServerFailed(f"{self.url} serves no model")
        return served

    def _cache(self) -> dict[str, str]:
        """The labels of the server's cache configuration: block_size, enable_prefix_caching, ..."""
        try:
            line = next(x for x in self._get("/metrics").splitlines() if x.startswith("vllm:cache_config_info{"))
        except (ServerFailed, StopIteration):
            return {}
        return dict(re.findall(r'(\w+)="([^"]*)"', line))

    def _info(self, cache: dict[str, str]) -> Info:
        block = cache.get("block_size", "16")
        return Info(
            mode="server",
            vllm=self._version.get("version", ""),
            torch="",
            device="",
            threads=0,
            block_size=int(block) if block.isdigit() else 16,
            vocab_size=self._vocabulary(),
            platform=SERVER,
            max_model_len=self.options.max_model_len,
            max_num_seqs=self.options.max_num_seqs,
        )

    def _vocabulary(self) -> int:
        """A vocabulary size that the server accepts: the API does not state the model's own."""
        for size in _VOCABULARIES:
            try:
                self.generate([Request((size - 1, 1), max_tokens=1, logprobs=None)])
            except ServerFailed as error:
                if isinstance(error.__cause__, self._openai.BadRequestError):
                    continue
                raise
            return size
        raise ServerFailed(f"{self.url} refuses prompts of token ids")

    def _get(self, path: str, data: dict | None = None) -> str:
        key = os.environ.get("OPENAI_API_KEY")
        request = urllib.request.Request(
            self.url + path,
            data=None if data is None else json.dumps(data).encode(),
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            raise ServerFailed(f"{self.url}{path} answered {error.code} {error.reason}") from error
        except (OSError, ValueError) as error:
            raise ServerFailed(
                f"no server answers at {self.url} ({getattr(error, 'reason', error)}): start `vllm serve`, or check "
                "the address"
            ) from error


def _said(entry: dict, cache: dict[str, str], version: dict) -> dict[str, object]:
    """Only what the server said about itself.

    entry: the model's entry of /v1/models. cache: see _cache. version: the answer to /version, where an armed server
    has the sign of its engine core (arming.sign); "bi_patch" is None for any other server.
    """
    said: dict[str, object] = {"model": entry["id"], "bi_patch": version.get("bi_patch")}
    if entry.get("max_model_len"):
        said["max_model_len"] = entry["max_model_len"]
    if cache.get("block_size", "").isdigit():
        said["block_size"] = int(cache["block_size"])
    if cache.get("enable_prefix_caching") in ("True", "False"):
        said["prefix_caching"] = cache["enable_prefix_caching"] == "True"
    return said


def _answer(choice, request: Request, url: str) -> Answer:
    """The Answer in a completion's choice with vLLM's extra fields. Top tokens keep the server's order.

    Raises ServerFailed for a choice without tokens, and for a logprob of null, which is how JSON writes NaN.
    """
    given = choice.model_extra or {}
    tokens = list(given.get("token_ids") or ())
    found = choice.logprobs
    logprobs = list(found.token_logprobs or ()) if found is not None else []
    if not tokens and found is not None:
        tokens = [_id(token) for token in found.tokens or ()]
    if not tokens:
        raise ServerFailed(
            f"{url} returns neither token ids nor logprobs, so nothing can be compared: is the server vLLM, and does "
            "every proxy pass on `return_token_ids` and `logprobs`?"
        )
    tops = [[(_id(k), v) for k, v in (top or {}).items()] for top in (found.top_logprobs or ())] if found else []
    prompt = [{int(k): v["logprob"] for k, v in entry.items()} for entry in (given.get("prompt_logprobs") or ())[1:]]
    # As in a local engine: NaN where the entry lacks the token.
    scored = [entry.get(token, math.nan) for token, entry in zip(request.prompt[1:], prompt)]
    every = [*logprobs, *scored, *(value for top in tops for _, value in top), *(v for e in prompt for v in e.values())]
    if None in every:
        raise ServerFailed(
            f"{url} returns null for a logprob: the model's logits are NaN there, which proves nothing; check the "
            "model's weights, dtype and quantization"
        )
    return Answer(
        tokens=tokens,
        logprobs=logprobs,
        top=tops,
        prompt_logprobs=scored,
        prompt_top=[list(entry.items()) for entry in prompt],
        text=choice.text,
        seed=given.get("seed"),
        weights_changed=bool(given.get("weights_changed", False)),
    )


def _named(error: Exception) -> str:
    """The client's error and, where it has one, the connection's below it."""
    return ": ".join(f"{type(e).__name__} {e}".strip() for e in (error, error.__cause__) if e is not None)[:300]


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))
