"""The decode kernel on the CPU: its own source, compiled by g++ over emulated instructions, against plain attention."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from bi_patch.kernels.cuda import decode

KERNELS = Path(__file__).resolve().parents[3] / "kernels" / "cuda"
LAUNCH = """
extern "C" void launch(int x, int y, const u16* q, const u16* k, const u16* v, u16* out, const int* starts,
                       const int* lengths, const int* pages, int page_stride, int page_bits, int group, float scale,
                       const i64* strides) {
  const i64* s = strides;
  run_grid(x, y, THREADS, [&] {
    decode(q, k, v, out, starts, lengths, pages, page_stride, page_bits, group, scale, s[0], s[1], s[2], s[3], s[4],
           s[5], s[6], s[7], s[8], s[9]);
  });
}
"""


def build(folder: Path, head: int, stages: int) -> ctypes.CDLL:
    source = folder / "decode.cpp"
    source.write_text(f'#include "emulate.h"\n#include "{KERNELS / "decode.cu"}"\n{LAUNCH}')
    library = folder / "decode.so"
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", f"-DHEAD={head}", f"-DSTAGES={stages}",
               "-Wno-unknown-pragmas", f"-I{Path(__file__).parent}", str(source), "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def address(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@pytest.mark.parametrize(
    "head, group, key_heads, page, stages", [(64, 4, 2, 16, 3), (128, 8, 1, 32, 3), (64, 16, 1, 128, 4)]
)
def test_attention_of_single_queries(tmp_path, head, group, key_heads, page, stages):
    library = build(tmp_path, head, stages)
    torch.manual_seed(head + group)
    lengths = torch.tensor([1, 127, 128, 129, 300, 0, 17], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6], dtype=torch.int32)  # the last request has no token
    heads, blocks = group * key_heads, -(-int(lengths.max()) // page)
    pages = torch.randperm(len(lengths) * blocks).to(torch.int32).reshape(len(lengths), blocks)
    cache = torch.randn(2, pages.numel(), page, key_heads, head).to(torch.bfloat16)
    q = torch.randn(len(lengths), heads, head).to(torch.bfloat16)
    out = torch.full_like(q, 7.0)
    k, v = cache
    strides = [*q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *out.stride()[:2]]
    scale = head**-0.5
    library.launch(
        key_heads, len(lengths), address(q), address(k), address(v), address(out), address(starts), address(lengths),
        address(pages), pages.stride(0), page.bit_length() - 1, group, ctypes.c_float(scale * 1.4426950408889634),
        (ctypes.c_longlong * 10)(*strides),
    )  # fmt: skip
    for i, length in enumerate(lengths.tolist()):
        if starts[i] == starts[i + 1]:
            assert (out[i] == 7).all()
            continue
        held = [x[pages[i].long()].reshape(-1, key_heads, head)[:length].float() for x in (k, v)]
        held = [x.repeat_interleave(group, 1) for x in held]
        weights = (torch.einsum("hd,khd->hk", q[i].float(), held[0]) * scale).softmax(-1)
        want = torch.einsum("hk,khd->hd", weights, held[1])
        torch.testing.assert_close(out[i].float(), want, atol=2e-2, rtol=2e-2)
        assert length == 0 or (out[i].float() - want).abs().mean() < 3e-3


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("head", decode.HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiles_without_a_gpu(arch, head, dtype):
    assert decode.build(head, dtype, arch, 13)[:4] == b"\x7fELF"


def test_what_the_kernel_does_not_have_is_refused():
    q = torch.zeros(3, 8, 64, dtype=torch.bfloat16)
    cache, pages = torch.zeros(4, 24, 2, 64, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="pages of 24 tokens"):
        decode.attend(q, cache, cache, q, None, None, pages, 1.0)
    with pytest.raises(ValueError, match="in torch.float32 are not covered"):
        decode.attend(q.float(), cache, cache, q, None, None, pages, 1.0)
    with pytest.raises(ValueError, match="not aligned to 16 bytes"):
        shifted = torch.zeros(4 * 16 * 2 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 16, 2, 64)
        decode.attend(q, shifted, shifted, q, None, None, pages, 1.0)
    assert not decode.covers(34, 2, 64, torch.bfloat16)
    assert not decode.covers(8, 2, 96, torch.bfloat16)
