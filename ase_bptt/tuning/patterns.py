"""Names of weights, and patterns for them as in a shell."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

PARAMETRISED = re.compile(r"parametrizations\.(\w+)\.(?:original|\d+\..*)$")
SHOWN = 3


def plain(name: str) -> str:
    """The name that a weight has without low-rank updates: the pretrained weight's and both factors' is one."""
    return PARAMETRISED.sub(r"\1", name)


def matching(names: Collection[str], patterns: Sequence[str], kind: str = "weight") -> set[str]:
    """Those of the names that match the pattern, or any of several (``*``, ``?`` and ``[...]`` as in a shell).

    Raises
    ------
    ValueError
        For a pattern that matches no name, with the names that come nearest.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            near = get_close_matches(pattern, sorted(names), SHOWN, cutoff=0)
            raise ValueError(
                f"No {kind} matches {pattern!r}; there are {len(names)}, as {', '.join(near)} "
                "(* stands for anything in a name)."
            )
        found |= hits
    return found
