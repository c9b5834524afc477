"""The decode kernel on the CPU, compared with plain attention, and bitwise with its order in plain loops: g++ compiles
its source over emulated instructions."""

import ctypes
import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bi_patch.kernels.cuda import decode, nvrtc

KERNELS = Path(__file__).resolve().parents[4] / "kernels" / "cuda"
LAUNCH = """
extern "C" void launch(int x, int y, const u16* q, const unsigned char* k, u16* out, const int* starts,
                       const int* lengths, const int* pages, i64 to_v, int requests, int most_pages,
                       int page_bits, int group, float scale, const int* strides, const float* k_scales,
                       const float* v_scales, int scale_head) {
  const int* s = strides;
  run_grid(x, y, THREADS, [&] {
    decode(q, k, out, starts, lengths, pages, to_v, requests, most_pages, page_bits, group, scale, s[0], s[1], s[2],
           s[3], s[4], s[5], s[6]
#if EIGHTHS
           , k_scales, v_scales, scale_head
#endif
    );
  });
}
extern "C" int threads() { return THREADS; }
extern "C" int shared_bytes() { return sizeof(Shared); }
"""
# Bytes of shared memory per block: on sm_80, then on sm_90 and sm_100.
AMPERE, SHARED = 163 * 1024, 227 * 1024


def build(folder: Path, form: decode.Form) -> ctypes.CDLL:
    source = folder / "decode.cpp"
    source.write_text(
        f'#include "emulate.h"\n#include "{KERNELS / "paged.h"}"\n'
        f'#include "{KERNELS / "eighths.h"}"\n#include "{KERNELS / "decode.cu"}"\n'
        f'#include "decode_order.h"\n{LAUNCH}'
    )
    library = folder / "decode.so"
    command = [
        "g++",
        "-std=c++20",
        "-O2",
        "-shared",
        "-fPIC",
        "-pthread",
        "-Wno-unknown-pragmas",
        f"-I{Path(__file__).parent}",
        str(source),
        "-o",
        str(library),
    ]
    command += [f"-D{name}={value}" for name, value in form.defines().items()]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def in_order(library, q, k, v, row: int, scale: float) -> torch.Tensor:
    """The output of query head `row` by decode_order.h: q [D], k and v [length, heads, D]."""
    arrays = [q.float(), k[:, row].contiguous(), v[:, row].contiguous(), torch.empty(len(q))]
    scaled = ctypes.c_float(ctypes.c_float(scale).value * decode._LOG2E)
    library.in_order(*(ctypes.c_void_p(x.data_ptr()) for x in arrays), len(k), scaled)
    return arrays[-1]


def sixteenth(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What e4m3 values [..., key heads, D] stand for."""
    return (values.float() * scales[:, None]).to(torch.bfloat16)


@pytest.mark.parametrize(
    "key_heads, page, form",
    [
        (2, 16, decode.Form(64, 4, 1, 6, 4, 1)),
        (1, 32, decode.Form(128, 8, 1, 2, 4, 1)),
        (1, 128, decode.Form(64, 16, 2, 4, 2, 2)),
        (2, 16, decode.Form(128, 12, 2, 3, 2, 2, True)),
        (1, 1024, decode.Form(64, 4, 4, 3, 1, 3, True)),
        (1, 16, decode.Form(128, 4, 8, 2, 1, 4, True)),
        (1, 16, decode.Form(128, 16, 1, 3, 4, 1)),
        (1, 16, decode.Form(256, 8, 1, 2, 4, 1)),
        (1, 128, decode.Form(256, 16, 2, 2, 4, 2)),
        (2, 16, decode.Form(256, 4, 4, 2, 2, 4)),
        (1, 1024, decode.Form(256, 12, 8, 2, 1, 4, True)),
        # e4m3 caches, converted by carriers
        (2, 16, decode.Form(64, 4, 1, 6, 4, 6, False, 1)),
        (2, 32, decode.Form(64, 12, 2, 4, 2, 2, False, 1)),
        (2, 16, decode.Form(128, 12, 1, 4, 2, 2, False, 2)),
        (1, 16, decode.Form(256, 4, 8, 2, 1, 8, True, 1)),
        (1, 16, decode.Form(256, 8, 1, 3, 4, 5, False, 5)),
        # by summers
        (2, 64, decode.Form(128, 4, 4, 4, 2, 2, False, 1, True)),
        (1, 16, decode.Form(128, 8, 1, 3, 4, 1, False, 1, True)),
        # the other forms that serve e4m3 caches
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (2, 1024, decode.Form(64, 4, 4, 3, 1, 4, True, 1)),
                (1, 16, decode.Form(64, 4, 2, 4, 2, 4, False, 1)),
                (1, 16, decode.Form(128, 4, 8, 2, 1, 2, True, 1, True)),
                (1, 1024, decode.Form(128, 8, 2, 4, 4, 2, False, 1, True)),
                (1, 16, decode.Form(128, 12, 8, 2, 1, 4, True, 1)),
                (2, 16, decode.Form(128, 16, 2, 3, 2, 2, True, 1)),
                (1, 64, decode.Form(128, 12, 4, 2, 2, 2, False, 1)),
                (1, 64, decode.Form(256, 12, 2, 2, 4, 2, False, 1)),
                (2, 16, decode.Form(256, 4, 4, 2, 2, 4, False, 1)),
                (1, 1024, decode.Form(256, 12, 8, 2, 1, 8, True, 1)),
                (1, 32, decode.Form(256, 12, 1, 3, 4, 5, False, 5)),
            )
        ),
    ],
    ids=str,
)
def test_attention_of_single_queries(tmp_path, monkeypatch, key_heads, page, form):
    head, group = form.head_size, form.group
    library = build(tmp_path, form)
    assert library.shared_bytes() <= form.shared_bytes <= SHARED
    assert library.threads() == form.threads

    emulate(monkeypatch, library)
    torch.manual_seed(head + group)
    # The last but one request has two tokens, the last request has none.
    tile = form.tile
    lengths = torch.tensor([1, tile - 1, tile, tile + 1, 45 * tile + 20, 0, tile + 2, 17], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8, 8], dtype=torch.int32)
    heads, blocks = group * key_heads, -(-int(lengths.max()) // page)
    pages = torch.randperm(len(lengths) * blocks).to(torch.int32).reshape(len(lengths), blocks)
    # K and V of a token lie side by side, as in vLLM.
    cache = torch.randn(pages.numel(), key_heads, page, 2 * head).to(torch.bfloat16)
    for i, length in enumerate(lengths.tolist()):  # what lies past a request's tokens may be anything
        slots = torch.arange(length, blocks * page)
        cache[pages[i].long()[slots // page], :, slots % page] = float("nan")
    cache = cache.to(torch.float8_e4m3fn) if form.shares else cache
    k, v = cache.transpose(1, 2).split(head, dim=-1)
    scales = (torch.tensor([0.37, 1.0])[:key_heads], torch.tensor([1.9, 0.11])[:key_heads]) if form.shares else None
    if page == 16 and form.shares:  # one scale for all heads
        scales = tuple(scale[:1].expand(key_heads) for scale in scales)
    q = torch.randn(9, heads, head).to(torch.bfloat16)
    out = torch.full_like(q, 7.0)
    scale = head**-0.5
    decode.attend(q, k, v, out, starts, lengths, pages, scale, form=form, scales=scales)
    assert (out[8] == 7).all()
    if scales is not None:
        k, v = (sixteenth(*given) for given in zip((k, v), scales))
    tokens = [(i, n) for i, n in enumerate(lengths.tolist()[:6])] + [(6, tile + 1), (6, tile + 2)]
    for token, (i, length) in enumerate(tokens):
        held = [x[pages[i].long()].reshape(-1, key_heads, head)[:length].float() for x in (k, v)]
        held = [x.repeat_interleave(group, 1) for x in held]
        weights = (torch.einsum("hd,khd->hk", q[token].float(), held[0]) * scale).softmax(-1)
        want = torch.einsum("hk,khd->hd", weights, held[1])
        torch.testing.assert_close(out[token].float(), want, atol=2e-2, rtol=2e-2)
        assert length == 0 or (out[token].float() - want).abs().mean() < 3e-3
        for row in range(heads if length else 0):
            want = in_order(library, q[token, row], *held, row, scale)
            assert torch.equal(out[token, row].float(), want), length


def emulate(monkeypatch, library) -> None:
    """Run the kernel's launches by this library."""

    def emulated(grid, stream, arguments):
        held, strides = arguments[:12], (ctypes.c_int * 7)(*(a.value for a in arguments[12:19]))
        library.launch(*grid, *held, strides, *(arguments[19:] or (None, None, 0)))

    monkeypatch.setattr(decode, "kernel", lambda *_: emulated)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))


def test_queries_within_and_beyond_fp16(tmp_path, monkeypatch):
    """With a scale of 1, products are of fp16 numbers if it holds a token's queries, else of bf16 numbers: the same."""
    form = decode.Form(128, 4, 2, 2, 4, 1, False, 1, True)
    library = build(tmp_path, form)
    emulate(monkeypatch, library)
    torch.manual_seed(3)
    length, heads = 300, 8
    q = torch.randn(7, heads, 128)
    q[1:3, :4, 0], q[1:3, 4:, 0] = 4.5, -7.9
    q[1, :, 5] = 2.0**-27  # 29 exponents below the largest: just within fp16's normal range
    q[2, 3, 5] = 2.0**-28
    q[3] *= 2.0**-90
    q[4] *= 2.0**20
    q[5] = 0
    q[6, 2, 100] = 2.0**-130
    q = q.to(torch.bfloat16)
    raw = torch.randint(0, 256, (19, 16, 2, 256), dtype=torch.uint8)
    raw = torch.where(raw & 127 == 127, raw & 128, raw)  # every finite number, also below the normal range
    k, v = raw.view(torch.float8_e4m3fn).split(128, dim=-1)
    ones, others = torch.ones(1).expand(2), torch.tensor([1.3]).expand(2)
    pages = torch.randperm(19).to(torch.int32).repeat(7, 1)
    given = torch.arange(8, dtype=torch.int32), torch.full((7,), length, dtype=torch.int32), pages
    for scales in ((ones, ones), (ones, others)):
        out = torch.empty_like(q)
        decode.attend(q, k, v, out, *given, 1e-3, form=form, scales=scales)
        held = [sixteenth(*x)[pages[0].long()].reshape(-1, 2, 128)[:length].float() for x in zip((k, v), scales)]
        held = [x.repeat_interleave(4, 1) for x in held]
        for token in range(7):
            for row in range(heads):
                want = in_order(library, q[token, row], *held, row, 1e-3)
                assert torch.equal(out[token, row].float(), want), (token, row)


@pytest.mark.parametrize("arch, shared", [("sm_80", AMPERE), ("sm_90", SHARED), ("sm_100", SHARED)])
@pytest.mark.parametrize("head", decode.HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiles_without_a_gpu(arch, shared, head, dtype):
    given = [form for group in (8, 16) for form in decode.forms(head, group, int(arch[3:]) // 10, shared)]
    assert bool(given) == (shared != AMPERE or head < 256)  # one scorer fits: FlashAttention keeps such a call
    for form in given:
        assert decode.build(form, dtype, arch, 13)[:4] == b"\x7fELF"
        assert form.shared_bytes <= shared
        assert form.scorers * form.parts >= 2  # each slot waits for the slot before it


@pytest.mark.parametrize(
    "arch, dtype",
    [
        ("sm_90", torch.bfloat16),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("sm_90", torch.float16), ("sm_100", torch.bfloat16), ("sm_100", torch.float16))
        ),
    ],
)
@pytest.mark.parametrize("head", decode.HEAD_SIZES)
def test_forms_for_an_e4m3_cache_compile_without_a_gpu(arch, head, dtype):
    assert not decode.forms(head, 8, 8, AMPERE, True)
    given = [form for group in (8, 16) for form in decode.forms(head, group, int(arch[3:]) // 10, SHARED, True)]
    assert given
    for form in given:
        assert decode.build(form, dtype, arch, 13)[:4] == b"\x7fELF"
        assert form.shared_bytes <= SHARED and form.scorers * form.parts >= 2
        # 228 KB of a multiprocessor, 1 KB of each block for the system
        assert form.defines().get("RESIDENT", 1) * (form.shared_bytes + 1024) <= 228 * 1024


CLUSTERS = [
    form
    for head in decode.HEAD_SIZES
    for n in (8, 16)
    for eighths in (False, True)
    for form in [*decode.forms(head, n, 9, SHARED, eighths)][:-1]
]


@pytest.mark.parametrize("form", CLUSTERS, ids=str)
def test_only_carriers_tell_other_blocks(tmp_path, form):
    """In the machine code too, only the loop of the carriers signals another block: such a message can overtake loads,
    and of all warps that free slots, only carriers load nothing that a scorer sends."""
    (tmp_path / "cubin").write_bytes(decode.build(form, torch.bfloat16, "sm_90", 13))
    triton = Path(importlib.util.find_spec("triton").origin).parent
    command = [triton / "backends" / "nvidia" / "bin" / "nvdisasm", "-c", tmp_path / "cubin"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loops = listing.split("HMMA")  # no products in the carriers' code
    assert sum("SYNCS.ARRIVE.TRANS64.RED" in part for part in loops) == 1


def test_few_requests_are_shared_by_clusters():
    for head in decode.HEAD_SIZES:
        for group in (1, 16):
            given = decode.forms(head, group, 9, SHARED)
            held, parts = [*given], [form.parts for form in given]
            assert parts == sorted(parts, reverse=True) and parts[-1] == 1
            at_once = {form: 120 // form.parts for form in held[:-1]}
            for pairs in (1, *at_once.values(), 121, 2000):
                want = next((form for form in held[:-1] if pairs <= at_once[form]), held[-1])
                assert decode.choose(pairs, 40960, given, at_once) == want
            assert decode.choose(1, 40960, given, {}) == held[-1]
            for form, least in given.items():
                assert least == 0 or decode.choose(1, least, given, at_once) == form
                assert least == 0 or decode.choose(1, least - 1, given, at_once) != form
    assert [form.parts for form in decode.forms(64, 8, 8, AMPERE)] == [1]
    assert [form.parts for form in decode.forms(64, 8, 12, 99 * 1024)] == [1]  # Hopper's forms do not fit


@pytest.mark.parametrize("most", [8, 4, 2, 1, 0])
def test_a_form_whose_clusters_do_not_run_does_not_serve(monkeypatch, most):
    """A small slice of a GPU (MIG) runs clusters of up to `most` blocks. The certificate launches no others."""
    at_once = {blocks: 8 // blocks if blocks <= most else 0 for blocks in (8, 4, 2)}
    monkeypatch.setattr(decode, "forms_on", lambda head, group, device, eighths: decode.forms(head, group, 9, SHARED))
    monkeypatch.setattr(decode, "kernel", lambda *form: SimpleNamespace(clusters=at_once.get))
    monkeypatch.setattr(decode, "_choices", decode._choices.__wrapped__)
    served = decode.serving(32, 8, 128, torch.bfloat16, 0)
    assert [form.parts for form in served] == [parts for parts in (8, 4, 2, 1) if parts <= max(1, most)]
    assert decode.choose(1, 40960, *decode._choices(4, 128, torch.bfloat16, 0)) == served[0]


@pytest.mark.parametrize("code, found", [(0, 3), (912, 0)])
def test_a_cluster_that_does_not_fit_never_runs(code, found):
    function = object.__new__(nvrtc.Function)
    function._function, function._threads, function._shared = None, 256, 1024

    def count(held, function, launch):
        held._obj.value = 3
        return code

    function._driver = SimpleNamespace(cuOccupancyMaxActiveClusters=count)
    assert function.clusters(8) == found


def test_what_the_kernel_does_not_have_is_refused():
    def given(page=16, dtype=torch.bfloat16, shift=0, **changes):
        q = torch.zeros(3, 8, 64, dtype=dtype)
        cache = torch.zeros(4 * page * 2 * 64 + shift, dtype=dtype)[shift:].view(4, page, 2, 64)
        numbers = {"starts": torch.arange(4), "lengths": torch.ones(3), "pages": torch.zeros(3, 4)}
        held = {name: x.to(torch.int32) for name, x in numbers.items()}
        return {"q": q, "k": cache, "v": cache, "out": torch.empty_like(q), "scale": 1.0} | held | changes

    ones = torch.ones(2)

    def eighths(dtype=torch.float8_e4m3fn, scales=(ones, ones)):
        cache = torch.zeros(4, 16, 2, 64).to(dtype)
        return {"k": cache, "v": cache, "scales": scales}

    # A view, which nothing reads, whose tokens lie further apart than the kernel's offsets reach.
    far = torch.empty((15 << 27) + 128, dtype=torch.bfloat16).as_strided((4, 16, 2, 64), (0, 1 << 27, 64, 1))
    for arguments, said in (
        (given(page=24), "pages of 24 tokens"),
        (given(page=8), "pages of 8 tokens"),
        (given(dtype=torch.float32), "in torch.float32 are not covered"),
        (given(shift=1), "not aligned to 16 bytes"),
        (given(out=torch.zeros(2, 8, 64, dtype=torch.bfloat16)), "laid out alike"),
        (given(q=(q := torch.zeros(3, 8, 64, dtype=torch.bfloat16)), out=q), "out is q"),
        (given(k=far, v=far), "too large"),
        (given(starts=torch.arange(3, dtype=torch.int32)), "do not belong to 3 requests"),
        (given(lengths=torch.ones(3, dtype=torch.int64)), "not int32"),
        (given() | eighths(scales=None), "scales of a cache in torch.float8_e4m3fn, or none"),
        (given(scales=(torch.ones(2),) * 2), "scales of a cache in torch.bfloat16, or none"),
        (given() | eighths(scales=(torch.ones(3),) * 2), "scales are not fp32 .2., laid out alike"),
        (given() | eighths(scales=(torch.ones(2, dtype=torch.bfloat16),) * 2), "scales are not fp32"),
        (given() | eighths(scales=(torch.ones(2), torch.ones(1).expand(2))), "laid out alike"),
        (given(scale=2.0**-41) | eighths(), "a scale of 4.5.*e-13 of the softmax"),
        (given(scale=0.0) | eighths(), "a scale of 0.0 of the softmax"),
        (given() | eighths(torch.float8_e5m2), "in torch.bfloat16 with KV in torch.float8_e5m2 are not covered"),
    ):
        with pytest.raises(decode.Unfit, match=said):
            decode.attend(**arguments)
    assert not decode.covers(34, 2, 64, torch.bfloat16)
    assert not decode.covers(8, 2, 96, torch.bfloat16)


def test_compiled_code_is_kept_for_later_processes(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(nvrtc, "folder", tmp_path / "cubins")
    monkeypatch.setattr(nvrtc, "_compile", lambda *given: made.append(given[1:]) or b"code")
    for source in ("a", "a", "b"):
        assert nvrtc.compile(source, "sm_90", {"N": 1}, 13) == b"code"
    assert [source for source, _ in made] == ["a", "b"]
    nvrtc.compile("a", "sm_90", {"N": 2}, 13)
    nvrtc.compile("a", "sm_80", {"N": 1}, 13)
    assert len(made) == 4 == len([*(tmp_path / "cubins").iterdir()])
    for file in (tmp_path / "cubins").iterdir():
        file.write_bytes(file.read_bytes()[:-1])  # damaged: compiled again
    assert nvrtc.compile("a", "sm_90", {"N": 1}, 13) == b"code" and len(made) == 5
    (tmp_path / "file").touch()
    monkeypatch.setattr(nvrtc, "folder", tmp_path / "file")  # cannot be written
    assert nvrtc.compile("a", "sm_90", {"N": 1}, 13) == b"code"
