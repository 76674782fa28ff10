"""Tensor products along edges with the sum that follows, against e3nn's own and a sum of its rows."""

import importlib.util

import pytest
import torch

from ase_bptt.potentials import quiet, require
from ase_bptt.potentials.faster_layers import convolution, tensor_messages
from ase_bptt.threads import Building

pytestmark = pytest.mark.skipif(importlib.util.find_spec("e3nn") is None, reason="needs e3nn, as MACE and others do")
ODD = "4x0e + 3x1o"
KINDS = [
    (ODD, "0e + 1o + 2e", "0e + 1o + 2e"),
    ("5x0e", "0e + 1o", "0e + 1o"),
    ("2x1e + 2x2e", "1o + 2e", "1o + 2o"),
    ("2x0o + 3x0e", "0e + 1o", "0e"),
]


def product(features, harmonics, kept, mode="uvu", shared=False):
    """A tensor product as those of MACE, SevenNet and NequIP, in float64."""
    if importlib.util.find_spec("mace") is not None:
        require("mace", extra="mace")  # where e3nn is the one that only imports within mace's own import
    o3 = require("e3nn.o3", extra="mace")
    features, harmonics, kept = map(o3.Irreps, (features, harmonics, kept))
    paths = [
        (i, j, n, ir)
        for i, (n, own) in enumerate(features)
        for j, (_, other) in enumerate(harmonics)
        for ir in own * other
        if ir in kept
    ]
    outputs, place, _ = o3.Irreps([(n, ir) for _, _, n, ir in paths]).sort()
    instructions = [(i, j, place[k], mode, True) for k, (i, j, _, _) in enumerate(paths)]
    with Building(torch.float64), quiet():
        return o3.TensorProduct(
            features, harmonics, outputs, instructions, shared_weights=shared, internal_weights=shared
        )


def inputs(made, n_atoms=4, n_edges=9, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    shapes = (n_atoms, made.irreps_in1.dim), (n_edges, made.irreps_in2.dim), (n_edges, made.weight_numel)
    senders, receivers = (torch.randint(n_atoms, (n_edges,), generator=draw) for _ in range(2))
    return [torch.randn(s, generator=draw, dtype=dtype, requires_grad=True) for s in shapes], senders, receivers


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("irreps", KINDS)
def test_convolution_is_the_tensor_product_and_a_sum(irreps, dtype, tolerance):
    made = product(*irreps).to(dtype)
    (x, y, w), senders, receivers = inputs(made, dtype=dtype)
    wanted = torch.zeros(len(x), made.irreps_out.dim, dtype=dtype).index_add(0, receivers, made(x[senders], y, w))
    found = convolution(made)(x, y, w, senders, receivers)
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("irreps", KINDS)
def test_second_derivatives(irreps):
    made = product(*irreps)
    values, senders, receivers = inputs(made, 3, 4)
    convolved = convolution(made)
    torch.autograd.gradgradcheck(lambda *v: convolved(*v, senders, receivers), values)


def test_without_edges_nothing_arrives():
    made = product(*KINDS[0])
    values, senders, receivers = inputs(made, 3, 0)
    assert not convolution(made)(*values, senders, receivers).any()


def test_in_inference_mode_first_and_with_derivatives_after():
    made = product("6x0e + 1x1o", "0e + 1o", "0e + 1o")  # a kind that no other test has computed
    values, senders, receivers = inputs(made)
    with torch.inference_mode():
        convolution(made)(*(v.detach() for v in values), senders, receivers)
    convolution(made)(*values, senders, receivers).sum().backward()
    assert values[0].grad.abs().max() > 0


@pytest.mark.parametrize(
    ("features", "harmonics", "mode", "shared"),
    [(ODD, "0e + 1o", "uvu", True), (ODD, "2x0e + 2x1o", "uvu", False), ("1x0e", "0e", "uvw", False)],
    ids=["one set of weights", "several harmonics", "all channels with all"],
)
def test_other_tensor_products_stay_as_they_are(features, harmonics, mode, shared):
    assert convolution(product(features, harmonics, "0e + 1o", mode, shared)) is None
    assert convolution(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize("n_edges", [0, 7])
def test_messages_of_a_tensornet_are_the_sums_of_its_scaled_parts(n_edges):
    draw = torch.Generator().manual_seed(1)
    tensors = torch.randn(4, 2, 3, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    scales = torch.randn(n_edges, 2, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    ends = torch.randint(4, (2, n_edges), generator=draw)

    def parts(x):
        scalar = torch.diag_embed(x.diagonal(dim1=2, dim2=3).mean(2, keepdim=True).expand(-1, -1, 3))
        return scalar, (x - x.mT) / 2, (x + x.mT) / 2 - scalar

    def summed(x, scales):
        messages = sum(part[ends[1]] * scales[..., k, None, None] for k, part in enumerate(parts(x)))
        return torch.zeros_like(x).index_add(0, ends[0], messages)

    torch.testing.assert_close(tensor_messages(ends, *parts(tensors), scales), summed(tensors, scales))
    torch.autograd.gradgradcheck(lambda x, s: tensor_messages(ends, *parts(x), s), (tensors, scales))
