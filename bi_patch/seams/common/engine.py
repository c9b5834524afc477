"""Rules on the engine's configuration for every platform."""

from bi_patch.seams.model import Policy


def _one_grammar_library(config) -> None:
    structured = getattr(config, "structured_outputs_config", None)
    if structured is not None and structured.backend == "auto":
        structured.backend = "xgrammar"


POLICIES = (
    Policy(
        name="engine.structured_outputs",
        apply=_one_grammar_library,
        why="with `auto`, the first structured-output request after the start chooses the grammar library for all "
        "later requests, so bi_patch sets xgrammar",
    ),
)
