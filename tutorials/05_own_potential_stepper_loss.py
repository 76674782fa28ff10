"""A potential, an update rule and a loss of your own, fine-tuned through the relaxation.

    python tutorials/05_own_potential_stepper_loss.py

A Rydberg pair potential for copper learns the length of its bond and the width of its well from the relaxed
structures of small clusters; energies and forces of the reference, ASE's EMT, are not used. Prints that its
forces are the negative gradient of its energies, its gradient through the new update rule, its parameters before
and after, and how far from EMT's structures larger clusters end than those in training.
"""

import numpy as np
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.fd import calculate_numerical_forces
from ase.cluster import Decahedron, Icosahedron, Octahedron
from ase.optimize import BFGS
from torch import nn

from ase_bptt import Potential, Prediction, RelaxationPair, Structures, TorchCalculator, Trainer, relax
from ase_bptt.adjoints import FullTape, Replay
from ase_bptt.steppers import State, Stepper


# 1. A potential gives energies; forces, stress and all gradients follow from them. The pairs are those within
#    `cutoff`, each in both directions, with vectors that are attached to positions and cells.
class Rydberg(Potential):
    """-depth (1 + x) exp(-x) with x = width (r - length), a pair; in eV, 1/Å and Å."""

    family = "rydberg"
    cutoff = 12.0  # wider than any cluster here, so no pair is cut off

    def __init__(self, depth: float = 0.4, width: float = 2.2, length: float = 2.8):
        super().__init__()
        self.depth, self.width, self.length = (
            nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (depth, width, length)
        )

    def forward(self, structures, edges):
        """Half of each pair's energy to each of its two atoms, then the sum over each structure."""
        x = self.width * (edges.vectors(structures).norm(dim=1) - self.length)
        halves = -self.depth * (1 + x) * torch.exp(-x) / 2
        atomic = halves.new_zeros(structures.n_atoms).index_add(0, edges.i, halves)
        return Prediction(structures.sum(atomic), atomic_energies=atomic)

    # The rest is needed only to save it, and to find it by name. Put the class into a package of yours, with
    # these lines in its pyproject.toml,
    #     [project.entry-points."ase_bptt.potentials"]
    #     rydberg = "my_package.rydberg:Rydberg"
    # and install it: load_potential("rydberg"), TorchCalculator on a folder that Trainer.save wrote, and
    # ase-bptt train --potential rydberg then find it. The name on the left must be the family.
    @classmethod
    def from_name(cls, variant):
        """`load_potential("rydberg")`; a variant would come after a colon."""
        return cls()

    def config(self):
        """JSON that builds the module again, its weights apart; it goes into model.json."""
        return {}

    @classmethod
    def from_config(cls, config):
        """The module for weights that are read from weights.pt."""
        return cls(**config)


# 2. A stepper moves all structures of a batch by one frame. It is a pure function: what it remembers is in the State,
#    tensors are replaced and not changed in place, and a decision is a torch.where.
class HeavyBall(Stepper):
    """v <- (1 - friction) v + F; X <- X + step_size v, no structure farther than maxstep (Å) in all."""

    name = "heavy ball"
    fields = ("step_size", "friction", "maxstep")

    def __init__(self, step_size=0.02, friction=0.4, maxstep=0.3):
        super().__init__()
        self.step_size, self.friction, self.maxstep = step_size, friction, maxstep

    def init(self, positions, n):
        """At rest."""
        return State(atoms={"velocities": torch.zeros_like(positions)})

    def step(self, positions, forces, state, batch):
        """One frame."""
        velocities = (1 - self.friction) * state.atoms["velocities"] + forces
        moves = self.step_size * velocities
        square = moves.new_zeros(int(batch[-1]) + 1).index_add(0, batch, moves.square().sum(1))
        far = square > self.maxstep**2
        # The root's argument is guarded too: its derivative at zero is infinite, and infinity times zero is NaN.
        factor = torch.where(far, self.maxstep / torch.where(far, square, 1.0).sqrt(), 1.0)
        return positions + factor[batch, None] * moves, State(atoms={"velocities": velocities})


# 3. A loss takes the relaxation and the reference as two batches, and gives one number for each structure.
def bond_lengths(relaxation, reference):
    """Mean squared error of all interatomic distances, in Å^2: blind to rotations of the cluster."""
    ends = relaxation.positions.split(reference.counts)
    targets = reference.positions.split(reference.counts)
    return torch.stack(
        [(nn.functional.pdist(x) - nn.functional.pdist(y)).square().mean() for x, y in zip(ends, targets)]
    )


# 4. The reference: compact clusters, rattled, and relaxed with EMT. All rattles of one shape are one group.
SHAPES = {
    "Cu6": Octahedron("Cu", length=2),
    "Cu7": Decahedron("Cu", p=2, q=1, r=0),
    "Cu13": Icosahedron("Cu", noshells=2),
    "Cu19": Octahedron("Cu", length=3),
}


def rattled(shape, seed):
    """A cluster of this shape, its atoms moved at random."""
    atoms = Atoms(SHAPES[shape].numbers, positions=SHAPES[shape].positions)
    atoms.rattle(0.1, seed=seed)
    return atoms


def reference(shape, seed):
    """The pair of a rattled cluster and the same after EMT's relaxation."""
    relaxed = rattled(shape, seed)
    relaxed.calc = EMT()
    BFGS(relaxed, logfile=None).run(fmax=0.01)
    return RelaxationPair(rattled(shape, seed), relaxed, id=f"{shape}_{seed}", group=shape)


train, valid, test = (
    [reference(shape, seed) for shape in shapes for seed in range(3)]
    for shapes in (("Cu6", "Cu7"), ("Cu13",), ("Cu19",))
)

# Forces follow from the energies; ASE's finite differences agree.
atoms = rattled("Cu13", 0)
atoms.calc = TorchCalculator(Rydberg())
difference = np.abs(atoms.get_forces() - calculate_numerical_forces(atoms, eps=1e-4)).max()
print("forces are the negative gradient of the energies:", difference < 1e-6)
assert difference < 1e-6

# The gradient through the new stepper: Replay's is that of the full tape.
potential = Rydberg()
found = {}
for adjoint in (FullTape(), Replay()):
    run = relax(potential, [p.initial for p in train], stepper=HeavyBall(), fmax=0.0, steps=12, adjoint=adjoint)
    loss = bond_lengths(run, Structures.from_atoms([p.relaxed for p in train])).mean()
    found[adjoint.name] = torch.stack(torch.autograd.grad(loss, list(potential.parameters())))
print("gradient with respect to depth, width and length:", " ".join(f"{g:.4f}" for g in found["replay"]))
assert torch.allclose(found["full"], found["replay"], rtol=1e-10, atol=0)

# 5. Fine-tune on structures alone (terms=()). Where a relaxation ends depends on the shape of the minima, not on
#    the depth, which only decides how fast it gets there. The depth cannot be learnt from ends, and is frozen.
#    Of the 40 epochs, the best one on the cluster of 13 atoms is kept.
potential.depth.requires_grad_(False)
trainer = Trainer(
    potential,
    stepper=HeavyBall(),
    loss=bond_lengths,
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
    steps=20,
    batch_size=6,
    rattle=0.0,
    terms=(),
)
before = trainer.evaluate(test)
trainer.fit(train, valid, epochs=40)
after = trainer.evaluate(test)
print(f"best on 13 atoms: epoch {trainer.best_epoch} of {trainer.epoch}")
print(f"depth {potential.depth.item():.2f} eV, width 2.20 -> {potential.width.item():.2f} 1/Å, ", end="")
print(f"length 2.80 -> {potential.length.item():.2f} Å")
print("clusters of 19 atoms, trained on 6 and 7: Delta-Q to EMT in amu^1/2 Å")
for b, a in zip(before.rows, after.rows):
    print(f"{b.id}: {b.delta_q:.2f} before, {a.delta_q:.2f} after")
assert potential.depth.item() == 0.4
assert after.mean < 0.5 * before.mean
