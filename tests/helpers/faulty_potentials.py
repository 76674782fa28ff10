"""Potentials with one fault each, which `check_potential` names."""

import torch

from ase_bptt.neighbors import Edges
from ase_bptt.potential import Prediction
from ase_bptt.potentials.analytic import LennardJones


class Faulty(LennardJones):
    """Sound, but for what a subclass spoils."""

    def __init__(self):
        super().__init__(smooth=True, rc=2.4, ro=1.8)

    def forward(self, structures, edges):
        energy = self.spoiled(super().forward(structures, edges).energy, structures, edges)
        return Prediction(energy)

    def spoiled(self, energy, structures, pairs):
        return energy


class SeesItsNeighbours(Faulty):
    def spoiled(self, energy, structures, pairs):
        return energy + 0.01 * structures.n_atoms


class KnowsWhereItIs(Faulty):
    def spoiled(self, energy, structures, pairs):
        return energy + 0.1 * structures.sum(structures.positions.sin().sum(1))


class KnowsUp(Faulty):
    def spoiled(self, energy, structures, pairs):
        along = pairs.vectors(structures)[:, 2].square()
        return energy + 0.1 * structures.sum(along.new_zeros(structures.n_atoms).index_add(0, pairs.i, along))


class CountsFromTheFirst(Faulty):
    def spoiled(self, energy, structures, pairs):
        starts = torch.tensor([0, *structures.counts[:-1]]).cumsum(0)
        rank = torch.arange(structures.n_atoms) - starts[structures.batch]
        length = pairs.vectors(structures).square().sum(1)
        nothing = length.new_zeros(structures.n_atoms)
        return energy + structures.sum(nothing.index_add(0, pairs.i, 1e-2 * rank[pairs.i] * length))


class NeedsANeighbour(Faulty):
    def spoiled(self, energy, structures, pairs):
        neighbours = torch.bincount(pairs.i, minlength=structures.n_atoms)
        return energy + structures.sum(1e-3 / neighbours)


class UnknownWithoutNeighbours(LennardJones):
    def forward(self, structures, edges):
        found = super().forward(structures, edges)
        alone = torch.bincount(edges.i, minlength=structures.n_atoms) == 0
        atomic = found.atomic_energies.masked_fill(alone, torch.nan)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)


class ForcesOfAnother(Faulty):
    def energy_and_forces(self, structures, pairs, *, create_graph=False):
        energy, forces = super().energy_and_forces(structures, pairs, create_graph=create_graph)
        return energy, 1.1 * forces


class PositionsHalfDetached(Faulty):
    def spoiled(self, energy, structures, pairs):
        here = structures.replace(positions=structures.positions.detach(), cells=structures.cells.detach())
        return (energy + LennardJones.forward(self, here, pairs).energy) / 2


class CellsDetached(Faulty):
    def forward(self, structures, edges):
        return super().forward(
            structures.replace(cells=structures.cells.detach()), Edges(edges.i, edges.j, edges.shifts)
        )


class NoSecondDerivative(Faulty):
    def energy_and_forces(self, structures, pairs, *, create_graph=False):
        return super().energy_and_forces(structures, pairs)


class OneWeightDetached(Faulty):
    def _well(self, r2):
        c6 = (self.sigma.detach() ** 2 / r2) ** 3
        return 4 * self.epsilon * (c6**2 - c6)


class EnergyDetached(Faulty):
    def spoiled(self, energy, structures, pairs):
        return energy.detach()


class EnergyFromNumpy(Faulty):
    def spoiled(self, energy, structures, pairs):
        return torch.from_numpy(energy.detach().numpy()) + 0 * self.sigma


class WeightsDetached(Faulty):
    def _well(self, r2):
        c6 = (self.sigma.detach() ** 2 / r2) ** 3
        return 4 * self.epsilon.detach() * (c6**2 - c6)


class OnlyOnce(torch.autograd.Function):
    """x times w, whose derivatives have no graph."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, gradient):
        x, w = (value.detach() for value in ctx.saved_tensors)
        return gradient * w, (gradient * x).sum()


class ForcesOnlyOnce(Faulty):
    """Forces that do not depend on the positions for autograd."""

    def _pair_energies(self, vectors):
        return OnlyOnce.apply(OnceSquared.apply(vectors).sum(1), self.epsilon * self.sigma)


class WeightsOnlyOnce(WeightsDetached):
    """Its energy has a gradient in the weights, its forces have none."""

    def _pair_energies(self, vectors):
        return OnlyOnce.apply(super()._pair_energies(vectors), self.epsilon * self.sigma)


class EpsilonOnlyOnce(Faulty):
    def _pair_energies(self, vectors):
        return OnlyOnce.apply(super()._pair_energies(vectors), self.epsilon)


class OnceSquared(torch.autograd.Function):
    """x squared, whose derivative is constant for autograd."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0].detach()


class SpringsOnlyOnce(Faulty):
    def spoiled(self, energy, structures, pairs):
        squared = OnceSquared.apply(pairs.vectors(structures)).sum(1)
        return energy + structures.sum(squared.new_zeros(structures.n_atoms).index_add(0, pairs.i, squared))


class VolumeOnlyOnce(Faulty):
    def spoiled(self, energy, structures, pairs):
        return energy + OnceSquared.apply(structures.volumes)


class FeelsTheCharge(Faulty):
    def spoiled(self, energy, structures, pairs):
        return energy + 0.1 * structures.charges.square() * energy


class FeelsTheSpin(FeelsTheCharge):
    inputs = frozenset({"charge"})

    def spoiled(self, energy, structures, pairs):
        return super().spoiled(energy, structures, pairs) + 0.1 * (structures.spins - 1) * energy


class IgnoresTheSpin(FeelsTheCharge):
    inputs = frozenset({"charge", "spin"})


class ChargeOfTheFirst(Faulty):
    inputs = frozenset({"charge"})

    def spoiled(self, energy, structures, pairs):
        return energy + 0.1 * structures.charges[0] * energy


class FeelsTheField(Faulty):
    inputs = frozenset({"field"})


class EndsAtOnce(Faulty):
    def _switch(self, r2):
        return torch.ones_like(r2)


class LosesAnAtomicEnergy(LennardJones):
    def forward(self, structures, edges):
        found = super().forward(structures, edges)
        return Prediction(found.energy, atomic_energies=found.atomic_energies * 0.9)


class Thaws(Faulty):
    def _weights_aside(self):
        self.requires_grad_()
        return super()._weights_aside()


class Drifts(Faulty):
    def spoiled(self, energy, structures, pairs):
        self.sigma.data.add_(1e-12)
        return energy


class SwitchesGradientsOn(Faulty):
    def results(self, structures, pairs):
        structures.positions.requires_grad_()
        return super().results(structures, pairs)


class EnergiesInAColumn(Faulty):
    def spoiled(self, energy, structures, pairs):
        return energy[:, None]


class OneEnergyForAll(Faulty):
    def spoiled(self, energy, structures, pairs):
        return energy.sum()


class RoundsItsEnergy(Faulty):
    def spoiled(self, energy, structures, pairs):
        return energy.float()


class Asserts(Faulty):
    def spoiled(self, energy, structures, pairs):
        assert len(structures) == 1, "one at a time"
        return energy


class Breaks(Faulty):
    def spoiled(self, energy, structures, pairs):
        if len(structures) > 1:
            raise IndexError("out of range")
        return energy


FAULTS = [
    (EnergyDetached, "graph", "its energy has no graph"),
    (EnergyFromNumpy, "graph", "autograd does not reach the positions from its energy"),
    (WeightsDetached, "graph", "autograd reaches none of its weights from its energy"),
    (OneWeightDetached, "graph", "depends on the weight sigma, which autograd does not reach"),
    (EnergiesInAColumn, "shapes", "shape of its energy is (1, 1) and not (1,)"),
    (OneEnergyForAll, "shapes", "shape of its energy is () and not (1,)"),
    (RoundsItsEnergy, "shapes", "dtype of its energy is torch.float32 and not torch.float64"),
    (ForcesOfAnother, "calls", "forces"),
    (LosesAnAtomicEnergy, "partition", "energy"),
    (SeesItsNeighbours, "batch", "energy"),
    (Breaks, "batch", "IndexError"),
    (Asserts, "batch", "AssertionError (one at a time)"),
    (KnowsWhereItIs, "translation", "energy"),
    (KnowsUp, "rotation", "energy"),
    (CountsFromTheFirst, "permutation", "energy"),
    (PositionsHalfDetached, "forces", "negative gradient of its energy"),
    (CellsDetached, "stress", "strain"),
    (NoSecondDerivative, "gradient", "without a graph"),
    (ForcesOnlyOnce, "gradient", "gave forces without a graph"),
    (WeightsOnlyOnce, "gradient", "autograd does not reach the weights from its forces, whose graph is cut"),
    (EpsilonOnlyOnce, "gradient", "second derivatives (gradient weights) from differences of its forces"),
    (SpringsOnlyOnce, "gradient", "second derivatives (gradient positions) from differences of its forces"),
    (VolumeOnlyOnce, "cells", "second derivatives (cells strain) from differences of its stress"),
    (FeelsTheCharge, "charge", "do not name 'charge', and its results change when info['charge'] does"),
    (FeelsTheSpin, "charge", "do not name 'spin', and its results change when info['spin'] does"),
    (IgnoresTheSpin, "charge", "name 'spin', and nothing changes when info['spin'] does"),
    (ChargeOfTheFirst, "charge", "each member of a batch with several charges and spins"),
    (FeelsTheField, "charge", "name 'field', and there are charge and spin only"),
    (EndsAtOnce, "cutoff", "its energy with an atom just beyond the cutoff from that just within it"),
    (Thaws, "untouched", "requires_grad"),
    (Drifts, "untouched", "value of its weight sigma"),
    (SwitchesGradientsOn, "untouched", "positions that it was given"),
]
