import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list
from helpers.structures import silicon

from ase_bptt.neighbors import NeighborList, find_edges, search_each
from ase_bptt.neighbors.search import feasible, search_on_device
from ase_bptt.structures import Structures


def as_set(pairs):
    return set(map(tuple, np.column_stack([pairs.i, pairs.j, pairs.shifts.to(torch.int64)]).tolist()))


def ase_set(atoms, cutoff):
    i, j, shifts = neighbor_list("ijS", atoms, cutoff)
    return set(map(tuple, np.column_stack([i, j, shifts]).tolist()))


def random_atoms(seed):
    rng = np.random.default_rng(seed)
    cell = np.eye(3) * rng.uniform(1.5, 5) + rng.normal(size=(3, 3))
    pbc = rng.random(3) < 0.5
    if rng.random() < 0.3:
        cell[~pbc] = 0
    n = int(rng.integers(1, 12))
    atoms = Atoms("H" * n, positions=rng.uniform(-8, 8, (n, 3)), cell=cell, pbc=pbc)
    return atoms, rng.uniform(0.5, 6)


@pytest.mark.parametrize("seed", range(40))
def test_random_cells_equal_ase(seed):
    atoms, cutoff = random_atoms(seed)
    assert as_set(find_edges(Structures.from_atoms(atoms), cutoff)) == ase_set(atoms, cutoff)


@pytest.mark.parametrize("block", [50, 10**6])
def test_where_the_structures_are_the_same_pairs_are_found_in_the_same_order(block, monkeypatch):
    monkeypatch.setattr("ase_bptt.neighbors.search.BLOCK", block)
    batch = Structures.from_atoms([random_atoms(seed)[0] for seed in range(40)] + [silicon(), Atoms("He")])
    host = search_each(batch, 3.3)
    found = search_on_device(batch.positions, batch.counts, batch.cells.numpy(), batch.pbc.numpy(), 3.3)
    for by_host, (i, j, shifts, mirror) in zip(host, found, strict=True):
        assert torch.equal(i, by_host.i)
        assert torch.equal(j, by_host.j)
        assert torch.equal(shifts, by_host.shifts)
        assert torch.equal(mirror, by_host.mirror)


def test_an_atom_that_is_nowhere_has_no_pairs_and_takes_none_from_others():
    lost = silicon()
    lost.positions[3] = np.nan
    batch = Structures.from_atoms([lost, silicon()])
    found = search_on_device(batch.positions, batch.counts, batch.cells.numpy(), batch.pbc.numpy(), 3.0)
    assert not (found[0][0] == 3).any()
    assert torch.equal(found[1][0], search_each(batch, 3.0)[1].i)


def test_large_structures_are_left_to_the_host():
    box = (np.eye(3)[None] * 20, np.ones((1, 3), bool), 5.0)
    assert feasible([1000], *box)
    assert not feasible([10000], *box)


@pytest.mark.parametrize(
    "atoms", [bulk("Si"), molecule("H2O"), Atoms("He"), bulk("Cu", cubic=True)], ids=lambda a: str(a.symbols)
)
def test_ordinary_structures_equal_ase(atoms):
    assert as_set(find_edges(Structures.from_atoms(atoms), 6.0)) == ase_set(atoms, 6.0)


def test_a_batch_is_its_members():
    members = [silicon(), Atoms("He"), bulk("Si"), molecule("H2O")]
    pairs = find_edges(Structures.from_atoms(members), 4.0)
    expected, first = set(), 0
    for atoms in members:
        expected |= {(i + first, j + first, *s) for i, j, *s in ase_set(atoms, 4.0)}
        first += len(atoms)
    assert as_set(pairs) == expected


def test_vectors_are_shorter_than_the_cutoff_and_come_in_both_directions():
    structures = Structures.from_atoms(silicon())
    vectors = find_edges(structures, 5.0).vectors(structures)
    assert vectors.norm(dim=1).max() < 5.0
    torch.testing.assert_close(vectors.sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)


def test_the_skin_saves_searches_and_changes_nothing():
    rng = np.random.default_rng(0)
    neighbors = NeighborList(cutoff=3.0, skin=0.6)
    atoms = silicon()
    for _ in range(30):
        atoms.positions += rng.normal(0, 0.05, (8, 3))
        assert as_set(neighbors(Structures.from_atoms(atoms))) == ase_set(atoms, 3.0)
    assert 1 < neighbors.builds < 15


@pytest.mark.parametrize("members", [[silicon()], [bulk("Si"), molecule("H2O"), silicon(), Atoms("He")]], ids=len)
@pytest.mark.parametrize("cutoff", [2.5, 4.0])
def test_every_pair_knows_its_other_direction(members, cutoff):
    pairs = NeighborList(cutoff, skin=0.6)(Structures.from_atoms(members))
    ahead, back = pairs.one_way_first.reshape(2, -1)
    assert sorted(pairs.one_way_first.tolist()) == list(range(len(pairs.i)))
    for one, other in [(torch.arange(len(pairs.i)), pairs.mirror), (ahead, back)]:
        assert torch.equal(pairs.i[one], pairs.j[other])
        assert torch.equal(pairs.j[one], pairs.i[other])
        assert torch.equal(pairs.shifts[one], -pairs.shifts[other])


def test_it_is_rebuilt_only_beyond_half_the_skin():
    neighbors = NeighborList(cutoff=3.0, skin=0.5)
    atoms = silicon()
    neighbors(Structures.from_atoms(atoms))
    atoms.positions[0, 0] += 0.249
    neighbors(Structures.from_atoms(atoms))
    assert neighbors.builds == 1
    atoms.positions[0, 0] += 0.002
    neighbors(Structures.from_atoms(atoms))
    assert neighbors.builds == 2


@pytest.mark.parametrize("change", ["cell", "pbc", "atoms"])
def test_it_is_rebuilt_after_any_other_change(change):
    neighbors = NeighborList(cutoff=3.0, skin=0.5)
    atoms = silicon()
    neighbors(Structures.from_atoms(atoms))
    if change == "cell":
        atoms.set_cell(atoms.cell * 1.001)
    elif change == "pbc":
        atoms.pbc = (True, True, False)
    else:
        del atoms[0]
    assert as_set(neighbors(Structures.from_atoms(atoms))) == ase_set(atoms, 3.0)
    assert neighbors.builds == 2


def test_a_periodic_direction_without_a_cell_vector_is_refused():
    with pytest.raises(ValueError, match="periodic along a cell vector of length zero"):
        find_edges(Structures.from_atoms(Atoms("H", pbc=(True, False, False))), 3.0)


def test_a_negative_skin_is_refused():
    with pytest.raises(ValueError, match="skin must not be negative"):
        NeighborList(3.0, skin=-0.1)


def test_a_huge_cutoff_costs_nothing_where_nothing_repeats():
    dimer = Structures.from_atoms(Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 1.1]]))
    assert as_set(find_edges(dimer, 1e5)) == as_set(find_edges(dimer, 2.0))


def test_members_that_stay_or_join_keep_their_pairs(monkeypatch):
    sought = []

    def spied(structures, cutoff, members=None):
        if members is not None:
            sought.append([structures.counts[k] for k in members])
        return search_each(structures, cutoff, members)

    monkeypatch.setattr("ase_bptt.neighbors.search_each", spied)
    members = [silicon(), Atoms("He"), bulk("Si"), molecule("H2O")]
    neighbors = NeighborList(cutoff=3.0, skin=0.5)
    neighbors(Structures.from_atoms(members))
    left = Structures.from_atoms([members[0], members[3]])
    neighbors.keep([0, 3], left)
    assert torch.equal(neighbors(left).i, find_edges(left, 3.0).i)
    joined = Structures.from_atoms([members[0], members[3], bulk("Cu", cubic=True)])
    neighbors.extend(joined)
    found, expected = neighbors(joined), find_edges(joined, 3.0)
    for name in ("i", "j", "shifts", "mirror"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    far = joined.positions.clone()
    far[8] += 0.3  # of the water alone
    moved = joined.replace(positions=far)
    assert as_set(neighbors(moved)) == as_set(find_edges(moved, 3.0))
    assert sought == [[8, 1, 2, 3], [4], [3]]
