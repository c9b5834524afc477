"""One image for each call of an encoder; the list of an encoder's layers; its certificate."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import CertificateFailed, UnsupportedFeature, UnsupportedRequest
from bi_patch.ops.cpu import dense, machine
from bi_patch.seams import vision
from bi_patch.seams.common import vision as names
from bi_patch.seams.cpu import vision as cpu
from bi_patch.seams.cuda import vision as cuda


class Model(torch.nn.Module):
    """An encoder around a language model."""

    def __init__(self, *layers):
        super().__init__()
        self.tower = torch.nn.ModuleList(layers)
        self.inner = torch.nn.ModuleDict({"language": torch.nn.ModuleDict({"odd": torch.nn.LSTM(2, 2)})})

    def get_language_model(self):
        return self.inner["language"]


def test_model_runner_v1_encodes_one_item_at_a_time():
    calls = []

    def original(runner, output):
        calls.append(output.scheduled_encoder_inputs)
        return [f"{name} {item}" for name, items in output.scheduled_encoder_inputs.items() for item in items]

    run = vision.alone(original)
    output = SimpleNamespace(scheduled_encoder_inputs={"a": [0, 2], "b": [1]}, free_encoder_mm_hashes=["x"])
    assert run(None, output) == ["a 0", "a 2", "b 1"]
    assert calls == [{"a": [0]}, {"a": [2]}, {"b": [1]}]
    assert output.scheduled_encoder_inputs == {"a": [0, 2], "b": [1]}
    empty = SimpleNamespace(scheduled_encoder_inputs={})
    assert run(None, empty) == []


def test_model_runner_v2_encodes_one_item_at_a_time():
    calls = []

    def original(runner, items):
        calls.append(list(items))
        return [item[1] * 2 for item in items]

    assert vision.alone_v2(original)(None, [("image", 1), ("video", 4), ("image", 3)]) == [2, 8, 6]
    assert [len(call) for call in calls] == [1, 1, 1]


def test_only_listed_layers_may_be_in_an_encoder():
    vision.check(Model(torch.nn.LayerNorm(4), torch.nn.Embedding(3, 4), torch.nn.GELU()), "vision.cpu")
    with pytest.raises(UnsupportedFeature, match="vision.cpu: .*GRU.*BI_PATCH=0"):
        vision.check(Model(torch.nn.GRU(2, 2)), "vision.cpu")

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

    with pytest.raises(UnsupportedFeature, match="Own"):
        vision.check(Model(Own()), "vision.cpu")
    vision.check(Model(Own()), "vision.cpu", vision.OWNERS | {"Own"})


@pytest.mark.parametrize("by", [0, 1, 3])
def test_a_moved_copy_has_the_same_numbers(by):
    x = torch.randn(2, 3, 5)
    moved = vision._moved(x, by)
    assert torch.equal(moved, x) and moved.data_ptr() % 64 == (4 * by) % 64
    assert vision._moved(torch.arange(3), by).tolist() == [0, 1, 2] and vision._moved("text", by) == "text"


def test_who_takes_images():
    def config(**media):
        return SimpleNamespace(
            model_config=SimpleNamespace(is_multimodal_model=True, multimodal_config=SimpleNamespace(**media))
        )

    assert vision.takes_images(config()) and vision.takes_images(config(language_model_only=False))
    assert not vision.takes_images(config(language_model_only=True))
    assert not vision.takes_images(SimpleNamespace(model_config=None))


def test_new_weights_are_refused():
    with pytest.raises(UnsupportedFeature, match="vision.weights"):
        vision.no_update(Model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_those_of_a_convolution(dtype, cache):
    machine.load_kernels(cache)
    layer = torch.nn.Conv2d(3, 20, 14, 14).to(dtype)
    x = torch.randn(2, 3, 42, 28).to(dtype)
    assert dense.patches(layer, x) is None
    dense.take_patches(layer)
    found = dense.patches(layer, x)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, layer(x), **close)
    for i in range(2):
        assert torch.equal(dense.patches(layer, x[i : i + 1]), found[i : i + 1])
    assert dense.patches(layer, x.double()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_of_frames_are_those_of_a_convolution(dtype, cache):
    machine.load_kernels(cache)
    layer = torch.nn.Conv3d(3, 20, (2, 14, 14)).to(dtype)
    layer.stride = layer.kernel_size
    x = torch.randn(2, 3, 4, 42, 28).to(dtype)
    dense.take_patches(layer)
    found = dense.patches(layer, x)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, layer(x), **close)
    assert torch.equal(dense.patches(layer, x[1:]), found[1:])


class Projector(torch.nn.Module):
    """Gemma 3's projector, as in vLLM."""

    def __init__(self, dtype):
        super().__init__()
        self.mm_input_projection_weight = torch.nn.Parameter(torch.randn(64, 96).to(dtype))
        self.mm_soft_emb_norm = torch.nn.LayerNorm(64).to(dtype)
        self.patches_per_image = 8
        self.avg_pool = torch.nn.AvgPool2d(2, 2)

    def forward(self, x):
        n, _, width = x.shape
        image = x.transpose(1, 2).reshape(n, width, 8, 8).contiguous()
        rows = self.mm_soft_emb_norm(self.avg_pool(image).flatten(2).transpose(1, 2))
        return torch.matmul(rows, self.mm_input_projection_weight).type_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projector_of_gemma_3_has_the_rows_of_each_image(dtype, cache):
    machine.load_kernels(cache)
    layer = Projector(dtype)
    x = torch.randn(3, 64, 64).to(dtype)
    forward = cpu._projector(Projector.forward)
    assert torch.equal(forward(layer, x), layer(x))  # not prepared
    dense.take_projection(layer, cpu._PROJECTION)
    found = forward(layer, x)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    torch.testing.assert_close(found, layer(x), **close)
    for i in range(3):
        assert torch.equal(forward(layer, x[i : i + 1]), found[i : i + 1])


@pytest.fixture
def made(monkeypatch):
    """The options of vLLM's made images; an image has a row for each 32 pixels of its width, 4 for the largest."""

    class Budget:
        mm_max_toks_per_item = {"image": 4}

        def __init__(self, *args, **kwargs):
            pass

        def get_dummy_encoder_profile_inputs(self, modality, count):
            asked = limits.get(modality)
            return [(modality, torch.ones(4 if asked is None or asked.width is None else asked.width // 32, 3))]

    limits = {}
    monkeypatch.setattr("vllm.multimodal.encoder_budget.MultiModalBudget", Budget)
    monkeypatch.setattr(
        "vllm.multimodal.utils.group_and_batch_mm_kwargs", lambda made, device: iter([("image", 1, {"x": made[0][1]})])
    )
    return limits


def certify(encode, limits):
    media = SimpleNamespace(limit_per_prompt=limits)
    config = SimpleNamespace(model_config=SimpleNamespace(get_multimodal_config=lambda: media))
    vision.certify(SimpleNamespace(embed_multimodal=encode), config, "cpu", "vision.cpu")


def test_an_encoder_that_changes_is_refused(made):
    calls = []

    def moving(x):
        calls.append(len(x))
        return [x.sum(-1) + len(calls)]

    certify(lambda x: [x.sum(-1)], made)
    with pytest.raises(CertificateFailed, match="vision.cpu: .*other bits.*largest size in run 2 of 3"):
        certify(moving, made)


def test_an_encoder_that_changes_for_one_size_is_refused(made):
    calls = []

    def moving(x):
        calls.append(len(x))
        return [x.sum(-1) + (len(calls) if len(x) == 640 // 32 else 0)]

    with pytest.raises(CertificateFailed, match="vision.cpu: .*other bits.*640 x 224 pixels in run 2 of 3"):
        certify(moving, made)
    assert calls == [4, 4, 4, 20, 20] and not made


def test_each_shape_is_encoded_once_and_the_users_limit_stays(made):
    from vllm.config.multimodal import ImageDummyOptions

    held = made["image"] = ImageDummyOptions(count=2)
    calls = []
    certify(lambda x: calls.append(len(x)) or [x.sum(-1)], made)
    assert calls == [4, 4, 4, 20, 20, 20, 3, 3, 3] and made == {"image": held}


RENDERER = SimpleNamespace(config=None)


def refuse(monkeypatch, found, given, videos=False):
    monkeypatch.setattr(names, "_takes_videos", lambda config: videos)
    return names._names(lambda self, data, items, given, number: given)(RENDERER, {}, found, given, "1")


def test_names_of_images_are_refused(monkeypatch):
    for given in ({}, {"image": [None, None]}):
        assert refuse(monkeypatch, Items(image=2), given) == given
    with pytest.raises(UnsupportedRequest, match="vision.names: .*BI_PATCH=0"):
        refuse(monkeypatch, Items(image=2), {"image": [None, "mine"]})


class Items(dict):
    """What a request brings of each kind: numbers, and items with data."""

    def get_all_counts(self):
        return {kind: held if isinstance(held, int) else len(held.data) for kind, held in self.items()}


def test_video_and_sound_are_refused(monkeypatch):
    with pytest.raises(UnsupportedRequest, match="vision.names: .*audio and video.*BI_PATCH=0"):
        refuse(monkeypatch, Items(image=1, video=SimpleNamespace(data=[1]), audio=2), {})
    with pytest.raises(UnsupportedRequest, match="vision.names: .* audio for this model.*BI_PATCH=0"):
        refuse(monkeypatch, Items(video=SimpleNamespace(data=[(torch.ones(1), {})]), audio=2), {}, videos=True)


def test_a_video_is_known_by_its_frames(monkeypatch):
    """vLLM's hash of a video that came as a file holds the file's bytes, not which frames were read."""
    frames = torch.ones(2, 4, 4, 3)
    read = SimpleNamespace(media=frames, original_bytes=b"file")
    found = SimpleNamespace(data=[(read, {"fps": 1.0}), (frames, {"fps": 2.0})])
    refuse(monkeypatch, Items(video=found), {}, videos=True)
    assert [held[0] is frames for held in found.data] == [True, True]
    assert [held[1]["fps"] for held in found.data] == [1.0, 2.0]
    with pytest.raises(UnsupportedRequest, match="vision.names: .*frames and times.*"):
        refuse(monkeypatch, Items(video=SimpleNamespace(data=[frames])), {}, videos=True)


class Deep:
    """Qwen3-VL's buffer of features of an image, which vLLM clears after a forward pass in Python."""

    def __init__(self):
        self.buffer, self.deepstack_input_embeds_num_tokens = torch.zeros(8), 0

    def embed_input_ids(self, ids, multimodal_embeddings=None, *, is_multimodal=None):
        if multimodal_embeddings:
            self.buffer[: len(ids)] = multimodal_embeddings[0]
            self.deepstack_input_embeds_num_tokens = len(ids)
        return self.buffer[: len(ids)].clone()

    def _clear_deepstack_input_embeds(self, count):
        self.buffer[:count] = 0
        self.deepstack_input_embeds_num_tokens = 0


def test_features_of_an_image_are_gone_after_a_graph(monkeypatch):
    """A step that replays one whole CUDA graph runs no Python, so vLLM clears nothing."""
    image = [torch.tensor([1.0, 2.0, 3.0])]
    stock = Deep()
    stock.embed_input_ids([1, 2, 3], image)
    assert stock.embed_input_ids([4, 5]).tolist() == [1.0, 2.0]
    monkeypatch.setattr(Deep, "embed_input_ids", cuda._deepstack(Deep.embed_input_ids))
    armed = Deep()
    assert armed.embed_input_ids([1, 2, 3], image).tolist() == [1.0, 2.0, 3.0]
    assert armed.embed_input_ids([4, 5], is_multimodal=None).tolist() == [0.0, 0.0]
    assert armed.buffer.tolist() == [0.0] * 8


def test_hashes_of_images_that_a_client_sends_are_refused():
    with pytest.raises(UnsupportedRequest, match="vision.sent: .*BI_PATCH=0"):
        names._sent(None)({"image": ["0" * 64]})


def test_a_rendered_prompt_has_the_renderers_hashes():
    prompt = names._rendered(lambda self, tokens: {"mm_hashes": {"image": ["0" * 64]}})(None, [1])
    text = {"type": "token", "prompt_token_ids": [1]}

    def arrive(*prompts, language_only=False):
        media = SimpleNamespace(is_multimodal_model=True)
        media.multimodal_config = SimpleNamespace(language_model_only=language_only)
        engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=media))
        return names._arriving(lambda self, *given: given)(engine, *prompts)

    assert arrive(None, prompt) == (None, prompt) and arrive(None, text) == (None, text)
    own = {"mm_hashes": {"image": ["0" * 64]}}
    assert arrive(None, own, language_only=True) == (None, own)
    prompt["mm_hashes"]["image"][0] = "1" * 64  # a client wrote into what the renderer made
    for wrong in (own, prompt):
        with pytest.raises(UnsupportedRequest, match="vision.rendered: .*mm_hashes.*BI_PATCH=0"):
            arrive(None, wrong)


def test_an_image_is_known_by_its_pixels():
    import uuid

    from PIL import Image
    from vllm.multimodal import hasher

    pictures = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for picture in pictures:
        picture.getexif()[Image.ExifTags.Base.ImageID] = uuid.UUID(int=7)
    assert len({hasher._get_image_id_bytes(picture) for picture in pictures}) == 1
    assert {names._image_id(None)(picture) for picture in pictures} == {None}


@pytest.mark.parametrize(
    "computed, tokens, chunked, waits",
    [
        (0, 40, False, False),  # upstream's own code cuts before the image
        (60, 20, False, True),  # the cache has the image's first tokens, and the rest does not fit
        (60, 40, False, False),  # it fits
        (60, 20, True, False),
        (100, 5, False, False),  # after the image
        (250, 10, False, True),  # inside the second image
    ],
)
def test_the_rest_of_an_image_is_computed_in_one_step(computed, tokens, chunked, waits):
    places = [SimpleNamespace(offset=50, length=50), SimpleNamespace(offset=200, length=64)]
    request = SimpleNamespace(mm_features=[SimpleNamespace(mm_position=place) for place in places])
    scheduler = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_chunked_mm_input=not chunked), is_encoder_decoder=False
    )
    asked = []

    def original(self, *given, shift_computed_tokens=0):
        asked.append(given)
        return [0], given[2], given[3], [], []

    schedule = cuda._whole(original)
    found = schedule(scheduler, request, computed, tokens, 99, shift_computed_tokens=0)
    assert found == (([], 0, 99, [], []) if waits else ([0], tokens, 99, [], []))
    assert len(asked) == (not waits)
