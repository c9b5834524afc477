"""PyTorch's pointwise operators on CPU: every form takes the bundled kernels, whatever the rows and threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.cpu import aten, machine

FORMS = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "in place": lambda x: x.clone().sigmoid_(),
    "out": lambda x: torch.sigmoid(x, out=torch.empty(0, dtype=x.dtype)),
}


@pytest.fixture(autouse=True)
def overridden(cache):
    machine.load_kernels(cache)
    aten.override()
    yield
    aten.restore()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_a_window_of_rows_has_the_bits_of_the_whole(name, dtype):
    run = FORMS[name]
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0)).mul(2).to(dtype)
    own = torch.get_num_threads()
    try:
        want = run(x)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for m in (1, 17, 129, 257):
                assert all(torch.equal(run(x[at : at + m]), want[at : at + m]) for at in range(0, 600 - m, 37)), m
    finally:
        torch.set_num_threads(own)


def test_other_types_stay_with_pytorch():
    assert torch.sigmoid(torch.tensor([0, 1])).dtype == torch.float32
    assert torch.equal(torch.sigmoid(torch.zeros(3, dtype=torch.float64)), torch.full((3,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_code_has_the_bits_of_eager_code(dtype):
    def layer(x):
        return F.layer_norm(F.gelu(x) * 1.7 * torch.sigmoid(x) + x, (20,))

    aten.keep_whole()
    function = torch.compile(layer, dynamic=True, fullgraph=True)
    x = torch.randn(257, 20).to(dtype)
    with torch.inference_mode():
        want = layer(x)
        assert torch.equal(function(x), want) and torch.equal(function(x[:17]), want[:17])


def test_what_was_compiled_before_changes_nothing():
    """Inductor keeps a copy of its table of decompositions from its first compilation on."""
    from torch._inductor import config, decomposition

    def layer(x):
        return F.layer_norm(F.gelu(x) * torch.sigmoid(x) + x, (20,))

    with config.patch(force_disable_caches=True), torch.inference_mode():
        torch.compile(lambda x: x * 2 + 1, dynamic=True)(torch.randn(5, 3))
        assert torch.ops.aten.gelu.default in decomposition.select_decomp_table()
        aten.keep_whole()
        x = torch.randn(257, 20)
        want, function = layer(x), torch.compile(layer, dynamic=True, fullgraph=True)
        assert torch.equal(function(x), want) and torch.equal(function(x[:17]), want[:17])
    aten.restore()
    assert torch.ops.aten.gelu.default in decomposition.select_decomp_table()


def test_a_table_that_stays_is_refused(monkeypatch):
    from torch._inductor import decomposition

    held = dict(decomposition.decompositions)
    monkeypatch.setattr(decomposition, "select_decomp_table", lambda: held)
    with pytest.raises(UnsupportedFeature, match="compile.cpu_whole: .*aten::gelu"):
        aten.keep_whole()
    assert not aten._undo


def test_compiled_rotations_have_the_bits_of_eager_code():
    """Models of transformers compute the angles of their positions in compiled code."""

    def rotation(positions):
        angles = positions[:, None].float() * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
        return angles.cos(), angles.sin()

    aten.keep_whole()
    function = torch.compile(rotation, dynamic=True, fullgraph=True)
    positions = torch.arange(4096)
    with torch.inference_mode():
        for rows in (positions, positions[1895:1900]):
            assert all(torch.equal(x, y) for x, y in zip(function(rows), rotation(rows)))


def _within(x):
    return x.clamp(-0.97, 0.97)


def _above(x):
    return x.abs() + 0.1


DOMAINS = {
    **dict.fromkeys(("log", "log2", "log10", "log1p", "sqrt"), _above),
    **dict.fromkeys(("asin", "acos", "erfinv"), _within),
}


def test_every_operator_with_equal_tails_keeps_the_bits_of_a_window():
    x = torch.randn(600, 12, generator=torch.Generator().manual_seed(0)).mul(2)
    own = torch.get_num_threads()
    try:
        for name in aten._EQUAL:
            op, given = getattr(torch, name), DOMAINS.get(name, lambda x: x)(x)
            for dtype in (torch.float32, torch.bfloat16):
                rows = given.to(dtype)
                torch.set_num_threads(own)
                want = op(rows)
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    for m in (1, 3, 17, 129):
                        same = (torch.equal(op(rows[at : at + m]), want[at : at + m]) for at in range(0, 600 - m, 61))
                        assert all(same), (name, dtype, m)
    finally:
        torch.set_num_threads(own)


def test_compiled_operators_have_the_bits_of_eager_code():
    def function(x):
        pointwise = [getattr(torch, name)(DOMAINS.get(name, lambda x: x)(x * 0.5)) * x for name in aten._EQUAL]
        return *pointwise, x.softmax(-1) * x, x.log_softmax(-1) * x

    aten.keep_whole()
    compiled = torch.compile(function, dynamic=True, fullgraph=True)
    x = torch.randn(3000, 20, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = function(x)
        for rows in (3000, 17):
            for name, a, b in zip((*aten._EQUAL, "softmax", "log_softmax"), compiled(x[:rows]), want):
                assert torch.equal(a, b[:rows]), (name, rows)


def test_the_tag_names_every_whole_operator():
    """Else PyTorch would load code that was compiled when other operators were whole."""
    named = aten._TAG.split()
    for name in (*(row.name() for row in aten._ROWS), *aten._BUNDLED, *aten._EQUAL):
        assert named.count(name) == 1, name


def test_what_changed_in_pytorch_is_restored():
    from torch._inductor import config, decomposition, lowering

    def state():
        ops = (torch.ops.aten.gelu.default, torch.ops.aten.silu.default, torch.ops.aten.cos.default, aten._LAYER_NORM)
        held = [table.get(op) for table in (decomposition.decompositions, lowering.lowerings) for op in ops]
        marks = [op in marked for marked in (lowering.fallbacks, lowering.needs_realized_inputs) for op in ops]
        return held, marks, config.emulate_precision_casts, torch.compiler.config.cache_key_tag

    with torch.compiler.config.patch(cache_key_tag="the user's"):
        before = state()
        for _ in range(2):
            aten.keep_whole()
            assert state()[2:] == (True, f"the user's; {aten._TAG}")
            aten.keep_whole()  # a second engine in the process
            assert state()[3].count("bi_patch") == 1 and state()[0] != before[0]
            aten.restore()
            assert state() == before and not aten._library


def test_code_that_another_thread_compiles_rounds_as_eager_code():
    """PyTorch 2.13 keeps the values of options by thread."""
    from torch._inductor import config

    def state():
        return config.emulate_precision_casts, torch.compiler.config.cache_key_tag

    with ThreadPoolExecutor(1) as thread:
        before = thread.submit(state).result()
        aten.keep_whole()
        assert thread.submit(state).result() == (True, aten._TAG)
        aten.restore()
        assert thread.submit(state).result() == before
