"""sync: what is sent, what is named when a sampler serves other weights, and how servers are asked."""

import copy
import gc
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from bi_patch import training
from bi_patch.errors import BiPatchError, SamplerFailed, UnsupportedFeature, WeightsNotSynced
from bi_patch.training import samplers
from bi_patch.training.sync import weights

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    return training.arm(made, dtype=torch.bfloat16)


class Params(SimpleNamespace):
    def __init__(self, **given):
        super().__init__(**given)


class Llm:
    """A vllm.LLM whose model is a copy of the trainer's. lazy: it drops the weights that it is given."""

    def __init__(self, model, lazy=False):
        training.disarm(model)
        self.model = training.arm(copy.deepcopy(model), dtype=torch.bfloat16)
        training.arm(model, dtype=torch.bfloat16)
        parallel = SimpleNamespace(world_size=1)
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(parallel_config=parallel), engine_core=SimpleNamespace(engine_core=None)
        )
        self.lazy, self.forgot, self.version = lazy, 0, None

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        sent = dict(kwargs["weights_iterator"])
        assert all(tensor.dtype == torch.bfloat16 for tensor in sent.values())
        if not self.lazy:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(sent[name])

    def reset_prefix_cache(self):
        self.forgot += 1
        return True

    def update_weight_version(self, version):
        self.version = version

    def get_default_sampling_params(self):
        return Params()

    def generate(self, prompts, params, use_tqdm):
        ids = list(prompts[0]["prompt_token_ids"])
        first = len(ids)
        with torch.no_grad():
            for _ in range(params.max_tokens):
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
            found = training.logprobs(self.model, torch.tensor([ids]))[0, first:].tolist()
        steps = [{token: SimpleNamespace(logprob=value)} for token, value in zip(ids[first:], found)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids[first:], logprobs=steps)])]


def changed(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.05)


def test_a_sync_compares_and_names_the_version(model):
    llm = Llm(model)
    changed(model)
    done = training.sync(model, llm, version="step 1")
    assert (done.compared, llm.forgot, llm.version) == (8, 1, "step 1")
    assert done.sent == len(list(model.named_parameters()))  # the tied head is not sent twice


def test_a_sampler_that_keeps_old_weights_is_named(model):
    llm = Llm(model, lazy=True)
    changed(model)
    with pytest.raises(WeightsNotSynced, match="of 8 logprobs differ"):
        training.sync(model, llm)


def test_a_forgotten_sync_is_named(model):
    with pytest.raises(WeightsNotSynced, match="never synced"):
        training.require_synced(model)
    llm = Llm(model)
    training.sync(model, llm, check=False)
    training.require_synced(model)
    model.model.norm.weight.data[3] += 1  # PyTorch counts no version of it
    with pytest.raises(WeightsNotSynced, match="1 weights changed .*model.norm.weight"):
        training.require_synced(model)
    model.model.norm.weight.data[3] -= 1
    training.require_synced(torch.compile(model))


def test_each_sampler_needs_its_own_sync(model):
    first, second = Llm(model), Llm(model)
    training.sync(model, first)
    with pytest.raises(WeightsNotSynced, match="never synced"):
        training.require_synced(model, second)
    changed(model)
    training.sync(model, second)
    training.require_synced(model, second)
    for asked in (None, first):
        with pytest.raises(WeightsNotSynced, match="up_proj"):
            training.require_synced(model, asked)
    del first, asked
    gc.collect()
    training.require_synced(model)


def test_a_sync_that_fails_is_no_sync(model):
    llm = Llm(model)
    training.sync(model, llm)
    llm.lazy = True
    changed(model)
    with pytest.raises(WeightsNotSynced, match="logprobs differ"):
        training.sync(model, llm)
    other = Llm(model)
    training.sync(model, other)
    with pytest.raises(WeightsNotSynced, match="sync failed"):
        training.require_synced(model)
    training.require_synced(model, other)


def test_a_compiled_model_has_the_names_of_its_model(model):
    assert list(dict(weights(torch.compile(model), torch.bfloat16))) == list(dict(weights(model, torch.bfloat16)))
    llm = Llm(model)
    assert training.sync(torch.compile(model), llm, check=False).sent == len(list(model.named_parameters()))
    training.require_synced(model)


def test_weights_are_rounded_and_named_as_a_checkpoint(model):
    sent = dict(weights(model, torch.bfloat16))
    assert "lm_head.weight" not in sent and "model.embed_tokens.weight" in sent
    assert torch.equal(sent["model.norm.weight"], model.model.norm.weight.to(torch.bfloat16))


def test_what_is_no_sampler_is_named(model):
    with pytest.raises(UnsupportedFeature, match="is no sampler"):
        training.sync(model, object())
    training.disarm(model)
    with pytest.raises(BiPatchError, match="not armed"):
        training.sync(model, "http://localhost:1")


def test_a_server_loads_a_folder_and_is_asked_for_a_score(model):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"data": [{"id": "served"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
            asked.append((self.path, body))
            if self.path == "/collective_rpc":
                (file,) = Path(body["kwargs"]["weights_path"]).iterdir()
                asked.append(load_file(file)["model.norm.weight"].dtype)
            if self.path == "/update_weight_version":
                self.send_error(404)
                return
            self.answer({"choices": [{"token_ids": [7], "logprobs": {"token_logprobs": [-0.5]}}]})

        def answer(self, body):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        training.sync(model, address, version="step 1", check=False)
        assert [at[0] for at in asked if isinstance(at, tuple)] == [
            "/collective_rpc",
            "/reset_prefix_cache",
            "/update_weight_version",
        ]
        assert torch.bfloat16 in asked
        assert samplers.Server(address).score([1, 2]) == ([1, 2, 7], [-0.5])
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(SamplerFailed, match="/collective_rpc"):
        training.sync(model, address)


def test_only_a_rank_may_leave_out_the_sampler(model):
    with pytest.raises(WeightsNotSynced, match="only a rank of FSDP2"):
        training.sync(model, None)
