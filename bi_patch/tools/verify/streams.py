"""Streamed inputs: requests whose prompts come in parts, on an engine in this process.

vLLM's AsyncLLM has them behind an asynchronous generator. Here, the engine takes the same parts one by one.
"""

from __future__ import annotations

import copy

from bi_patch.tools.verify.answers import Request


class Stream:
    """A request that comes in parts. vLLM answers each part, and keeps all tokens of an answer but the last.

    engine: an LLMEngine. name: the request's id. params: its SamplingParams, the same for each part but max_tokens.
    """

    def __init__(self, engine, name: str, request: Request, params, **more: object) -> None:
        self._engine, self._name, self._params, self._more = engine, name, params, more
        self._left = parts(request)
        self._unanswered = len(self._left)
        self._tokens: list[int] = []
        self._logprobs: list = []
        self._text = ""
        for _ in range(len(self._left) if request.at_once else 1):
            self._send()

    def _send(self) -> None:
        from vllm.sampling_params import RequestOutputKind

        tokens, generate = self._left.pop(0)
        params = self._params.clone()
        params.max_tokens, params.output_kind = generate, RequestOutputKind.DELTA
        engine = self._engine
        made = engine.input_processor.process_inputs(
            self._name,
            {"prompt_token_ids": list(tokens), "type": "token"},
            params,
            supported_tasks=engine.get_supported_tasks(),
            resumable=True,
            **self._more,
        )
        made.external_req_id = self._name
        engine.output_processor.add_request(made, None, None, 0)
        sent = copy.copy(made)  # as through a socket: the front end extends its own list of tokens
        sent.prompt_token_ids = list(tokens)
        engine.engine_core.add_request(sent)

    def take(self, output):
        """The whole output of the last part once that part is answered, else None. output: of an engine step."""
        part = output.outputs[0]
        self._tokens += part.token_ids
        self._logprobs += part.logprobs or []
        self._text += part.text
        if not part.finish_reason:
            return None
        self._unanswered -= 1
        if not self._unanswered:
            self._engine.abort_request([self._name])
            whole, answer = copy.copy(output), copy.copy(part)
            answer.token_ids, answer.logprobs, answer.text = self._tokens, self._logprobs, self._text
            whole.outputs, whole.finished = [answer], True
            return whole
        self._tokens, self._logprobs, self._text = [], [], ""
        if self._left:
            self._send()
        return None


def parts(request: Request) -> list[tuple[tuple[int, ...], int]]:
    """The tokens of each part of a request's prompt, and how many tokens answer the part."""
    found, start = [], 0
    for end, generate in (*request.parts, (len(request.prompt), request.max_tokens)):
        found.append((request.prompt[start:end], generate))
        start = end + generate - 1  # the prompt holds the answer without its last token
    return found
