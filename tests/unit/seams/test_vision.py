"""One image for each call of an encoder; the list of an encoder's layers; its certificate."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import CertificateFailed, UnsupportedFeature, UnsupportedRequest
from bi_patch.ops.cpu import dense, machine
from bi_patch.ops.cuda import image_attention
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

    items = [("image", 1), ("video", 4), ("image", 3)]
    runner = SimpleNamespace(model=SimpleNamespace())
    assert vision.alone_v2(original)(runner, items) == [2, 8, 6]
    assert [len(call) for call in calls] == [1, 1, 1]
    calls.clear()
    setattr(runner.model, vision._MARK, True)
    assert vision.alone_v2(original)(runner, items) == [2, 8, 6]
    assert calls == [[("image", 1), ("image", 3)], [("video", 4)]]
    assert vision.alone_v2(original)(runner, items[:2]) == [2, 8] and vision.alone_v2(original)(runner, []) == []


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


def test_an_encoder_with_quantized_weights_is_refused():
    layer = torch.nn.LayerNorm(4)
    for method in ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"):
        layer.quant_method = type(method, (), {})()
        vision.check(Model(layer), "vision.cpu")
    layer.quant_method = type("Fp8LinearMethod", (), {})()
    with pytest.raises(UnsupportedFeature, match="vision.cpu: .*quantized weights of Model's encoder .tower.0: Fp8Lin"):
        vision.check(Model(layer), "vision.cpu")


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
            rows = 4 if asked is None or asked.width is None else asked.width // 32
            return [(modality, {"x": SimpleNamespace(data=torch.ones(rows, 3))})]

    def batch(items, device):
        held = [element["x"].data for _, element in items]
        yield "image", len(items), {"x": torch.cat(held), "sizes": [len(x) for x in held]}

    limits = {}
    monkeypatch.setattr("vllm.multimodal.encoder_budget.MultiModalBudget", Budget)
    monkeypatch.setattr("vllm.multimodal.utils.group_and_batch_mm_kwargs", batch)
    return limits


def certify(encode, limits, together=False, ranks=1):
    """encode(x, ...): all images' rows [rows, 3] -> one number a row."""
    media = SimpleNamespace(limit_per_prompt=limits)
    config = SimpleNamespace(
        model_config=SimpleNamespace(get_multimodal_config=lambda: media),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )
    model = SimpleNamespace(embed_multimodal=lambda x, sizes: encode(x).split(sizes))
    found = vision.certify(model, config, "cpu", "vision.cpu", together)
    assert getattr(model, vision._MARK) == found
    return found


def test_an_encoder_that_changes_is_refused(made):
    calls = []

    def moving(x):
        calls.append(len(x))
        return x.sum(-1) + len(calls)

    assert not certify(lambda x: x.sum(-1), made)
    with pytest.raises(CertificateFailed, match="vision.cpu: .*other bits.*largest size in run 2 of 3"):
        certify(moving, made)


def test_an_encoder_that_changes_for_one_size_is_refused(made):
    calls = []

    def moving(x):
        calls.append(len(x))
        return x.sum(-1) + (len(calls) if len(x) == 640 // 32 else 0)

    with pytest.raises(CertificateFailed, match="vision.cpu: .*other bits.*640 x 224 pixels in run 2 of 3"):
        certify(moving, made)
    assert calls == [4, 4, 4, 20, 20] and not made


def test_each_shape_is_encoded_once_and_the_users_limit_stays(made):
    from vllm.config.multimodal import ImageDummyOptions

    held = made["image"] = ImageDummyOptions(count=2)
    calls = []
    certify(lambda x: calls.append(len(x)) or x.sum(-1), made)
    assert calls == [4, 4, 4, 20, 20, 20, 3, 3, 3] and made == {"image": held}


def test_images_go_together_where_each_has_the_bits_that_it_has_alone(made, caplog):
    calls = []
    assert certify(lambda x: calls.append(len(x)) or x.sum(-1), made, together=True)
    assert max(calls) > 20 + 4 + 3  # more than one of each size in one call
    for wrong in (
        lambda x: x.sum(-1) + (len(x) == 6),  # two of the smallest
        lambda x: x.sum(-1) + (len(x) > 40),  # many
        lambda x: x.sum(-1) + x.amax(),  # another image's pixels
        lambda x: x.sum(-1).roll(1) if len(x) > 20 else x.sum(-1),  # other places
    ):
        caplog.clear()
        assert not certify(wrong, made, together=True)
        assert "vision.cpu" in caplog.text and "one at a time" in caplog.text
    assert not certify(lambda x: x.sum(-1), made)


def test_ranks_that_share_an_encoder_agree(made, monkeypatch):
    """Another rank that finds other bits at one comparison decides for all ranks, after as many calls."""
    group, told, calls = object(), [], []
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tp_group", lambda: group)

    def other(wrong):
        def every(asked, own):
            assert asked is group
            told.append(own)
            return own and len(told) != wrong

        told.clear(), calls.clear()
        monkeypatch.setattr(vision.agreement, "every", every)

    def encode(x):
        calls.append(len(x))
        return x.sum(-1)

    other(wrong=0)
    assert certify(encode, made, together=True, ranks=2) and all(told) and len(told) > 20
    other(wrong=1)
    assert not certify(encode, made, together=True, ranks=2) and len(calls) == 9
    other(wrong=14)
    assert not certify(encode, made, together=True, ranks=2) and 9 < len(calls) and len(told) == 14
    other(wrong=4)
    with pytest.raises(CertificateFailed, match="run 3 of 3"):
        certify(encode, made, ranks=2)


def test_an_encoder_whose_items_get_lost_encodes_one_at_a_time(made):
    media = SimpleNamespace(limit_per_prompt=made)
    config = SimpleNamespace(model_config=SimpleNamespace(get_multimodal_config=lambda: media))
    model = SimpleNamespace(embed_multimodal=lambda x, sizes: [x.sum(-1)])
    assert not vision.certify(model, config, "cpu", "vision.cpu", True)


@pytest.mark.parametrize("items", [3, 4, 7])
def test_mixes_hold_each_image_and_many_of_the_small_ones(items):
    found = vision.mixes(items)
    assert all(0 <= i < items for mix in found for i in mix)
    assert max(len(mix) for mix in found) >= 6 and {len(mix) for mix in found} >= {2, items}
    assert {i for mix in found for i in mix} == set(range(items))
    assert sum(mix.count(0) for mix in found) == 2  # the largest takes most memory


def attention(backend=True, fp8=False):
    class MMEncoderAttention(torch.nn.Module):
        is_flash_attn_backend, fp8_enabled = backend, fp8

    return MMEncoderAttention()


def convolution(overlaps=False):
    class Conv2dLayer(torch.nn.Conv2d):
        enable_linear = not overlaps

    return Conv2dLayer(3, 8, 2, 2)


def quantized():
    layer = torch.nn.Identity()
    layer.quant_method = SimpleNamespace()
    return layer


def test_images_go_together_in_encoders_whose_layers_have_an_order():
    Known = type("Qwen3VLForConditionalGeneration", (Model,), {})
    assert cuda.ordered(Known(torch.nn.LayerNorm(4), attention(), convolution()))
    for wrong in (attention(backend=False), attention(fp8=True), convolution(overlaps=True), quantized()):
        assert not cuda.ordered(Known(torch.nn.LayerNorm(4), wrong))
    assert not cuda.ordered(Model(torch.nn.LayerNorm(4), attention()))  # no model whose code was read


def test_products_of_an_encoder_get_a_route():
    media = SimpleNamespace(is_multimodal_model=True, multimodal_config=SimpleNamespace(language_model_only=False))
    model = Model(torch.nn.Linear(4, 6), torch.nn.Linear(6, 5, bias=False), convolution(), convolution(overlaps=True))
    found = [(tuple(weight.shape), bias) for weight, bias in cuda.linears(model, SimpleNamespace(model_config=media))]
    assert found == [((6, 4), True), ((5, 6), False), ((8, 12), True)]
    assert not list(cuda.linears(model, SimpleNamespace(model_config=None)))


def test_patches_that_do_not_overlap_are_one_product():
    layer = SimpleNamespace(enable_linear=True, _forward_mulmat=lambda x: x + 1)
    assert cuda._patches(lambda self, x: x - 1)(layer, 1) == 2
    layer.enable_linear = False
    assert cuda._patches(lambda self, x: x - 1)(layer, 1) == 0


@pytest.mark.parametrize("lengths", [None, [5, 3, 2]])
def test_attention_of_an_encoder_has_one_split(monkeypatch, lengths):
    """A stand-in for FlashAttention computes each sequence. Its arguments are those that the order needs."""
    given = {}

    def varlen(q, k, v, cu_seqlens_q, **kwargs):
        given.update(kwargs)
        ends = cu_seqlens_q.tolist()
        parts = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in zip(ends, ends[1:])]
        made = [
            torch.nn.functional.scaled_dot_product_attention(*part, scale=kwargs["softmax_scale"]) for part in parts
        ]
        return torch.cat(made, 1).transpose(0, 1).contiguous()

    utils = SimpleNamespace(flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.fa_utils", utils)
    allowed = []
    debug = SimpleNamespace(gpu_sync_allowed=lambda: allowed.append(1) or contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "vllm.utils.gpu_sync_debug", debug)
    batch = 1 if lengths else 2
    q, k, v = torch.randn(batch, 10, 3, 4, 16).unbind(2)
    more = {}
    if lengths:
        more = {"cu_seqlens": torch.tensor([0, 5, 8, 10]), "max_seqlen": torch.tensor(5)}
    out = cuda._attention(lambda: None)(q, k, v, batch, False, 3, 0.25, **more)
    for x in range(batch):
        first = 0
        for count in lengths or [10]:
            rows = [part[x : x + 1, first : first + count].transpose(1, 2) for part in (q, k, v)]
            want = torch.nn.functional.scaled_dot_product_attention(*rows, scale=0.25).transpose(1, 2)
            torch.testing.assert_close(out[x : x + 1, first : first + count], want)
            first += count
    assert given["num_splits"] == 1 and given["fa_version"] == 3 and given["causal"] is False
    assert given["max_seqlen_q"] == given["max_seqlen_k"] == 128 and allowed


def attend(q, k, v, ends, longest):
    """Attention of each image for itself."""
    parts = zip(ends.tolist(), ends.tolist()[1:])
    rows = [[x[:, a:b].transpose(1, 2) for x in (q, k, v)] for a, b in parts]
    return torch.cat([torch.nn.functional.scaled_dot_product_attention(*part) for part in rows], 2).transpose(1, 2)


def test_attention_over_images_is_compared_in_company(monkeypatch, caplog):
    def differs(run):
        return image_attention.differs(run, 2, 16, torch.float32, "cpu")

    assert differs(attend) == ""
    assert "among 11 images" in differs(lambda q, k, v, ends, longest: attend(q, k, v, ends, longest) * (1 + len(ends)))
    one = torch.tensor([0, 10_000])
    assert differs(lambda q, k, v, ends, longest: attend(q, k, v, one, longest))
    short = lambda q, k, v, ends, longest: attend(q, k, v, ends, longest) + (int(longest) > 1000)  # noqa: E731
    assert "attention over 1 tokens" in differs(short)

    asked = []
    monkeypatch.setattr(image_attention, "differs", lambda *given: asked.append(given[1:]) or ("x" if asked else ""))
    layer = attention()
    layer.num_heads, layer.num_kv_heads, layer.head_size, layer.forward_cuda = 4, 4, 16, None
    assert not cuda._attends_alike(Model(layer), torch.float32) and asked == [(4, 16, torch.float32)]
    assert "one at a time" in caplog.text
    layer.num_kv_heads = 2
    assert not cuda._attends_alike(Model(layer), torch.float32) and len(asked) == 1
    monkeypatch.setattr(image_attention, "differs", lambda *given: "")
    layer.num_kv_heads = 4
    assert cuda._attends_alike(Model(layer, layer), torch.float32)


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
