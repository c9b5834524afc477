"""Which kernels a call would launch, without running them: record it into a CUDA graph and read the graph's nodes.

A library that picks its algorithm by the number of rows can so be asked about every number of rows: recording takes
microseconds a call, running would take seconds. Needs torch >= 2.8 (CUDAGraph.raw_cuda_graph) and a driver for CUDA 12.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

from bi_patch.errors import CertificateFailed

_KERNEL_NODE = 0


class _KernelParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2 of cuda.h."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        *((f"{part}_{axis}", ctypes.c_uint) for part in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("params", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


def signatures(call: Callable[[int], object], rows: Iterable[int]) -> dict[int, tuple]:
    """For each number of rows m, what `call(m)` launches: a tuple of (kernel, block size, shared bytes, grid depth).

    `call` must do nothing but enqueue work on the current stream, into memory that exists already. A node that is
    no kernel (a copy, a memset) is named by its type.
    """
    import torch

    rows = list(rows)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    cuda = ctypes.CDLL("libcuda.so.1")
    ends: list[tuple[int, int]] = []
    with torch.cuda.stream(stream):
        call(rows[0])  # workspaces are made outside the recording
        stream.synchronize()
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            for m in rows:
                call(m)
                ends.append(_captured(cuda, stream.cuda_stream))
        finally:
            graph.capture_end()
    nodes = _nodes(cuda, graph.raw_cuda_graph())
    found, start = {}, 0
    for m, (end, last) in zip(rows, ends, strict=True):
        if end > len(nodes) or nodes[end - 1] != last:
            raise CertificateFailed("the launches that were recorded cannot be told apart")
        found[m] = tuple(_describe(cuda, node) for node in nodes[start:end])
        start = end
    del graph
    return found


def _captured(cuda, stream: int) -> tuple[int, int]:
    """The number of nodes in the graph that `stream` records so far, and the last one."""
    status, graph, count = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_size_t()
    last, lasts = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_size_t()
    code = cuda.cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), None, ctypes.byref(graph), ctypes.byref(last), ctypes.byref(lasts)
    )
    _check(code, "cuStreamGetCaptureInfo")
    _check(cuda.cuGraphGetNodes(graph, None, ctypes.byref(count)), "cuGraphGetNodes")
    return count.value, last[0] if lasts.value == 1 else 0


def _nodes(cuda, graph: int) -> list[int]:
    """The graph's nodes in the order in which they were recorded."""
    count = ctypes.c_size_t()
    _check(cuda.cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count)), "cuGraphGetNodes")
    held = (ctypes.c_void_p * count.value)()
    _check(cuda.cuGraphGetNodes(ctypes.c_void_p(graph), held, ctypes.byref(count)), "cuGraphGetNodes")
    return list(held)


def _describe(cuda, node: int) -> tuple:
    kind = ctypes.c_int()
    _check(cuda.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)), "cuGraphNodeGetType")
    if kind.value != _KERNEL_NODE:
        return (f"node {kind.value}",)
    held = _KernelParams()
    _check(cuda.cuGraphKernelNodeGetParams_v2(ctypes.c_void_p(node), ctypes.byref(held)), "cuGraphKernelNodeGetParams")
    text = ctypes.c_char_p()
    if held.func:
        code = cuda.cuFuncGetName(ctypes.byref(text), ctypes.c_void_p(held.func))
    else:
        code = cuda.cuKernelGetName(ctypes.byref(text), ctypes.c_void_p(held.kern))
    _check(code, "cuFuncGetName")
    block = held.block_x * held.block_y * held.block_z
    return (text.value.decode(), block, held.shared, held.grid_z)


def _check(code: int, call: str) -> None:
    if code:
        raise CertificateFailed(f"{call} failed with CUDA error {code}: the vendor's algorithms cannot be listed")
