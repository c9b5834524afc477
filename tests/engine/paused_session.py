"""Runs a streamed input over pauses, for test_paused_session.py: python paused_session.py MODEL

vLLM's AsyncLLM, with its engine core in another process. Two streamed inputs of two parts each, with a pause between
the parts: one keeps requests, one aborts them. The last line is "RESULT " and JSON: for each, the tokens of both parts
and the last finish reason; then the tokens of the whole prompt, and the names of the requests that the front end keeps
after a request that cannot be sent to the engine core.
"""

import bi_patch  # isort: skip  # before vLLM
import asyncio
import json
import sys

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

assert bi_patch

FIRST, SECOND = list(range(50, 90)), list(range(300, 310))


def asked(kind: RequestOutputKind) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, output_kind=kind)


async def session(engine: AsyncLLM, mode: str) -> tuple[list[list[int]], str]:
    """The tokens of each part, and the last finish reason. mode: of the pause between both parts."""
    answered, paused = asyncio.Event(), asyncio.Event()
    parts, reason = [[]], ""

    async def feed():
        yield StreamingInput(prompt={"prompt_token_ids": list(FIRST)})
        await paused.wait()
        yield StreamingInput(prompt={"prompt_token_ids": list(SECOND)})

    async def pause() -> None:
        await answered.wait()
        await engine.pause_generation(mode=mode, clear_cache=False)
        await engine.resume_generation()
        paused.set()

    pausing = asyncio.create_task(pause())
    async for output in engine.generate(feed(), asked(RequestOutputKind.DELTA), f"session {mode}"):
        parts[-1] += output.outputs[0].token_ids
        if output.outputs[0].finish_reason:
            reason = output.outputs[0].finish_reason
            parts.append([])
            answered.set()
    await pausing
    return [part for part in parts if part], reason


async def unsent(engine: AsyncLLM) -> list[str]:
    """The requests that the front end knows after one with an option that nothing serializes."""
    params = SamplingParams(temperature=0, max_tokens=5, extra_args={"own": object()})
    try:
        async for _ in engine.generate({"prompt_token_ids": list(FIRST)}, params, "unsent"):
            pass
    except Exception as error:
        assert isinstance(error.__cause__, TypeError), error
        return list(engine.output_processor.request_states)
    raise AssertionError("the request was sent")


async def main() -> None:
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(sys.argv[1], dtype="float32", max_model_len=512, enforce_eager=True)
    )
    kept, aborted = [await session(engine, mode) for mode in ("keep", "abort")]
    whole = {"prompt_token_ids": [*FIRST, *kept[0][0][:-1], *SECOND]}
    async for output in engine.generate(whole, asked(RequestOutputKind.FINAL_ONLY), "whole"):
        tokens = list(output.outputs[0].token_ids)
    left = await unsent(engine)
    engine.shutdown()
    print("RESULT " + json.dumps([kept, aborted, tokens, left]))


if __name__ == "__main__":
    asyncio.run(main())
