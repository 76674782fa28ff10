"""How Sphinx builds these pages: sphinx-build -W -b html docs OUT, offline."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import ase_bptt  # noqa: E402 (of this checkout, whatever else is installed)

project = "ase_bptt"
author = "the authors of ase_bptt"
copyright = "the authors of ase_bptt, MIT licence"
release = version = ase_bptt.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "directives"]
exclude_patterns = ["measure"]
default_role = "py:obj"

napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"ase_bptt {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False


def _readable(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make of a docstring for people what napoleon understands.

    A length |x| is no substitution, and attributes that share a line are described one by one.
    """
    found: list[str] = []
    shared: list[str] = []
    body: list[str] = []
    for line in [*(line.replace("|", r"\|") for line in lines), ""]:
        several = re.fullmatch(r"(\w+(?:, \w+)+) : (.*)", line)
        if shared and (several or not line.startswith(" ")):
            found += [text for head in shared for text in (head, *body)]
            shared, body = [], []
        if several:
            shared = [f"{each} : {several[2]}" for each in several[1].split(", ")]
        else:
            (body if shared else found).append(line)
    lines[:] = found


def setup(app: Sphinx) -> dict[str, Any]:
    """Adapt what is documented."""
    app.connect("autodoc-process-docstring", _readable, priority=100)  # before napoleon
    return {"parallel_read_safe": True}
