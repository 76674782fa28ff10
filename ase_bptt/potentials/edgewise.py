"""What the networks of several families need not compute twice, or for each edge: their results stay, to rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
