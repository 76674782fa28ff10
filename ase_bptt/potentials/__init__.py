"""Families of potentials, one adapter a file: from a name, a file or a module to a Potential, to a folder and back.

A family registers through the entry-point group `ase_bptt.potentials`. What is particular to it (its package, its
layers, its files) stands in its adapter, and no adapter imports the package of another.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import logging
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..potential import Potential
from ..suggestions import hint, named
from ..threads import Building, quiet
from ..tuning.low_rank import merged
from ..utils import UNREADABLE, as_device, differs, in_short, outside_inference_mode, replacing
from .model_card import MODEL_CARD, model_card

log = logging.getLogger(__name__)
GROUP = "ase_bptt.potentials"
EMBEDDED = {"mace-si": Path(__file__).parent.parent / "data" / "mace_si"}
FORMAT = "ase_bptt potential"
VERSION = 1
RUN_POTENTIAL = "potential"
CORRECTION = re.compile(r"\+(?=d3(?:[:+]|$))")
"""Where the name of a sum is split: paths may hold a plus sign, too."""
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def load_potential(
    spec: str | Path | nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    trust: bool = False,
) -> Potential:
    """Load a potential; all its parameters require gradients afterwards.

    >>> load_potential("lj", dtype="float32").dtype
    torch.float32

    Parameters
    ----------
    spec : str, Path or nn.Module
        "mace-si" (embedded); a family with or without a variant ("chgnet", "chgnet:r2scan",
        "mace:medium", with a head "mace:mh-1:omat_pbe"); any of these with DFT-D3 added
        ("chgnet+d3", "mace:medium+d3:pbe:bj"); a folder written by `save_potential`, a training
        run or matgl; a family's native checkpoint (a pickle: only with trust); a module of a
        supported family, or a Potential.
    device : torch.device or str, optional
        By default the GPU where PyTorch finds one, else the CPU; a module that is given stays where it is.
    dtype : torch.dtype or str, optional
        None keeps that of the weights. A module that is given is copied for another, never cast itself.
    trust : bool
        Allow unpickling, which can run any code: only for files from sources that you trust.

    Raises
    ------
    ValueError
        For a spec that is none of the above, with the names that there are; for a device that is not here.
    PermissionError
        For a pickle without trust; it has not been opened.
    ImportError
        Where the family's package is missing, with the extra that installs it.
    """
    return as_potential(spec, device=device, dtype=dtype, trust=trust).requires_grad_()


@outside_inference_mode
def as_potential(
    spec: str | Path | nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    trust: bool = False,
) -> Potential:
    """`load_potential`, but a module that is given keeps its ``requires_grad`` flags."""
    if isinstance(dtype, str):
        dtype = named(DTYPES, dtype.removeprefix("torch."), "dtype")
    if not isinstance(spec, str | Path | nn.Module):
        raise TypeError(f"A potential is a name, a path or a torch module, not of type {type(spec).__name__}.")
    if device is not None or not isinstance(spec, nn.Module):
        device = as_device(device)
    if isinstance(spec, nn.Module):
        if any(t.is_inference() for t in (*spec.parameters(), *spec.buffers())):
            raise ValueError(
                f"The weights of this {type(spec).__name__} were made under torch.inference_mode(), and nothing can be "
                "differentiated with them, so that there are no forces: build or load it outside of that block."
            )
        module = copy.deepcopy(spec) if differs(spec, device, dtype) else spec
        potential = module if isinstance(module, Potential) else from_native(module, "this module")
    else:
        with Building():
            potential = _from_spec(str(spec), trust).requires_grad_()
        potential.metadata = dict(potential.metadata) or {"source": str(spec)}
    return potential.to(device=device, dtype=dtype)


def _from_spec(spec: str, trust: bool) -> Potential:
    if spec in EMBEDDED:
        return _from_folder(EMBEDDED[spec])
    parts = CORRECTION.split(spec)
    if len(parts) > 1 and not Path(spec).expanduser().exists():
        return family("sum")(*(_from_spec(part, trust) for part in parts))
    name, _, variant = spec.partition(":")
    known = families()
    # Names come first: a clone of chgnet in the working directory must not hide the family (./chgnet is the folder).
    if name in known:
        if Path(spec).exists():
            log.warning("%r is taken as the name of a family; say ./%s for the file or folder here.", spec, spec)
        return family(name).from_name(variant or None)
    path = Path(spec).expanduser()
    if path.is_dir():
        ours = any((path / within / "weights.pt").is_file() for within in ("", RUN_POTENTIAL))
        native = None if ours else _read_native(path)
        return _from_folder(path) if native is None else from_native(native, str(path))
    if path.is_file():
        return from_checkpoint(path, trust)
    names = [*EMBEDDED, *known]
    raise ValueError(
        f"There is no potential {spec!r}{hint(name, names)}: it is no file or folder here, and the names are "
        f"{', '.join(names)} (a family takes a variant: chgnet:r2scan)."
    )


def families() -> tuple[str, ...]:
    """Names of the registered families."""
    return tuple(sorted(entry_points(group=GROUP).names))


def family(name: str) -> type[Potential]:
    """The adapter of a family. Only its own module is imported."""
    (entry, *_) = entry_points(group=GROUP, name=name)
    return entry.load()


def from_checkpoint(path: Path, trust: bool) -> Potential:
    """A family's own checkpoint as a Potential; it is a pickle, and is not opened without trust."""
    if not trust:
        raise PermissionError(
            f"{path} is a pickle, and loading a pickle can run any code that somebody put into it. "
            "If you trust where it comes from, say so: trust=True, or --trust in the shell."
        )
    try:
        with quiet():
            native = _read_native(path)
            if native is None:
                native = torch.load(path, weights_only=False, map_location="cpu")
    except ImportError as error:
        if isinstance(error.__cause__, ImportError):  # from require, which has named the family
            raise
        every = ", ".join(found for adapter in map(family, families()) if (found := adapter.installation))
        raise ImportError(f"{path} needs a package that is not here ({error}): install its family, {every}.") from error
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be unpickled ({in_short(error)}).") from error
    return from_native(native, str(path))


def _read_native(path: Path) -> Any | None:
    return next((native for name in families() if (native := family(name).read_native(path)) is not None), None)


def from_native(native: Any, name: str) -> Potential:
    """A family's own module, or what its checkpoint holds, as a Potential; errors call it by the name."""
    for candidate in map(family, families()):
        if candidate.owns(native):
            potential = candidate.from_native(native)
            found = native.get("metadata") if isinstance(native, dict) else getattr(native, "metadata", None)
            potential.metadata = found if isinstance(found, dict) else {}
            return potential
    raise ValueError(
        f"No family of potentials knows what to do with {name} (a {type(native).__module__}."
        f"{type(native).__name__}); the families are {', '.join(families())}."
    )


def _from_folder(folder: Path) -> Potential:
    # A run folder holds its best potential in "potential".
    if (folder / RUN_POTENTIAL / "model.json").is_file():
        folder = folder / RUN_POTENTIAL
    try:
        description = json.loads((folder / "model.json").read_text())
        if (description["format"], description["version"]) != (FORMAT, VERSION):
            raise ValueError(f"this release reads {FORMAT!r} of version {VERSION} only")
        if description["family"] not in families():
            raise ValueError(f"its family {description['family']!r} is none of {', '.join(families())}")
        with quiet():
            weights = torch.load(folder / "weights.pt", weights_only=True, map_location="cpu")
        potential = _rebuild(family(description["family"]), description["config"], DTYPES[description["dtype"]])
        missing, unexpected = potential.load_state_dict(weights, strict=False)
    except UNREADABLE as error:
        raise ValueError(f"The folder {folder} holds no potential that can be read ({in_short(error)}).") from error
    lost = set(missing) & {name for name, _ in potential.named_parameters()}
    if lost or unexpected:
        raise ValueError(
            f"The weights in {folder} do not fit its model.json: "
            f"{len(lost)} are missing and {len(unexpected)} are unknown, as {min({*lost, *unexpected})}."
        )
    potential.metadata = description.get("metadata") or {}
    return potential


def save_potential(potential: Potential, folder: str | Path) -> None:
    """Write model.json and weights.pt, which load without unpickling, the native checkpoint, and model_card.md.

    Low-rank updates (`ase_bptt.tuning.low_rank`) are folded into the weights that are written; the potential keeps them
    apart. Files that are there already are replaced whole, or not at all.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_potential(load_potential("morse"), folder)
    ...     load_potential(folder).family
    'morse'

    Raises
    ------
    FileExistsError
        For a training run's folder, whose own potential would be loaded instead.
    """
    folder = Path(folder)
    if (folder / RUN_POTENTIAL / "model.json").is_file():
        raise FileExistsError(f"{folder} is the folder of a training run, with a potential of its own: take another.")
    folder.mkdir(parents=True, exist_ok=True)
    potential = merged(potential).as_stored()
    config = potential.config()
    description = {
        "format": FORMAT,
        "version": VERSION,
        "family": potential.family,
        "dtype": str(potential.dtype).removeprefix("torch."),
        "written_by": f"ase_bptt {__version__}",
        "config": config,
        "metadata": dict(potential.metadata),
    }
    blank = _rebuild(type(potential), config, potential.dtype).state_dict()
    parameters = dict(potential.named_parameters())
    # Constants that the config rebuilds bit for bit would only make the file larger.
    weights = {
        name: value.detach().cpu()
        for name, value in potential.state_dict().items()
        if name in parameters or not torch.equal(value.cpu(), blank[name])
    }
    with replacing(folder / "weights.pt") as path:
        torch.save(weights, path)
    with replacing(folder / "model.json") as path:
        path.write_text(json.dumps(description, indent=1) + "\n")
    if potential.native_name:
        with replacing(folder / potential.native_name) as path:
            potential.save_native(path)
    with replacing(folder / MODEL_CARD) as path:
        path.write_text(model_card(potential), encoding="utf-8")


def weights_hash(potential: Potential) -> str:
    """SHA-256 of all parameters as they are stored, names and dtypes included: the same for the same weights."""
    found = hashlib.sha256()
    for name, value in sorted(merged(potential).as_stored().named_parameters()):
        array = value.detach().cpu().contiguous().numpy()
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _rebuild(adapter: type[Potential], config: dict[str, Any], dtype: torch.dtype) -> Potential:
    with Building(dtype):
        return adapter.from_config(config).to(dtype)


def require(module: str, *, extra: str) -> ModuleType:
    """Import a family's package; where it is missing, the error names the extra that installs it.

    The extra of a family is called as the family is; others, such as "cueq", add to one.
    """
    if (known := sys.modules.get(module)) is not None and not getattr(known.__spec__, "_initializing", False):
        return known
    try:
        with Building(), quiet():
            return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".", 1)[0]
        adapter = family(extra) if extra in families() else Potential
        commands = " and ".join(filter(None, (f'pip install "ase_bptt[{extra}]"', adapter.further_installation)))
        where = f", in an environment of its own: {reason}" if (reason := adapter.environment()) else ""
        raise ImportError(
            f"This potential needs the package {package!r}, which does not import here ({error}): "
            f"install it by {commands}{where}."
        ) from error
