"""Code from outside vLLM: refused by name, unless the user vouches for it in BI_PATCH_ALLOW_CODE."""

import functools
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active
from bi_patch.seams.inductor import CODE
from bi_patch.seams.model import Policy, Seam, Target
from bi_patch.seams.naming import dotted

# The packages whose code bi_patch has patch points for, and bi_patch itself.
_KNOWN = ("vllm", "vllm_ascend", "bi_patch", "bi_patch_entry")


def _refuse_code(config) -> None:
    """Raise UnsupportedFeature with every class and plugin from outside vLLM that the user does not vouch for."""
    _refuse_unknown(_outside(config))


def check_passes() -> None:
    """Raise UnsupportedFeature for code from outside vLLM that Inductor runs on all graphs of this process."""
    _refuse_unknown(_passes(None))


def _refuse_unknown(code: Iterable[tuple[str, str]]) -> None:
    """code: the words and the dotted name of each piece of code."""
    found = {name: what for what, name in code if _unknown(name)}
    if not found:
        return
    said = "; nor ".join(f"{what} {name}" for name, what in found.items())
    raise UnsupportedFeature(
        f"plugins.code: batch invariance does not cover {said}, which is code from outside vLLM. Leave it out (for a "
        "general plugin: list the others in VLLM_PLUGINS). If you know that its results do not depend on the batch, "
        f"vouch for it with BI_PATCH_ALLOW_CODE={','.join(found)}. Or set BI_PATCH=0 to run vLLM without bi_patch"
    )


def _outside(config) -> Iterator[tuple[str, str]]:
    """Each place of a finished VllmConfig that can hold code from outside: (its words, the code's dotted name)."""
    parallel = config.parallel_config
    yield "the worker class", _dotted(getattr(parallel, "worker_cls", None))
    yield "the worker extension", _dotted(getattr(parallel, "worker_extension_cls", None))
    yield "the worker of drafts", _dotted(getattr(parallel, "sd_worker_cls", None))
    cache = getattr(config, "ec_manager_config", None)
    yield "the cache of encoded images", _dotted(getattr(cache, "encoder_cache_manager_cls", None))
    yield "the executor", _dotted(getattr(parallel, "distributed_executor_backend", None))
    yield "the scheduler", _dotted(getattr(getattr(config, "scheduler_config", None), "scheduler_cls", None))
    yield "the compiler backend", _dotted(getattr(config.compilation_config, "backend", None))
    yield from _passes(config.compilation_config)
    platform = getattr(sys.modules.get("vllm.platforms"), "_current_platform", None)
    yield "the platform", _dotted(None if platform is None else type(platform))
    yield from _models(config.model_config)
    chosen = os.environ.get("VLLM_PLUGINS")
    for plugin in entry_points(group="vllm.general_plugins"):
        if chosen is None or plugin.name in chosen.split(","):
            yield f"the general plugin {plugin.name!r},", _dotted(plugin.value)
    registry = sys.modules.get("vllm.model_executor.custom_op")  # not loaded: nothing has registered a layer
    for layer, replacement in getattr(registry, "op_registry_oot", {}).items():
        yield f"a replacement of the layer {layer},", _dotted(replacement)
    backends = sys.modules.get("vllm.v1.attention.backends.registry")
    for backend, replacement in getattr(backends, "_ATTN_OVERRIDES", {}).items():
        yield f"a replacement of the attention backend {backend.name},", _dotted(replacement)


def _passes(compilation) -> Iterator[tuple[str, str]]:
    """Code that Inductor runs on the graphs that it compiles: from vLLM's options, or set for the whole process."""
    inductor = sys.modules.get("torch._inductor.config")  # not loaded: nothing has set a pass
    given = [*(getattr(compilation, "inductor_compile_config", None) or {}).items()]
    given += [(name, getattr(inductor, name, None)) for name in CODE]
    for name, code in given:
        if callable(code):
            # vLLM wraps a function.
            yield f"the Inductor pass {name!r},", dotted(getattr(code, "callable", code))


def _models(model) -> Iterator[tuple[str, str]]:
    """The class that computes the model: registered by a plugin, or from the model's own repository."""
    if model is None:
        return
    registered = getattr(getattr(model, "registry", None), "models", {}).get(getattr(model, "architecture", None))
    lazy = getattr(registered, "module_name", None)
    held = f"{lazy}.{registered.class_name}" if lazy else getattr(registered, "model_cls", None)
    yield "the model class", _dotted(held)
    if getattr(model, "trust_remote_code", False) and model.using_transformers_backend():
        remote = getattr(getattr(model, "hf_config", None), "auto_map", None) or {}
        for kind, where in remote.items():
            if kind.startswith("AutoModel"):
                yield "modelling code from the model's repository,", f"remote.{where}"


def _dotted(code) -> str:
    """The dotted name of a class, or of code that an option names; "" for one of vLLM's own short names."""
    name = f"{code.__module__}.{code.__qualname__}" if isinstance(code, type) else str(code or "").replace(":", ".")
    return name if "." in name else ""


def _unknown(name: str) -> bool:
    return bool(name) and name.split(".", 1)[0] not in _KNOWN and name not in active.allowed


def _checked_v1(original):
    """build_logitsprocs: refuse processors that do not say that they are batch-invariant (model runner V1)."""

    @functools.wraps(original)
    def build_logitsprocs(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs=()):
        built = original(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
        own = [type(processor) for processor in built.all if _custom(type(processor))]
        _refuse_processors(own)
        early = [kind for kind in map(type, built.argmax_invariant) if _custom(kind)]
        if early and vllm_config.model_config.logprobs_mode.startswith("processed"):
            _refuse(
                early,
                "with processed logprobs, because vLLM applies an argmax-invariant processor to a greedy request only "
                "beside other requests",
                "Let its is_argmax_invariant() return False, or use --logprobs-mode raw_logprobs",
            )
        if own and not custom_logitsprocs and vllm_config.scheduler_config.async_scheduling:
            _refuse(
                own,
                "as an installed plugin with asynchronous scheduling, because vLLM hides the newest token from it",
                "Use --no-async-scheduling",
            )
        return built

    return build_logitsprocs


def _checked_v2(original):
    """build_custom_logits_processors: the same for model runner V2."""

    @functools.wraps(original)
    def build_custom_logits_processors(*args, **kwargs):
        built = original(*args, **kwargs)
        _refuse_processors([type(processor) for processor in built])
        return built

    return build_custom_logits_processors


def _custom(kind: type) -> bool:
    return kind.__module__.split(".", 1)[0] not in _KNOWN


def _refuse_processors(kinds: list[type]) -> None:
    silent = [k for k in kinds if _unknown(_dotted(k)) and getattr(k, "batch_invariant", None) is not True]
    if silent:
        _refuse(
            silent,
            "unless it says that it keeps no state of its own",
            "vLLM calls a processor for parts of a prompt, too, and makes it anew after a preemption. If its result "
            "for a row depends only on the request's parameters, prompt, generated tokens and logits, set the class "
            f"attribute batch_invariant = True, or BI_PATCH_ALLOW_CODE={','.join(map(_dotted, silent))}",
        )


def _refuse(kinds: list[type], when: str, todo: str) -> None:
    raise UnsupportedFeature(
        f"plugins.logits_processors: batch invariance does not cover the custom logits processor "
        f"{', '.join(map(_dotted, kinds))} {when}. {todo}. Or set BI_PATCH=0 to run vLLM without bi_patch"
    )


_STATE = (
    "a custom logits processor that counts its calls answers by the chunks of the prompt, and forgets its state at a "
    "preemption"
)
_REFUSED = "bi_patch refuses a processor whose class does not say batch_invariant = True"
_UNTIL = "upstream calls processors for sampled tokens only, and keeps their state over a preemption"

SEAMS = (
    Seam(
        name="plugins.logits_processors",
        targets=(
            Target("vllm.v1.sample.logits_processor", "build_logitsprocs", "", ("vllm.v1.worker.gpu_model_runner",)),
        ),
        close=_checked_v1,
        why=_STATE,
        how=_REFUSED,
        until=_UNTIL,
        causes=(29,),
    ),
    Seam(
        name="plugins.slot_processors",
        targets=(
            Target(
                "vllm.v1.worker.gpu.sample.logits_processor.loader",
                "build_custom_logits_processors",
                ">=0.32",
                ("vllm.v1.worker.gpu.sample.logits_processor", "vllm.v1.worker.gpu.model_runner"),
            ),
        ),
        close=_checked_v2,
        why=_STATE,
        how=_REFUSED,
        until=_UNTIL,
        causes=(29,),
    ),
)

POLICIES = (
    Policy(
        name="plugins.code",
        apply=_refuse_code,
        why="bi_patch has patch points for vLLM's code only. A class, a model or a plugin from outside can sum in any "
        "order",
    ),
)
