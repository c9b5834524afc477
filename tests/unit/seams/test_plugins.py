"""Code from outside vLLM is refused by name, until the user vouches for it."""

import enum
import importlib
import sys
from types import SimpleNamespace

import pytest

from bi_patch import settings
from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active
from bi_patch.seams.common import plugins


class Backend(enum.Enum):
    """Stands for vLLM's list of attention backends."""

    TRITON_ATTN = "vllm.TritonAttentionBackend"


class Registered:
    """Stands for a model's class that a plugin registered."""


def run_on_graph(graph):
    """Stands for a user's pass on Inductor's graphs."""


class Wrapped:
    """Stands for vLLM's CallableInductorPass."""

    __module__ = "vllm.compilation"

    def __init__(self, function):
        self.callable = function

    def __call__(self, graph):
        self.callable(graph)


def config(model=None, passes=None, images=None, **parallel):
    scheduler = parallel.pop("scheduler_cls", None)
    parallel = {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker", "distributed_executor_backend": "mp"} | parallel
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler, async_scheduling=False),
        compilation_config=SimpleNamespace(backend="inductor", inductor_compile_config=passes or {}),
        model_config=model,
        ec_manager_config=SimpleNamespace(encoder_cache_manager_cls=images),
    )


def model(held=None, *, remote=False):
    return SimpleNamespace(
        registry=SimpleNamespace(models={"Foo": held}),
        architecture="Foo",
        trust_remote_code=remote,
        using_transformers_backend=lambda: remote,
        hf_config=SimpleNamespace(auto_map={"AutoConfig": "configuration_foo.Foo", "AutoModel": "modeling_foo.Foo"}),
    )


LAZY = SimpleNamespace(module_name="foo.models", class_name="FooForCausalLM")
OWN = SimpleNamespace(module_name="vllm.model_executor.models.qwen3", class_name="Qwen3ForCausalLM")
OUTSIDE = {
    "my.Worker": config(worker_cls="my.Worker"),
    "my.Extension": config(worker_extension_cls="my.Extension"),
    f"{__name__}.Registered": config(distributed_executor_backend=Registered),
    "my.Drafter": config(sd_worker_cls="my.Drafter"),
    "my.ImageCache": config(images="my.ImageCache"),
    "my.Scheduler": config(scheduler_cls="my.Scheduler"),
    "foo.models.FooForCausalLM": config(model(LAZY)),
    "remote.modeling_foo.Foo": config(model(OWN, remote=True)),
    f"{__name__}.run_on_graph": config(passes={"post_grad_custom_post_pass": Wrapped(run_on_graph)}),
    f"{__name__}.Backend": config(passes={"custom_partitioner_fn": Backend}),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_it_is_refused_by_name_and_served_when_the_user_vouches_for_it(name, monkeypatch):
    with pytest.raises(UnsupportedFeature, match=f"plugins.code: .*{name}.*BI_PATCH_ALLOW_CODE={name}"):
        plugins._refuse_code(OUTSIDE[name])
    monkeypatch.setattr(active, "allowed", settings.read({"BI_PATCH_ALLOW_CODE": f"x.Y, {name}"}).allow_code)
    plugins._refuse_code(OUTSIDE[name])


@pytest.mark.parametrize(
    "held",
    [
        config(),
        config(model(OWN)),
        config(model(None)),
        config(worker_extension_cls=""),
        config(passes={"post_grad_custom_post_pass": Wrapped(Wrapped(None)), "dce": True, "cpp.simdlen": None}),
    ],
)
def test_vllms_own_code_passes(held):
    plugins._refuse_code(held)


def test_a_general_plugin_can_be_left_out(monkeypatch):
    plugin = SimpleNamespace(name="foo", value="foo.plugin:register")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [plugin])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    with pytest.raises(UnsupportedFeature, match="the general plugin 'foo', foo.plugin.register"):
        plugins._refuse_code(config())
    monkeypatch.setenv("VLLM_PLUGINS", "bi_patch,lora_resolver")
    plugins._refuse_code(config())


class Silent:
    """A processor that says nothing about its state."""


class Stateless(Silent):
    batch_invariant = True


def build(*kinds, early=(), mode="raw_logprobs", given=True, asynchronous=False):
    built = SimpleNamespace(argmax_invariant=[k() for k in early], all=[k() for k in (*kinds, *early)])
    vllm = SimpleNamespace(
        model_config=SimpleNamespace(logprobs_mode=mode),
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
    )
    make = plugins._checked_v1(lambda *given: built)
    return make(vllm, None, False, False, kinds if given else ()) is built


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kinds": [Silent]}, "Silent unless it says .*batch_invariant = True, or BI_PATCH_ALLOW_CODE="),
        ({"kinds": [], "early": [Stateless], "mode": "processed_logits"}, "Stateless with processed logprobs"),
        ({"kinds": [Stateless], "given": False, "asynchronous": True}, "Use --no-async-scheduling"),
    ],
)
def test_a_processor_that_could_see_the_batch_is_refused(changes, said):
    with pytest.raises(UnsupportedFeature, match=f"plugins.logits_processors: .*{said}"):
        build(*changes.pop("kinds"), **changes)


def test_a_processor_that_says_that_it_keeps_no_state_is_served(monkeypatch):
    assert build(Stateless) and build(Stateless, early=[Stateless]) and build(Stateless, given=False)
    assert build(Stateless, asynchronous=True)
    assert plugins._checked_v2(lambda: [Stateless()])()
    with pytest.raises(UnsupportedFeature, match="Silent"):
        plugins._checked_v2(lambda: [Silent()])()
    monkeypatch.setattr(active, "allowed", frozenset({f"{__name__}.Silent"}))
    assert build(Silent)


def test_a_replaced_attention_backend_is_refused(monkeypatch):
    registry = SimpleNamespace(_ATTN_OVERRIDES={Backend.TRITON_ATTN: "my.Attention"})
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", registry)
    with pytest.raises(UnsupportedFeature, match="attention backend TRITON_ATTN, my.Attention"):
        plugins._refuse_code(config())


def test_what_a_program_sets_for_its_whole_process_is_refused(monkeypatch):
    inductor = importlib.import_module("torch._inductor.config")
    with inductor.patch(joint_custom_pre_pass=run_on_graph):
        with pytest.raises(UnsupportedFeature, match="the Inductor pass 'joint_custom_pre_pass', .*run_on_graph"):
            plugins._refuse_code(config())
    monkeypatch.setattr("vllm.platforms._current_platform", Registered())
    with pytest.raises(UnsupportedFeature, match="the platform .*Registered"):
        plugins._refuse_code(config())
