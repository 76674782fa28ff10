"""What was probably meant by a name, a keyword or a flag that is not known, so that the error can say it.

Names are taken in any case. An unknown word is refused with the nearest of the known ones, or with the one that stands
here for what other programs call so.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")

ELSEWHERE = {
    "potential": ("model", "models", "model_path", "model_paths", "model_name", "calculator", "checkpoint", "mlip"),
    "device": ("use_device", "gpu", "cuda", "cpu"),
    "dtype": ("default_dtype", "precision", "float_dtype"),
    "trust": ("weights_only", "allow_pickle", "unsafe"),
    "lr": ("learning_rate", "rate"),
    "epochs": ("max_epochs", "num_epochs", "n_epochs"),
    "batch_size": ("batch", "num_structures"),
    "steps": ("max_steps", "nsteps", "n_steps", "max_iterations", "frames"),
    "fmax": ("force_tolerance", "ftol", "tolerance", "max_force", "f_max"),
    "stepper": ("optimizer", "optimiser", "algorithm", "update_rule"),
    "step_size": ("eta", "step"),
    "maxstep": ("max_step", "maxmove"),
    "out": ("output", "output_dir", "results", "save"),
    "overwrite": ("force",),
    "resume": ("restart", "continue"),
    "pairs": ("data", "train_file", "relaxations"),
    "folds": ("cv", "k", "cross_validate"),
    "skip_invalid": ("ignore_errors",),
    "weight_anchor": ("pull", "l2_sp", "anchor"),
    "teacher": ("distillation", "distill"),
    "reference": ("labels", "forces"),
    "gd": ("gradient_descent", "sgd", "steepest_descent"),
    "full": ("full_tape", "tape", "bptt"),
    "replay": ("checkpointing", "checkpoint"),
    "one-step": ("one_step_gradient",),
    "hydrostatic": ("volume", "isotropic"),
    "constant-volume": ("shape", "isochoric"),
    "delta_q": ("dq", "deltaq"),
    "rmsd": ("rmse",),
    "max_displacement": ("max", "largest_displacement"),
    "float32": ("single", "float"),
    "float64": ("double",),
}
"""Our words, each with what other programs say for it."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, or None."""
    by = {_plain(name): name for name in known}
    plain = _plain(word)
    ours = [name for name, others in ELSEWHERE.items() if plain in map(_plain, others)]
    found = [by[_plain(name)] for name in (word, *ours) if _plain(name) in by]
    beginning = [name for key, name in by.items() if key.startswith(plain)]
    found += beginning if len(beginning) == 1 and len(plain) > 1 else []
    found += [by[key] for key in get_close_matches(plain, list(by), 1)]
    return found[0] if found else None


def named(table: Mapping[str, T], name: object, what: str) -> T:
    """The entry of a table by its name, in any case; ValueError with the nearest name, and all that there are."""
    found = table.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise unknown_name(what, name, table)
    return found


def unknown_name(what: str, name: object, known: Iterable[str], more: str = "") -> ValueError:
    """For a name that is not known.

    Parameters
    ----------
    what : str
        What it would be the name of, as "stepper".
    name : object
        As it was given.
    known : iterable of str
        The names that there are.
    more : str
        Added after them.
    """
    known = list(known)
    return ValueError(f"There is no {what} {name!r}{hint(name, known)}; there are {', '.join(known)}{more}.")


def unknown_keyword(owner: str, name: str, known: Iterable[str], advice: Mapping[str, str] | None = None) -> TypeError:
    """For a keyword that is not known.

    Parameters
    ----------
    owner : str
        What it was given to, as the user calls it.
    name : str
        The keyword.
    known : iterable of str
        Those that there are.
    advice : mapping, optional
        What to say of some keywords, in place of the nearest known one.
    """
    known = list(known)
    said = (advice or {}).get(name)
    meant = f" ({said})" if said else hint(name, known)
    return TypeError(f"{owner} has no keyword {name!r}{meant}; it has {', '.join(known)}.")


def keywords(function: Any) -> list[str]:
    """Names of what a function takes by keyword; of a class those of its base classes, too, if it passes them on."""
    functions = [function]
    if inspect.isclass(function):
        functions = [vars(c)["__init__"] for c in function.__mro__ if "__init__" in vars(c)]
    found: dict[str, None] = {}
    for each in functions:
        parameters = inspect.signature(each).parameters.values()
        found |= dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in found if name != "self"]


def hint(word: object, known: Iterable[str]) -> str:
    """The nearest known word in brackets, as errors add it; nothing where none is near."""
    if inspect.isclass(word):
        return f" (an object is wanted: {word.__name__}(...))"
    near = nearest(word, known) if isinstance(word, str) else None
    return "" if near is None else f" (did you mean {near!r}?)"


def _plain(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "").replace(" ", "")
