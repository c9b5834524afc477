"""Rules on the engine's configuration that hold on every platform."""

from bi_patch.seams.model import Policy


def _one_grammar_library(config) -> None:
    structured = getattr(config, "structured_outputs_config", None)
    if structured is not None and structured.backend == "auto":
        structured.backend = "xgrammar"


POLICIES = (
    Policy(
        name="engine.structured_outputs",
        apply=_one_grammar_library,
        why="`auto` lets the first structured request since the start pick the library for all: set to xgrammar",
    ),
)
