"""Prints the bits of many kinds of requests for test_speculation.py: python speculation.py MODEL OPTIONS [PHASE]

OPTIONS: a list of engines as JSON, each the arguments of vllm.LLM, and `adapters`: folders of LoRA adapters that
requests get in turn, or none. Each engine is a fork, so that vLLM is imported once. PHASE: only this phase. Two engines
that differ in speculative_config only must print the same bits.
"""

import bi_patch  # isort: skip  # before vLLM
import json
import os
import random
import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

assert bi_patch

VOCABULARY = 1900
KINDS = {
    "greedy": {},
    "temperature": {"temperature": 0.4, "seed": 1},
    "top-k": {"temperature": 0.8, "seed": 2, "top_k": 3},
    "top-p": {"temperature": 0.5, "seed": -3, "top_p": 0.3},
    "top-k and top-p": {"temperature": 0.7, "seed": 4, "top_k": 5, "top_p": 0.6},
    "unseeded": {"temperature": 0.6, "top_k": 3},
    "repetition penalty": {"repetition_penalty": 1.05},
    "presence penalty": {"presence_penalty": 0.2, "temperature": 0.5, "seed": 5, "top_k": 4},
    "frequency penalty": {"frequency_penalty": 0.1, "temperature": 0.6, "seed": 6, "top_k": 3},
    "allowed tokens": {"allowed_token_ids": list(range(11, 20))},
    "allowed tokens, sampled": {"allowed_token_ids": list(range(11, 15)), "temperature": 1.0, "seed": 7},
    "given logprobs": {"logprob_token_ids": [3, 4, 5], "logprobs": 3},
    "no logprobs": {"logprobs": None, "temperature": 0.4, "seed": 8, "top_k": 2},
    "prompt logprobs": {"prompt_logprobs": 2},
    "three answers": {"temperature": 0.8, "top_k": 3, "seed": 9, "n": 3},
}
_ITEM = {"type": "array", "minItems": 8, "maxItems": 12, "items": {"enum": ["alpha", "beta"]}}
# Grammars, served by the libraries xgrammar and guidance, and a text of each for n-grams to find.
GRAMMARS = {
    "items": ({"json": _ITEM}, '["alpha","beta","alpha","alpha","beta","beta","alpha","beta"]'),
    "multiples": ({"json": {**_ITEM, "items": {"type": "integer", "multipleOf": 7}}}, "[7,14,21,7,14,21,7,14,21]"),
    "regex": ({"regex": "(abc|abd){12,20}x"}, "abcabdabcabcabdabdabcabdabcabcabdabdabcx"),
    "choice": ({"choice": ["one one one one one one", "two two two two two two"]}, "one one one one one one"),
}


def prompt(tag, length):
    """Token ids that repeat themselves, so that n-grams find drafts."""
    source = random.Random(f"{tag}")
    part = [source.randrange(VOCABULARY) for _ in range(9)]
    return {"prompt_token_ids": (part * (length // 9 + 1))[:length]}


def params(**given):
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 32, "ignore_eos": True, "logprobs": 2, **given})


def bits(output):
    """Everything of an answer that a client sees, floats in hexadecimal."""

    def scores(steps):
        return [s and [[t, v.logprob.hex(), v.rank] for t, v in s.items()] for s in steps or []]

    return [
        [
            list(c.token_ids),
            c.text,
            c.finish_reason,
            c.stop_reason,
            c.cumulative_logprob and c.cumulative_logprob.hex(),
            scores(c.logprobs),
            getattr(c, "seed", None),
        ]
        for c in output.outputs
    ] + [scores(output.prompt_logprobs)]


class Asked:
    """Asks an engine, and keeps the bits of each answer and the counters of each phase."""

    def __init__(self, llm, only=(), adapters=()):
        self.llm, self.only, self.found, self.counted = llm, only, {}, {}
        self.adapters = [None, *(LoRARequest(f"{i}", i, folder) for i, folder in enumerate(adapters, 1))]

    def loras(self, count):
        return [self.adapters[i % len(self.adapters)] for i in range(count)] if self.adapters[1:] else None

    def total(self):
        names = ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens", "vllm:num_preemptions")
        held = {m.name: m.value for m in self.llm.get_metrics() if m.name in names}
        return [held.get(name, 0) for name in names]

    def phase(self, name, ask):
        if self.only and name not in self.only:
            return
        before = self.total()
        for label, output in ask().items():
            self.found[f"{name}: {label}"] = bits(output)
        self.counted[name] = [b - a for a, b in zip(before, self.total())]

    def together(self, requests):
        """requests: label -> (prompt, parameters)."""
        prompts, given = zip(*requests.values())
        loras = self.loras(len(prompts))
        return dict(zip(requests, self.llm.generate(list(prompts), list(given), use_tqdm=False, lora_request=loras)))

    def late(self, requests):
        """Each request arrives two engine steps after the one before."""
        engine, waiting, done, step = self.llm.llm_engine, list(requests.items()), {}, 0
        loras = self.loras(len(waiting)) or [None] * len(waiting)
        while waiting or engine.has_unfinished_requests():
            if waiting and step % 2 == 0:
                label, (text, given) = waiting.pop(0)
                engine.add_request(f"late {label}", text, given, lora_request=loras.pop(0))
            done.update({o.request_id.removeprefix("late "): o for o in engine.step() if o.finished})
            step += 1
        return done


def answers(given):
    adapters = given.pop("adapters", ())
    library = given.get("structured_outputs_config", {}).get("backend")
    llm = LLM(sys.argv[1], **given)
    asked = Asked(llm, sys.argv[3:], adapters)
    length = llm.llm_engine.model_config.max_model_len
    kinds = {k: (prompt(i % 5, 30 + 7 * i), params(**given)) for i, (k, given) in enumerate(KINDS.items())}

    asked.phase("together", lambda: asked.together(kinds))
    asked.phase("together, cached", lambda: asked.together(kinds))
    single = {k: v for k, v in kinds.items() if k != "three answers"}
    llm.reset_prefix_cache()
    asked.phase("late", lambda: asked.late(single))

    # More requests than the cache holds.
    many = {f"{i}": (prompt(f"many {i}", 90 + i), list(kinds.values())[i % 10][1].clone()) for i in range(16)}
    for _, given in many.values():
        given.max_tokens = 50
    llm.reset_prefix_cache()
    asked.phase("preempted", lambda: asked.together(many))

    # Ends inside of accepted drafts: stop tokens, stop strings, max_tokens, min_tokens, the model's longest text.
    text = prompt(1, 60)
    (free,) = asked.together({"": (text, params(max_tokens=60))}).values()
    tokens, words = list(free.outputs[0].token_ids), free.outputs[0].text
    few = {"temperature": 0.6, "seed": 3, "top_k": 9}
    cut = words[len(words) // 2 : len(words) // 2 + 3]
    ends = {
        **{f"{n} tokens": {"max_tokens": n} for n in (1, 2, 3, 5, 8, 13)},
        "a stop token": {"stop_token_ids": [tokens[30]]},
        "a stop token, later": {"stop_token_ids": [tokens[30]], "min_tokens": 35, "max_tokens": 60},
        "min_tokens, sampled": {"stop_token_ids": tokens[:9], "min_tokens": 22, **few},
        "a stop string": {"stop": [cut], "max_tokens": 60},
        "stop strings": {"stop": [words[-4:], cut], "max_tokens": 60, "include_stop_str_in_output": True},
        "a stop string, later": {"stop": [cut[:1]], "min_tokens": 17, "max_tokens": 60},
        "bad words": {"bad_words": [words[20:24] or "a", llm.get_tokenizer().decode(tokens[10:12])]},
    }
    asked.phase("ends", lambda: asked.together({k: (text, params(**given)) for k, given in ends.items()}))
    long = {f"{n} before": (prompt(n, length - n), params(max_tokens=n)) for n in (2, 3, 5, 9)}
    asked.phase("longest", lambda: asked.together(long))

    sampled = ({}, {"temperature": 0.9, "seed": 4}, {"temperature": 0.9, "seed": 5, "min_tokens": 12})
    tokenizer = llm.get_tokenizer()
    grammars = {
        f"{name} {i}": (
            {"prompt_token_ids": ([*tokenizer.encode(words), tokenizer.eos_token_id] * 9)[:100]},
            params(ignore_eos=False, max_tokens=70, structured_outputs=StructuredOutputsParams(**given), **how),
        )
        for name, (given, words) in GRAMMARS.items()
        for i, how in enumerate(sampled)
        if not (name == "multiples" and library == "xgrammar")  # which does not know them
    }
    asked.phase("grammars", lambda: asked.together(grammars))

    sampler = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.sampler
    for mode in ("processed_logprobs", "raw_logits"):
        for part in (sampler, sampler.topk_topp_sampler):
            part.logprobs_mode = mode
        asked.phase(mode, lambda: asked.together(kinds))
    print("RESULT", json.dumps({"found": asked.found, "counted": asked.counted}))


def main():
    for given in json.loads(sys.argv[2]):
        sys.stdout.flush()
        if not (child := os.fork()):
            answers(given)
            sys.exit()
        if os.waitpid(child, 0)[1]:
            sys.exit(1)


if __name__ == "__main__":
    main()
