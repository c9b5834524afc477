"""The seams that run the start-up check: on the finished configuration, in every worker, and in the engine."""

import dataclasses
import functools

from bi_patch.arming import sign, startup, workers
from bi_patch.seams import active, stages
from bi_patch.seams.model import Seam, Target

_FIRST = "_bi_patch_first"  # attribute of vLLM's MPClient: the sign of its first engine core


def _config(original):
    """VllmConfig.__post_init__: apply the policies to every finished configuration."""

    @functools.wraps(original)
    def __post_init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        active.apply_policies(self)

    return __post_init__


def _worker(original):
    """WorkerWrapperBase.init_worker: run the start-up check first, whatever plugins vLLM loaded. And what stops one
    rank's start stops every rank's."""

    @functools.wraps(original)
    def init_worker(self, all_kwargs):
        startup.check_worker(all_kwargs[self.rpc_rank].get("vllm_config"))
        result = original(self, all_kwargs)
        stages.guard(self.worker)
        return result

    return init_worker


def _workers(original):
    """EngineCore._initialize_kv_caches: first ask every worker whether it is armed, before vLLM captures a graph."""

    @functools.wraps(original)
    def _initialize_kv_caches(self, *args, **kwargs):
        workers.check(self.model_executor)
        result = original(self, *args, **kwargs)
        sign.make(self.vllm_config, self.model_executor)
        return result

    return _initialize_kv_caches


def _ready(original):
    """EngineCoreReadyResponse: the engine core's ready message, with the sign of the armed engine core."""

    @dataclasses.dataclass
    class EngineCoreReadyResponse(original):
        bi_patch: "dict | None" = dataclasses.field(default_factory=sign.held)

    EngineCoreReadyResponse.__module__ = original.__module__
    EngineCoreReadyResponse.__qualname__ = original.__qualname__
    return EngineCoreReadyResponse


def _front_end(original):
    """MPClient._apply_ready_response: check the engine core's sign before the front end sends it a request, and compare
    it with that of the first one."""

    @functools.wraps(original)
    def _apply_ready_response(self, payload, *args, **kwargs):
        found = sign.take(payload)
        if found is not None:
            sign.compare(self.__dict__.setdefault(_FIRST, found), found)
        return original(self, payload, *args, **kwargs)

    return _apply_ready_response


def _version(original):
    """register_instrumentator_api_routers: answer /version with the engine's sign. The first route of a path serves."""

    @functools.wraps(original)
    def register_instrumentator_api_routers(app, *args, **kwargs):
        async def show_version():
            from fastapi.responses import JSONResponse
            from vllm.version import __version__

            return JSONResponse({"version": __version__, "bi_patch": sign.held()})

        app.add_api_route("/version", show_version, methods=["GET"])
        return original(app, *args, **kwargs)

    return register_instrumentator_api_routers


SEAMS = (
    Seam(
        name="engine.config",
        targets=(Target("vllm.config.vllm", "VllmConfig.__post_init__"),),
        close=_config,
        why="a feature that no patch point covers would change bits silently",
        how="bi_patch applies its policies to the finished configuration, and refuses such a feature by name",
        until="upstream's mode refuses every feature and platform that it does not cover "
        "(https://github.com/vllm-project/vllm/pull/55958)",
    ),
    Seam(
        name="engine.worker",
        targets=(Target("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_worker"),),
        close=_worker,
        why="the variable VLLM_PLUGINS can leave out bi_patch's plugin, which runs the start-up check",
        how="every worker runs the start-up check and the policies before it starts. If the start of one rank fails, "
        "the others stop with its reason",
        until="never: this patch point runs the start-up check",
    ),
    Seam(
        name="engine.workers",
        targets=(Target("vllm.v1.engine.core", "EngineCore._initialize_kv_caches"),),
        close=_workers,
        why="a worker that is not armed runs no start-up check, e.g. on another node, or if Ray started it before the "
        "engine",
        how="the engine asks every worker for its start-up check and its bi_patch. It stops if a worker is not armed, "
        "or is armed by another bi_patch",
        until="never: this patch point runs the start-up check",
    ),
    Seam(
        name="engine.sign",
        targets=(
            Target(
                "vllm.v1.engine",
                "EngineCoreReadyResponse",
                copies=("vllm.v1.engine.core", "vllm.v1.engine.core_client"),
            ),
        ),
        close=_ready,
        why="an engine core that is not armed gives no sign of it",
        how="an armed engine core says so in its ready message: release and digest of bi_patch, patch points, "
        "certificates",
        until="never: this patch point runs the start-up check",
    ),
    Seam(
        name="engine.front_end",
        targets=(Target("vllm.v1.engine.core_client", "MPClient._apply_ready_response"),),
        close=_front_end,
        why="an armed front end would use an engine core that is not armed, e.g. on another node",
        how="the front end stops if an engine core is not armed, or is armed by another bi_patch. It also stops if "
        "data-parallel engine cores differ in what decides bits, because any of them may serve a request",
        until="never: this patch point runs the start-up check",
    ),
    Seam(
        name="engine.version",
        targets=(Target("vllm.entrypoints.serve.instrumentator", "register_instrumentator_api_routers"),),
        close=_version,
        why="nobody can see from outside whether a server is armed",
        how="the server's answer to /version has the field bi_patch, the engine core's sign",
        until="never: this patch point shows that the server is armed",
        required=False,
    ),
)
