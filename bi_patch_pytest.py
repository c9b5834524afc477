"""pytest plugin: the fixture `verify_invariance`, for a test of your own model or server.

It stands beside the package, and imports nothing of it until the fixture is asked for: importing `bi_patch` would arm
every pytest process in whose environment it is installed.
"""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def verify_invariance():
    """verify_invariance(model="", *, url="", level="quick", mode="armed", axes=(), engine_args={}, dtype="auto",
    eager=None, random_weights=None, logits=False, clients=256) -> bi_patch.tools.verify.report.Report

    Fails the test with the report as text when a position differs, or when an axis that applies could not be checked.
    The options are those of `bi-patch verify`; axes: names of axes, all of the level by default. An axis, a level, a
    mode or a model that does not exist fails the test with one line.
    """
    import bi_patch_entry

    bi_patch_entry.without_arming()

    return _verify


def _verify(
    model: str = "",
    *,
    url: str = "",
    level: str = "quick",
    mode: str = "armed",
    axes=(),
    engine_args=None,
    dtype: str = "auto",
    eager: bool | None = None,
    random_weights: int | None = None,
    logits: bool = False,
    clients: int = 256,
):
    from bi_patch.errors import BiPatchError
    from bi_patch.tools.verify import levels, terminal
    from bi_patch.tools.verify.local import local
    from bi_patch.tools.verify.measure import verify
    from bi_patch.tools.verify.system import RunningServer

    try:
        chosen = levels.named(level)
        if url:
            system = RunningServer(url, model=model)
        else:
            system = local(
                model,
                chosen,
                mode=mode,
                engine_args=engine_args,
                dtype=dtype,
                eager=eager,
                random_weights=random_weights,
                logits=logits,
            )
        report = verify(system, chosen, only=(axes,) if isinstance(axes, str) else tuple(axes), clients=clients)
    except BiPatchError as error:
        wrong = f"{type(error).__name__}: {error}"
    else:
        wrong = f"{' '.join(report.verdict)}\n\n{terminal.plain(report)}" if report.exit_code else ""
    if wrong:  # outside of the handler: pytest would print the error that is handled a second time
        pytest.fail(wrong, pytrace=False)
    return report
