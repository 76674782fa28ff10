"""Every public name has a docstring with an example, and each example runs and prints what stands in it."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import ase_bptt

MODULES = ("adjoints", "datasets", "losses", "optimize", "steppers", "testing")
CONSTANTS = {
    "ADJOINTS",
    "STEPPERS",
    "LOSSES",
    "TOLERANCES",
    "DEMO_FOLD",
    "FOLDER",
    "FOLDS",
    "SPLITS",
    "CRYSTALS",
    "CELLS",
}
"""Values, which hold no docstring; the example of their module shows them."""
ELSEWHERE = {
    "GradientWarning",  # docs/adjoints
    "Labels",  # of the module ase_bptt.terms
    "cross_validate",  # called as `finetune` is
    *("log_delta_q", "max_displacement", "rmsd", "root_delta_q", "squared_delta_q"),  # called as `delta_q` is
    *("table", "write_csv"),  # called as `evaluation_table` is
}
"""Names whose example stands somewhere else."""
DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|exception):: ase_bptt\.([\w.]+)$", re.MULTILINE)
"""A name that the API pages describe; results, which nobody builds by hand, have brackets behind their names there."""
API = Path(__file__).parents[1] / "docs" / "api"
FURTHER = {
    *(name for page in API.glob("*.rst") for name in DIRECTIVE.findall(page.read_text(encoding="utf-8"))),
    *(f"terms{name}" for name in ("", ".Term", ".make_term", ".make_terms")),
    *(f"potentials.{name}" for name in ("analytic.LennardJones", "analytic.Morse", "emt.EMT")),
    *(f"drift.curves.{name}" for name in ("birch_murnaghan", "dimer_curves", "elastic")),
    *(f"tuning.{name}" for name in ("count", "describe", "layers")),
    "evaluation.space_group",
    "throughput.relax_all",
}
"""Names in the modules for research that have an example, too: all that are on the API pages, and some more."""


def public() -> dict[str, object]:
    """All objects by their names, the modules among them."""
    found = {f"ase_bptt.{name}": getattr(ase_bptt, name) for name in ase_bptt.__all__ if name != "__version__"}
    for module in MODULES:
        home = getattr(ase_bptt, module)
        found |= {f"ase_bptt.{module}.{name}": getattr(home, name) for name in home.__all__ if name not in CONSTANTS}
    return found


PUBLIC = public()
EVERY = PUBLIC | {f"ase_bptt.{name}": pkgutil.resolve_name(f"ase_bptt.{name}") for name in sorted(FURTHER)}


def test_the_modules_are_all_that_are_public():
    assert {name.removeprefix("ase_bptt.") for name, found in PUBLIC.items() if inspect.ismodule(found)} == set(MODULES)


@pytest.mark.parametrize("name", EVERY)
def test_an_example_runs(name):
    found = EVERY[name]
    text = inspect.getdoc(found) or ""
    scope = vars(found) if inspect.ismodule(found) else inspect.getmodule(found).__dict__
    test = doctest.DocTestParser().get_doctest(text, dict(scope), name, name, 0)
    assert test.examples or name.rpartition(".")[2] in ELSEWHERE, "it has no example"
    report: list[str] = []
    result = doctest.DocTestRunner().run(test, out=report.append)
    assert result.failed == 0, "".join(report)
