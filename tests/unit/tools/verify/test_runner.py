"""The search for the target's rows in model runner V2, on a stand-in with V2's order of calls.

A test on the real engine covers V1.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.runner import AttachedV2, NotTraceable, attach, model_runner, replaced
from bi_patch.tools.verify.trace import Tracer


class Logprobs(NamedTuple):
    ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = torch.nn.Linear(1, 4), torch.nn.Linear(4, 6)

    def forward(self, input_ids):
        return self.layer(input_ids.float().unsqueeze(-1))

    def compute_logits(self, hidden):
        return self.head(hidden)


class PromptWorker:
    def compute_prompt_logprobs(self, logits_fn, hidden, batch):
        held = [logits_fn(hidden[i : i + 4]).log_softmax(-1) for i in range(0, hidden.shape[0], 4)]
        whole = torch.cat(held)
        name = batch.req_ids[-1]
        end = int(batch.query_start_loc_np[-1])
        part = whole[int(batch.query_start_loc_np[-2]) : end - 1]
        return {name: Logprobs(part.argmax(-1, keepdim=True), part, part.argmax(-1))}


class RunnerV2:
    """Runs steps of [(name, prompt, first token, tokens)] like V2: prepare, model, sample, prompt logprobs."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Model()
        held = {"seeds": np.array([7, 8]), "temperature": np.array([0.7, 1.0])}
        states = SimpleNamespace(**{name: SimpleNamespace(np=values) for name, values in held.items()})
        self.sampler = SimpleNamespace(sampling_states=states)
        self.prompt_logprobs_worker = PromptWorker()
        self.req_states = self.block_tables = None
        empty = SimpleNamespace(static_forward_context={})
        self.vllm_config = SimpleNamespace(compilation_config=empty, cache_config=SimpleNamespace(block_size=16))

    def get_model(self):
        return self.model

    def prepare_inputs(self, parts):
        starts = np.cumsum([0, *(count for *_, count in parts)])
        ids = [prompt[first + i] for _, prompt, first, count in parts for i in range(count)]
        return SimpleNamespace(
            req_ids=[name for name, *_ in parts],
            query_start_loc_np=starts,
            num_tokens=len(ids),
            num_tokens_after_padding=len(ids) + 1,
            num_scheduled_tokens=np.array([c for *_, c in parts]),
            num_computed_tokens_np=np.array([first for _, _, first, _ in parts]),
            prefill_len_np=np.array([len(prompt) for _, prompt, _, _ in parts]),
            cu_num_logits_np=np.arange(len(parts) + 1),
            logits_indices=torch.as_tensor(starts[1:] - 1),
            input_ids=torch.tensor([*ids, 0]),
            idx_mapping_np=np.arange(len(parts)),
        )

    def execute_model(self, output):
        self.batch = self.prepare_inputs(output.parts)
        self.hidden = self.model(input_ids=self.batch.input_ids)[: self.batch.num_tokens]

    def sample(self, hidden, batch, grammar):
        logits = self.model.compute_logits(hidden[batch.logits_indices])
        return SimpleNamespace(sampled_token_ids=logits.argmax(-1, keepdim=True)), None, None


def traced(runner, index, prompts, steps):
    names = {id(m): n for n, m in runner.model.named_modules()}
    tracer = Tracer(names, lambda module, path, op: "", lambda func, args: str(func))
    attached = attach(runner, tracer, [Request(tuple(p)) for p in prompts], index)
    assert isinstance(attached, AttachedV2)
    seen = set()
    with torch.inference_mode(), attached.attached():
        for step in steps:
            parts = [(f"r{i}", prompts[i], first, count) for i, first, count in step]
            new = [SimpleNamespace(req_id=name, prompt_token_ids=p) for name, p, *_ in parts if name not in seen]
            seen |= {name for name, *_ in parts}
            runner.execute_model(SimpleNamespace(parts=parts, scheduled_new_reqs=new))
            runner.sample(runner.hidden, runner.batch, None)
            runner.prompt_logprobs_worker.compute_prompt_logprobs(
                runner.model.compute_logits, runner.hidden, runner.batch
            )
    return tracer.calls


def test_rows_are_found_in_a_batch_in_chunks_and_in_pieces_of_prompt_logits():
    prompts = [[5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7]]
    alone = traced(RunnerV2(), 1, prompts, [[(1, 0, 7)]])
    both = traced(RunnerV2(), 1, prompts, [[(0, 0, 5), (1, 0, 3)], [(1, 3, 4)]])

    def rows(calls, phase, op):
        mine = [c for c in calls if (c.phase, c.op) == (phase, op)]
        return {p for c in mine for p in range(c.position, c.position + c.rows)}

    for phase, op in (("forward", "aten.linear"), ("logits", "aten.linear"), ("logprobs", "aten.log_softmax")):
        assert rows(alone, phase, op) == rows(both, phase, op) == set(range(7)), (phase, op)
    assert [c.position for c in both if c.op == "sampled token"] == [6]
    assert {c.op for c in both if c.phase == "sample"} >= {"request's seed", "aten.argmax", "sampled token"}
    assert any(c.phase == "returned" and c.position == 0 for c in both)
    embedded = [c for c in both if c.phase == "forward"]
    assert all(c.shape[0] in (8, 9, 4, 5) for c in embedded)


def test_another_runner_is_refused_by_name():
    with pytest.raises(NotTraceable, match="neither model runner V1 nor V2"):
        attach(SimpleNamespace(sampler=None), None, [Request((1,))], 0)


def test_a_model_in_other_processes_is_not_traced():
    class MultiprocExecutor:
        pass

    engine = SimpleNamespace(core=SimpleNamespace(model_executor=MultiprocExecutor()))
    with pytest.raises(NotTraceable, match=r"runs in other processes \(MultiprocExecutor\)"):
        model_runner(engine)


class Base:
    def name(self):
        return "base"


class Derived(Base):
    pass


@pytest.mark.parametrize("owner", [Base, Derived, Derived()], ids=["own", "inherited", "object"])
def test_an_attribute_is_replaced_in_its_owner_alone_and_given_back(owner):
    given = owner() if isinstance(owner, type) else owner
    before = vars(owner).get("name")
    with replaced(owner, "name", lambda held: lambda *_: "replaced"):
        assert given.name() == "replaced"
        assert Base().name() == ("replaced" if owner is Base else "base")
    assert given.name() == "base" and vars(owner).get("name") is before
