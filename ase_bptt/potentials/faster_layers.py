"""Layers of several families with less work for the same results, to rounding.

What their networks need not compute twice, or for each edge and atom where once for each atom or element will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..neighbors import Edges
from ..structures import Structures
from ..threads import view

Branches = tuple[Any, Any]


class Rows(TorchFunctionMode):
    """Within it x[rows] is x.index_select(0, rows), whose derivative takes a third of the time.

    For rows that are a vector of whole numbers, none of them negative, as are the indices of atoms and edges.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__ and _is_rows(args[1]):
            return args[0].index_select(0, args[1])
        return function(*args, **(kwargs or {}))


def _is_rows(index: Any) -> bool:
    return isinstance(index, Tensor) and index.ndim == 1 and index.dtype in (torch.int32, torch.int64)


def one_way_first(edges: Edges, structures: Structures) -> tuple[Edges, bool]:
    """The edges in the order of `Edges.one_way_first`, and whether there is one.

    In that order `of_lengths` can be called on what depends on the lengths of edges alone.
    """
    order = edges.one_way_first
    if order is None:
        return edges, False
    i, j, shifts, offsets = (
        values.index_select(0, order) for values in (edges.i, edges.j, edges.shifts, edges.offsets(structures))
    )
    return Edges(i, j, shifts).with_offsets(offsets), True


def each(layers: Any, change: Callable[[Any], Any]) -> Any:
    """A view of a module, whose children are changed."""
    return view(layers, **{name: change(layer) for name, layer in layers._modules.items()})


def of_lengths(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A network of features that an edge and its reverse share, computed for one of them.

    It is to be called with the edges in the order of `one_way_first`.
    """

    def computed(features: Tensor) -> Tensor:
        found = network(features[: len(features) // 2])
        return torch.cat((found, found))

    return computed


class Paths(NamedTuple):
    """The paths of a tensor product that start from one irreducible representation of the features."""

    coupling: Tensor
    """Shape (harmonics, rows of all its outputs x components): a matrix for each edge, once the harmonics are known."""
    components: int
    numbers: list[int]
    """Which of the weights, and outputs, these paths have."""
    rows: list[int]
    """Components of their outputs."""


def convolution(product: Any) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """A tensor product of e3nn along edges, and the sum of it at their receivers, as one function.

    With the channels last and all paths from one input as one matrix for each edge, large models take between a third
    and two thirds of the time of e3nn's own code, whose derivative of a slice of the weights fills a whole tensor.

    Parameters
    ----------
    product : Any
        None is returned, unless it is a TensorProduct of e3nn in the form of convolutions: paths "uvu" alone, single
        harmonics, and weights for each edge.

    Returns
    -------
    Callable or None
        Of features (n_atoms, irreps_in1), harmonics (n_edges, irreps_in2), weights (n_edges, weight_numel), and the
        indices of senders and receivers (n_edges,). It returns shape (n_atoms, irreps_out).
    """
    if not isinstance(product, import_module("e3nn.o3").TensorProduct) or product.shared_weights:
        return None
    paths = tuple(product.instructions)
    single = all(n == 1 for n, _ in product.irreps_in2)
    one_each = sorted(path.i_out for path in paths) == list(range(len(product.irreps_out)))
    if not (single and one_each and all(path.connection_mode == "uvu" and path.has_weight for path in paths)):
        return None
    channels = [n for n, _ in product.irreps_in1]

    def convolved(features: Tensor, harmonics: Tensor, weights: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        n_atoms, n_edges = len(features), len(harmonics)
        of_paths = weights.split([channels[path.i_in1] for path in paths], dim=1)
        sums: list[Any] = [None] * len(paths)
        inputs = features.split([n * ir.dim for n, ir in product.irreps_in1], dim=1)
        for n, values, group in zip(channels, inputs, _paths(product, weights.dtype, weights.device), strict=True):
            m = group.components
            values = values.view(n_atoms, n, m).mT.flatten(1).index_select(0, senders).view(n_edges, m, n)
            matrices = (harmonics @ group.coupling).view(n_edges, sum(group.rows), m)
            # One component is multiplied by its weights first, for they are smaller than the outer product.
            parts = (matrices if m == 1 else matrices @ values).split(group.rows, dim=1)
            for k, rows, part in zip(group.numbers, group.rows, parts, strict=True):
                scales = of_paths[k].unsqueeze(1)
                part = part * (scales * values if m == 1 else scales)
                total = part.new_zeros(n_atoms, rows * n).index_add(0, receivers, part.flatten(1))
                sums[paths[k].i_out] = total.view(n_atoms, rows, n).mT.flatten(1)
        return torch.cat(sums, dim=1)

    return convolved


def _paths(product: Any, dtype: torch.dtype, device: torch.device) -> list[Paths]:
    irreps = product.irreps_in1, product.irreps_in2, product.irreps_out
    return _paths_between(*irreps, tuple(product.instructions), dtype, device)


@lru_cache(maxsize=256)
def _paths_between(
    inputs: Any, harmonics: Any, outputs: Any, paths: tuple[Any, ...], dtype: torch.dtype, device: torch.device
) -> list[Paths]:
    """Kept for all products of this kind; in inference mode they could not be kept for derivatives."""
    wigner_3j, found = import_module("e3nn.o3").wigner_3j, []
    with torch.inference_mode(False), torch.no_grad():
        for i, (_, own) in enumerate(inputs):
            numbers = [k for k, path in enumerate(paths) if path.i_in1 == i]
            blocks = [torch.zeros(harmonics.dim, 0, own.dim, dtype=torch.float64)]
            for path in (paths[k] for k in numbers):
                other, out = harmonics[path.i_in2].ir, outputs[path.i_out].ir
                block = torch.zeros(harmonics.dim, out.dim, own.dim, dtype=torch.float64)
                coupling = wigner_3j(own.l, other.l, out.l, dtype=torch.float64, device="cpu")
                block[harmonics.slices()[path.i_in2]] = path.path_weight * coupling.permute(1, 2, 0)
                blocks.append(block)
            coupling = torch.cat(blocks, dim=1).flatten(1).to(device, dtype)
            found.append(Paths(coupling, own.dim, numbers, [outputs[paths[k].i_out].ir.dim for k in numbers]))
    return found


Group = tuple[int, Tensor | None]
"""Atoms of one element: its place in the one-hot vectors of a model, and their indices; None for all atoms."""


def contraction(contractions: Sequence[Any], groups: Sequence[Group], features: Tensor) -> Tensor:
    """A symmetric contraction of MACE (Batatia et al., arXiv 2206.07697, equations 10 and 11).

    Its couplings are weighted once for each element that there is, not for each atom: in models of all elements, as
    the published ones, that was most of the time.

    Parameters
    ----------
    contractions : sequence of mace.modules.symmetric_contraction.Contraction
    groups : sequence of Group
        All atoms, by elements.
    features : Tensor, shape (n_atoms, channels, components)
    """
    found = []
    for one in contractions:
        alike = groups if len(one.weights_max) > 1 else [(0, None)]
        parts = [
            _contracted(one, element, features if rows is None else features.index_select(0, rows))
            for element, rows in alike
        ]
        if len(parts) > 1:
            order, together = torch.cat([rows for _, rows in alike if rows is not None]), torch.cat(parts)
            parts = [torch.empty_like(together).index_copy(0, order, together)]
        found += parts
    return torch.cat(found, dim=1)


def _contracted(one: Any, element: int, features: Tensor) -> Tensor:
    """A polynomial of the features of each atom of an element, shape (n_atoms, channels x components of the output)."""
    x = features.transpose(0, 1).contiguous()
    channels, n_atoms, m = x.shape
    order = one.correlation
    sums: Tensor | None = None
    for nu, weights in zip(range(order, 0, -1), (one.weights_max, *one.weights), strict=True):
        couplings = (weights[element].mT @ getattr(one, f"U_matrix_{nu}").flatten(0, -2).mT).view(channels, -1, m)
        if sums is None:
            sums = x @ couplings.mT
        else:
            sums = ((sums.view(channels, n_atoms, -1, m) + couplings.unsqueeze(1)) @ x.unsqueeze(3)).squeeze(3)
    assert sums is not None
    return sums.transpose(0, 1).flatten(1)


def tensor_messages(ends: Tensor, scalar: Tensor, skew: Tensor, traceless: Tensor, scales: Tensor) -> Tensor:
    """Sums of the messages of a TensorNet (Simeon and De Fabritiis, arXiv 2306.06482) at the first atoms of the edges.

    On edges the three parts of a tensor are its one, three and five components, not three tensors.

    Parameters
    ----------
    ends : Tensor of whole numbers, shape (2, n_edges)
    scalar, skew, traceless : Tensor, shape (n_atoms, channels, 3, 3)
    scales : Tensor, shape (n_edges, channels, 3)
        Of the parts of the second atom's tensor, by which each edge multiplies them.
    """
    basis = _components(scalar.dtype, scalar.device)
    n_atoms, channels = scalar.shape[:2]
    components = ((scalar + skew + traceless).flatten(2) @ basis.mT).mT.flatten(1)
    parts = components.index_select(0, ends[1]).unflatten(1, (9, channels)).split((1, 3, 5), dim=1)
    sums = []
    for part, scale in zip(parts, scales.movedim(2, 0).contiguous(), strict=True):
        products = (part * scale.unsqueeze(1)).flatten(1)
        sums.append(products.new_zeros(n_atoms, products.shape[1]).index_add(0, ends[0], products))
    return (torch.cat(sums, dim=1).unflatten(1, (9, channels)).mT @ basis).unflatten(2, (3, 3))


@lru_cache(maxsize=8)
def _components(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal components of tensors, shape (9, 9): the trace, three of the skew part, five of the traceless one."""
    with torch.inference_mode(False), torch.no_grad():
        units = torch.eye(9, dtype=torch.float64).view(3, 3, 9)
        above = units[(0, 0, 1), (1, 2, 2)]
        below = units[(1, 2, 2), (0, 0, 1)]
        xx, yy, zz = units[range(3), range(3)]
        rest = torch.stack((xx + yy + zz, xx - yy, xx + yy - 2 * zz))
        found = torch.cat((rest[:1], above - below, above + below, rest[1:]))
        return (found / found.norm(dim=1, keepdim=True)).to(device, dtype)


def m3gnet_update(
    ends: Tensor, bonds: Tensor, atoms: Tensor, networks: Sequence[Branches], weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Features of bonds and of atoms after a layer of an M3GNet (Chen and Ong, equations 4 and 5).

    Parameters
    ----------
    ends : Tensor of whole numbers, shape (2, n_edges)
    bonds, atoms : Tensor, shapes (n_edges, k) and (n_atoms, m)
    networks : two pairs of Sequential
        For bonds and for atoms: those whose product is taken, of the features of both atoms and the bond.
    weights : two Tensors, shape (n_edges, k) and (n_edges, m)
        By which the products are multiplied.
    """
    bonds = bonds + _product(networks[0], ends, bonds, atoms) * weights[0]
    messages = _product(networks[1], ends, bonds, atoms) * weights[1]
    return bonds, atoms.index_add(0, ends[0], messages)


def _product(branches: Branches, ends: Tensor, bonds: Tensor, atoms: Tensor) -> Tensor:
    one, other = (_of_bonds(branch, atoms, ends)(bonds) for branch in branches)
    return one * other


def _of_bonds(network: Any, atoms: Tensor, ends: Tensor) -> Any:
    """A Sequential of the features of both atoms and the bond, to be called with those of the bond alone."""
    first = network[0]
    # mattersim's layers hold a linear layer and an activation.
    if hasattr(first, "linear"):
        return view(network, **{"0": view(first, linear=_linear(first.linear, atoms, ends))})
    return view(network, **{"0": _linear(first, atoms, ends)})


def _linear(layer: nn.Linear, atoms: Tensor, ends: Tensor) -> Callable[[Tensor], Tensor]:
    """Features of an atom are multiplied by the weights once, instead of once for each of its edges."""

    def computed(bonds: Tensor) -> Tensor:
        n = atoms.shape[1]
        first, second, own = layer.weight.split((n, n, bonds.shape[1]), dim=1)
        both = nn.functional.linear(atoms, torch.cat((first, second)))
        one, other = (part.index_select(0, end) for part, end in zip(both.chunk(2, dim=1), ends, strict=True))
        return nn.functional.linear(bonds, own, layer.bias) + one + other

    return computed
