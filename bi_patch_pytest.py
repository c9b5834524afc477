"""pytest plugin: the fixture `verify_invariance`, for a test of your own model or server.

The plugin stands beside the package and imports nothing of bi_patch before a test uses the fixture. Otherwise it would
arm every pytest process of an environment in which bi_patch is installed.
"""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def verify_invariance():
    """verify_invariance(model="", *, url="", level="quick", mode="armed", axes=(), engine_args={}, dtype="auto",
    eager=None, random_weights=None, logits=False, clients=256) -> bi_patch.tools.verify.report.Report

    The test fails with the report as text if a position differs, or if an axis that applies could not be measured. If
    an axis, a level, a mode or a model does not exist, the test fails with one line. The options are those of
    `bi-patch verify`. axes: names of axes, by default all axes of the level.
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
    if wrong:  # outside of the handler, where pytest would print the handled error a second time
        pytest.fail(wrong, pytrace=False)
    return report
