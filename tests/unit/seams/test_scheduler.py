"""The scheduler's patch points: a reset of the prefix cache reaches offloaded keys and values."""

from types import SimpleNamespace

import pytest

from bi_patch.arming.catalog import CATALOG
from bi_patch.errors import UnsupportedRequest
from bi_patch.seams.common.scheduler import _reset


@pytest.mark.parametrize(
    "connector, asked, reset", [(None, False, False), (None, True, True), ("held", False, True), ("held", True, True)]
)
def test_a_reset_of_the_cache_resets_what_was_offloaded(connector, asked, reset):
    seam = next(seam for seam in CATALOG.seams if seam.name == "scheduler.offloaded")
    close = seam.close(lambda self, running, connector: (running, connector))
    assert close(SimpleNamespace(connector=connector), False, reset_connector=asked) == (False, reset)


@pytest.mark.parametrize(
    ("first_runner", "asynchronous", "temperature"), [(1, 1, 0.7), (1, 1, 0.0), (1, 0, 0.7), (0, 1, 0.7)]
)
def test_a_reset_that_would_lose_draws_is_refused(first_runner, asynchronous, temperature):
    config = SimpleNamespace(
        use_v2_model_runner=not first_runner, scheduler_config=SimpleNamespace(async_scheduling=bool(asynchronous))
    )
    running = [
        SimpleNamespace(sampling_params=None),
        SimpleNamespace(sampling_params=SimpleNamespace(temperature=temperature)),
    ]
    scheduler = SimpleNamespace(vllm_config=config, running=running, connector=None)
    reset = _reset(lambda self, running, connector: (running, connector))
    assert reset(scheduler) == (False, False)
    if first_runner and asynchronous and temperature:
        with pytest.raises(UnsupportedRequest, match="scheduler.reset_running"):
            reset(scheduler, True)
    else:
        assert reset(scheduler, True) == (True, False)
