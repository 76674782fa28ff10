"""Edges between neighbouring atoms: what they are, and a list with a skin that keeps them up to date."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..structures import Structures
from .search import search_structures


@dataclass(eq=False)
class Edges:
    """An edge from each atom to each of its neighbours within a cutoff, so that every edge has its reverse.

    Attributes
    ----------
    i, j : Tensor of int64, shape (n_edges,)
        Atom and neighbour, as indices into the batch.
    shifts : Tensor, shape (n_edges, 3)
        Whole numbers of cell vectors that lead to the neighbour's image, in the positions' dtype.
    mirror : Tensor of int64 or None, shape (n_edges,)
        Index of each edge's reverse; None where there are edges without one.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from ase_bptt import Structures
    >>> from ase_bptt.neighbors import find_edges
    >>> structures = Structures.from_atoms([bulk("Cu")])  # one atom, and its twelve neighbours' images
    >>> edges = find_edges(structures, cutoff=3.0)
    >>> edges.vectors(structures).shape
    torch.Size([12, 3])
    """

    i: Tensor
    j: Tensor
    shifts: Tensor
    mirror: Tensor | None = None
    _offsets: Tensor | None = None

    def offsets(self, structures: Structures) -> Tensor:
        """Cartesian translation of each neighbour to its image, shape (n_edges, 3), in Å."""
        if self._offsets is not None:
            return self._offsets
        cells = structures.cells[structures.batch[self.i]]
        return (self.shifts.unsqueeze(1) @ cells).squeeze(1)

    def vectors(self, structures: Structures) -> Tensor:
        """Vector from each atom to its neighbour's image, shape (n_edges, 3), in Å."""
        x = structures.positions
        return x[self.j] - x[self.i] + self.offsets(structures)

    def near(self, cutoff: float, structures: Structures) -> Tensor:
        """Whether each edge is shorter than the cutoff (Å) now, shape (n_edges,)."""
        with torch.no_grad():
            near = self.vectors(structures).square().sum(1) < cutoff**2
        # An edge and its reverse may differ in length by the last bit.
        return near if self.mirror is None else near & near[self.mirror]

    def select(self, keep: Tensor, count: int | None = None) -> Edges:
        """The edges where keep, bool of shape (n_edges,), is true: of an edge and its reverse both or none.

        With their count, where it is known, nothing has to be read from the device.
        """
        place = keep.cumsum(0) - 1
        rows = keep.nonzero().squeeze(1) if count is None else _rows(keep, place, count)
        mirror = None if self.mirror is None else place[self.mirror[rows]]
        return Edges(self.i[rows], self.j[rows], self.shifts[rows], mirror)

    def with_offsets(self, offsets: Tensor) -> Edges:
        """The same edges with these offsets instead of those that follow from the cells."""
        new = copy(self)
        new._offsets = offsets
        return new

    @cached_property
    @torch.inference_mode(False)
    def one_way_first(self) -> Tensor | None:
        """Order in which one of each edge and its reverse comes first, then the reverses in the same order.

        None where there is no `mirror`.
        """
        if self.mirror is None:
            return None
        first = self.mirror > torch.arange(len(self.i), device=self.i.device)
        # No edge is its own reverse.
        first = _rows(first, first.cumsum(0) - 1, len(self.i) // 2)
        return torch.cat((first, self.mirror[first]))


def search_each(structures: Structures, cutoff: float, members: Sequence[int] | None = None) -> list[Edges]:
    """The edges closer than the cutoff (Å) of each structure, or of these members, as indices into that structure.

    All in both directions, sorted by i, j and shifts. Any mix of boundary conditions, skewed cells, cells smaller than
    the cutoff and atoms outside of their cell. The cost is that of the atoms and their edges, however large the cell is
    and however far apart the atoms are.

    Raises
    ------
    ValueError
        Naming the structure: for one that is periodic along a cell vector of length zero, or along vectors that are
        linearly dependent; with an atom so far from the origin that the precision does not resolve its position; or
        with a cell that is tiny beside the cutoff.
    """
    some = structures if members is None else structures.select(members)
    return [Edges(*found) for found in search_structures(some, cutoff)]


def find_edges(structures: Structures, cutoff: float) -> Edges:
    """The edges of a batch, as indices into it; otherwise as `search_each`."""
    return _joined(search_each(structures, cutoff), structures)


def _joined(found: Sequence[Edges], structures: Structures) -> Edges:
    """The edges of all structures, as indices into the batch."""
    sizes = torch.tensor([len(edges.i) for edges in found])
    firsts = torch.from_numpy(np.cumsum([0, *structures.counts])[:-1])
    device = structures.positions.device
    atoms = torch.repeat_interleave(firsts, sizes).to(device)
    i, j, shifts = (torch.cat([getattr(edges, name) for edges in found]) for name in ("i", "j", "shifts"))
    mirrors = [edges.mirror for edges in found if edges.mirror is not None]
    mirror = None
    if len(mirrors) == len(found):
        mirror = torch.cat(mirrors) + torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes).to(device)
    return Edges(i + atoms, j + atoms, shifts, mirror)


def _equal(cells: Tensor, others: Tensor) -> bool:
    """Whether cells are the same; of one tensor it is known without reading from the device."""
    return cells is others or torch.equal(cells, others)


def _rows(keep: Tensor, place: Tensor, count: int) -> Tensor:
    """Indices of the true ones, without reading from the device how many they are."""
    rows = torch.zeros(count + 1, dtype=torch.int64, device=keep.device)
    rows.scatter_(0, torch.where(keep, place, count), torch.arange(len(keep), device=keep.device))
    return rows[:count]


class NeighborList:
    """Edges within a cutoff, searched for again only where atoms and cells have moved out of the skin.

    Parameters
    ----------
    cutoff : float
        In Å. The edges it returns are closer than this, whatever the skin.
    skin : float
        In Å, by which the stored list reaches beyond the cutoff.

    The list is exact for every geometry. While a cell deforms, atoms count as moved by what they move beside the
    deformation, and the skin shrinks with it; a change of the boundary conditions or the atoms rebuilds the list. Each
    structure of a batch has a list of its own, so that one that moves far, is removed or is added costs the others
    nothing.

    Attributes
    ----------
    builds : int
        How often edges were searched for.
    """

    def __init__(self, cutoff: float, skin: float = 0.5):
        if skin < 0:
            raise ValueError(f"The skin must not be negative, got {skin} Å.")
        self.cutoff = cutoff
        self.skin = skin
        self.builds = 0
        self._members: list[Edges | None] = []
        self._built_for: Structures | None = None
        self._stored: Edges | None = None
        self._offsets: Tensor | None = None
        self._near: Tensor | None = None
        self._asked: Tensor | None = None
        self._found: Edges | None = None

    def __call__(self, structures: Structures) -> Edges:
        """The edges of this batch."""
        return self.edges(structures, self.question(structures).tolist())

    def question(self, structures: Structures) -> Tensor:
        """What `edges` needs to know from the device, shape (n + 2,): to be fetched with other numbers in one transfer.

        For each structure, whether its edges must be searched for again; then whether the edges within the cutoff
        have changed, and how many there are.
        """
        with torch.no_grad():
            now = structures.placed()
            if self._built_for is None or not self._same_atoms(now):
                self._members, self._stored, self._built_for = [None] * len(now), None, None
                return torch.ones(len(now) + 2, dtype=torch.float64, device=now.positions.device)
            found = self._far(now).double()
            if self._stored is None:
                return torch.cat((found, found.new_ones(2)))
            near = self._asked = self._nearby(self._stored, now)
            other = near.new_ones(()) if self._near is None else (near != self._near).any()
            return torch.cat((found, torch.stack((other, near.sum())).double()))

    def edges(self, structures: Structures, answer: Sequence[float]) -> Edges:
        """The edges of the batch that was last given to `question`, from the values of that tensor."""
        *far, other, count = answer
        wanted = [k for k, found in enumerate(self._members) if found is None or far[k]]
        if wanted or self._stored is None:
            return self._build(structures, wanted)
        if other or self._found is None:
            assert self._asked is not None
            self._near, self._found = self._asked, self._stored.select(self._asked, int(count))
        return self._found

    @torch.no_grad()
    def keep(self, members: Sequence[int], structures: Structures) -> None:
        """From now on the batch consists of these structures, which are these members of it."""
        if self._built_for is None:
            return
        self._members = [self._members[k] for k in members]
        self._built(structures.placed(), self._built_for.select(members))
        self._join_up()

    @torch.no_grad()
    def extend(self, structures: Structures) -> None:
        """From now on the batch consists of these structures, the first of which it consisted of before."""
        then = self._built_for
        if then is None:
            return
        self._members += [None] * (len(structures) - len(self._members))
        now = structures.placed()
        self._built(now, then.joined(now.select(range(len(then), len(now)))))
        self._stored = None

    @torch.no_grad()
    def _build(self, structures: Structures, wanted: list[int]) -> Edges:
        now = structures.placed()
        for k, found in zip(wanted, search_each(now, self.cutoff + self.skin, wanted), strict=True):
            self._members[k] = found
        self.builds += 1
        then = now
        if self._built_for is not None and len(wanted) < len(now):
            rows, places = now.atoms_of(wanted), torch.tensor(wanted, device=now.positions.device)
            then = now.replace(
                positions=self._built_for.positions.index_copy(0, rows, now.positions.detach()[rows]),
                cells=self._built_for.cells.index_copy(0, places, now.cells.detach()[places]),
            )
        self._built(now, then)
        self._join_up()
        assert self._stored is not None
        self._near = self._nearby(self._stored, now)
        self._found = self._stored.select(self._near)
        return self._found

    def _built(self, now: Structures, then: Structures) -> None:
        """Remember for which positions and cells the edges of this batch were searched for."""
        cells = now.cells if _equal(then.cells, now.cells) else then.cells.detach()
        self._built_for = now.replace(positions=then.positions.detach().clone(), cells=cells)

    def _join_up(self) -> None:
        """Put the stored edges of all members together, once each has been searched for."""
        self._stored = self._near = self._found = None
        known = [found for found in self._members if found is not None]
        if self._built_for is not None and len(known) == len(self._members):
            self._stored = _joined(known, self._built_for)
            self._offsets = self._stored.offsets(self._built_for).detach()

    def _nearby(self, stored: Edges, now: Structures) -> Tensor:
        """Which of the stored edges are within the cutoff."""
        assert self._built_for is not None
        if self._offsets is not None and _equal(now.cells, self._built_for.cells):
            stored = stored.with_offsets(self._offsets)
        return stored.near(self.cutoff, now)

    def _far(self, now: Structures) -> Tensor:
        """Which structures have left the skin, bool of shape (n,).

        With the deformation G from the cells of the list to these, and the largest displacement d of an atom beside it,
        atoms that are closer than the cutoff now were closer than (cutoff + 2 d) |G^-1|, and |G^-1| is at most
        1 / (1 - |G - 1|).
        """
        then = self._built_for
        assert then is not None
        before: Tensor = then.positions
        room: Tensor | float = self.skin / 2
        if not _equal(then.cells, now.cells):
            # Along directions without a cell vector nothing is deformed.
            change = torch.linalg.pinv(then.cells) @ (now.cells - then.cells)
            before = before + (before.unsqueeze(1) @ change[now.batch]).squeeze(1)
            room = room - change.square().sum((1, 2)).sqrt() * ((self.cutoff + self.skin) / 2)
        moved = now.max((now.positions - before).square().sum(1)).sqrt()
        # Written so that a NaN position counts as far.
        return ~(moved <= room)

    def _same_atoms(self, now: Structures) -> bool:
        """Whether the stored edges belong to these atoms."""
        then = self._built_for
        if then is None or then.counts != now.counts or then.positions.dtype != now.positions.dtype:
            return False
        return then.pbc is now.pbc or torch.equal(then.pbc, now.pbc)
