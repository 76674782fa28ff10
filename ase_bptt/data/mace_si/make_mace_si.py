"""Pretrain mace-si, a small MACE that imitates CHGNet 0.3.0 on silicon with point defects.

The published model was made on one core of a busy machine (times for other machines differ by a factor of two or so):

    label a.extxyz --seed 11                                       624 walkers follow CHGNet, 6,800 cells: 10 min
    label b.extxyz --seed 12                                       the same: 10 min
    train a.extxyz b.extxyz --out first --minutes 16               12,000 steps
    label c.extxyz --seed 21 --walkers 528 --guide first           7,900 cells: 6 min (first was half trained then)
    label d.extxyz --seed 31 --walkers 288 --guide first --kinds Sb-Te_nn1 Te-Sb_nn1 Sb-In_nn2 In-Sb_nn2 Sb-In_nn1
        Ga-In_nn1 Ga-In_nn2 In-Te_nn1 In-Te_nn2 Sb-Te_nn2 Ga-Sn_nn2 Ga-Sb_nn1 Sn-Te_nn1 Sn-In_nn1 I_X I_X I_H I_T
        SnV SbV V2 TeV InV Al_i Mg_i Ga_i S_i                      4,300 cells: 3.5 min
    train a.extxyz b.extxyz c.extxyz d.extxyz --out final --go-on first --rate 5e-3 --minutes 36
    check final ../si_defects                                      CHGNet 70 s, MACE 30 s
    pack final .                                                   model.json and weights.pt, as they are here

The published model held out every twentieth of the sorted walkers of a and b, not those whose seed is a multiple of 20.
Training ends by the clock, so a faster machine makes more steps and a slightly different model.
"""

import argparse
import json
import math
import sys
import time
import warnings
from pathlib import Path

import mace  # noqa: F401  (before e3nn: it lets torch load e3nn's tables)
import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import find_mic
from ase.io import read, write
from ase.optimize import FIRE
from e3nn.o3 import Irreps
from mace import modules
from mace.calculators import MACECalculator
from mace.data.neighborhood import get_neighborhood
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "si_defects"))
from make_si_defects import DOPANTS, start

warnings.filterwarnings("ignore")
ELEMENTS = [12, 13, 14, 15, 16, 31, 32, 33, 34, 49, 50, 51, 52]  # Mg Al Si P S Ga Ge As Se In Sn Sb Te
LARGE = ["Sn", "Sb", "In", "Te"]  # they move far, so guided walkers meet them three times as often
STEPS = [0, 2, 5, 9, 14, 20, 28, 38, 50]  # of a walk, to be labelled
GUIDED_STEPS = [0, 2, 5, 9, 14, 20, 27, 35, 45, 57, 72, 90, 110]
ARCHITECTURE = {
    "r_max": 5.0,
    "num_bessel": 8,
    "num_polynomial_cutoff": 5,
    "max_ell": 2,
    "num_interactions": 2,
    "correlation": 3,
    "interaction_cls_first": "RealAgnosticInteractionBlock",
    "interaction_cls": "RealAgnosticResidualInteractionBlock",
    "hidden_irreps": "32x0e",
    "MLP_irreps": "16x0e",
    "radial_MLP": [64, 64, 64],
    "gate": "silu",
    "num_elements": len(ELEMENTS),
    "atomic_numbers": ELEMENTS,
}


def build(config):
    """The untrained model that a configuration of plain numbers and names describes."""
    translate = {
        "gate": lambda name: getattr(torch.nn.functional, name),
        "atomic_energies": np.array,
        "hidden_irreps": Irreps,
        "MLP_irreps": Irreps,
        "interaction_cls_first": modules.interaction_classes.get,
        "interaction_cls": modules.interaction_classes.get,
    }
    return modules.ScaleShiftMACE(**{key: translate.get(key, lambda v: v)(value) for key, value in config.items()})


def load(folder):
    return torch.load(folder / "mace_si.model", weights_only=False)


# label ---------------------------------------------------------------------------------------------------------------


def random_kind(rng, guided):
    """A defect to start from. Guided walkers have more vacancies and interstitials: their basins lie close together."""
    weights = np.array([3 if guided and x in LARGE else 1 for x in DOPANTS])
    x, y = rng.choice(DOPANTS, 2, replace=False, p=weights / weights.sum())
    pair, native = f"{x}-{y}_nn{rng.integers(1, 3)}", rng.choice(["I_T", "I_H", "I_X"])
    kinds = [pair, f"{x}_s", f"{x}V", f"{x}_i", "V", "V2", native, "crystal"]
    shares = (
        [0.36, 0.06, 0.20, 0.10, 0.05, 0.06, 0.14, 0.03] if guided else [0.45, 0.15, 0.12, 0.08, 0.04, 0.04, 0.07, 0.05]
    )
    return str(rng.choice(kinds, p=shares))


def random_start(rng, kind):
    """A rattled defect, its cell strained by some 2 % in one of four. Seeds from 100 on: those of si_defects lie below."""
    while (atoms := start(kind, 100 + int(rng.integers(1e6)), mild=bool(rng.random() < 0.5))) is None:
        pass
    if rng.random() < 0.25:
        strain = rng.normal(0, 0.02, (3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    return atoms


def chgnet_labels():
    """CHGNet 0.3.0 as a function from cells to the (energy, forces) of each."""
    from chgnet.model import CHGNet
    from pymatgen.io.ase import AseAtomsAdaptor

    model = CHGNet.load(model_name="0.3.0", use_device="cpu", verbose=False)

    def labels(cells):
        structures = [AseAtomsAdaptor.get_structure(a) for a in cells]
        found = model.predict_structure(structures, task="ef", batch_size=16)
        return [(float(r["e"]) * len(a), np.array(r["f"], dtype=float)) for r, a in zip(found, cells)]

    return labels


def mace_labels(folder):
    """The same from a trained mace-si."""
    model = load(folder)

    def labels(cells):
        out = model(collate([graph(a, labelled=False) for a in cells]))
        forces = out["forces"].detach().split([len(a) for a in cells])
        return [(e, f.double().numpy()) for e, f in zip(out["energy"].tolist(), forces)]

    return labels


def walk(cells, labels, steps):
    """Move the cells downhill with momentum, in place; yields (step, labels) before each move."""
    velocities = [np.zeros((len(a), 3)) for a in cells]
    for step in range(steps + 1):
        found = labels(cells)
        yield step, found
        for i, (atoms, (_, forces)) in enumerate(zip(cells, found)):
            velocities[i] = 0.7 * velocities[i] + forces
            move = 0.05 * velocities[i]
            atoms.positions += move * min(1, 0.15 / np.linalg.norm(move, axis=1).max())


def label(args):
    """Write cells that walkers pass, with what CHGNet says of them.

    Without --guide the walkers follow CHGNet. With it they follow a trained mace-si, to where its mistakes lead it.
    """
    rng, teacher = np.random.default_rng(args.seed), chgnet_labels()
    guide, steps = (mace_labels(args.guide), GUIDED_STEPS) if args.guide else (teacher, STEPS)
    began, kept = time.time(), []

    def keep(cells, found):
        for atoms, (energy, forces) in zip(cells, found):
            if np.abs(forces).max() < 25:  # eV/Å; false for nan, too
                kept.append(atoms.copy())
                kept[-1].calc = SinglePointCalculator(kept[-1], energy=energy, forces=forces)

    for first in range(0, args.walkers, 48):
        kinds = [rng.choice(args.kinds) if args.kinds else random_kind(rng, bool(args.guide)) for _ in range(48)]
        cells = [random_start(rng, str(kind)) for kind in kinds[: args.walkers - first]]
        for step, found in walk(cells, guide, steps[-1]):
            if step in steps:
                keep(cells, teacher(cells) if args.guide else found)
        for _ in range(2):  # the curvature around where the walk ended
            for atoms in (noisy := [a.copy() for a in cells]):
                atoms.positions += rng.normal(0, rng.uniform(0.01, 0.07), atoms.positions.shape)
            keep(noisy, teacher(noisy))
        write(args.out, kept)
        print(f"{first + len(cells)} walkers, {len(kept)} cells, {time.time() - began:.0f} s", flush=True)


# train ---------------------------------------------------------------------------------------------------------------


def graph(atoms, labelled=True):
    """One cell as the tensors that MACE wants, with its labels."""
    edges, shifts, unit_shifts, cell = get_neighborhood(
        atoms.positions, ARCHITECTURE["r_max"], (True,) * 3, atoms.cell.array
    )
    numbers = {
        "positions": atoms.positions,
        "shifts": shifts,
        "unit_shifts": unit_shifts,
        "cell": cell,
        "node_attrs": np.equal.outer(atoms.numbers, ELEMENTS),
    }
    if labelled:
        numbers.update(forces=atoms.get_forces(), energy=[atoms.get_potential_energy()])
    tensors = {key: torch.tensor(value, dtype=torch.float32) for key, value in numbers.items()}
    return tensors | {"edge_index": torch.tensor(edges, dtype=torch.int64)}


def collate(graphs):
    """Several cells as one disconnected graph."""
    batch = {key: torch.cat([g[key] for g in graphs]) for key in graphs[0] if key != "edge_index"}
    ptr = torch.tensor([0] + [len(g["positions"]) for g in graphs]).cumsum(0)
    edges = torch.cat([g["edge_index"] + first for g, first in zip(graphs, ptr)], 1)
    of_atom = torch.arange(len(graphs)).repeat_interleave(ptr.diff())
    return batch | {"edge_index": edges, "ptr": ptr, "batch": of_atom, "head": torch.zeros_like(ptr[1:])}


def errors(model, batch, training):
    """The energy error per atom of each cell, the force error of each atom."""
    out = model(batch, training=training)
    energy = out["energy"] if training else out["energy"].detach()  # let the graph go
    return (energy - batch["energy"]) / batch["ptr"].diff(), out["forces"] - batch["forces"]


def evaluate(model, graphs):
    """Mean absolute errors in meV/atom and meV/Å."""
    energy, forces = zip(
        *(errors(model, collate(graphs[i : i + 16]), training=False) for i in range(0, len(graphs), 16))
    )
    return {
        "energy_mae_meV_per_atom": 1e3 * torch.cat(energy).abs().mean().item(),
        "force_mae_meV_per_A": 1e3 * torch.cat(forces).abs().mean().item(),
    }


def configure(graphs):
    """The architecture with what the labels fix: the energy of each element, the number of neighbours, the scale."""
    counts = torch.stack([g["node_attrs"].sum(0) for g in graphs]).double()
    energies = torch.cat([g["energy"] for g in graphs]).double()
    return ARCHITECTURE | {
        "atomic_energies": torch.linalg.lstsq(counts, energies).solution.tolist(),
        "avg_num_neighbors": sum(g["edge_index"].shape[1] for g in graphs) / counts.sum().item(),
        "atomic_inter_scale": torch.cat([g["forces"] for g in graphs]).square().mean().sqrt().item(),
        "atomic_inter_shift": 0.0,
    }


def fit(model, graphs, held_out, minutes, rate, path):
    """Adam with a rate that rises at once and falls to zero as the minutes pass. Saves the running mean of the weights."""
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, amsgrad=True)
    began, epoch, done = time.time(), 0, 0.0
    while done < 1:
        for picked in torch.randperm(len(graphs)).split(8):
            done = (time.time() - began) / (60 * minutes)
            optimizer.param_groups[0]["lr"] = rate * min(1, 50 * done) * (1 + math.cos(math.pi * min(1, done))) / 2
            energy, forces = errors(model, collate([graphs[i] for i in picked]), training=True)
            # absolute, not squared: the small forces near the minima decide where a relaxation ends
            loss = 2 * energy.abs().mean() + forces.norm(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
            optimizer.step()
            mean.update_parameters(model)
            if done >= 1:
                break
        epoch += 1
        torch.save(mean.module, path)
        found = evaluate(mean.module, held_out)
        print(
            f"epoch {epoch}, {time.time() - began:.0f} s:",
            ", ".join(f"{v:.1f} {k}" for k, v in found.items()),
            flush=True,
        )
    return found


def train(args):
    began = time.time()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    cells = [atoms for path in args.labels for atoms in read(path, ":")]
    # walkers are held out whole, for the frames of one resemble one another
    graphs, held_out = ([graph(a) for a in cells if (a.info["seed"] % 20 == 0) == out] for out in (False, True))
    config = json.loads((args.go_on / "config.json").read_text()) if args.go_on else configure(graphs)
    model = load(args.go_on) if args.go_on else build(config)
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    report = fit(model, graphs, held_out, args.minutes, args.rate, args.out / "mace_si.model")
    report.update(train_cells=len(graphs), held_out_cells=len(held_out), train_wall_s=round(time.time() - began))
    (args.out / "report.json").write_text(json.dumps(report, indent=1))


# check ---------------------------------------------------------------------------------------------------------------


def delta_q(atoms, reference):
    """sqrt(sum m dR^2) in amu^1/2 Å: minimum image, without the drift of the centre of mass."""
    moved = find_mic(atoms.positions - reference.positions, reference.cell, reference.pbc)[0]
    masses = reference.get_masses()[:, None]
    moved -= (masses * moved).sum(0) / masses.sum()
    return float(np.sqrt((masses * moved**2).sum()))


def relax(pair, calculator):
    """The first frame relaxed: Delta-Q to the last frame, steps, largest displacement."""
    first, last = pair
    atoms = first.copy()
    atoms.calc = calculator
    optimizer = FIRE(atoms, logfile=None)
    optimizer.run(fmax=0.02, steps=500)
    moved = find_mic(atoms.positions - first.positions, first.cell, first.pbc)[1]
    return {"dq": delta_q(atoms, last), "n_steps": optimizer.nsteps, "max_disp": moved.max()}


def chgnet_relaxed(pairs, cache):
    """CHGNet's own relaxations, done once and kept."""
    if not cache.exists():
        from chgnet.model.dynamics import CHGNetCalculator

        calculator = CHGNetCalculator(use_device="cpu")
        cache.write_text(json.dumps({name: relax(pair, calculator) for name, pair in pairs.items()}))
    return json.loads(cache.read_text())


def over_thirds(names, values, statistic, draws=1000):
    """5th, 50th and 95th percentile of MACE's statistic by CHGNet's, over random thirds of the kinds."""
    rng, kinds = np.random.default_rng(0), np.array([name.rsplit("_", 1)[0] for name in names])
    distinct = np.unique(kinds)
    thirds = [np.isin(kinds, rng.choice(distinct, len(distinct) // 3, replace=False)) for _ in range(draws)]
    ratios = [statistic(values[rows, 0]) / statistic(values[rows, 1]) for rows in thirds]
    return np.percentile(ratios, [5, 50, 95]).round(3).tolist()


def check(args):
    report = json.loads((args.folder / "report.json").read_text())
    print("held out: {energy_mae_meV_per_atom:.2f} meV/atom, {force_mae_meV_per_A:.1f} meV/Å".format(**report))
    frames = {path.stem: read(path, ":") for path in sorted(args.pairs.glob("*.extxyz"))}
    pairs = {name: (f[0], f[-1]) for name, f in frames.items()}
    teacher = chgnet_relaxed(pairs, args.folder / "chgnet_dq.json")
    calculator = MACECalculator(models=[load(args.folder)], device="cpu", default_dtype="float32")
    rows = {
        name: {"mace": relax(pair, calculator)["dq"], "chgnet": teacher[name]["dq"]} for name, pair in pairs.items()
    }
    for name, row in rows.items():
        print(f"{name:14s} Delta-Q %(mace)6.2f, CHGNet %(chgnet)6.2f" % row)
    values = np.array([list(row.values()) for row in rows.values()])
    for what, statistic in {"mean": np.mean, "median": np.median}.items():
        a, b = map(float, statistic(values, axis=0))
        report[what] = {
            "mace": a,
            "chgnet": b,
            "ratio": a / b,
            "ratio_over_thirds": over_thirds(rows, values, statistic),
        }
        print(
            f"{what}: {a:.3f}, CHGNet {b:.3f}, ratio {a / b:.3f}; over thirds of the kinds",
            report[what]["ratio_over_thirds"],
        )
    (args.folder / "report.json").write_text(json.dumps(report | {"delta_q": rows}, indent=1))


def pack(args):
    """Write the trained model as the package holds it: rebuilt in float64, the weights as they were trained."""
    from ase_bptt.potentials import load_potential, save_potential
    from ase_bptt.potentials.mace import MACE

    trained = load_potential(args.folder / "mace_si.model", trust=True)
    torch.set_default_dtype(torch.float64)
    packed = MACE.from_config(trained.config()).double()
    with torch.no_grad():
        for (name, value), (same, target) in zip(trained.named_parameters(), packed.named_parameters(), strict=True):
            assert name == same
            target.copy_(value)
    save_potential(packed, args.out)
    (args.out / "mace.model").unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("label", help="write cells with the energies and forces of CHGNet")
    p.set_defaults(run=label)
    p.add_argument("out", type=Path)
    p.add_argument("--walkers", type=int, default=624)
    p.add_argument("--seed", type=int, required=True)
    p.add_argument(
        "--guide", type=Path, metavar="FOLDER", help="trained model that the walkers follow instead of CHGNet"
    )
    p.add_argument("--kinds", nargs="+", help="defects to start from, instead of all")
    p = commands.add_parser("train", help="train on labelled cells")
    p.set_defaults(run=train)
    p.add_argument("labels", type=Path, nargs="+")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    p.add_argument("--minutes", type=float, default=20)
    p.add_argument("--rate", type=float, default=1e-2)
    p.add_argument("--go-on", type=Path, metavar="FOLDER", help="trained model to start from")
    p.add_argument("--seed", type=int, default=0)
    p = commands.add_parser("check", help="relax what DFT has relaxed, beside CHGNet")
    p.set_defaults(run=check)
    p.add_argument("folder", type=Path)
    p.add_argument("pairs", type=Path, metavar="PAIRS_DIR")
    p = commands.add_parser("pack", help="write model.json and weights.pt of a trained model")
    p.set_defaults(run=pack)
    p.add_argument("folder", type=Path)
    p.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.run(args)


if __name__ == "__main__":
    main()
