"""Settings: unknown names and values are errors that say what is allowed."""

from pathlib import Path

import pytest

from bi_patch import settings
from bi_patch.errors import SettingError


def test_defaults():
    read = settings.read({})
    assert read.enabled and read.form == "hooks" and read.platform is None
    assert not read.leave_open and not read.allow_open and read.unseeded == "random" and not read.tp_invariant
    assert read.mla == "two"


def test_values():
    read = settings.read(
        {"BI_PATCH": "0", "BI_PATCH_PLATFORM": "cuda", "BI_PATCH_CACHE": "/x", "BI_PATCH_LEAVE_OPEN": "a.b, c.d"}
    )
    assert not read.enabled and read.platform == "cuda" and read.cache == Path("/x")
    assert read.leave_open == {"a.b", "c.d"}
    assert settings.read({"BI_PATCH_TP_INVARIANT": "8"}).tp_invariant == 8
    assert settings.read({"BI_PATCH_MLA": "one"}).mla == "one"


@pytest.mark.parametrize(
    "environ, said",
    [
        ({"BI_PATCH": "yes"}, "BI_PATCH='yes'"),
        ({"BI_PATCH_FORM": "magic"}, "'hooks' or 'patches'"),
        ({"BI_PATCH_PLATFORM": "tpu"}, "'cpu' or 'cuda' or 'ascend'"),
        ({"BI_PATCH_UNSEEDED": "seed"}, "'random' or 'derive' or 'refuse'"),
        ({"BI_PATCH_TP_INVARIANT": "3"}, "'0' or '2' or '4' or '8'"),
        ({"BI_PATCH_CASHE": "/x"}, "BI_PATCH_CASHE"),
        ({"VLLM_BATCH_INVARIANT": "true"}, "VLLM_BATCH_INVARIANT='true'"),
    ],
)
def test_errors_name_the_setting(environ, said):
    with pytest.raises(SettingError, match=said):
        settings.read(environ)
