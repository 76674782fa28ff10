"""metatomic: any model that was exported to its files, such as those of metatrain, UPET and PET-MAD.

The files are TorchScript archives (https://docs.metatensor.org/metatomic). A script can be differentiated twice, and is
trained and written as it is.
"""

from __future__ import annotations

import base64
import copy
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..neighbors import Edges
from ..potential import Potential, Prediction
from ..structures import Structures
from ..threads import quiet
from . import DTYPES, require

ENERGY = "energy"
EXTRA_FILES = "extra/"
"""Folder of a TorchScript archive for further files; metatomic keeps the versions that it was written with there."""
MARK = "metatomic-version"
"""A further file that every export of metatomic has."""


class Metatomic(Potential):
    """A model that metatomic exported, seen as a Potential.

    Edges, live positions and live cells are ours, in the neighbour lists that the model requests.

    Parameters
    ----------
    model : torch.jit.ScriptModule
        As `metatomic.torch.load_atomistic_model` returns it; it is used as it is, not copied.
    further : dict of str to str, optional
        The further files of its archive, which are written again with it.

    Raises
    ------
    ValueError
        For a model that computes no energy of structures.
    """

    family = "metatomic"
    extra = "metatomic"
    installation = 'for metatomic by pip install "ase_bptt[metatomic]"'
    native_name = "metatomic.pt"

    model: Any

    def __init__(self, model: Any, further: dict[str, str] | None = None):
        super().__init__()
        self.model = model.eval()
        self.further = dict(further or {})
        capabilities = model.capabilities()
        if ENERGY not in capabilities.outputs:
            raise ValueError(
                f"This metatomic model computes no energy, but {', '.join(sorted(capabilities.outputs)) or 'nothing'}: "
                "only a potential can be relaxed with."
            )
        lists = model.requested_neighbor_lists()
        self.cutoff = max((float(wanted.engine_cutoff("Angstrom")) for wanted in lists), default=1.0)
        self.atomic_numbers = frozenset(capabilities.atomic_types)

    def __deepcopy__(self, memo: dict[int, Any]) -> Metatomic:
        # A script copies its weights by clone, which autograd would follow.
        with torch.no_grad():
            twin = type(self)(copy.deepcopy(self.model), self.further)
        for mine, copied in zip(self.parameters(), twin.parameters(), strict=True):
            copied.requires_grad_(mine.requires_grad)
        twin.metadata = dict(self.metadata)
        memo[id(self)] = twin
        return twin

    def forward(self, structures: Structures, edges: Edges) -> Prediction:
        systems = [self._system(structures, k) for k in range(len(structures))]
        for wanted in self.model.requested_neighbor_lists():
            self._add_list(systems, wanted, structures, edges)
        metatomic = require("metatomic.torch", extra="metatomic")
        options = metatomic.ModelEvaluationOptions("Angstrom", {ENERGY: metatomic.ModelOutput(unit="eV")}, None)
        # TorchScript's optimised graphs round differently after some calls; see MACE.
        with torch.jit.optimized_execution(False):
            found = self.model(systems, options, check_consistency=False)
        return Prediction(found[ENERGY].block().values.squeeze(1))

    def _system(self, structures: Structures, k: int) -> Any:
        """One structure; metatomic wants no cell vector where it is not periodic."""
        atoms = structures.batch == k
        pbc = structures.pbc[k]
        return require("metatomic.torch", extra="metatomic").System(
            types=structures.numbers[atoms].to(torch.int32),
            positions=structures.positions[atoms],
            cell=structures.cells[k] * pbc[:, None],
            pbc=pbc,
        )

    def _add_list(self, systems: list[Any], wanted: Any, structures: Structures, edges: Edges) -> None:
        """The edges of each structure as a neighbour list: all or one way, and within its own cutoff if it says so."""
        near = edges.near(float(wanted.engine_cutoff("Angstrom")), structures)
        if not wanted.full_list:
            near &= _one_way(edges)
        i, j = edges.i[near], edges.j[near]
        owner = structures.batch[i]
        first = torch.searchsorted(structures.batch, owner)
        samples = torch.column_stack((i - first, j - first, edges.shifts[near])).to(torch.int32)
        vectors = edges.vectors(structures)[near].unsqueeze(2)
        names = ["first_atom", "second_atom", "cell_shift_a", "cell_shift_b", "cell_shift_c"]
        tensors = require("metatensor.torch", extra="metatomic")
        labels = tensors.Labels
        across = torch.arange(3, dtype=torch.int32, device=i.device)[:, None]
        for k, system in enumerate(systems):
            mine = owner == k
            block = tensors.TensorBlock(
                vectors[mine],
                labels(names, samples[mine]),
                [labels(["xyz"], across)],
                labels(["distance"], across[:1]),
            )
            system.add_neighbor_list(wanted, block)

    @classmethod
    def from_name(cls, variant: str | None) -> Potential:
        raise ValueError(
            "A metatomic model is loaded from its file: give the .pt file that was exported as potential, with trust "
            "(--potential FILE --trust in the shell)."
        )

    @classmethod
    def read_native(cls, path: Path) -> Any | None:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
        if EXTRA_FILES + MARK not in names:
            return None
        require("metatomic.torch", extra="metatomic")
        return _load(path, [name.removeprefix(EXTRA_FILES) for name in names if name.startswith(EXTRA_FILES)])

    @classmethod
    def owns(cls, native: Any) -> bool:
        script = native[0] if isinstance(native, tuple) else native
        return isinstance(script, torch.jit.ScriptModule) and hasattr(script, "requested_neighbor_lists")

    @classmethod
    def from_native(cls, native: Any) -> Metatomic:
        return cls(*native) if isinstance(native, tuple) else cls(native)

    def config(self) -> dict[str, Any]:
        # The script is part of the model: it is written with zeros for its weights, which stand elsewhere.
        with torch.no_grad():
            blank = copy.deepcopy(self.model)
            for parameter in blank.parameters():
                parameter.zero_()
        file = io.BytesIO()
        with quiet():
            torch.jit.save(blank, file)
        return {"script": base64.b85encode(zlib.compress(file.getvalue())).decode(), "further": self.further}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Metatomic:
        require("metatomic.torch", extra="metatomic")
        script, _ = _load(io.BytesIO(zlib.decompress(base64.b85decode(config["script"]))), [])
        return cls(script, config["further"])

    def save_native(self, path: Path) -> None:
        # metatomic's calculator gives structures in the exported precision, and leaves weights as they are.
        exported = DTYPES.get(self.model.capabilities().dtype, self.dtype)
        with torch.no_grad(), quiet():
            stored = self.model if self.dtype is exported else copy.deepcopy(self.model).to(exported)
            torch.jit.save(stored, str(path), _extra_files=self.further)


def _load(file: Path | io.BytesIO, names: list[str]) -> tuple[Any, dict[str, str]]:
    further = dict.fromkeys(names, "")
    with quiet():
        script = torch.jit.load(str(file) if isinstance(file, Path) else file, map_location="cpu", _extra_files=further)
    return script, {name: _text(found) for name, found in further.items()}


def _text(found: str | bytes) -> str:
    return found.decode() if isinstance(found, bytes) else found


def _one_way(edges: Edges) -> Tensor:
    """One of each edge and its reverse: the way to the higher index, or for an atom's own image up the first vector."""
    a, b, c = edges.shifts.unbind(1)
    up = (a > 0) | ((a == 0) & ((b > 0) | ((b == 0) & (c > 0))))
    return (edges.i < edges.j) | ((edges.i == edges.j) & up)
