"""The OpenAI server's answers: the seed of each sampled choice (`seed`), and updates on its way (`weights_changed`)."""

import contextlib
import functools
import inspect
import json

from bi_patch.seams.model import Seam, Target

_FINISHED = '"finish_reason":"'  # vLLM writes JSON without spaces; inside a text, the quotes would be escaped


class _Noted:
    """An iterator over engine outputs that notes the extra fields of each choice on the way.

    outputs: yields RequestOutput, or (index of the prompt, RequestOutput). n: choices for each prompt.
    fields: number of the choice -> its extra fields.
    """

    def __init__(self, outputs, n: int) -> None:
        self._outputs, self._n = outputs, n
        self.fields: dict[int, dict[str, int | bool]] = {}

    def __aiter__(self):
        return self

    async def __anext__(self):
        item = await anext(self._outputs)
        prompt, output = item if isinstance(item, tuple) else (0, item)
        for completion in output.outputs:
            if completion.finish_reason is not None and (fields := _fields(completion)):
                self.fields[completion.index + prompt * self._n] = fields
        return item


def _fields(completion) -> dict[str, int | bool]:
    """The extra fields of a choice: its seed, and `weights_changed` if weights changed while it was made."""
    seed = getattr(completion, "seed", None)
    changed = {"weights_changed": True} if getattr(completion, "weights_changed", False) else {}
    return changed if seed is None else {"seed": seed, **changed}


def _noting(signature, self, args, kwargs):
    """The arguments of a server's generator, with its engine outputs noted on the way, and the notes."""
    given = signature.bind(self, *args, **kwargs)
    noted = _Noted(given.arguments["result_generator"], given.arguments["request"].n or 1)
    given.arguments["result_generator"] = noted
    return given, noted.fields


def _completion(original):
    """OpenAIServingCompletion.request_output_to_completion_response: name the seed in each choice."""

    @functools.wraps(original)
    def request_output_to_completion_response(self, final_res_batch, *args, **kwargs):
        response = original(self, final_res_batch, *args, **kwargs)
        completions = (completion for output in final_res_batch for completion in output.outputs)
        for choice, completion in zip(response.choices, completions, strict=True):
            for name, value in _fields(completion).items():
                setattr(choice, name, value)
        return response

    return request_output_to_completion_response


def _chat(original):
    """OpenAIServingChat.chat_completion_full_generator: name the seed in each choice."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    async def chat_completion_full_generator(self, *args, **kwargs):
        given, noted = _noting(signature, self, args, kwargs)
        response = await original(*given.args, **given.kwargs)
        for choice in getattr(response, "choices", ()):  # an error has none
            for name, value in noted.get(choice.index, {}).items():
                setattr(choice, name, value)
        return response

    return chat_completion_full_generator


def _stream(original):
    """The generator of a stream's events: name the seed in the last event of each choice."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    async def stream_generator(self, *args, **kwargs):
        given, noted = _noting(signature, self, args, kwargs)
        async with contextlib.aclosing(original(*given.args, **given.kwargs)) as events:
            async for event in events:
                yield _named(event, noted) if noted and _FINISHED in event else event

    return stream_generator


def _named(event: str, noted: dict[int, dict[str, int | bool]]) -> str:
    """A server-sent event, with the extra fields in each choice that it finishes."""
    chunk = json.loads(event.removeprefix("data: "))
    for choice in chunk.get("choices", ()):
        if choice.get("finish_reason"):
            choice.update(noted.get(choice["index"], {}))
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


_COMPLETION = "vllm.entrypoints.openai.completion.serving"
_CHAT = "vllm.entrypoints.openai.chat_completion.serving"


def _seam(name: str, module: str, target: str, close, how: str) -> Seam:
    return Seam(
        name=name,
        targets=(Target(module, target),),
        close=close,
        why="a client can replay an answer only if it knows the seed of the answer",
        how=how,
        until="upstream returns the seed of each answer",
        causes=(29,),
        on_import=True,
        required=False,  # the seed is on its way, whoever writes the answer
    )


_CHOICE = "each sampled choice has the field `seed`"
_LAST = "the last event of each sampled choice has the field `seed`"

SEAMS = (
    _seam(
        "answers.completion",
        _COMPLETION,
        "OpenAIServingCompletion.request_output_to_completion_response",
        _completion,
        _CHOICE,
    ),
    _seam(
        "answers.completion_stream",
        _COMPLETION,
        "OpenAIServingCompletion.completion_stream_generator",
        _stream,
        _LAST,
    ),
    _seam("answers.chat", _CHAT, "OpenAIServingChat.chat_completion_full_generator", _chat, _CHOICE),
    _seam("answers.chat_stream", _CHAT, "OpenAIServingChat.chat_completion_stream_generator", _stream, _LAST),
)
