"""Turns a user's arguments (a model, a level, arguments of vllm.LLM) into the local engines that verify measures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from bi_patch.tools.models import recipes
from bi_patch.tools.verify import levels
from bi_patch.tools.verify.child import ARMED, known_mode
from bi_patch.tools.verify.levels import QUICK, Level
from bi_patch.tools.verify.system import LocalEngines

# Arguments of vllm.LLM that are fields of Options.
_NAMES = {
    "enforce_eager": "eager",
    "max_num_batched_tokens": "chunk",
    "enable_chunked_prefill": "chunked",
    "enable_prefix_caching": "prefix_caching",
    "num_gpu_blocks_override": "kv_blocks",
    "dtype": "dtype",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
}


def local(
    model: str,
    level: Level,
    *,
    mode: str = ARMED,
    engine_args: Mapping[str, object] | None = None,
    dtype: str = "auto",
    eager: bool | None = None,
    random_weights: int | None = None,
    logits: bool = False,
    environ: dict[str, str] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> LocalEngines:
    """The local engines for a model and a level.

    model: a folder, a name in recipes.NAMES ("" for SmolLM2), or a name that vLLM resolves. engine_args: arguments of
    vllm.LLM by name. eager: None compiles, except on the quick level on CPU. logits: compare digests of logits, too.
    tell: called with a text before a model is made. Raises ModelMissing for a folder without config.json, or for a
    folder without weights when random_weights is None; SettingError for a mode that does not exist.
    """
    known_mode(mode)  # before a model is made
    folder = _folder(model or recipes.SMOL, tell)
    if random_weights is None and not levels.has_weights(folder):
        raise recipes.ModelMissing(
            f"{folder} has a config.json and no weights: give --random-weights SEED to use random weights"
        )
    given = {_NAMES.get(name, name): value for name, value in (engine_args or {}).items()}
    known = {name: value for name, value in given.items() if name in _NAMES.values()}
    extra = {name: value for name, value in given.items() if name not in known}
    if eager is None:
        eager = level.name == QUICK.name and _on_cpu()  # compiling alone would use up the time of a quick run
    made = levels.options(
        level,
        folder,
        **{"dtype": dtype, "eager": eager, "random_weights": random_weights, "digests": logits} | known,
        extra=extra,
    )
    # A name is looked up on the model hub, unless the user sets HF_HUB_OFFLINE; a folder needs no hub.
    hub = {} if Path(folder).expanduser().is_dir() else {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}
    return LocalEngines(mode, made, environ=hub | (environ or {}))


def _folder(model: str, tell: Callable[[str], None]) -> str:
    if model in recipes.NAMES:
        return str(recipes.path(model, tell=tell))
    if Path(model).expanduser().is_dir():
        return str(recipes.path(model))  # raises when the folder has no config.json
    if model.startswith((".", "/", "~")):
        recipes.path(model)  # raises: the folder does not exist
    return model


def _on_cpu() -> bool:
    from bi_patch import installed

    found = installed.find()
    return found is not None and found.platform == "cpu"
