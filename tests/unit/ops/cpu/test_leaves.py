"""Row-parallel layers in fixed parts of K: the same bits for 1, 2, 4 and 8 ranks, here computed one by one."""

import pytest
import torch

from bi_patch.ops import bits
from bi_patch.ops.cpu import leaves

LEAVES = 8


def outputs(x, weight, bias, ranks, cache):
    """What each of `ranks` ranks returns: first every rank's subtree, then the whole tree."""
    own, layers = x.shape[-1] // ranks, [torch.nn.Identity() for _ in range(ranks)]
    roots = []

    def keep(out, root):
        roots.append(root)
        out.zero_()

    def share(out, root):
        out.copy_(torch.stack(roots))

    def run(gather):
        parts = []
        for r, layer in enumerate(layers):
            part = slice(r * own, (r + 1) * own)
            call = leaves.route(weight[:, part], bias, LEAVES, ranks, gather, layer, cache)
            parts.append(call(x[..., part], None, None))
        return parts

    run(keep)
    return run(share)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [64, 768, 8 * 700])
def test_every_number_of_ranks_has_the_same_bits(dtype, k, cache):
    generator = torch.Generator().manual_seed(k)
    weight, bias = torch.randn(48, k, generator=generator).to(dtype), torch.randn(48, generator=generator).to(dtype)
    x = torch.randn(3, 11, k, generator=generator).to(dtype)
    (want,) = outputs(x, weight, bias, 1, cache)
    exact = x.double() @ weight.double().T + bias.double()
    assert want.shape == (3, 11, 48) and want.dtype == dtype
    assert torch.allclose(want.double(), exact, rtol=2e-2, atol=0.5 if dtype == torch.bfloat16 else 1e-3)
    for ranks in (2, 4, 8):
        for got in outputs(x, weight, bias, ranks, cache):
            assert not bits.differing(got, want)
    alone = outputs(x[1:2, 4:5], weight, bias, 2, cache)[1]
    assert not bits.differing(alone, want[1:2, 4:5])


def test_the_tree_adds_neighbours():
    class Named:
        def __init__(self, name):
            self.name = name

        def __add__(self, other):
            return Named(f"({self.name}{other.name})")

    assert leaves.tree(map(Named, "abcdefgh")).name == "(((ab)(cd))((ef)(gh)))"
    assert leaves.tree([Named("a")]).name == "a"


def test_code_of_another_model_is_an_error(cache):
    from bi_patch.errors import CertificateFailed

    layer = torch.nn.Identity()
    call = leaves.route(torch.randn(8, 16), None, LEAVES, 1, None, layer, cache)
    with pytest.raises(CertificateFailed, match="Delete vLLM's compile cache"):
        call(torch.randn(2, 24), None, None)
