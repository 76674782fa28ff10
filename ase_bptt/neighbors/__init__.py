"""Neighbour edges, from a list with a skin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..structures import Structures
from .edges import Edges, joined_up
from .search import search_each


class NeighborList:
    """Edges within a cutoff, sought anew only where an atom moved more than half the skin.

    Parameters
    ----------
    cutoff : float
        In Å. The edges it returns are closer than this, whatever the skin.
    skin : float
        In Å: how much farther the stored list looks.

    The list is exact for every geometry: any change of the cells, the boundary conditions or the atoms builds it
    again, too. Each structure of a batch has its own: one that moves far, leaves or joins costs the others nothing.

    Attributes
    ----------
    builds : int
        How often edges were sought.
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
        self._near: Tensor | None = None
        self._asked: Tensor | None = None
        self._found: Edges | None = None

    def __call__(self, structures: Structures) -> Edges:
        """The edges of this batch."""
        return self.edges(structures, self.question(structures).tolist())

    def question(self, structures: Structures) -> Tensor:
        """What `edges` has to know from the device, shape (n + 2,): to be fetched with other numbers in one transfer.

        Of each structure whether its edges have to be sought; then whether other edges than before are closer than
        the cutoff, and how many are.
        """
        if self._built_for is None or not self._same_atoms(structures):
            self._members, self._stored, self._built_for = [None] * len(structures), None, None
            return torch.ones(len(structures) + 2, dtype=torch.float64, device=structures.positions.device)
        with torch.no_grad():
            moved = structures.max((structures.positions - self._built_for.positions).square().sum(1))
            # Written so that a NaN position counts as far.
            found = (~(moved <= (self.skin / 2) ** 2)).double()
            if self._stored is None:
                return torch.cat((found, found.new_ones(2)))
            near = self._asked = self._stored.near(self.cutoff, structures)
            other = near.new_ones(()) if self._near is None else (near != self._near).any()
            return torch.cat((found, torch.stack((other, near.sum())).double()))

    def edges(self, structures: Structures, answer: Sequence[float]) -> Edges:
        """The edges of the batch that the `question` was last asked for, given what it came to."""
        *far, other, count = answer
        wanted = [k for k, found in enumerate(self._members) if found is None or far[k]]
        if wanted or self._stored is None:
            return self._build(structures, wanted)
        if other or self._found is None:
            assert self._asked is not None
            self._near, self._found = self._asked, self._stored.select(self._asked, int(count))
        return self._found

    def keep(self, members: Sequence[int], structures: Structures) -> None:
        """The batch goes on as these structures, which are these members of it."""
        if self._built_for is None:
            return
        self._members = [self._members[k] for k in members]
        then = self._built_for.positions[self._built_for.atoms_of(members)]
        self._built_for = structures.replace(positions=then)
        self._join_up()

    def extend(self, structures: Structures) -> None:
        """The batch goes on as these structures, of which it was the first ones."""
        if self._built_for is None:
            return
        self._members += [None] * (len(structures) - len(self._members))
        new = structures.positions.detach()[self._built_for.n_atoms :]
        self._built_for = structures.replace(positions=torch.cat((self._built_for.positions, new)))
        self._stored = None

    def _build(self, structures: Structures, wanted: list[int]) -> Edges:
        for k, found in zip(wanted, search_each(structures, self.cutoff + self.skin, wanted), strict=True):
            self._members[k] = found
        self.builds += 1
        now = structures.positions.detach()
        if self._built_for is not None and len(wanted) < len(structures):
            rows = structures.atoms_of(wanted)
            now = self._built_for.positions.index_copy(0, rows, now[rows])
        self._built_for = structures.replace(positions=now.clone())
        self._join_up()
        assert self._stored is not None
        self._near = self._stored.near(self.cutoff, structures)
        self._found = self._stored.select(self._near)
        return self._found

    def _join_up(self) -> None:
        """The stored edges of all members as one, if all have theirs."""
        self._stored = self._near = self._found = None
        known = [found for found in self._members if found is not None]
        if self._built_for is not None and len(known) == len(self._members):
            joined = joined_up(known, self._built_for)
            self._stored = joined.with_offsets(joined.offsets(self._built_for).detach())

    def _same_atoms(self, now: Structures) -> bool:
        """Whether the stored edges are of these atoms, in these cells."""
        then = self._built_for
        if then is None or then.counts != now.counts or then.positions.dtype != now.positions.dtype:
            return False
        if then.cells is not now.cells and not torch.equal(then.cells, now.cells):
            return False
        return then.pbc is now.pbc or torch.equal(then.pbc, now.pbc)
