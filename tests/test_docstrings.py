"""Every public name has a docstring with an example, and each example runs and prints what stands in it."""

from __future__ import annotations

import doctest
import inspect
import pkgutil

import pytest

import ase_bptt

MODULES = ("adjoints", "datasets", "losses", "optimize", "steppers", "testing")
CONSTANTS = {"ADJOINTS", "STEPPERS", "LOSSES", "TOLERANCES", "DEMO_FOLD", "FOLDER", "FOLDS", "SPLITS"}
"""Values, which hold no docstring; the example of their module shows them."""
ELSEWHERE = {"GradientWarning", "Trainer", "log_delta_q", "max_displacement", "rmsd", "root_delta_q", "squared_delta_q"}
"""A training is the example of docs/tutorials/02_fine_tune, and losses are called as `delta_q` is."""


FURTHER = (
    "diagnostics.gradient_report.diagnose_gradients",
    "pairs.groups.with_groups",
    "pairs.structure_matching.same_structure",
    "potentials.analytic.LennardJones",
    "potentials.analytic.Morse",
    "potentials.emt.EMT",
    "stability.largest_curvature",
    "stability.resolve_step_size",
    "stability.stability_limit",
    "throughput.relax_all",
    "tuning.prepare",
    "tuning.select",
)
"""Names in the modules for research that have an example, too."""


def public() -> dict[str, object]:
    """All objects by their names, the modules among them."""
    found = {f"ase_bptt.{name}": getattr(ase_bptt, name) for name in ase_bptt.__all__ if name != "__version__"}
    for module in MODULES:
        home = getattr(ase_bptt, module)
        found |= {f"ase_bptt.{module}.{name}": getattr(home, name) for name in home.__all__ if name not in CONSTANTS}
    return found


PUBLIC = public() | {f"ase_bptt.{name}": pkgutil.resolve_name(f"ase_bptt.{name}") for name in FURTHER}


def test_the_modules_are_all_that_are_public():
    assert {name.removeprefix("ase_bptt.") for name, found in PUBLIC.items() if inspect.ismodule(found)} == set(MODULES)


@pytest.mark.parametrize("name", PUBLIC)
def test_an_example_runs(name):
    found = PUBLIC[name]
    text = inspect.getdoc(found) or ""
    scope = vars(found) if inspect.ismodule(found) else inspect.getmodule(found).__dict__
    test = doctest.DocTestParser().get_doctest(text, dict(scope), name, name, 0)
    assert test.examples or name.rpartition(".")[2] in ELSEWHERE, "it has no example"
    report: list[str] = []
    result = doctest.DocTestRunner().run(test, out=report.append)
    assert result.failed == 0, "".join(report)
