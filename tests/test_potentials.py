"""Every adapter: the contract, and the family's own calculator."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT as AseEMT
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.calculators.morse import MorsePotential
from helpers.potentials import lennard_jones, needs_chgnet, needs_mace, tiny_mace
from helpers.structures import argon, cluster, methanol, rattled, silicon, skewed

from ase_bptt import load_potential
from ase_bptt.neighbors import Edges, NeighborList
from ase_bptt.potential import Prediction
from ase_bptt.potentials import mace, require
from ase_bptt.potentials.analytic import LennardJones, Morse
from ase_bptt.potentials.emt import EMT
from ase_bptt.structures import Structures
from ase_bptt.testing import check_potential


def evaluate(potential, atoms):
    structures = Structures.from_atoms(atoms, dtype=potential.dtype)
    return potential.results(structures, NeighborList(potential.cutoff)(structures))


def mace_potential(**changes):
    from ase_bptt.potentials.mace import MACE

    return MACE(tiny_mace(**changes))


def chgnet_potential(variant=None, dtype=torch.float64):
    from ase_bptt.potentials.chgnet import CHGNet

    return CHGNet.from_name(variant).to(dtype)


def mace_calculator():
    from mace.calculators import MACECalculator

    return MACECalculator(models=tiny_mace(), device="cpu", default_dtype="float64")


def alloy():
    atoms = bulk("Pd", cubic=True)
    atoms.symbols = "AlNiCuPd"
    return rattled(atoms)


CASES = [
    pytest.param(lambda: lennard_jones(True), argon, lambda: AseLennardJones(rc=2.4, ro=1.8, smooth=True), id="lj"),
    pytest.param(lambda: lennard_jones(False), cluster, lambda: AseLennardJones(rc=2.4), id="lj-cluster"),
    pytest.param(EMT, alloy, AseEMT, id="emt"),
    pytest.param(lambda: Morse(), cluster, lambda: MorsePotential(), id="morse"),
    pytest.param(lambda: load_potential("direct"), silicon, None, id="direct"),
    pytest.param(lambda: load_potential("direct"), methanol, None, id="direct-molecule"),
    pytest.param(lambda: load_potential("mace-si"), silicon, None, id="mace-si", marks=needs_mace),
    pytest.param(mace_potential, silicon, mace_calculator, id="mace", marks=needs_mace),
    pytest.param(mace_potential, skewed, mace_calculator, id="mace-primitive", marks=needs_mace),
    pytest.param(mace_potential, lambda: methanol()[[0, 1]], mace_calculator, id="mace-molecule", marks=needs_mace),
    pytest.param(chgnet_potential, silicon, None, id="chgnet", marks=needs_chgnet),
    pytest.param(chgnet_potential, skewed, None, id="chgnet-primitive", marks=needs_chgnet),
    pytest.param(chgnet_potential, methanol, None, id="chgnet-molecule", marks=needs_chgnet),
]


OWN = {"emt": {"cutoff": 8e-4}}
"""ASE's EMT leaves 1e-4 of an interaction at its cutoff."""


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("make", "atoms", "calculator"), CASES)
def test_every_family_keeps_the_contract(make, atoms, calculator, dtype):
    """Differences, invariances, second derivatives, batches, and the family's own calculator."""
    # A calculator in float64 says nothing of rounding.
    compared = calculator() if calculator and dtype == "float64" else None
    potential = load_potential(make(), dtype=dtype)
    report = check_potential(potential, atoms(), calculator=compared, tolerances=OWN.get(potential.family))
    left_out = {"parity"} if compared is None else set()
    if not potential.conservative:
        left_out |= {"forces", "stress", "cells"}
    if atoms().cell.rank < 3:
        left_out |= {"stress", "cells"}
    if not potential.atomic_properties:
        left_out |= {"partition"}
    assert set(report.skipped) == left_out


@pytest.mark.parametrize("smooth", [True, False])
def test_lennard_jones_has_ases_stresses_of_atoms(smooth):
    atoms, potential = argon(), lennard_jones(smooth)
    atoms.calc = AseLennardJones(rc=2.4, ro=1.8, smooth=smooth)
    structures = Structures.from_atoms(atoms)
    stresses = potential.stresses(structures, NeighborList(potential.cutoff)(structures))
    np.testing.assert_allclose(
        stresses[:, [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]].detach(), atoms.get_stresses(), atol=1e-10
    )


@pytest.fixture
def chgnet_module(capsys):
    """A loader of chgnet's own modules; it greets on standard output."""
    from chgnet.model.model import CHGNet

    yield lambda variant: CHGNet.load(model_name=variant, use_device="cpu", verbose=False)
    capsys.readouterr()


@needs_chgnet
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
@pytest.mark.parametrize("variant", ["0.3.0", "0.2.0", "r2scan"])
@pytest.mark.parametrize("atoms", [silicon, skewed], ids=["silicon", "primitive"])
class TestCHGNetParity:
    def test_float32_equals_its_own_calculator_and_leaves_it_alone(self, variant, atoms, chgnet_module):
        from chgnet.model.dynamics import CHGNetCalculator

        calculator = CHGNetCalculator(chgnet_module(variant), use_device="cpu")
        evaluate(chgnet_potential(variant, torch.float64), atoms())
        report = check_potential(chgnet_potential(variant, torch.float32), atoms(), calculator=calculator)
        assert {f"parity {name}" for name in ("energy", "forces", "stress", "magmoms")} <= report.measured.keys()

    def test_float64_equals_its_own_graph_in_float64(self, variant, atoms, chgnet_module, monkeypatch):
        from chgnet.graph import converter, crystalgraph
        from chgnet.model import model as chgnet_model
        from pymatgen.io.ase import AseAtomsAdaptor

        for module in (converter, crystalgraph, chgnet_model):
            monkeypatch.setattr(module, "TORCH_DTYPE", torch.float64)
        atoms, model = atoms(), chgnet_module(variant).double()
        model.composition_model.float()
        expected = model.predict_structure(AseAtomsAdaptor.get_structure(atoms), task="efsm")
        found = evaluate(chgnet_potential(variant, torch.float64), atoms)
        assert found["energy"].item() / len(atoms) == pytest.approx(float(expected["e"]), abs=1e-6)
        np.testing.assert_allclose(found["forces"], expected["f"], atol=1e-6)
        np.testing.assert_allclose(found["stress"][0], expected["s"] / 160.21766208, atol=1e-6)


def test_unknown_elements_are_named():
    potential = lennard_jones()
    potential.atomic_numbers = frozenset({14, 18})
    with pytest.raises(NotImplementedError, match=r"no parameters for Cu; it knows Si Ar"):
        potential.check(Structures.from_atoms(bulk("Cu")))


def test_a_lone_atom_has_no_forces():
    found = evaluate(LennardJones(), Atoms("Ar"))
    assert found["energy"].item() == 0
    assert not found["forces"].any()
    assert torch.isnan(found["stress"]).all()


class OwnOffsets(LennardJones):
    """Finds the images by itself, and knows the volume."""

    def forward(self, structures, edges):
        offsets = (edges.shifts[:, None] @ structures.cells[structures.batch[edges.i]]).squeeze(1)
        vectors = structures.positions[edges.j] - structures.positions[edges.i] + offsets
        halves = vectors.new_zeros(structures.n_atoms).index_add(0, edges.i, self._pair_energies(vectors) / 2)
        return Prediction(structures.sum(halves) + structures.volumes.log())


def test_the_stress_holds_what_acts_through_the_cells_themselves():
    atoms, plain, own = argon(), lennard_jones(), OwnOffsets(smooth=True, rc=2.4, ro=1.8)
    pressure = torch.eye(3, dtype=torch.float64) / atoms.get_volume()
    torch.testing.assert_close(
        evaluate(own, atoms)["stress"][0], evaluate(plain, atoms)["stress"][0] + pressure, atol=1e-12, rtol=0
    )


MACES = [
    {},
    {"distance_transform": "Agnesi", "pair_repulsion": True},
    {"interaction_cls": "RealAgnosticDensityResidualInteractionBlock", "apply_cutoff": False},
    {"interaction_cls": "RealAgnosticAttResidualInteractionBlock"},
    {"hidden_irreps": "4x0e + 4x1o + 4x2e", "max_ell": 3, "correlation": 3},
]


@needs_mace
@pytest.mark.parametrize("changes", MACES, ids=lambda c: "-".join(map(str, c.values())) or "plain")
@pytest.mark.parametrize("make", [silicon, skewed, methanol])
def test_mace_with_less_work_is_mace(make, changes, monkeypatch):
    """Distances computed once, our tensor products and contractions: mace-torch's results, and derivatives of them."""
    classes, irreps = require("mace.modules", extra="mace").interaction_classes, require("e3nn.o3", extra="mace").Irreps
    of_names = {"interaction_cls": classes.get, "hidden_irreps": irreps}
    changes = {k: of_names[k](v) if k in of_names else v for k, v in changes.items()}
    potential = mace_potential(elements=(1, 6, 8, 14), **changes)
    structures = Structures.from_atoms([make(), make()[1:]])
    pairs = NeighborList(potential.cutoff)(structures)

    def found(edges):
        positions = structures.positions.clone().requires_grad_()
        _, forces = potential.energy_and_forces(structures.replace(positions=positions), edges, create_graph=True)
        weights = [p for p in potential.parameters() if p.requires_grad]
        second = torch.autograd.grad(forces.square().sum(), [positions, *weights], allow_unused=True)
        return potential.results(structures, edges), [g for g in second if g is not None]

    less = found(pairs)
    monkeypatch.setattr(mace, "with_faster_layers", lambda model, groups: model)
    more = found(Edges(pairs.i, pairs.j, pairs.shifts))
    torch.testing.assert_close(less, more, atol=1e-11, rtol=1e-9, equal_nan=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in potential.modules())
