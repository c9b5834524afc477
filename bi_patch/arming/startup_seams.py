"""The seams that run the start-up check: the finished configuration, every worker, the engine that asks its workers."""

import functools

from bi_patch.arming import startup, workers
from bi_patch.seams import active
from bi_patch.seams.model import Seam, Target


def _config(original):
    """VllmConfig.__post_init__: every finished configuration passes the policies."""

    @functools.wraps(original)
    def __post_init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        active.apply_policies(self)

    return __post_init__


def _worker(original):
    """WorkerWrapperBase.init_worker: no worker starts with an open seam, whatever plugins were loaded."""

    @functools.wraps(original)
    def init_worker(self, all_kwargs):
        startup.check_worker(all_kwargs[self.rpc_rank].get("vllm_config"))
        return original(self, all_kwargs)

    return init_worker


def _workers(original):
    """EngineCore._initialize_kv_caches: the workers, wherever they run, are asked before anything is captured."""

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
        why="a feature without a closed seam would vary silently",
        how="the finished configuration passes every policy, or is refused by name",
        until="upstream refuses what its own mode does not cover",
    ),
    Seam(
        name="engine.worker",
        targets=(Target("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_worker"),),
        close=_worker,
        why="VLLM_PLUGINS can leave bi_patch's plugin out",
        how="every worker verifies all seams and policies before it starts",
        until="never: it is the gate",
    ),
    Seam(
        name="engine.workers",
        targets=(Target("vllm.v1.engine.core", "EngineCore._initialize_kv_caches"),),
        close=_workers,
        why="a worker that was not armed has no gate of its own: on another node, or started by Ray before the engine",
        how="the engine asks every worker for its gate and its bi_patch, and stops where one has none or another",
        until="never: it is the gate",
    ),
)
