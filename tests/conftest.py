"""Seeded, offline, single-threaded, in a folder of its own: so each test runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("helpers")


@pytest.fixture(autouse=True, scope="session")
def _on_the_cpu():
    """The expected numbers are those of the CPU, also where there is a GPU; tests/test_gpu.py asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ase_bptt.utils.best_device", lambda: torch.device("cpu"))
        yield


@pytest.fixture(autouse=True)
def _deterministic():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (for what ASE draws from the global state)
    yield
    torch.set_num_threads(threads)
    assert torch.get_default_dtype() is torch.float32, "a test changed torch's default dtype"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """A test that litters, litters here."""
    monkeypatch.chdir(tmp_path)
