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


@pytest.mark.parametrize(
    ("length", "given"),
    [(8192, {"rope_type": "dynamic"}), (4096, {"rope_type": "longrope", "original_max_position_embeddings": 2048})],
)
def test_a_rotation_that_can_grow_is_refused(length, given):
    for refuse in (cpu._refuse_rotations, cuda._refuse_rotations):
        with pytest.raises(UnsupportedFeature, match=f"_rotation: .*{given['rope_type']}"):
            refuse(config(length, **given))
        refuse(config(length, backend=False, **given))


@pytest.mark.parametrize("platform", [cpu, cuda])
def test_a_rotation_within_its_length_is_served(platform):
    platform._refuse_rotations(config(4096, rope_type="dynamic"))
    platform._refuse_rotations(config(2048, full={"rope_type": "longrope", "original_max_position_embeddings": 2048}))
    platform._refuse_rotations(config(9999))
