"""Prints how answers differ in company, for test_request_options.py: python request_options.py MODEL DTYPE

Options of requests that no axis of verify has. Each request runs alone, then beside all others in two orders, then
twice beside the others. The engine has few KV blocks and few tokens a step. The last line is "RESULT " and JSON: how
many answers were compared, the names of those that differ, the preemptions, and how each request ended.
"""

import bi_patch  # isort: skip  # before vLLM
import json
import sys

from vllm import LLM, SamplingParams
from vllm.sampling_params import RepetitionDetectionParams

assert bi_patch

REPEATED = RepetitionDetectionParams(max_pattern_size=4, min_pattern_size=1, min_count=3)
KINDS = {
    "bad words": {"bad_words": ["a", "the", "V", "ll"]},
    "bad words, seeded": {"bad_words": ["e", "L"], "temperature": 1.0, "seed": 5},
    "repetition": {"repetition_detection": REPEATED, "allowed_token_ids": [40, 41]},
    "repetition, seeded": {"repetition_detection": REPEATED, "temperature": 0.4, "seed": 9},
    "chosen logprobs": {"logprob_token_ids": [3, 9, 77], "logprobs": None},
    "flat logprobs": {"flat_logprobs": True, "logprobs": 3, "prompt_logprobs": 2},
    "stop texts": {"stop": ["e", "a"], "include_stop_str_in_output": True, "temperature": 1.0, "seed": 3},
    "stop tokens late": {"stop_token_ids": list(range(0, 500, 7)), "min_tokens": 5},
    "end ignored": {"ignore_eos": True, "temperature": 0.9, "top_p": 0.8, "seed": 4},
    "bias": {"logit_bias": {5: 4.0, 6: -3.0}, "repetition_penalty": 1.3},
    "three answers": {"n": 3, "temperature": 0.7, "seed": 11, "top_k": 20, "frequency_penalty": 0.5},
    "plain": {},
}


def rows(found):
    """Logprobs of each position: (token, logprob in hexadecimal, rank)."""
    held = found or ()
    return [sorted((t, float(p.logprob).hex(), p.rank) for t, p in (row or {}).items()) for row in held]


def bits(output):
    answers = [(list(o.token_ids), o.text, o.finish_reason, rows(o.logprobs)) for o in output.outputs]
    return rows(output.prompt_logprobs), answers


def main(model, dtype):
    llm = LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=9,
        disable_log_stats=False,
        seed=0,
    )

    def ask(chosen):
        llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": [(7 * i + 13 * j) % 400 + 20 for j in range(100 + 5 * i)]} for i in chosen]
        params = [
            SamplingParams(**{"temperature": 0.0, "max_tokens": 40, "logprobs": 1, **KINDS[names[i]]}) for i in chosen
        ]
        return [bits(output) for output in llm.generate(prompts, params, use_tqdm=False)]

    names, every = list(KINDS), list(range(len(KINDS)))
    alone = [ask([i])[0] for i in every]
    differing, compared = [], 0
    for order in (every, every[::-1], every * 2):
        for i, got in zip(order, ask(order)):
            compared += 1
            differing += [names[i]] * (got != alone[i])
    preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    ends = {name: found[1][0][2] for name, found in zip(names, alone)}
    print(f"RESULT {json.dumps([compared, differing, preemptions, ends])}")


if __name__ == "__main__":
    main(*sys.argv[1:])
