"""Layers with a recurrent state: one row for each kind that kernels of bi_patch compute, and one for all others.

The rows tell the kinds by the model's architecture. On CPU, what a loaded model really has is checked again, layer by
layer (`recurrent.cpu_layers`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bi_patch.platforms.features.model import Feature, refused, row, served

_CPU = "invariance-2026-11-28-cpu-amx-recurrent-vllm-0.32.0.json"
_MAMBA_1 = "invariance-2026-11-29-cpu-amx-recurrent-vllm-0.32.0.json"
# -5 and -7: the kernels of 2026-11-29; -4: also a slower form of those of gated delta nets and Mamba 2.
_H200_CHUNKS = "invariance-2026-11-29-h200-recurrent-vllm-0.33.0-4.json"
_H200 = "invariance-2026-11-29-h200-recurrent-vllm-0.33.0-5.json"
_H200_MORE = "invariance-2026-11-29-h200-recurrent-vllm-0.33.0-7.json"  # compiled, and Nemotron-H in eager mode
_CPU_OWN = "invariance-2026-11-30-cpu-recurrent-vllm-0.32.0-2.json"  # Qwen3.5
_CPU_EXPERTS = "invariance-2026-11-30-cpu-recurrent-vllm-0.32.0.json"
_H200_NEW = "invariance-2026-11-30-h200-recurrent-vllm-0.33.0-3.json"  # eager, two families more
# In engines with few KV blocks, too.
_H200_FEW = "invariance-2026-11-30-h200-recurrent-vllm-0.33.0-2.json"
_H200_LAST = "invariance-2026-11-30-h200-recurrent-vllm-0.33.0.json"
_H200_KIMI = "invariance-2026-11-30-h200-kimi-vllm-0.33.0.json"
_H200_STATES = "invariance-2026-11-30-h200-recurrent-vllm-0.33.0-4.json"
_H200_STATES_5 = "invariance-2026-11-30-h200-recurrent-vllm-0.33.0-5.json"
# --full: every axis, eager and compiled engines among them.
_FULL_4 = "invariance-2026-11-29-cpu-amx-full-vllm-0.32.0-4.json"
_FULL_5 = "invariance-2026-11-29-cpu-amx-full-vllm-0.32.0-5.json"
_FULL_7 = "invariance-2026-11-29-cpu-amx-full-vllm-0.32.0-7.json"
_CHUNKS = refused("chunks of a recurrent state start where an engine step starts", todo="Use another model")
_OLD = refused("chunks of a recurrent state start where an engine step starts", releases="<0.33")
_TINY = served(_CPU, why="tiny shapes with random weights, in bf16")
_FOUR = "four layers of published sizes with random weights, six axes"
_RUN = f"{_FOUR}; compiled and in eager mode"
_CUTLASS = refused("vLLM's CPU build does not load it: its package imports cutlass", todo="Use another model")

# The kind of recurrent layer, by architecture.
_KINDS = {
    "Qwen3NextForCausalLM": "gated delta nets",
    "Qwen3_5ForCausalLM": "Qwen3.5",
    "Qwen3_5MoeForCausalLM": "Qwen3.5",
    "FalconH1ForCausalLM": "Mamba 2",
    "GraniteMoeHybridForCausalLM": "Mamba 2",
    "NemotronHForCausalLM": "Mamba 2",
    "Mamba2ForCausalLM": "Mamba 2",
    "MambaForCausalLM": "Mamba 1",
    "FalconMambaForCausalLM": "Mamba 1",
    "JambaForCausalLM": "Mamba 1",
    "Lfm2ForCausalLM": "short convolutions",
    "Lfm2MoeForCausalLM": "short convolutions",
    "KimiLinearForCausalLM": "Kimi delta attention",
}


def _asked(kind: str) -> Callable[[Any], str]:
    """The kind, if the engine's model has recurrent layers of this kind; "" stands for every other kind."""

    def asked(config: Any) -> str:
        model = config.model_config
        if not any(getattr(model, name, False) for name in ("is_hybrid", "is_attention_free", "has_inner_state")):
            return ""
        found = {_KINDS.get(name, "") for name in getattr(model, "architectures", None) or ("",)}
        return (kind or "hybrid and state-space models") if kind in found else ""

    return asked


def _eager(config: Any) -> bool:
    return bool(getattr(config.model_config, "enforce_eager", False))


def _named(architecture: str) -> Callable[[Any], bool]:
    return lambda config: architecture in (getattr(config.model_config, "architectures", None) or ())


RECURRENT: tuple[Feature, ...] = (
    row(
        "gated delta nets (Qwen3-Next)",
        short="Qwen3-Next",
        cpu=_TINY,
        cuda=(_OLD, served(_H200, _H200_FEW, why=f"{_FOUR} and preemption; compiled and in eager mode")),
        ascend=_CHUNKS,
        asked=_asked("gated delta nets"),
        details="The states are kept exactly, with prefix caching (`--mamba-cache-mode align`) and without. On CPU in "
        "bf16; on CUDA in bf16 with `--mamba-ssm-cache-dtype float32` and a `--block-size` that leaves pages of a "
        "power of two tokens, e.g. 1024.",
    ),
    row(
        "gated delta nets, compiled",
        cpu=served(_FULL_4),
        cuda=(_OLD, served(_H200, _H200_FEW)),
        ascend=_CHUNKS,
        asked=lambda config: _asked("gated delta nets")(config) and not _eager(config) and "compiled gated delta nets",
    ),
    row(
        "gated delta nets, in eager mode",
        cpu=served(_CPU),
        cuda=(_OLD, served(_H200_FEW)),
        ascend=_CHUNKS,
        asked=lambda config: _asked("gated delta nets")(config) and _eager(config) and "gated delta nets in eager mode",
    ),
    row(
        "gated delta nets (Qwen3.5)",
        cpu=served(_CPU_OWN, why="a tiny shape with random weights; vLLM needs torchvision for these models"),
        cuda=(
            _OLD,
            served(
                _H200_STATES,
                _H200_STATES_5,
                why="four layers of published sizes with random weights, six axes; with experts in eager mode, too",
            ),
        ),
        ascend=_CHUNKS,
        asked=lambda config: (
            _asked("Qwen3.5")(config)
            and not (_named("Qwen3_5ForCausalLM")(config) and _eager(config))
            and "gated delta nets (Qwen3.5)"
        ),
    ),
    row(
        "gated delta nets (Qwen3.5 without experts), in eager mode",
        cpu=served(_CPU_OWN, why="a tiny shape with random weights; vLLM needs torchvision for these models"),
        cuda=(_OLD, served(_H200_NEW, why=_FOUR)),
        ascend=_CHUNKS,
        asked=lambda config: (
            _named("Qwen3_5ForCausalLM")(config) and _eager(config) and "Qwen3.5 without experts in eager mode"
        ),
    ),
    row(
        "Mamba 2 (Falcon-H1, Granite 4-H, Nemotron-H)",
        short="Falcon-H1, Granite 4-H",
        cpu=_TINY,
        cuda=(
            _OLD,
            served(
                _H200,
                _H200_FEW,
                _H200_MORE,
                _H200_LAST,
                why=_RUN,
            ),
        ),
        ascend=_CHUNKS,
        asked=_asked("Mamba 2"),
    ),
    row(
        "Mamba 2, compiled",
        cpu=served(_FULL_5, _FULL_7, why="Falcon-H1, Granite 4-H, Nemotron-H, Mamba 2"),
        cuda=(_OLD, served(_H200)),
        ascend=_CHUNKS,
        asked=lambda config: _asked("Mamba 2")(config) and not _eager(config) and "compiled Mamba 2",
    ),
    row(
        "Mamba 2, in eager mode",
        cpu=served(_CPU),
        cuda=(_OLD, served(_H200_FEW, _H200_MORE, _H200_LAST)),
        ascend=_CHUNKS,
        asked=lambda config: _asked("Mamba 2")(config) and _eager(config) and "Mamba 2 in eager mode",
    ),
    row(
        "Granite 4-H, in eager mode",
        cpu=served(_CPU),
        cuda=(_OLD, served(_H200_LAST, _H200_FEW)),
        ascend=_CHUNKS,
        asked=lambda config: (
            _named("GraniteMoeHybridForCausalLM")(config) and _eager(config) and "Granite 4-H in eager mode"
        ),
    ),
    row(
        "Mamba 2 (the first models)",
        cpu=served(_FULL_7, why="a tiny shape with random weights"),
        cuda=(
            _OLD,
            served(
                _H200_STATES,
                _H200_STATES_5,
                why="four layers of published sizes with random weights, six axes; compiled and in eager mode",
            ),
        ),
        ascend=_CHUNKS,
        asked=lambda config: _named("Mamba2ForCausalLM")(config) and "Mamba 2 (the first models)",
    ),
    row(
        "Nemotron-H",
        cpu=served(_FULL_7, why="a tiny shape with random weights"),
        cuda=(_OLD, served(_H200_MORE, _H200_LAST, why=f"{_FOUR}; compiled and in eager mode")),
        ascend=_CHUNKS,
        asked=lambda config: _named("NemotronHForCausalLM")(config) and "Nemotron-H",
    ),
    row(
        "Nemotron-H, compiled",
        cpu=served(_FULL_7),
        cuda=(_OLD, served(_H200_LAST)),
        ascend=_CHUNKS,
        asked=lambda config: _named("NemotronHForCausalLM")(config) and not _eager(config) and "compiled Nemotron-H",
    ),
    row(
        "short convolutions (LFM2)",
        short="LFM2",
        cpu=_TINY,
        cuda=(
            _OLD,
            served(_H200_CHUNKS, _H200_MORE, _H200_FEW, why=f"{_FOUR} and preemption; compiled and in eager mode"),
        ),
        ascend=_CHUNKS,
        asked=_asked("short convolutions"),
    ),
    row(
        "LFM2 with experts",
        cpu=served(_CPU_EXPERTS, why="a tiny shape with random weights, compiled and in eager mode"),
        cuda=(_OLD, served(_H200_NEW, why=f"in eager mode, {_FOUR}")),
        ascend=_CHUNKS,
        asked=lambda config: _named("Lfm2MoeForCausalLM")(config) and "LFM2 with experts",
    ),
    row(
        "LFM2 with experts, compiled",
        cpu=served(_CPU_EXPERTS),
        cuda=(_OLD, served(_H200_STATES, why="four layers of published sizes with random weights, six axes")),
        ascend=_CHUNKS,
        asked=lambda config: (
            _named("Lfm2MoeForCausalLM")(config) and not _eager(config) and "compiled LFM2 with experts"
        ),
    ),
    row(
        "short convolutions, compiled",
        cpu=served(_FULL_7),
        cuda=(_OLD, served(_H200_MORE)),
        ascend=_CHUNKS,
        asked=lambda config: (
            _asked("short convolutions")(config) and not _eager(config) and "compiled short convolutions"
        ),
    ),
    row(
        "Mamba 1 (Mamba, Falcon-Mamba, Jamba)",
        short="Mamba, Falcon-Mamba, Jamba",
        cpu=served(_MAMBA_1, why="tiny shapes with random weights, in bf16"),
        cuda=(
            _OLD,
            served(_H200_CHUNKS, _H200_MORE, why=f"Falcon-Mamba and Jamba, compiled and in eager mode, {_FOUR}"),
        ),
        ascend=_CHUNKS,
        asked=_asked("Mamba 1"),
    ),
    row(
        "Mamba (the first models)",
        cpu=served(_MAMBA_1),
        cuda=(
            _OLD,
            served(
                _H200_STATES,
                why="four layers of published sizes with random weights, six axes; compiled and in eager mode",
            ),
        ),
        ascend=_CHUNKS,
        asked=lambda config: _named("MambaForCausalLM")(config) and "Mamba",
    ),
    row(
        "Mamba 1, compiled",
        cpu=served(_MAMBA_1, why="Mamba and Falcon-Mamba; Jamba has a row of its own"),
        cuda=(_OLD, served(_H200_MORE, why="Falcon-Mamba; Jamba has a row of its own")),
        ascend=_CHUNKS,
        asked=lambda config: _asked("Mamba 1")(config) and not _eager(config) and "compiled Mamba 1",
    ),
    row(
        "Jamba, compiled",
        cpu=served(_FULL_7),
        cuda=(_OLD, served(_H200_MORE)),
        ascend=_CHUNKS,
        asked=lambda config: _named("JambaForCausalLM")(config) and not _eager(config) and "compiled Jamba",
    ),
    row(
        "Kimi delta attention (Kimi Linear)",
        short="Kimi Linear",
        cpu=_CUTLASS,
        cuda=(
            _OLD,
            served(
                _H200_KIMI,
                why="four layers of Kimi-Linear-48B-A3B's sizes with 64 experts, in CUDA graphs and in eager mode; "
                "decode = prefill with BI_PATCH_MLA=one",
            ),
        ),
        ascend=_CHUNKS,
        asked=_asked("Kimi delta attention"),
        details="The kernels take one token after the other. Its layers of MLA follow `BI_PATCH_MLA`. In bf16, on one "
        "GPU, with a `--block-size` that leaves pages of a power of two tokens, e.g. 1024.",
    ),
    row(
        "other hybrid and state-space models (Zamba2, MiniMax-Text)",
        cpu=_CHUNKS,
        cuda=_CHUNKS,
        ascend=_CHUNKS,
        asked=_asked(""),
    ),
)
