import re
import time

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.neighborlist import neighbor_list
from helpers.structures import silicon

from ase_bptt import TorchCalculator, load_potential, relax
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
        atoms.set_cell(atoms.cell * 1.2)
    elif change == "pbc":
        atoms.pbc = (True, True, False)
    else:
        del atoms[0]
    assert as_set(neighbors(Structures.from_atoms(atoms))) == ase_set(atoms, 3.0)
    assert neighbors.builds == 2


def sparse(kind: str) -> Atoms:
    """A structure in far more space than its atoms need."""
    atoms = bulk("Cu", cubic=True)
    if kind == "far above a slab":
        atoms.pbc = (1, 1, 0)
        atoms.positions[0, 2] += 1e7
    elif kind == "far below a wire":
        atoms.pbc = (0, 0, 1)
        atoms.positions[1, :2] -= 3e6
    elif kind == "far in a molecule":
        atoms.pbc = False
        atoms.positions[2] += 1e7
    elif kind == "a long cell":
        atoms.set_cell([3.6, 3.6, 1e6])
    elif kind == "a long cell in two directions":
        atoms.set_cell([1e6, 3.6, 1e7])
        atoms.positions[0, 0] += 4e5
    elif kind == "many images away":
        atoms.positions[1] += 1e6 * atoms.cell[2] - 3e6 * atoms.cell[0]
    elif kind == "a skewed cell":
        cell = atoms.cell.array
        atoms.set_cell(np.stack([cell[0], cell[1] + 300 * cell[0], cell[2] - 500 * cell[1]]))
    elif kind == "a gas":
        spread = np.random.default_rng(0).uniform(0, 1e6, (300, 2))
        spread = np.repeat(spread, 2, axis=0)
        heights = np.tile([0.0, 2.5], 300)
        atoms = Atoms("Cu600", positions=np.column_stack([spread, heights]), cell=[1e6, 1e6, 8], pbc=True)
    return atoms


SPARSE = {
    "far above a slab": 48,
    "far below a wire": 22,
    "far in a molecule": 6,
    "a long cell": 80,
    "a long cell in two directions": 22,
    "many images away": 168,
    "a skewed cell": 168,
    "a gas": 600,
}


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_structures_cost_their_atoms_and_not_their_box(kind):
    structures = Structures.from_atoms(sparse(kind))
    start = time.perf_counter()
    edges = find_edges(structures, 5.0)
    assert time.perf_counter() - start < 1.0
    assert edges.mirror is not None
    assert len(edges.i) == SPARSE[kind]
    assert edges.vectors(structures).norm(dim=1).max() < 5.0


@pytest.mark.parametrize("kind", SPARSE)
def test_energies_of_sparse_structures_are_those_of_ases_emt(kind):
    atoms = sparse(kind)
    found = load_potential("emt").results(structures := Structures.from_atoms(atoms), find_edges(structures, 7.5))
    if kind in ("many images away", "a skewed cell"):  # the same crystal
        atoms = bulk("Cu", cubic=True)
    if kind != "a gas":  # ASE's own takes minutes
        atoms.calc = EMT()
        np.testing.assert_allclose(found["energy"].item(), atoms.get_potential_energy(), atol=1e-7)


def test_bins_of_the_search_are_never_so_many_that_it_divides_by_zero():
    rng = np.random.default_rng(0)
    flat = np.column_stack([rng.uniform(0, 1e6, (2000, 2)), rng.uniform(0, 4, 2000)])
    atoms = Atoms("H2000", positions=flat, cell=[1e6, 1e6, 4], pbc=True)
    # Every atom meets its own images along the short vector, and nothing else.
    assert len(find_edges(Structures.from_atoms(atoms), 5.0).i) == 2 * 2000


def flawed(kind: str) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    if kind == "no cell":
        atoms.cell[:] = 0
    elif kind == "no cell in one direction":
        atoms = Atoms("Cu4", positions=atoms.positions, pbc=(True, False, False))
    elif kind == "flat":
        atoms.set_cell([[3, 0, 0], [6, 0, 0], [0, 0, 3]])
    elif kind == "infinite":
        atoms.set_cell([3, np.inf, 3])
    elif kind == "nan":
        atoms.set_cell([3, np.nan, 3])
    elif kind == "collapsed":
        atoms.set_cell([0.3] * 3)
    elif kind == "narrow":
        atoms.set_cell([1e-3, 1e-3, 9])
        atoms.pbc = (True, True, False)
    elif kind == "astronomical":
        atoms.positions[0] += 1e14
    elif kind == "far in single precision":
        atoms.positions[0] += 1e5
    return atoms


FLAWS = {
    "no cell": "Cu4 is periodic along a cell vector of length zero: set its cell or its pbc.",
    "no cell in one direction": "Cu4 is periodic along a cell vector of length zero: set its cell or its pbc.",
    "flat": "Cu4 is periodic along cell vectors that are linearly dependent: set its cell or its pbc.",
    "infinite": "Cu4 has a cell vector that is not finite, or too long to compute with: set its cell.",
    "nan": "Cu4 has a cell vector that is not finite, or too long to compute with: set its cell.",
    "collapsed": "Cu4 has a cell of 0.027 Å^3, less than 0.01 Å^3 for each of its atoms: check its cell and its units.",
    "narrow": "Cu4 has a cell so small that more than 67108864 images of its atoms lie within 5 Å: check its cell "
    "and its units.",
    "astronomical": "Cu4 has an atom more than 4,503,599,627,370 Å from the origin, where float64 does not resolve "
    "0.001 Å: move the structure to the origin, or compute in float64.",
    "far in single precision": "Cu4 has an atom more than 8,389 Å from the origin, where float32 does not resolve "
    "0.001 Å: move the structure to the origin, or compute in float64.",
}


@pytest.mark.parametrize("kind", FLAWS)
def test_what_cannot_be_searched_is_refused_in_one_sentence(kind):
    dtype = torch.float32 if "single" in kind else torch.float64
    structures = Structures.from_atoms([silicon(), flawed(kind)], dtype=dtype)
    with pytest.raises(ValueError, match=re.escape(FLAWS[kind].replace("Cu4", "Structure 1 (Cu4)"))):
        find_edges(structures, 5.0)


@pytest.mark.parametrize("kind", [kind for kind in FLAWS if "single" not in kind])
def test_the_same_sentence_ends_a_calculation_and_a_relaxation(kind):
    atoms = flawed(kind)
    with pytest.raises(ValueError, match=r"Cu4 (is periodic|has a)"):
        relax(load_potential("emt"), atoms, steps=1)
    atoms.calc = TorchCalculator("emt")
    with pytest.raises(ValueError, match=r"Cu4 (is periodic|has a)"):
        atoms.get_potential_energy()


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
