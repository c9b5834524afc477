"""bi_patch's kernel for experts of 4 bits: which layers get it, which integers it is given, and what runs around it."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from bi_patch.errors import CertificateFailed, UnsupportedFeature
from bi_patch.kernels import packing
from bi_patch.kernels.cuda import packed
from bi_patch.ops.cuda import activation as gated
from bi_patch.ops.cuda import packed_experts as ops
from bi_patch.seams.cuda import packed_experts, packed_experts_weights
from bi_patch.seams.cuda import packed_products as seam
from bi_patch.tools.models import quantize

E, N, K, TOP = 4, 128, 256, 2  # N: of a token's activations


class QuantizationArgs(SimpleNamespace):
    pass


class AutoGPTQConfig(SimpleNamespace):
    pass


class AutoAWQConfig(SimpleNamespace):
    pass


class MoeWNA16Config(SimpleNamespace):
    pass


COMPRESSED = QuantizationArgs(num_bits=4, type="int", strategy="group", actorder=None, group_size=128, symmetric=True)
ZEROS = QuantizationArgs(**vars(COMPRESSED) | {"symmetric": False})
GPTQ = AutoGPTQConfig(weight_bits=4, group_size=64, is_sym=True, desc_act=False)
AWQ = AutoAWQConfig(weight_bits=4, group_size=32, zero_point=True)
WNA16 = MoeWNA16Config(weight_bits=4, group_size=128, has_zp=True)
KINDS = (COMPRESSED, ZEROS, GPTQ, AWQ, WNA16)


def given(kind, n, k):
    """Random weights of each expert: q, scale and zero, and the same as vLLM hands them to the conversion."""
    generator = torch.Generator().manual_seed(n)
    zeros = kind in (ZEROS, AWQ, WNA16)
    shape = (E, n, k // kind.group_size)
    q = torch.randint(0, 16, (E, n, k), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(shape, generator=generator) * 0.01 + 0.002).bfloat16()
    zero = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8) if zeros else None
    if kind is AWQ:
        order = list(quantize._AWQ_ORDER)

        def words(values):  # [E, rows, columns] -> [E, rows, columns / 8]
            return words_of(values.unflatten(2, (-1, 8))[..., order].flatten(2))

        return (q, scale, zero), (words(q.mT), scale.mT.contiguous(), words(zero.mT))
    if kind is WNA16:
        halves = q[..., 0::2] | q[..., 1::2] << 4
        return (q, scale, zero), (halves, scale, zero[:, 0::2] | zero[:, 1::2] << 4)
    # GPTQ's zero points do not count, whatever they hold.
    held = words_of(zero.mT).mT.contiguous() if zeros else torch.full((E, n // 8, shape[2]), 0x77777777)
    return (q, scale, zero), (words_of(q), scale, None if kind is COMPRESSED else held)


def words_of(values):
    return torch.stack([quantize._packed(each.contiguous()) for each in values])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize("at_once", [1, 1 << 27])
def test_every_layout_is_packed_for_the_kernel(monkeypatch, kind, at_once):
    monkeypatch.setattr(packed_experts_weights, "_AT_ONCE", at_once)  # one expert at a time, or all
    (q, scale, zero), held = given(kind, 2 * N, K)
    data, scales, zeros = packed_experts_weights.pack(*held, kind)
    assert data.shape == (E, 2 * N, K // 2) and data.dtype == torch.uint8
    want = packing.pack_experts(q, scale, zero)
    assert torch.equal(data.flatten(), want.data.flatten()) and torch.equal(scales, want.scale)
    assert (zeros is None) == (zero is None) and (zero is None or torch.equal(zeros, want.zero))
    assert packing.Packed(data, scales, zeros, 4, kind.group_size).shape == (2 * N, K)


@pytest.mark.parametrize("kind", [GPTQ, AWQ], ids=lambda kind: type(kind).__name__)
def test_moe_wna16_hands_over_the_integers_of_awq_and_gptq(monkeypatch, kind):
    """vLLM's own loader of --quantization moe_wna16: its layout gives the kernel what the checkpoint's method gives."""
    from vllm.model_executor.layers.quantization import moe_wna16 as module

    monkeypatch.setattr(module, "get_tp_group", lambda: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
    _, (words, scale, zero) = given(kind, N, K)
    across = kind is AWQ
    asked = MoeWNA16Config(weight_bits=4, group_size=kind.group_size, has_zp=across)
    asked.linear_quant_method, asked.bit8_pack_factor = "awq" if across else "gptq", 2
    held = SimpleNamespace(quant_config=asked, group_size_div_factor=1, intermediate_size_per_partition=K)
    held.tp_size, held.moe_config = 1, SimpleNamespace(tp_size=1)  # by release

    def place(param, loaded, name, shard, expert, return_success=False):
        param[expert] = loaded

    load = module.MoeWNA16Method.get_weight_loader(held, place)
    made = {
        "qweight": torch.zeros((E, N, K // 2), dtype=torch.uint8),
        "scales": torch.zeros((E, N, K // kind.group_size), dtype=scale.dtype),
        "qzeros": torch.zeros((E, N // 2, K // kind.group_size), dtype=torch.uint8),
    }
    for expert in range(E):
        for name, each in (("qweight", words), ("scales", scale), ("qzeros", zero)):
            # A checkpoint of GPTQ has K first, and vLLM's own method turns it.
            one = each[expert] if across else each[expert].T.contiguous()
            load(SimpleNamespace(data=made[name]) if name == "qzeros" else made[name], one, f"w2_{name}", "w2", expert)
    want = packed_experts_weights.pack(words, scale, zero, kind)
    got = packed_experts_weights.pack(made["qweight"], made["scales"], made["qzeros"] if across else None, asked)
    assert all(b is None if a is None else torch.equal(a, b) for a, b in zip(want, got, strict=True))


def config(**changed):
    held = {"moe_backend": "auto", "is_lora_enabled": False, "intermediate_size_per_partition": N, "hidden_dim": K}
    return SimpleNamespace(**held | {"is_act_and_mul": True, "in_dtype": torch.bfloat16} | changed)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_layers_of_every_method_get_the_kernel(monkeypatch, kind):
    monkeypatch.setattr(ops, "served", lambda: True)
    monkeypatch.setattr(seam, "_supported", lambda *_: True)
    chosen = seam._chosen(lambda *_: "vLLM's")(config(), "key", kind, may_have_zp=True, may_have_bias=True)
    assert chosen[0].name == "TRITON" and chosen[1] is seam.own() and chosen[1].__name__ == packed_experts.OWN
    monkeypatch.setattr(seam, "_supported", lambda *_: False)
    assert seam._chosen(lambda *_: "vLLM's")(config(), "key", kind, True, True) == "vLLM's"


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        (COMPRESSED, {"moe_backend": "triton"}),
        (COMPRESSED, {"is_lora_enabled": True}),
        (COMPRESSED, {"hidden_dim": 192}),
        (COMPRESSED, {"intermediate_size_per_partition": 96}),
        (COMPRESSED, {"in_dtype": torch.float32}),
        (SimpleNamespace(weight_bits=4, group_size=128), {}),
        (QuantizationArgs(**vars(COMPRESSED) | {"num_bits": 8}), {}),
        (QuantizationArgs(**vars(COMPRESSED) | {"type": "float"}), {}),
        (QuantizationArgs(**vars(COMPRESSED) | {"strategy": "channel", "group_size": None}), {}),
        (QuantizationArgs(**vars(COMPRESSED) | {"actorder": "group"}), {}),
        (QuantizationArgs(**vars(COMPRESSED) | {"actorder": "dynamic"}), {}),
        (QuantizationArgs(**vars(COMPRESSED) | {"group_size": 512}), {}),
        (AutoGPTQConfig(**vars(GPTQ) | {"desc_act": True}), {}),
        (AutoGPTQConfig(**vars(GPTQ) | {"weight_bits": 8}), {}),
        (AutoGPTQConfig(**vars(GPTQ) | {"group_size": -1}), {}),
        (AutoAWQConfig(**vars(AWQ) | {"zero_point": False}), {}),
        (AutoAWQConfig(**vars(AWQ) | {"group_size": 16}), {}),
    ],
)
def test_all_other_layers_keep_what_vllm_takes(monkeypatch, kind, changed):
    monkeypatch.setattr(ops, "served", lambda: True)
    monkeypatch.setattr(seam, "_supported", lambda *_: True)
    assert seam._chosen(lambda *_: "vLLM's")(config(**changed), "key", kind, True, True) == "vLLM's"


def test_gpus_that_do_not_run_every_form_keep_what_vllm_takes(monkeypatch):
    for capability, served in (((9, 0), True), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda held=capability: held)
        assert ops.served() == served


@pytest.fixture
def layer(monkeypatch):
    """make(kind) -> a layer of experts on the kernel, and the weights [E, N, K] of its products. The kernel's products
    are computed from these weights in fp64, and vLLM's CUDA operators by PyTorch's."""
    from vllm.model_executor.layers.fused_moe import moe_align_block_size as module

    dense, calls = {}, []

    def product_of_experts(x, data, rows, bias, form, out):
        calls.append((rows, form))
        count = int(rows.padded)
        tiles = zip(rows.sorted_ids[:count].view(-1, 8 * form.tiles).tolist(), rows.experts.tolist(), strict=False)
        for ids, expert in tiles:
            ids = [i for i in ids if i < rows.ids]
            got = x[[i // rows.each for i in ids]].double() @ dense[data.data.data_ptr()][expert].double().T
            got += 0 if bias is None else bias[expert]
            out[ids] = (got * (1 if rows.weights is None else rows.weights[ids, None])).to(out.dtype)

    def align(ids, block, experts, expert_map=None, ignore_invalid_experts=False):
        assert ignore_invalid_experts == (expert_map is not None)
        return ops.sort(ids, block, experts)

    monkeypatch.setattr(packed, "product_of_experts", product_of_experts)
    monkeypatch.setattr(module, "moe_align_block_size", align)
    monkeypatch.setattr(ops, "_able", {})
    seam.own.cache_clear()

    def make(kind=COMPRESSED, bias=False):
        held = torch.nn.Module()
        held.quant_method = SimpleNamespace(experts_cls=seam.own())
        raw, sizes = [], ((2 * N, K), (K, N))
        for n, k in sizes:
            (q, scale, zero), words = given(kind, n, k)
            middle = 8 if zero is None else zero.float().repeat_interleave(kind.group_size, 2)
            raw.append((words, ((q.float() - middle) * scale.float().repeat_interleave(kind.group_size, 2)).bfloat16()))
        (first, w13), (second, w2) = raw
        converted = seam._packed(None)(
            "TRITON", held, kind, None, first[0], second[0], first[1], second[1], first[2], second[2]
        )
        for name, value in zip(("w13_weight", "w2_weight"), converted, strict=False):
            setattr(held, name, torch.nn.Parameter(value, requires_grad=False))
        dense[held.w13_weight.data_ptr()], dense[held.w2_weight.data_ptr()] = w13.float(), w2.float()
        biases = [torch.randn(E, n).bfloat16() if bias else None for n, _ in sizes]
        experts = object.__new__(seam.own())
        names = ("w1_scale", "w2_scale", "w1_zp", "w2_zp")
        held_by = dict(zip(names, converted[2:6], strict=True)) | {"w1_bias": biases[0], "w2_bias": biases[1]}
        experts.quant_config = SimpleNamespace(**held_by)

        def activation(kind, output, input):
            gate, up = input.float().chunk(2, -1)
            output.copy_((torch.nn.functional.silu(gate) * up).to(output.dtype))

        def moe_sum(input, output, topk_ids, expert_map):
            assert topk_ids is not None
            output.copy_(input.float().sum(1))

        experts.activation, experts.moe_sum, experts.post_gemm2_hook = activation, moe_sum, None
        held.quant_method.moe_kernel = SimpleNamespace(fused_experts=experts)
        for problem in seam.problems(torch.nn.ModuleList([held])):
            ops._able[problem] = tuple(range(len(packed.FORMS_OF_EXPERTS)))
        return held, (w13.float(), w2.float(), *biases)

    make.calls, make.dense = calls, dense
    yield make
    seam.own.cache_clear()


def routed(tokens):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn((tokens, K), generator=generator).bfloat16()
    weights, ids = torch.rand((tokens, E), generator=generator).softmax(-1).topk(TOP, -1)
    return x, weights, ids.int()


def run(held, x, weights, ids, on_input=False, expert_map=None, activation="silu"):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    wide = len(x) * TOP * 2 * N + 1
    output, spaces = torch.empty_like(x), torch.full((2, wide), float("nan")).bfloat16()
    held.quant_method.moe_kernel.fused_experts.apply(
        output, x, held.w13_weight, held.w2_weight, weights, ids, MoEActivation(activation), E, expert_map, None, None,
        spaces[0], spaces[1], None, on_input,
    )  # fmt: skip
    return output


def reference(x, weights, ids, w13, w2, bias13, bias2):
    out = torch.zeros(x.shape)
    for token, (chosen, scores) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for expert, score in zip(chosen, scores, strict=True):
            up = x[token].float() @ w13[expert].T + (0 if bias13 is None else bias13[expert].float())
            gate, up = up.bfloat16().float().chunk(2)
            active = (torch.nn.functional.silu(gate) * up).bfloat16().float()
            down = active @ w2[expert].T + (0 if bias2 is None else bias2[expert].float())
            out[token] += (down * score).bfloat16()
    return out.bfloat16()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_two_products_around_the_activation(layer, kind, bias):
    held, weights = layer(kind, bias)
    given = routed(9)
    want = reference(*given, *weights)
    assert (run(held, *given).float() - want.float()).norm() < 4e-3 * want.float().norm()
    (first, _), (second, _) = layer.calls
    assert (first.each, first.weights, second.each) == (TOP, None, 1) and second.weights.shape == (9 * TOP,)
    ones = torch.ones_like(given[1])  # the weights that were applied to the input before
    assert torch.equal(run(held, *given, on_input=True), run(held, given[0], ones, given[2]))


@pytest.mark.parametrize(
    ("activation", "certified", "want"),
    [
        ("silu", True, ["silu"]),
        ("swigluoai", True, ["bundled"]),
        ("swigluoai", False, ["bundled", "swigluoai"]),
    ],
)
def test_pairs_alone_take_the_bundled_activation(layer, monkeypatch, activation, certified, want):
    """A process may have a certificate of pairs from another model."""
    seen, (held, _) = [], layer()
    monkeypatch.setattr(gated, "swigluoai_and_mul", lambda output, input: seen.append("bundled") or certified)
    held.quant_method.moe_kernel.fused_experts.activation = lambda kind, output, input: seen.append(kind.value)
    run(held, *routed(3), activation=activation)
    assert seen == want


def test_rows_are_sorted_again_for_another_form(layer, monkeypatch):
    held, weights = layer()
    small, large = packed.FORMS_OF_EXPERTS[0], packed.FORMS_OF_EXPERTS[-1]
    monkeypatch.setattr(ops, "form", lambda problem, ids, experts: small if problem.k == K else large)
    given = routed(40)
    want = reference(*given, *weights)
    assert (run(held, *given).float() - want.float()).norm() < 4e-3 * want.float().norm()
    assert [form for _, form in layer.calls] == [small, large]
    assert layer.calls[0][0].sorted_ids is not layer.calls[1][0].sorted_ids


def test_each_product_has_a_problem_and_needs_its_certificate(layer):
    held, _ = layer(AWQ, bias=True)
    first, second = seam.problems(torch.nn.ModuleList([held, torch.nn.Linear(2, 2)]))
    assert first == ops.Problem(2 * N, K, torch.bfloat16, True, 32, True)
    assert str(second) == f"experts N={K} K={N} int4 groups of 32 zero points bfloat16 bias"
    ops._able.clear()
    with pytest.raises(CertificateFailed, match="cuda.packed_products: experts N=256 K=256 int4 .*no certificate"):
        run(held, *routed(2))


def test_a_form_without_a_certificate_does_not_serve(monkeypatch):
    problem = ops.Problem(2 * N, K, torch.bfloat16, False, 128, False)
    monkeypatch.setattr(ops, "_able", {problem: (0, 3)})
    tiles = {ops.form(problem, ids, E).tiles for ids in (1, 8, 40, 100, 5000)}
    assert tiles <= {packed.FORMS_OF_EXPERTS[0].tiles, packed.FORMS_OF_EXPERTS[3].tiles}


def test_rows_of_another_type_than_the_scales_are_refused(layer):
    held, _ = layer()
    x, weights, ids = routed(3)
    with pytest.raises(CertificateFailed, match="torch.float16 and scales of torch.bfloat16"):
        run(held, x.half(), weights, ids)


def test_adapters_and_another_sum_are_refused(layer):
    held, _ = layer()
    for name in ("post_gemm2_hook", "_lora_context"):
        experts = held.quant_method.moe_kernel.fused_experts
        setattr(experts, name, object())
        with pytest.raises(UnsupportedFeature, match="packed_products.cuda_kernel"):
            run(held, *routed(1))
        setattr(experts, name, None)


def test_weights_of_another_kernel_are_converted_by_vllm(monkeypatch):
    seen = []
    convert = seam._packed(lambda *given: seen.append(given))
    convert("HUMMING", SimpleNamespace(quant_method=SimpleNamespace(experts_cls=object)), *range(10))
    assert len(seen[0]) == 12 and seen[0][2:] == tuple(range(10))


class TritonWNA16Experts:
    """A global of make_wna16_moe_kernel."""


def make_wna16_moe_kernel(moe_quant_config, moe_config, experts_cls, backend=None):
    assert experts_cls in (TritonWNA16Experts,)
    return experts_cls


def test_vllm_allows_the_kernel():
    make = seam._made(make_wna16_moe_kernel)
    assert make(None, None, experts_cls=seam.own(), backend="TRITON") is seam.own()
    assert make(None, None, TritonWNA16Experts) is TritonWNA16Experts
    with pytest.raises(AssertionError):
        make(None, None, experts_cls=object)


def test_rows_are_sorted_as_vllm_sorts_them():
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]])  # the example of vLLM's moe_align_block_size
    sorted_ids, experts, padded = ops.sort(ids, 4, 5)
    want = [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert sorted_ids[:16].tolist() == want and experts[:4].tolist() == [1, 2, 3, 4] and padded.item() == 16
    assert (sorted_ids[16:] > 12).all() and (experts[4:] > 4).all()


class Layer(torch.nn.Module):
    """As vLLM's runner of experts: one module with the routed experts of a token's layer."""

    def __init__(self, held, given):
        super().__init__()
        self.routed_experts, self.given = held, given

    def forward(self, tokens):
        return run(self.routed_experts, *(t[:tokens] for t in self.given))


@pytest.fixture
def traced(monkeypatch):
    """traced(layer, tokens) -> the trace of the first token's rows in a layer's answer for so many tokens."""
    from packaging.version import Version

    from bi_patch.arming import catalog
    from bi_patch.tools.verify import owners, trace

    monkeypatch.setattr(owners.process, "state", lambda: None)
    monkeypatch.setattr(owners, "_plan", lambda: catalog.plan(Version("0.33.0"), "cuda"))

    def make(layer, tokens):
        tracer = trace.Tracer({id(layer): "mlp.experts"}, owners.Owners().seam, lambda func, args: "")
        with (
            torch.inference_mode(),
            tracer.hooked(),
            tracer.phase(trace.Rows(0, trace.FORWARD, frozenset({tokens}), 0, 1, 0)),
        ):
            out = layer(tokens)
        return out[:1], trace.Trace(tracer.calls)

    return make


@pytest.fixture
def fault(layer, monkeypatch):
    """fault(held): plant the fault of such experts. Its weights are those of the layer's double."""
    from bi_patch.ops.cuda import packed_linear
    from bi_patch.tools.faults import named

    def dequantize(one):
        held = {part.data_ptr(): w for name in ("w13", "w2") for part, w in zip(*parts(layer, name), strict=True)}
        return held[one.data.data_ptr()]

    def parts(layer, name):
        packed_weights = getattr(layer.held, f"{name}_weight")
        return packed_weights, layer.dense[packed_weights.data_ptr()]

    def plant(held):
        layer.held = held
        return named("parts of K of packed experts added as they arrive").plant(None)

    monkeypatch.setattr(packed_linear, "dequantize", dequantize)
    return plant


@pytest.mark.parametrize("kind", [COMPRESSED, AWQ], ids=lambda kind: type(kind).__name__)
def test_a_planted_fault_is_found_and_named(layer, fault, traced, kind):
    """The last quarter of each sum over K cancels the others, so that sums of parts show, in whichever order the parts
    arrive: each part is rounded to fp32."""
    from bi_patch.tools.verify import align

    held, _ = layer(kind)
    for weights in layer.dense.values():
        first, *rest = weights.chunk(4, -1)
        rest[2].copy_(-(first + rest[0] + rest[1]))
    x, *given = routed(40)
    x.copy_(x[:, : K // 4].repeat(1, 4))
    experts = Layer(held, (x, *given))
    with fault(held):
        (alone, one), (company, many) = traced(experts, 1), traced(experts, 40)
        first = align.compare(one, many).first
    assert not torch.equal(alone, company) and first.company.module == "mlp.experts"
    assert {first.company.seam, *(call.seam for call in first.only_alone)} == {"packed_products.cuda_kernel"}
    (alone, one), (company, many) = traced(experts, 1), traced(experts, 40)
    assert torch.equal(alone, company) and align.compare(one, many).first is None


@pytest.mark.parametrize("kind", [COMPRESSED, AWQ], ids=lambda kind: type(kind).__name__)
def test_the_fault_computes_the_products(layer, fault, kind):
    held, weights = layer(kind, bias=True)
    given = routed(9)
    with fault(held):
        got = run(held, *given)
    want = reference(*given, *weights)
    assert not layer.calls and (got.float() - want.float()).norm() < 4e-3 * want.float().norm()


def test_rows_of_no_expert_get_zeros_from_the_fault_as_from_the_kernel(monkeypatch):
    from bi_patch.tools.faults import packed_experts as fault

    monkeypatch.setattr(fault, "_one", lambda held, expert: None)
    monkeypatch.setattr(fault, "_added", lambda x, held: x.float())
    x, out = torch.randn(4, 3).bfloat16(), torch.full((4, 3), float("nan")).bfloat16()
    form = packed.FORMS_OF_EXPERTS[0]._replace(tiles=1)
    places = torch.full((16,), 4, dtype=torch.int32)
    places[:2], places[8:10] = torch.tensor([3, 1]), torch.tensor([0, 2])
    rows = packed.Rows(places, torch.tensor([0, -1]), torch.tensor([16]), 1, 4)
    with fault.atomic_experts(None):
        ops.product(x, None, rows, None, form, out)
    assert torch.equal(out[[1, 3]], x[[1, 3]]) and not out[[0, 2]].any()
