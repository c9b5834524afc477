"""Building, caching and loading the CPU kernels."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bi_patch.kernels.cpu import KernelBuildError, build, detect_isa, load, runnable_isas
from bi_patch.kernels.cpu.fakes import packed_size

ROOT = Path(__file__).parents[4]


@pytest.fixture
def built(isa, cache, tmp_path):
    """A cache folder of this test's own, which holds the library of this machine's ISA."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for path in (build(cache), *cache.glob("bindings-*.o")):
        shutil.copy2(path, folder)
    return folder


def test_load_is_idempotent_and_keeps_one_isa(isa, cache):
    assert isa in runnable_isas()
    assert load(cache) == isa
    other = "portable" if isa != "portable" else "avx2"
    with pytest.raises(KernelBuildError, match="already runs"):
        load(cache, other)


def test_cached_library_is_not_built_again(built):
    (first,) = built.glob("*.so")
    stamp = first.stat().st_mtime_ns
    assert build(built) == first
    assert first.stat().st_mtime_ns == stamp
    assert not list(built.glob("build-*"))


def test_key_tells_isa_and_flags_apart(built, monkeypatch):
    names = {build(built).name}
    compiled = []
    monkeypatch.setattr(
        sys.modules["bi_patch.kernels.cpu.build"],
        "_compile",
        lambda cxx, isa, defines, work, bindings: compiled.append(isa) or _touch(work / "lib.so"),
    )
    names.add(build(built / "key", "portable").name)
    names.add(build(built / "key", "portable", ("-DX",)).name)
    assert len(names) == 3 and compiled == ["portable"] * 2


def _touch(path):
    path.write_bytes(b"")
    return path


def test_processes_building_at_once_compile_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from bi_patch.kernels.cpu import build as b\n"
        "m = sys.modules['bi_patch.kernels.cpu.build']\n"
        "def slow(cxx, isa, defines, work, bindings):\n"
        "    time.sleep(0.5); print('compiled'); out = work / 'lib.so'; out.write_bytes(b'x'); return out\n"
        "m._compile = slow\n"
        f"b(Path({str(tmp_path)!r}))"
    )
    with ThreadPoolExecutor(2) as pool:
        runs = list(
            pool.map(
                lambda _: subprocess.run(
                    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
                ),
                range(2),
            )
        )
    assert [r.returncode for r in runs] == [0, 0], runs
    assert sum(r.stdout.count("compiled") for r in runs) == 1


def test_no_compiler_is_a_named_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelBuildError, match="set CXX"):
        build(tmp_path)


def test_failed_compile_is_a_named_error_and_leaves_nothing(built):
    before = sorted(p.name for p in built.iterdir() if p.suffix != ".lock")
    with pytest.raises(KernelBuildError, match="compiling the CPU kernels failed"):
        build(built, defines=("-include", "no-such-header.h"))
    assert sorted(p.name for p in built.iterdir() if p.suffix != ".lock") == before


def test_unwritable_cache_is_a_named_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelBuildError, match="cache"):
        build(tmp_path / "file" / "cache")


def test_unknown_isa(tmp_path):
    with pytest.raises(KernelBuildError, match="unknown ISA"):
        build(tmp_path, "sse9")


def test_detects_an_isa():
    assert detect_isa() == runnable_isas()[0]
    assert runnable_isas()[-1] == "portable"


def test_amx_sources_compile(tmp_path):
    if "avx2" not in runnable_isas():
        pytest.skip("not an x86 machine")
    from bi_patch.kernels.cpu.build import _CFLAGS, CSRC, _compiler, _run

    out = tmp_path / "amx.o"
    _run(
        [
            _compiler()[0],
            "-O1",
            "-std=c++17",
            "-fopenmp",
            "-w",
            *_CFLAGS["amx_bf16"],
            "-c",
            str(CSRC / "gemm_amx.cpp"),
            "-o",
            str(out),
        ]
    )
    assert b"gemm_amx" in out.read_bytes()


def test_fakes_agree_with_the_ops(ops, isa):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, k in [(1, 1), (5, 7), (64, 64), (100, 33)]:
            packed = ops.gemm_pack(torch.randn(n, k).to(dtype))
            assert packed.shape == (packed_size(isa, dtype, n, k),) and packed.dtype == dtype


def test_ops_trace_in_one_graph(ops):
    w, x, b = torch.randn(40, 24), torch.randn(2, 3, 24), torch.randn(40)
    packed = ops.gemm_pack(w)
    kv = torch.zeros(3, 1, 16, 32)
    q, k, v = torch.randn(5, 2, 16), torch.randn(5, 1, 16), torch.randn(5, 1, 16)
    start, lens = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    table, slots = torch.tensor([[1]], dtype=torch.int32), torch.arange(16, 21)

    def f(x, q, kv):
        y = ops.gemm(x, packed, 40, 24, b).relu()
        out = torch.empty_like(q)
        ops.kv_store(k, v, kv, slots)
        ops.attention(out, q, kv, start, lens, table, 0.25, -1, 0.0)
        return y, out

    want = f(x, q, kv.clone())
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(x, q, kv)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_opcheck(ops):
    w, x = torch.randn(40, 24), torch.randn(3, 24)
    packed = ops.gemm_pack(w)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.gemm_pack.default, (w,), test_utils=checks)
    torch.library.opcheck(ops.gemm.default, (x, packed, 40, 24, None), test_utils=checks)
