"""The scheduler's patch points: a reset of the prefix cache reaches offloaded keys and values."""

from types import SimpleNamespace

import pytest

from bi_patch.arming.catalog import CATALOG


@pytest.mark.parametrize(
    "connector, asked, reset", [(None, False, False), (None, True, True), ("held", False, True), ("held", True, True)]
)
def test_a_reset_of_the_cache_resets_what_was_offloaded(connector, asked, reset):
    seam = next(seam for seam in CATALOG.seams if seam.name == "scheduler.offloaded")
    close = seam.close(lambda self, running, connector: (running, connector))
    assert close(SimpleNamespace(connector=connector), True, reset_connector=asked) == (True, reset)
