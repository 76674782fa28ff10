"""Models that are built once: to build a MACE takes longer than to train it here."""

import copy
import json
from functools import cache
from unittest import mock

from conftest import tiny_mace

from ase_bptt import potentials


@cache
def _made(elements):
    return tiny_mace(elements=elements, max_ell=1, correlation=1)


def quick_mace(*elements: int):
    """A MACE of these elements, by its adapter."""
    from ase_bptt.potentials.mace import MACE

    return MACE(copy.deepcopy(_made(elements)))


def built_once():
    """A patch under which potentials of one config are copies of one."""
    real, made = potentials._rebuild, {}

    def rebuild(adapter, config, dtype):
        key = json.dumps([adapter.family, config, str(dtype)])
        if key not in made:
            made[key] = real(adapter, config, dtype)
        return copy.deepcopy(made[key])

    return mock.patch.object(potentials, "_rebuild", rebuild)
