"""The seams that run the start-up check: on the finished configuration, in every worker, and in the engine."""

import functools

from bi_patch.arming import startup, workers
from bi_patch.seams import active
from bi_patch.seams.model import Seam, Target


def _config(original):
    """VllmConfig.__post_init__: apply the policies to every finished configuration."""

    @functools.wraps(original)
    def __post_init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        active.apply_policies(self)

    return __post_init__


def _worker(original):
    """WorkerWrapperBase.init_worker: run the start-up check first, whatever plugins vLLM loaded."""

    @functools.wraps(original)
    def init_worker(self, all_kwargs):
        startup.check_worker(all_kwargs[self.rpc_rank].get("vllm_config"))
        return original(self, all_kwargs)

    return init_worker


def _workers(original):
    """EngineCore._initialize_kv_caches: first ask every worker whether it is armed, before vLLM captures a graph."""

    @functools.wraps(original)
    def _initialize_kv_caches(self, *args, **kwargs):
        workers.check(self.model_executor)
        return original(self, *args, **kwargs)

    return _initialize_kv_caches


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
        how="every worker runs the start-up check and the policies before it starts",
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
)
