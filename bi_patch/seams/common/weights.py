"""Weight updates: no request uses keys and values of other weights, and an answer over an update says so."""

import contextlib
import functools
import secrets
from pathlib import Path

from bi_patch.errors import UnsupportedFeature
from bi_patch.files import HANDED_OVER
from bi_patch.seams import active, pooling, vision, weights
from bi_patch.seams.common import arriving, embeds, streamed
from bi_patch.seams.model import Seam, Target

HEADER = "bi-patch-weights"
_KEY = "_bi_patch_weights"  # attribute of vLLM's Request: the weights in its block hashes
_MIXED = "_bi_patch_mixed"  # attribute of vLLM's RequestState
_SOURCE = ("model", "model_weights", "revision")  # fields of vLLM's ModelConfig: where weights are read
_DROPPED = "_bi_patch_dropped"  # attribute of vLLM's EngineCore: it sleeps without its weights

# A front end's call to its engine cores, in place of a worker's method: they hold other weights than each other.
SPLIT = "bi_patch: other weights"
# Methods of workers that write no weights. Every other call to the workers counts as a write.
READING = frozenset(
    {
        "check_health",
        "compute_weight_checksums",
        "get_kv_cache_spec",
        "get_model_inspection",
        "get_supported_tasks",
        "init_weight_transfer_engine",
        "list_loras",
        "profile",
        "reset_encoder_cache",
        "reset_mm_cache",
        "save_sharded_state",
        "save_tensorized_model",
        "shutdown_weight_transfer_engine",
        "supports_draft_weight_updates",
        "synchronize_device",
        "update_max_model_len",
    }
)


def read(state, output) -> None:
    """Note in the front end that weights changed under a request. state: RequestState. output: EngineCoreOutput."""
    if output.trace_headers and HEADER in output.trace_headers:
        setattr(state, _MIXED, True)


def tell(state, completion) -> None:
    """Say in an answer (CompletionOutput) whether weights changed while it was made, as `weights_changed`."""
    completion.weights_changed = getattr(state, _MIXED, False)


def _first_block(original):
    """generate_block_hash_extra_keys: the first block's hash holds the identity of the weights. The hash of a block
    with prompt embeddings holds what these are."""

    @functools.wraps(original)
    def generate_block_hash_extra_keys(request, start_token_idx, end_token_idx, start_mm_idx):
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        if described := embeds.described(request, start_token_idx, end_token_idx):
            keys = (*(keys or ()), *described)
        if start_token_idx:
            return keys, next_mm_idx
        held = request.__dict__.setdefault(_KEY, weights.identity())
        return (("weights", held), *(keys or ())), next_mm_idx

    return generate_block_hash_extra_keys


def _hash_again(request, held: str) -> None:
    """Make the block hashes of vLLM's Request again, with other weights in them."""
    setattr(request, _KEY, held)
    request.block_hashes.clear()
    request.update_block_hashes()


def renew(core) -> None:
    """After a change of the weights: no request of the engine core uses or leaves keys and values of other weights.

    Requests that were not computed yet are hashed with the new weights. A request that holds keys and values gets
    hashes that no other request has, so that what it computes from now on is used by nobody. Requests that were
    computed in part are marked, and their answers say so.
    """
    scheduler = core.scheduler
    for request in list(scheduler.requests.values()):
        holds = any(scheduler.kv_cache_manager.get_block_ids(request.request_id))
        if holds or request.num_output_tokens or request.num_computed_tokens or request.num_preemptions:
            request.trace_headers = {**(request.trace_headers or {}), HEADER: "changed"}
        _hash_again(request, secrets.token_hex(16) if holds else weights.identity())
    if getattr(scheduler, "connector", None) is not None:
        scheduler.reset_connector_cache()


def _core(original):
    """EngineCore.__init__: tell this engine core about new weights, and the hashes of blocks about MLA."""

    @functools.wraps(original)
    def __init__(self, vllm_config, *args, **kwargs):
        active.latent |= bool(getattr(vllm_config.model_config, "use_mla", False))
        original(self, vllm_config, *args, **kwargs)
        weights.watch_core(self, renew)

    return __init__


def _arrival(original):
    """EngineCore.add_request: hash a request again whose hashes were made before the weights changed. The request is no
    longer on its way. A part of a streamed input that a pause aborted meanwhile is dropped."""

    @functools.wraps(original)
    def add_request(self, request, *args, **kwargs):
        if request.__dict__.get(_KEY) not in (None, now := weights.identity()):
            _hash_again(request, now)
        if id(request) not in self.__dict__.get(arriving.ON_THEIR_WAY, ()):
            return original(self, request, *args, **kwargs)
        try:
            if streamed.ended(getattr(self, "scheduler", None), request):
                return None  # a pause aborted the parts before, and its client knows
            return original(self, request, *args, **kwargs)
        finally:
            arriving.arrived(self, request)

    return add_request


def _settled(worker) -> None:
    """In a worker: the core knows of the new weights, and what the model derives from its weights follows them."""
    weights.told()
    weights.settle()


def _failed(worker) -> None:
    """In a worker, after a call that failed: a model that holds a part of a layer stops the engine. An update in
    several calls goes on if the failed call was no part of it."""
    try:
        _settled(worker)
    finally:
        if not getattr(worker, "_weight_update_active", False):
            for model in _halves(worker):
                weights.broke(model, RuntimeError("a call to the workers, whose error its caller got"))


def _halves(worker) -> list:
    """The models of a worker that hold a part of an update: its own, and a draft model.

    A draft model may share embeddings and the head with the target. An update of the drafts has then changed the
    target's layer, if it got so far.
    """
    targets = weights.models()
    found = [model for model in targets if _partly(model)]
    draft = getattr(getattr(worker, "model_runner", None), "get_draft_model", lambda: None)()
    if draft is not None and _begun(draft, targets) and _partly(draft):
        found.append(draft)
    return found


def _begun(draft, targets: list) -> bool:
    """Whether an update of a draft model began: a layer that is its own waits for weights. A shared layer also waits in
    an update of the target."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    shared = {layer for model in targets for layer in model.modules()}
    return any(get_layerwise_info(layer).can_load() for layer in draft.modules() if layer not in shared)


def _split(worker) -> None:
    """In a worker whose data-parallel engine core holds other weights than another: each later step stops."""
    for model in weights.models():
        weights.broke(model, RuntimeError("a call to the workers failed in one data-parallel engine core alone"))


def _settle(core, after=_settled) -> None:
    if active.plan is not None and active.plan.platform in ("cpu", "cuda"):
        core.model_executor.collective_rpc(after)


def _refuse(core, method) -> None:
    """Raise UnsupportedFeature for a call that may write weights, to an engine that takes no new ones. The engine goes
    on."""
    plan, config = active.plan, getattr(core, "vllm_config", None)
    if plan is None or config is None:
        return
    kind = ""
    if pooling.is_pooling(config):
        kind = "an engine that pools"
    elif vision.takes_images(config):
        kind = "an engine that takes images"
    elif getattr(config, "lora_config", None) is not None:
        kind = "an engine with LoRA"
    elif active.leaves:
        kind = "an engine with BI_PATCH_TP_INVARIANT"
    elif plan.platform == "cuda" and getattr(config.model_config, "quantization", None) is not None:
        kind = "quantized weights on CUDA"
    if kind:
        name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
        raise UnsupportedFeature(
            f"weights.calls: collective_rpc({name}) may write weights, and bi_patch does not cover new weights for "
            f"{kind}. Nothing was called, and the engine goes on. Methods that only read are covered, e.g. "
            "check_health. Start another engine with new weights, or set BI_PATCH=0"
        )


def _calls(original):
    """EngineCore.collective_rpc: after a call that may write weights, they count as changed."""

    @functools.wraps(original)
    def collective_rpc(self, method, *args, **kwargs):
        if method in READING:
            return original(self, method, *args, **kwargs)
        if method == SPLIT:
            return _settle(self, _split)
        _refuse(self, method)
        try:
            result = original(self, method, *args, **kwargs)
        except BaseException:
            with contextlib.suppress(Exception):  # a worker that did not settle refuses its next step
                _settle(self, _failed)
            raise
        else:
            _settle(self)
            return result
        finally:
            weights.renew()

    return collective_rpc


def _sleep(original):
    """EngineCore.sleep: a level above 1 drops the weights."""

    @functools.wraps(original)
    def sleep(self, level=1, *args, **kwargs):
        if level > 1:
            self.__dict__[_DROPPED] = True
            weights.renew()
        return original(self, level, *args, **kwargs)

    return sleep


def _wake(original):
    """EngineCore.wake_up: after a sleep without weights, the memory holds other weights."""

    @functools.wraps(original)
    def wake_up(self, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        finally:
            if self.__dict__.get(_DROPPED):
                weights.renew()

    return wake_up


def _reload(original):
    """GPUModelRunner.reload_weights: the weights count as written, also if the call fails. A model that holds a
    part of a layer then stops the engine.

    vLLM notes the folder as the model's, and reads it at the next reload. A folder of training.sync is gone by then.
    """

    @functools.wraps(original)
    def reload_weights(self, *args, **kwargs):
        weights.refuse_with_lora(self.vllm_config)
        config = self.vllm_config.model_config
        own = {name: getattr(config, name) for name in _SOURCE if hasattr(config, name)}
        try:
            return original(self, *args, **kwargs)
        except BaseException as error:
            if _partly(model := self.get_model()):
                weights.broke(model, error)
            raise
        finally:
            if Path(config.model).name.startswith(HANDED_OVER):
                vars(config).update(own)
            weights.wrote()

    return reload_weights


def _partly(model) -> bool:
    """Whether a load ended before all layers had their weights, and after some had. vLLM would count the parts of such
    a layer twice at the next load, take the layer for whole, and leave memory as it was for the rest."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    layers = [get_layerwise_info(layer) for layer in model.modules()]
    loading = [layer for layer in layers if layer.can_load()]
    return bool(loading) and (len(loading) < len(layers) or any(layer.load_numel for layer in loading))


_CORE = "vllm.v1.engine.core"
_HASHES = "vllm.v1.core.kv_cache_utils"
_POOL = "vllm.v1.core.block_pool"
_OFFLOAD = "vllm.v1.simple_kv_offload.manager"
_STALE = "cached keys and values of old weights are used after new weights arrived, if nobody resets the prefix cache"
_UNTIL = "upstream keys cached blocks by the weights (https://github.com/vllm-project/vllm/pull/46125)"


def _seam(name: str, module: str, qualname: str, close, how: str, **given) -> Seam:
    return Seam(
        name=f"weights.{name}",
        targets=(Target(module, qualname),),
        close=close,
        why=_STALE,
        how=how,
        until=_UNTIL,
        causes=(31,),
        **given,
    )


SEAMS = (
    Seam(
        name="weights.first_block",
        targets=(
            Target(_HASHES, "generate_block_hash_extra_keys", "<0.32", (_POOL,)),
            Target(_HASHES, "generate_block_hash_extra_keys", ">=0.32", (_POOL, _OFFLOAD)),
        ),
        close=_first_block,
        why=f"{_STALE}. And the hash of a block with prompt embeddings holds their bytes, but neither their type nor "
        "which positions are tokens, so a request can get the keys and values of other embeddings",
        how="the hash of a prompt's first block holds a random identity of the loaded weights, and all later blocks "
        "follow from the first. The hash of a block with embeddings holds their type, and which positions are tokens",
        until=_UNTIL,
        causes=(7, 31),
    ),
    _seam("core", _CORE, "EngineCore.__init__", _core, "each engine core hears of new weights in its process"),
    _seam(
        "arrival",
        _CORE,
        "EngineCore.add_request",
        _arrival,
        "a request that arrives while weights change is hashed with the new weights",
    ),
    _seam(
        "calls",
        _CORE,
        "EngineCore.collective_rpc",
        _calls,
        "every call to the workers that may write weights changes their identity. Waiting requests are hashed again, "
        "running requests leave nothing in the cache that others use, and their answers say so. Engines that pool, "
        "take images or, on CUDA, are quantized refuse such a call and go on",
    ),
    _seam("sleep", _CORE, "EngineCore.sleep", _sleep, "a sleep that drops the weights changes their identity"),
    _seam("wake", _CORE, "EngineCore.wake_up", _wake, "waking up without weights changes their identity"),
    _seam(
        "reload",
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.reload_weights",
        _reload,
        "a reload in the engine's own process changes the identity",
    ),
    _seam(
        "reload_v2",
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.reload_weights",
        _reload,
        "a reload in the engine's own process changes the identity",
        on_import=True,
    ),
)
