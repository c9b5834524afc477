"""The contract: the first difference between a trainer and its sampler is named, and nothing is compared in silence."""

import json
from types import SimpleNamespace

import msgspec
import pytest
import torch

from bi_patch import identity, running, training
from bi_patch.arming import contract as made
from bi_patch.errors import ContractBroken, UnsupportedFeature
from bi_patch.training import contract, devices, huggingface


def attentions(layers, backend):
    return {f"model.layers.{number}.self_attn.attn": backend for number in range(layers)}


@pytest.fixture
def model(make):
    return make("Llama")


@pytest.fixture
def agreed(model):
    """The contract of a sampler that has this model's bits."""
    return {
        "instance": "ab123",
        "platform": "cpu",
        "vllm": "0.32.0",
        "torch": str(torch.__version__),
        "digest": identity.digest(),
        **devices.implementation("cpu").kernels(),
        "attention": attentions(model.config.num_hidden_layers, "CPU_ATTN"),
        "mla": None,
        "dtype": "float32",
        "quantization": None,
        "lora": False,
        "kv_cache_dtype": "auto",
        "tensor_parallel_size": 1,
        "rank_sums": "none",
        "logprobs_mode": "raw_logprobs",
        "runner": "V1",
        "compiled": True,
        "model": {name: made._plain(getattr(model.config, name, None)) for name in running.MODEL},
    }


def test_both_sides_agree(model, agreed, ids):
    training.arm(model, sampler=agreed)
    training.logprobs(model, *ids)


def test_a_trainer_with_an_adapter_needs_a_sampler_that_takes_adapters(model, agreed):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ContractBroken, match="training.contract: lora is True in the trainer and False in the sampler"):
        training.arm(adapted, sampler=agreed)
    training.arm(adapted, sampler=agreed | {"lora": True})


@pytest.mark.parametrize(
    "name, value",
    [
        ("platform", "cuda"),
        ("digest", "0" * 64),
        ("kernels", "bi_cpu-avx2-00"),
        ("device", "another CPU"),
        ("torch", "2.12.0"),
        ("dtype", "bfloat16"),
        ("quantization", "fp8"),
        ("kv_cache_dtype", "fp8"),
        ("logprobs_mode", "raw_logits"),
        ("rank_sums", "in any order"),
        ("attention", attentions(1, "CPU_ATTN")),
        ("attention", {"attn": "CPU_ATTN"}),
        ("runner", "V3"),
        ("mla", "two"),
    ],
)
def test_the_first_difference_is_named(model, agreed, name, value):
    with pytest.raises(ContractBroken, match=f"training.contract: .*{name}"):
        training.arm(model, sampler=agreed | {name: value})


def test_the_backend_of_each_layer_is_compared(model, agreed):
    agreed["attention"]["model.layers.1.self_attn.attn"] = "TRITON_ATTN"
    with pytest.raises(ContractBroken, match="attention of model.layers.1.self_attn.attn is 'TRITON_ATTN'"):
        training.arm(model, sampler=agreed)


def test_each_model_keeps_the_form_of_its_own_sampler(make, agreed):
    first, second = make("Llama"), make("Llama")
    training.arm(first, sampler=agreed | {"runner": "V2", "logprobs_mode": "processed_logprobs"})
    training.arm(second, sampler=agreed)
    backends = ("CPU_ATTN",) * first.config.num_hidden_layers
    assert huggingface.armed(first).form == contract.Form("V2", True, backends)
    assert huggingface.armed(second).form == contract.Form("V1", False, backends)


def test_a_cuda_layer_has_the_backend_that_the_trainer_can_repeat():
    backends = devices.implementation("cuda", "attention").backends
    assert backends(torch.bfloat16, 128, 0) == ("FLASH_ATTN", "TRITON_ATTN")
    for dtype, size, window in ((torch.float32, 128, 0), (torch.bfloat16, 48, 0), (torch.bfloat16, 128, 9)):
        assert backends(dtype, size, window) == ("TRITON_ATTN",)


def test_a_cuda_process_that_is_not_armed_repeats_no_truncation(monkeypatch, agreed):
    folder, kernels = (devices.implementation("cuda", name) for name in ("", "vllm_kernels"))
    for closed in (True, False):
        monkeypatch.setattr(kernels, "truncates_as_armed", lambda closed=closed: closed)
        folder.agree(agreed)
        if closed:
            folder.agree(agreed | {"logprobs_mode": "processed_logprobs"})
    with pytest.raises(ContractBroken, match="not armed"):
        folder.agree(agreed | {"logprobs_mode": "processed_logprobs"})


def test_another_model(model, agreed):
    agreed["model"]["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    with pytest.raises(ContractBroken, match="model.rope_parameters"):
        training.arm(model, sampler=agreed)


@pytest.mark.parametrize("cut", [{}, None, "model", "attention", "rank_sums", "mla", "model.rope_parameters"])
def test_an_empty_or_cut_contract_is_no_contract(model, agreed, tmp_path, cut):
    if not cut:
        agreed = cut
    elif cut.startswith("model."):
        del agreed["model"][cut.partition(".")[2]]
    else:
        del agreed[cut]
    file = tmp_path / "contract.json"
    file.write_text(json.dumps(agreed))
    for given in (str(file), *([] if agreed is None else [agreed])):
        with pytest.raises(ContractBroken, match=f"training.contract: .*{cut or 'not armed'}"):
            training.arm(model, sampler=given)


def test_a_contract_without_layers_is_no_contract(model, agreed):
    with pytest.raises(ContractBroken, match="lacks attention"):
        training.arm(model, sampler=agreed | {"attention": {}})


def test_raw_logprobs_show_no_temperature(model, agreed, ids):
    training.arm(model, sampler=agreed)
    for change in ({"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}):
        with pytest.raises(ContractBroken, match="raw_logprobs"):
            training.logprobs(model, *ids, **change)


def test_where_a_contract_comes_from(agreed, tmp_path, monkeypatch):
    file = tmp_path / "contract.json"
    contract.save(agreed, file)
    assert contract.of(file) == contract.of(str(file)) == agreed
    monkeypatch.setattr(running, "contracts", {})
    running.keep(agreed)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(instance_id="ab123")))
    assert contract.of(llm) is agreed
    stock = SimpleNamespace(vllm_config=SimpleNamespace(instance_id="cd456"))
    with pytest.raises(ContractBroken, match="not armed"):
        contract.of(stock)
    with pytest.raises(ContractBroken, match="is no sampler"):
        contract.of(7)


def test_a_server_says_its_contract(agreed, monkeypatch):
    asked = []

    class Answer:
        def __init__(self, said):
            self.said = said

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def read(self):
            return json.dumps(self.said)

    said = {"version": "0.32.0", "bi_patch": {"contract": agreed}}
    monkeypatch.setattr(contract.urllib.request, "urlopen", lambda url, timeout: asked.append(url) or Answer(said))
    assert contract.of("http://localhost:8000/v1") == agreed and asked == ["http://localhost:8000/version"]
    said["bi_patch"] = None
    with pytest.raises(ContractBroken, match="the server http://localhost:8000 is not armed"):
        contract.of("http://localhost:8000")


def test_the_engines_side():
    text = SimpleNamespace(model_type="llama", rope_parameters={"rope_theta": 1.0}, layer_types=("a", "b"))
    config = SimpleNamespace(
        instance_id="ab123",
        model_config=SimpleNamespace(
            dtype=torch.bfloat16, quantization=None, logprobs_mode="raw_logprobs", hf_text_config=text
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        lora_config=None,
        compilation_config=SimpleNamespace(mode=SimpleNamespace(name="NONE")),
    )
    layer = SimpleNamespace(attn_backend=SimpleNamespace(get_name=lambda: "CPU_ATTN"))
    held = SimpleNamespace(static_forward_context={"layers.0": layer, "other": object()})
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(
            compilation_config=held, parallel_config=config.parallel_config, model_config=config.model_config
        )
    )
    found = made.make(config, SimpleNamespace(collective_rpc=lambda call: [call(worker)] * 2), "cpu", "0.32.0")
    assert (
        msgspec.msgpack.decode(msgspec.msgpack.encode(found)) == found
    )  # the way to another process takes no subclass
    assert set(found) == set(running.FIELDS) and set(found["model"]) == set(running.MODEL)
    assert found["attention"] == {"layers.0": "CPU_ATTN"} and found["dtype"] == "bfloat16"
    assert found["rank_sums"] == "none" and not found["compiled"] and not found["lora"] and found["runner"] == "V1"
    assert found["model"]["layer_types"] == ["a", "b"] and found["model"]["head_dim"] is None
    assert found["mla"] is None


def test_the_form_of_mla_is_told(monkeypatch):
    plain, latent = SimpleNamespace(), SimpleNamespace(use_mla=True)
    for form in ("two", "one"):
        monkeypatch.setattr(made.active, "mla", form)
        assert made._form_of_mla(plain, "cuda") is None and made._form_of_mla(latent, "cuda") == form
        assert made._form_of_mla(latent, "cpu") is None  # one form


def test_ranks_on_cpu_are_added_in_rank_order(model, agreed):
    config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2))
    said = made._rank_sums(config, "cpu")
    assert said == made.ASCENDING and made._rank_sums(config, "ascend") != said
    training.arm(model, sampler=agreed | {"tensor_parallel_size": 2, "rank_sums": said})


def test_how_ranks_hold_experts_is_told(monkeypatch):
    def said(data, tensor, whole, experts=True):
        parallel = SimpleNamespace(
            data_parallel_size=data, tensor_parallel_size=tensor, enable_expert_parallel=whole, rank=0
        )
        return made._rank_sums(
            SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(is_moe=experts)), "cpu"
        )

    several = [(2, 1, True), (2, 1, False), (4, 1, True), (4, 1, False), (2, 2, True), (1, 2, True), (1, 4, True)]
    assert len({said(*ranks) for ranks in several} | {made.ASCENDING, "none"}) == len(several) + 2
    assert said(4, 1, False) == "cut experts over 4 ranks, 4 of them data-parallel"
    assert said(1, 2, True) == "whole experts over 2 ranks, 1 of them data-parallel"
    assert said(1, 2, False) == said(1, 2, True, False) == made.ASCENDING and said(1, 1, True) == "none"


def test_only_the_one_stage_all_reduce_adds_as_the_trainer_does(monkeypatch):
    monkeypatch.setenv("VLLM_CUSTOM_ALLREDUCE_ALGO", "1stage")
    own = SimpleNamespace(disabled=False, should_custom_ar=lambda row: row.shape[1] % 8 == 0)
    whole, odd = torch.empty(1, 64), torch.empty(1, 63)
    plain = SimpleNamespace(ca_comm=own)
    assert made._sums_of(plain, whole) == "ascending in fp32, rounded once"
    assert made._sums_of(plain, odd) == "nccl"
    assert made._sums_of(SimpleNamespace(ca_comm=None), whole) == "nccl"  # disable_custom_all_reduce
    assert made._sums_of(SimpleNamespace(ca_comm=SimpleNamespace(disabled=True)), whole) == "nccl"
    other = SimpleNamespace(disabled=False)
    assert made._sums_of(SimpleNamespace(ca_comm=own, fi_ar_comm=other), whole) == "nccl"
    monkeypatch.setenv("VLLM_CUSTOM_ALLREDUCE_ALGO", "2stage")
    assert made._sums_of(plain, whole) == "nccl"


def test_nccl_is_refused(model, agreed):
    with pytest.raises(ContractBroken, match="rank_sums is 'nccl'"):
        training.arm(model, sampler=agreed | {"tensor_parallel_size": 2, "rank_sums": "nccl"})


def test_experts_call_the_kernel_of_the_same_vllm(make, agreed):
    model = make("Mixtral")
    agreed["model"] = {name: made._plain(getattr(model.config, name, None)) for name in running.MODEL}
    with pytest.raises(ContractBroken, match="vllm is .*'0.1.0' in the sampler"):
        training.arm(model, sampler=agreed | {"vllm": "0.1.0"})


def test_a_trainer_with_threads_by_the_load_is_refused(monkeypatch):
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    with pytest.raises(UnsupportedFeature, match="training.threads: nobody has examined OMP_DYNAMIC"):
        devices.prepare("cpu")
