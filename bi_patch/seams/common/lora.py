"""LoRA adapters: an adapter's number stands for one adapter, and cached keys and values belong to it."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import adapter_files
from bi_patch.seams.common import arriving
from bi_patch.seams.common.refused import bad_request
from bi_patch.seams.model import Seam, Target

_KNOWN = "_bi_patch_adapters"  # attribute of an EngineCore: lora_int_id -> (name, path)
_FILES = "_bi_patch_adapter_files"  # attribute of an EngineCore: lora_int_id -> (stamp, digest) of adapter_files
_LOADED = "_bi_patch_loaded"  # attribute of a WorkerLoRAManager: lora_int_id -> a checksum of the weights


_CHANGED = (
    "lora.load: {path} holds other weights than when adapter {id} ({name!r}) was loaded before. Cached keys and "
    "values, and requests that are running, have the old weights. Load it with another lora_int_id"
)


def check(core, lora) -> None:
    """Raise UnsupportedRequest if a LoRARequest's number or name means another adapter, too, or if a step would refuse
    its files. core: EngineCore.

    vLLM finds adapters by number once they are loaded, and tells requests apart by name: two adapters with one number
    or name would be mixed up.
    """
    if lora is None:
        return
    known = core.__dict__.setdefault(_KNOWN, {})
    name, path = known.setdefault(lora.lora_int_id, (lora.lora_name, lora.lora_path))
    if (name, path) != (lora.lora_name, lora.lora_path):
        raise bad_request(
            f"lora.adapters: lora_int_id {lora.lora_int_id} is the adapter {name!r} of {path}. Give "
            f"{lora.lora_name!r} of {lora.lora_path} another number"
        )
    for request in arriving.everyone(core):
        other = request.lora_request
        if other is not None and other.lora_name == name and other.lora_int_id != lora.lora_int_id:
            raise bad_request(
                f"lora.adapters: requests of another adapter that is named {name!r}, too, are running. Wait for them, "
                "or give the adapter another name"
            )
    _check_files(core, lora)


def _check_files(core, lora) -> None:
    """Raise UnsupportedRequest for files that changed since a request named the adapter first, and for an adapter of a
    head in another type. Inside a step, which reads the files, an error would end the engine."""
    where = adapter_files.folder(lora.lora_path)
    if where is None:  # vLLM says what it misses
        return
    model = core.vllm_config.model_config
    kind = getattr(model, "head_dtype", model.dtype)
    if kind != model.dtype and adapter_files.may_have_head(where):
        raise bad_request(
            f"lora.head: {lora.lora_path} may change the model's head, and bi_patch does not cover adapters of a head "
            f"in {kind}. Use a head of the model's type, or an adapter of safetensors without lm_head"
        )
    stamp, known = adapter_files.stamp(where), core.__dict__.setdefault(_FILES, {})
    if known.get(lora.lora_int_id, ((), ""))[0] == stamp:
        return
    digest = adapter_files.digest(where)
    if known.setdefault(lora.lora_int_id, (stamp, digest))[1] != digest:
        raise bad_request(_CHANGED.format(path=lora.lora_path, id=lora.lora_int_id, name=lora.lora_name))
    known[lora.lora_int_id] = stamp, digest


def _add(original):
    """EngineCore.add_lora: the number of an adapter that a caller loads is its own."""

    @functools.wraps(original)
    def add_lora(self, lora_request):
        check(self, lora_request)
        return original(self, lora_request)

    return add_lora


def _keys(original):
    """_gen_lora_extra_hash_keys: the number of the adapter is a part of its blocks' hashes."""

    @functools.wraps(original)
    def _gen_lora_extra_hash_keys(request):
        keys = original(request)
        return [*keys, ("lora_int_id", request.lora_request.lora_int_id)] if keys else keys

    return _gen_lora_extra_hash_keys


def _load(original):
    """WorkerLoRAManager._load_adapter: an adapter that is read again has the weights that it had."""

    @functools.wraps(original)
    def _load_adapter(self, lora_request):
        from bi_patch.ops import bits

        adapter = original(self, lora_request)
        held = tuple(
            (name, _sums(bits, weights.lora_a), _sums(bits, weights.lora_b), weights.scaling)
            for name, weights in sorted(adapter.loras.items())
        )
        known = self.__dict__.setdefault(_LOADED, {}).setdefault(lora_request.lora_int_id, hash(held))
        if known != hash(held):
            raise UnsupportedFeature(
                _CHANGED.format(path=lora_request.lora_path, id=lora_request.lora_int_id, name=lora_request.lora_name)
            )
        return adapter

    return _load_adapter


def _sums(bits, held) -> tuple[int, ...]:
    """A checksum of each tensor of one or several."""
    parts = held if isinstance(held, (list, tuple)) else [held]
    return tuple(0 if part is None else bits.checksum(part) for part in parts)


_UNTIL = "upstream rejects two adapters of one lora_int_id"

SEAMS = (
    Seam(
        name="lora.add",
        targets=(Target("vllm.v1.engine.core", "EngineCore.add_lora"),),
        close=_add,
        why="two adapters of one number or name are mixed up: which of them answers depends on which was loaded first",
        how="such a request is refused by name",
        until=_UNTIL,
        causes=(34,),
    ),
    Seam(
        name="lora.keys",
        targets=(Target("vllm.v1.core.kv_cache_utils", "_gen_lora_extra_hash_keys"),),
        close=_keys,
        why="an adapter that is loaded again under its name finds the keys and values of the adapter before",
        how="an adapter's number, which stands for one adapter, is a part of the hash of cached blocks",
        until="upstream keys cached blocks by the adapter's weights",
        causes=(34,),
    ),
    Seam(
        name="lora.load",
        targets=(Target("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter"),),
        close=_load,
        why="an adapter whose slot another adapter took is read again, and its files may have changed",
        how="weights that changed are refused by name",
        until=_UNTIL,
        causes=(34,),
        on_import=True,
    ),
)
