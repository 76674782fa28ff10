#!/usr/bin/env python
"""Run ASE's own test-suite with *our* Optimizer and/or Calculator swapped in.

ASE's tests are the oracle; nothing of ASE is copied or edited.  For every test
module in the tables below we replace, only while that module is being
imported (and, where a test looks the name up late, while it runs), the names the
module imports -- e.g. ``ase.optimize.BFGS`` or ``ase.calculators.emt.EMT`` --
by the target class.  ASE's internals keep their own classes.

Usage (needs ase >= 3.29 and pytest in the same environment)::

    python ase_conformance.py --optimizer ase.optimize:FIRE
    python ase_conformance.py --calculator ase.calculators.emt:EMT --reference emt
    python ase_conformance.py --optimizer ase_bptt:BPTTOptimizer \
        --calculator twins:TorchEMT --reference emt \
        --opt-kwargs '{"logfile": null}' --drop-opt-kwargs alpha,dt,memory

What is reported
----------------
* PASS/FAIL/SKIP/XFAIL for each ASE test, plus how many times the target
  classes were *constructed* in it.  A pass with zero constructions is printed
  as VACUOUS and counts as a failure of the recipe (the swap did not reach it).
* exit status 0 only if there is no failure and no vacuous pass.

``--reference emt|lj|morse|none`` says whose numbers the target calculator
reproduces.  Tests with hard-coded numbers of a potential run only when the
target claims that reference; 'none' keeps the potential-independent tests.
The torch EMT, LJ and Morse behind our calculator (twins.py) claim their namesakes; LJ and
Morse with ``--own``, since the tests of the other kind are written for metals::

    python ase_conformance.py --calculator twins:TorchEMT --reference emt
    python ase_conformance.py --calculator twins:TorchLJ --reference lj --own
    python ase_conformance.py --calculator twins:TorchMorse --reference morse --own

All of ASE's tests run under ``filterwarnings = error``: a DeprecationWarning
raised by our constructor fails the test, which is part of the contract.
"""

import argparse
import functools
import importlib
import json
import os
import sys
import tempfile
import time
import types
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # many tiny systems
sys.dont_write_bytecode = True  # leave the wheel untouched

OPT, CALC = "opt", "calc"
EMT = "ase.calculators.emt.EMT"
LJ = "ase.calculators.lj.LennardJones"
MORSE = "ase.calculators.morse.MorsePotential"


def O(*names):  # noqa: E743 - tiny DSL for the table below
    return tuple((OPT, f"ase.optimize.{n}") for n in names)


def C(*names):
    return tuple((CALC, n) for n in names)


class Entry:
    """One ASE test file: what to swap, which tests, under which condition."""

    def __init__(self, swaps, only=None, skip=(), reference=None, late=False, slow=False, needs=(), why=""):
        self.swaps = swaps  # ((OPT|CALC, dotted name), ...)
        self.only = only  # test function names, None = all
        self.skip = skip  # test function names to leave out
        self.reference = reference  # potential whose numbers are hard-coded
        self.late = late  # names looked up at run time: patch then too
        self.slow = slow  # > ~10 s with pure-python EMT; needs --slow
        self.needs = needs  # 'asap3' shim, 'spglib', ...
        self.why = why  # what it exercises


# --------------------------------------------------------------------------
# Optimizer suite: the calculator stays ASE's unless --calculator is given too.
# --------------------------------------------------------------------------
OPTIMIZER = {
    "optimize/test_optimizers.py": Entry(
        O("FIRE"), why="converge, unconverged+todict[fmax], run twice, Path logfile/traj"
    ),
    "optimize/test_nsteps.py": Entry(O("BFGS"), why="irun yields steps+1 times, then StopIteration"),
    "optimize/test_optimize_stepwise.py": Entry(
        O("BFGS"), why="first yield before any step; open Trajectory, n images"
    ),
    "optimize/test_pure.py": Entry(
        O("FIRE"), late=True, why="non-Atoms Optimizable (Booth function, 2 dof, own gradient_norm)"
    ),
    "optimize/test_restart.py": Entry(O("BFGS"), why="restart Path/None in todict; RestartError on bad JSON"),
    "optimize/test_optimizer_restart.py": Entry(
        O("BFGS"),
        why="interrupt + restart == single run, FrechetCellFilter, "
        "append_trajectory (passes alpha=: use --drop-opt-kwargs alpha)",
    ),
    "optimize/test_replay.py": Entry(O("BFGS"), why="replay_trajectory (optional: needs _replay_trajectory)"),
    "optimize/test_maxstep.py": Entry(O("MDMin"), why="default maxstep 0.2 A clips a huge step (passes dt=)"),
    "test_linesearch_maxstep.py": Entry(O("BFGS"), why="maxstep keyword, longest step <= maxstep on Pt13"),
    "optimize/test_fire.py": Entry(O("FIRE"), why="FIRE keyword set incl. downhill_check, position_reset_callback"),
    "filter/test_filter.py": Entry(
        O("QuasiNewton"), only=("test_filter",), why="Filter(indices) as target, trajectory writes the full Atoms"
    ),
    "filter/test_strain_emt.py": Entry(
        (*O("MDMin"), (OPT, "ase.optimize.mdmin.MDMin")), why="StrainFilter (2x3 generalized positions), steps=2"
    ),
    "filter/test_cellfilter.py": Entry(
        O("LBFGS", "MDMin"),
        needs=("asap3",),
        only=("test_pressure", "test_constant_volume"),
        why="UnitCell/Frechet/ExpCellFilter: pressure reached, volume kept",
    ),
    "filter/test_strain.py": Entry(
        (*O("MDMin"), (OPT, "ase.optimize.mdmin.MDMin")),
        needs=("asap3",),
        slow=True,
        why="StrainFilter on 216/108 atoms, mask",
    ),
    "test_stress.py": Entry(
        O("BFGS"), only=("test_stress",), slow=True, why="UnitCellFilter relaxation lands on the theoretical cell"
    ),
    "constraints/test_CO2linear_Au111.py": Entry(O("BFGS"), why="FixLinearTriatomic kept to 1e-9 A, pbc wrap"),
    "constraints/test_fixbondlength_CO2_Au111.py": Entry(O("BFGS"), why="FixBondLengths kept to 1e-9 A"),
    "constraints/test_external_force.py": Entry(O("FIRE"), why="ExternalForce adds to energy; with FixBondLength"),
    "constraints/test_fix_bond_length_mic.py": Entry(O("FIRE"), why="FixBondLength across the boundary, logfile=None"),
    "constraints/test_fixcom.py": Entry(O("BFGS"), only=("test_center_of_mass_position",), why="FixCom"),
    "constraints/test_fixsubsetcom.py": Entry(O("BFGS"), only=("test_center_of_mass_position",), why="FixSubsetCom"),
    "constraints/test_fixedline_fixedplane.py": Entry(
        O("BFGS"),
        only=("test_constrained_optimization_fixedline", "test_constrained_optimization_fixedplane"),
        why="FixedLine / FixedPlane projections",
    ),
    "constraints/test_mirror.py": Entry(O("FIRE"), why="MirrorForce/MirrorTorque: forces are changed, energy not"),
    "emt/test_emt1.py": Entry(O("BFGS"), why="attach(traj.write) + attach(f), FixBondLength 1e-14"),
    "emt/test_emt_h3o2m.py": Entry(O("BFGS", "QuasiNewton"), why="end points then NEB(climb) as target"),
    "neb/test_neb.py": Entry(O("BFGS"), why="NEB improvedtangent with FixAtoms as target"),
    "vibrations/test_vibrations_example.py": Entry(O("BFGS"), why="relax then Vibrations"),
    "test_example.py": Entry(O("QuasiNewton"), why="maxstep=, attach(traj.write), FixAtoms"),
}

# --------------------------------------------------------------------------
# Calculator suite.
# --------------------------------------------------------------------------
CALCULATOR = {
    "calculator/test_fd.py": Entry(
        C(EMT), why="forces/stress against finite differences, rtol 1e-7 (needs float64), energy bitwise repeatable"
    ),
    "calculator/test_traj.py": Entry(C(EMT), late=True, why="H2: calculation_required, traj write/read"),
    "emt/test_emt_stress.py": Entry(C(EMT), why="stress sign, Voigt order, 1e-5 percent of numerical"),
    "emt/test_emt.py": Entry(C(EMT), why="calculator= keyword, cells, pbc mixes"),
    "emt/test_emt2.py": Entry(C(EMT), reference="emt", why="isolated atom, molecule, sum to 1e-13"),
    "test_potential_energies.py": Entry(C(EMT), why='energies sum to energy (property "energies")'),
    "test_issue276.py": Entry(C(EMT), why="extxyz round trip of results"),
    "test_singlepointcalc.py": Entry(C(EMT), why="write/read via SinglePointCalculator with FixAtoms"),
    "test_loggingcalc.py": Entry(C(EMT), why="LoggingCalculator wrapper: get_property protocol"),
    "test_mixingcalc.py": Entry(C(EMT), why="Sum/Average/LinearCombination/Mixed calculators"),
    "test_eos.py": Entry(C(EMT), reference="emt", why="EOS numbers of EMT Al"),
    "test_hcp.py": Entry(C(EMT), reference="emt", why="hcp Ni lattice constants, 48 calculators"),
    "test_dimer_method.py": Entry(C(EMT), reference="emt", why="Dimer saddle and curvature"),
    "test_forcecurve.py": Entry(C(EMT), why="VelocityVerlet + trajectory"),
    "md/test_irun_force_call_order.py": Entry(C(EMT), why="MD order of property calls"),
    "md/test_md_stepwise.py": Entry(C(EMT), why="MD irun state changes"),
    "md/test_md.py": Entry(C(EMT), why="energy conservation of the forces"),
    "calculator/test_subprocess_calculator.py": Entry(
        C(EMT),
        only=("test_subprocess_calculator", "test_subprocess_calculator_optimize"),
        reference="emt",
        why="result equality with EMT run by name in a subprocess",
    ),
    "filter/test_cellfilter.py": Entry(
        (),
        needs=("asap3",),
        only=("test_cellfilter_forces", "test_cellfilter_stress", "test_intensive_cell_gradient"),
        why="cell-filter gradient tests: stress to 3e-6 eV",
    ),
    "vibrations/test_vibrations_example.py": Entry(C(EMT), reference="emt", why="vibrational analysis, summary format"),
    "optimize/test_optimizers.py": Entry(
        C(EMT),
        reference="emt",
        only=("test_optimize", "test_run_twice"),
        why="all of ASE's optimizers on our calculator (energy to 1.75e-5)",
    ),
    "neb/test_shared_calculator_neb.py": Entry(
        C(EMT),
        only=("test_no_shared_calc", "test_freeze_method"),
        why="calculators must be hashable; frozen NEB images",
    ),
    "test_phonons.py": Entry(
        C(EMT),
        skip=("test_frequencies_amplitudes", "test_partial_dos"),
        reference="emt",
        why="Phonons: displaced cells, force checks, bands",
    ),
    "calculator/test_lj.py": Entry(C(LJ), reference="lj", why="energies/forces/stress/stresses/cutoffs"),
    "test_stress.py": Entry(
        C(LJ),
        reference="lj",
        only=("test_stress_voigt_shape",),
        why="get_stress / get_stresses shapes, include_ideal_gas",
    ),
    "calculator/test_morse.py": Entry(
        C(MORSE), reference="morse", skip=("test_cutoff",), why="Morse forces, stress, vibrations"
    ),
}


def load(spec):
    modname, _, name = spec.partition(":")
    return getattr(importlib.import_module(modname), name)


class Target:
    """A class under test; counts constructions and injects keyword defaults."""

    def __init__(self, spec, kwargs, drop):
        self.cls = load(spec)
        self.count = 0
        orig = self.cls.__init__

        @functools.wraps(orig)
        def __init__(obj, *args, **kw):
            if type(obj) is self.cls or self.cls in type(obj).__bases__:
                self.count += 1
                for key in drop:
                    kw.pop(key, None)
                for key, value in kwargs.items():
                    kw.setdefault(key, value)
            return orig(obj, *args, **kw)

        self.cls.__init__ = __init__


@contextmanager
def swapped(entry, targets):
    with ExitStack() as stack:
        for kind, dotted in entry.swaps:
            if kind in targets:
                stack.enter_context(mock.patch(dotted, targets[kind].cls))
                if dotted == EMT:  # @pytest.mark.calculator('emt') factories
                    from ase.calculators.calculator import external_calculators

                    stack.enter_context(mock.patch.dict(external_calculators, {"emt": targets[kind].cls}))
        yield


class SwapPlugin:
    def __init__(self, manifest, root, targets, asap3_shim, known=()):
        self.known = known
        self.manifest, self.root, self.targets = manifest, root, targets
        self.asap3_shim = asap3_shim
        self.rows = []

    def entry(self, path):
        try:
            return self.manifest.get(Path(path).relative_to(self.root).as_posix())
        except ValueError:
            return None

    # Patch while a test module is imported (collection of the module).
    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        entry = self.entry(collector.path) if isinstance(collector, pytest.Module) else None
        if entry is None:
            return (yield)
        with swapped(entry, self.targets):
            return (yield)

    def pytest_collection_modifyitems(self, config, items):
        seen, keep, drop = set(), [], []
        for item in items:
            entry = self.entry(item.path)
            name = getattr(item, "originalname", item.name)
            params = getattr(getattr(item, "callspec", None), "params", {})
            ok = entry is not None and name not in entry.skip
            ok &= entry is None or entry.only is None or name in entry.only
            # Of an optimizer-parametrized test keep the target only, once.
            key = (
                item.nodeid.partition("[")[0],
                tuple(sorted((k, id(v) if isinstance(v, type) else repr(v)) for k, v in params.items())),
            )
            if entry is not None and any(k == OPT for k, _ in entry.swaps):
                names = [d.rpartition(".")[2] for k, d in entry.swaps if k == OPT]
                for argname in ("optcls", "opt", "optname"):
                    if argname in params:
                        value = params[argname]
                        ok &= value is self.targets[OPT].cls or value in names
            if "factory" in params:  # @pytest.mark.calculator parametrization
                ok &= params["factory"][0] == "emt"
            if ok and key not in seen:
                seen.add(key)
                for text in self.known:
                    if text in item.nodeid:
                        item.add_marker(pytest.mark.xfail(strict=True, reason=f"declared with --known {text}"))
                keep.append(item)
            else:
                drop.append(item)
        items[:] = keep
        config.hook.pytest_deselected(items=drop)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        for target in self.targets.values():
            target.count = 0
        entry = self.entry(item.path)
        with ExitStack() as stack:
            if entry is not None and entry.late:
                stack.enter_context(swapped(entry, self.targets))
            if entry is not None and "asap3" in entry.needs:
                stack.enter_context(mock.patch.dict(sys.modules, {"asap3": self.asap3_shim}))
            return (yield)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            counts = {k: t.count for k, t in self.targets.items()}
            outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            used = sum(counts.values())
            if outcome == "passed" and used == 0:
                outcome = "VACUOUS"
            self.rows.append((report.nodeid.split("ase/test/")[-1], outcome, counts, report.duration))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--optimizer", metavar="MODULE:CLASS")
    add("--calculator", metavar="MODULE:CLASS")
    add("--suite", choices=["optimizer", "calculator", "all"], default=None)
    add("--reference", default="none", choices=["emt", "lj", "morse", "none"])
    add("--opt-kwargs", default="{}", help="JSON, defaults for the constructor")
    add("--calc-kwargs", default="{}")
    add("--drop-opt-kwargs", default="", help="comma list, e.g. alpha,dt")
    add("--drop-calc-kwargs", default="")
    add(
        "--known",
        default="",
        metavar="TEXT,...",
        help="node ids containing TEXT must fail (strict xfail): the published\n"
        "list of what the target does not support",
    )
    add("--slow", action="store_true", help="also tests marked slow here")
    add("--list", action="store_true", help="print the manifest and stop")
    add("--own", action="store_true", help="only tests whose numbers are those of --reference")
    add("-k", dest="expr", help="pytest -k expression")
    add("--json", help="write the rows to this file")
    args = parser.parse_args()

    import ase.test

    root = Path(ase.test.__file__).parent

    if args.list:
        for title, table in (("optimizer", OPTIMIZER), ("calculator", CALCULATOR)):
            for name, entry in table.items():
                print(f"{title:10} {name:46} {entry.reference or '-':5} {'slow' if entry.slow else '':4} {entry.why}")
        return 0

    if not (args.optimizer or args.calculator):
        parser.error("give --optimizer and/or --calculator")

    targets = {}
    if args.optimizer:
        targets[OPT] = Target(
            args.optimizer, json.loads(args.opt_kwargs), [x for x in args.drop_opt_kwargs.split(",") if x]
        )
    if args.calculator:
        targets[CALC] = Target(
            args.calculator, json.loads(args.calc_kwargs), [x for x in args.drop_calc_kwargs.split(",") if x]
        )

    # The asap3 fixture (importorskip) otherwise skips the cell-filter tests.
    import ase.calculators.emt as emt_module

    shim = types.ModuleType("asap3")
    shim.EMT = targets[CALC].cls if CALC in targets and args.reference in ("emt", "none") else emt_module.EMT
    suites = {"optimizer": [OPTIMIZER], "calculator": [CALCULATOR], "all": [OPTIMIZER, CALCULATOR]}
    suite = args.suite or ("all" if len(targets) == 2 else "optimizer" if OPT in targets else "calculator")
    references = (args.reference,) if args.own else (None, args.reference)
    status = 0
    rows = []
    for table in suites[suite]:
        manifest = {
            name: entry
            for name, entry in table.items()
            if (args.slow or not entry.slow) and entry.reference in references and (root / name).exists()
        }
        # Each suite swaps its own kind only, so that a failure has one cause.
        kind = OPT if table is OPTIMIZER else CALC
        if kind not in targets:
            continue
        plugin = SwapPlugin(manifest, root, {kind: targets[kind]}, shim, [x for x in args.known.split(",") if x])
        for name in list(sys.modules):  # re-import test modules per suite
            if name.startswith("ase.test.") and ".test_" in name:
                del sys.modules[name]
        argv = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", "--rootdir", str(root.parent.parent)]
        if args.expr:
            argv += ["-k", args.expr]
        t0 = time.process_time()
        with tempfile.TemporaryDirectory(prefix="ase-conformance-") as tmp:
            argv += ["--basetemp", str(Path(tmp) / "pytest")]
            status |= int(pytest.main(argv + [str(root / n) for n in manifest], plugins=[plugin]))
        cpu = time.process_time() - t0
        print(f"\n{'=' * 78}\n{kind}: {targets[kind].cls!r}  cpu {cpu:.0f} s")
        for nodeid, outcome, counts, duration in plugin.rows:
            print(f"{outcome:8} built={sum(counts.values()):<4d} {duration:6.2f}s {nodeid}")
        tally = {}
        for _, outcome, _, _ in plugin.rows:
            tally[outcome] = tally.get(outcome, 0) + 1
        print("tally:", ", ".join(f"{k} {v}" for k, v in sorted(tally.items())))
        status |= "VACUOUS" in tally
        rows += plugin.rows
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1, default=str))
    return status


if __name__ == "__main__":
    sys.exit(main())
