"""The page on a saved potential that its next user should read: what it was tuned on, how, and how well it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..potential import Potential

MODEL_CARD = "model_card.md"
FILL_IN = "**to be filled in**"
SHOWN = ("first", "loss", "adjoint", "stepper", "steps", "lr", "batch_size", "terms", "seed")
"""Settings of the Trainer that a reader needs first; all of them are in model.json."""


def model_card(potential: Potential) -> str:
    """A potential's metadata as Markdown, with marks where only its author knows.

    `Trainer.save` and `ase_bptt.save_potential` write it as model_card.md. The settings come from the Trainer; numbers
    of pairs and the held-out figure from `ase_bptt.training.fine_tune`, on which ``ase-bptt train`` is built.

    >>> from ase_bptt import load_potential
    >>> print(model_card(load_potential("lj")).splitlines()[0])
    # Model card: lj

    Parameters
    ----------
    potential : Potential
    """
    data: Mapping[str, Any] = potential.metadata
    chain = list(_chain(data))
    first = chain[-1].get("source", "unknown")
    times = sum(not kept_as_it_was(tuning) for tuning in chain[:-1])
    trained = {"data", "settings", "trained", "versions"} <= data.keys()  # native files may bring a dict of others
    tuned = trained and not kept_as_it_was(data)
    lines = [
        f"# Model card: {f'{first}, fine-tuned' if tuned else first}",
        "",
        f"- Family: {potential.family}; cutoff {float(potential.cutoff):g} Å; "
        f"{str(potential.dtype).removeprefix('torch.')}",
        f"- Base: {first}" + (f", fine-tuned {times} times in a row" if times > 1 else ""),
        f"- Licence of the base: {_licence(potential, first)}. It applies to tuned weights, too.",
    ]
    if trained:
        lines += _training(data)
    lines += [
        "- Meant for, and not meant for (elements, kinds of structures, temperatures): " + FILL_IN,
        "- Author, date, how to cite: " + FILL_IN,
        "",
    ]
    return "\n".join(lines)


def _chain(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Metadata of the potential, of the one that it was tuned from, and so on to the first."""
    yield data
    while isinstance(data.get("base"), Mapping):
        data = data["base"]
        yield data


def kept_as_it_was(data: Mapping[str, Any]) -> bool:
    """Whether the training of a potential with this metadata left the weights as they were.

    By its validation, or by what it held out.
    """
    return bool(data.get("kept_as_it_was") or data.get("held_out", {}).get("kept_as_it_was"))


def _licence(potential: Potential, source: str) -> str:
    return "MIT (this package's own)" if source == "mace-si" else potential.licence or FILL_IN


def _training(data: Mapping[str, Any]) -> Iterator[str]:
    counts = data.get("pairs")
    pairs = ", ".join(f"{n} {name}" for name, n in counts.items()) if counts else f"{FILL_IN} (how many)"
    yield f"- Pairs of initial and relaxed structures: {pairs}; SHA-256 of what was trained on {data['data'][:16]}"
    yield f"- Where the pairs come from, functional (+U?), code, cut-off, fmax of the references: {FILL_IN}"
    shown = {k: data["settings"][k] for k in SHOWN if data["settings"].get(k) is not None}
    what = "Recipe, which did not help: **these are the untuned weights**" if kept_as_it_was(data) else "Recipe"
    yield f"- {what}: {data['trained']}; " + "; ".join(f"{k} {_plain(value)}" for k, value in shown.items())
    yield f"- Held-out figure: {_figure(data.get('held_out'))}"
    yield "- Versions: " + ", ".join(f"{name} {version}" for name, version in data["versions"].items())


def _figure(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return f"none was measured in this run; {FILL_IN}"
    notes = ""
    if found["folds"]:
        notes = f"; by cross-validation over {found['folds']} folds, each with a potential of its own"
    elif found.get("on_all_pairs"):
        notes = "; by the same training without these, before the last one on all pairs"
    if found["kept_as_it_was"]:
        notes += "; the tuned potential was not better"
    parts = [f"{name} {_number(found[f'{name}_before'])} before, {_number(found[f'{name}_after'])} after"
             for name in ("mean", "median")]  # fmt: skip
    return (
        f"Delta-Q to the reference in amu^1/2 Å over {found['n']} structures of {found['kinds']} kinds that were not "
        f"trained on: {'; '.join(parts)}; in the right basin {_share(found['basins_before'])} before, "
        f"{_share(found['basins_after'])} after{_cells(found)}{notes}"
    )


def _cells(found: Mapping[str, Any]) -> str:
    """The errors of the cells; nothing where none moved."""

    def said(name: str, text: Callable[[Any], str]) -> str:
        values = (found.get(f"{name}_{when}") for when in ("before", "after"))
        return " before, ".join("-" if value in (None, [None, None]) else text(value) for value in values) + " after"

    after = found.get("volume_error_after")
    if after is None or not math.isfinite(after):
        return ""
    return (
        f"; mean absolute volume error {said('volume_error', lambda v: f'{100 * v:.2f} %')}; median strain "
        f"{said('cell_strain', lambda v: f'{v:.4f}')}; mean absolute error of a, b, c "
        f"{said('lattice_errors', lambda v: f'{v[0]:.3f} Å')}, of the angles "
        f"{said('lattice_errors', lambda v: f'{v[1]:.2f}°')}; median RMSD / (V/n)^(1/3) "
        f"{said('scaled_rmsd', lambda v: f'{v:.4f}')}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.0f} %"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{_plain(v)}" if k == "name" else f"{k}={_plain(v)}" for k, v in value.items())
    return ", ".join(map(_plain, value)) or "none" if isinstance(value, list | tuple) else str(value)
