"""Rules on models: rotations that grow with the batch."""

from types import SimpleNamespace

import pytest

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cpu import models as cpu
from bi_patch.seams.cuda import models as cuda


def config(length, backend=True, **given):
    text = SimpleNamespace(max_position_embeddings=4096, rope_parameters=given or None)
    model = SimpleNamespace(hf_text_config=text, max_model_len=length, using_transformers_backend=lambda: backend)
    return SimpleNamespace(model_config=model)


@pytest.fixture(params=[cpu, cuda], ids=["cpu", "cuda"])
def refuse(request):
    return next(policy.apply for policy in request.param.POLICIES if policy.name.endswith("_rotation"))


@pytest.mark.parametrize(
    ("length", "given"),
    [(8192, {"rope_type": "dynamic"}), (4096, {"rope_type": "longrope", "original_max_position_embeddings": 2048})],
)
def test_a_rotation_that_can_grow_is_refused(refuse, length, given):
    with pytest.raises(UnsupportedFeature, match=f"_rotation: .*{given['rope_type']}"):
        refuse(config(length, **given))
    refuse(config(length, backend=False, **given))


def test_a_rotation_within_its_length_is_served(refuse):
    refuse(config(4096, rope_type="dynamic"))
    refuse(config(2048, full={"rope_type": "longrope", "original_max_position_embeddings": 2048}))
    refuse(config(9999))
