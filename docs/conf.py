"""How Sphinx builds these pages: sphinx-build -W -b html docs OUT, offline."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import ase_bptt  # noqa: E402 (of this checkout, whatever else is installed)

project = "ase_bptt"
author = "the authors of ase_bptt"
copyright = "the authors of ase_bptt, MIT licence"
release = version = ase_bptt.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["measure"]
default_role = "py:obj"
nitpicky = False

napoleon_google_docstring = False
napoleon_use_rtype = False
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

COLUMNS = 80
"""Width of the help texts."""


class CommandLine(Directive):
    """A section with the help text of each command, from the parser itself, so that it cannot be stale."""

    def run(self) -> list[nodes.Node]:
        """The main help, then a section for each command, in the parser's order."""
        parser = importlib.import_module("ase_bptt.cli").build_parser()
        return [_help(parser), *(_section(name, command) for name, command in _commands(parser).items())]


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return {name: command for action in found for name, command in action.choices.items()}


def _section(name: str, parser: argparse.ArgumentParser) -> nodes.section:
    title = f"ase-bptt {name}"
    section = nodes.section(ids=[f"ase-bptt-{name}"], names=[title])
    section += [nodes.title(text=title), _help(parser)]
    return section


def _help(parser: argparse.ArgumentParser) -> nodes.literal_block:
    before = os.environ.get("COLUMNS")
    # argparse leaves two columns free.
    os.environ["COLUMNS"] = str(COLUMNS + 2)
    try:
        text = parser.format_help()
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return nodes.literal_block(text, text, language="text")


def _for_the_site(app: Sphinx, relative_path: Path, parent: str, content: list[str]) -> None:
    """The README as an included page: its paths begin here, and nothing is loaded from elsewhere."""
    if Path(relative_path).name != "README.rst":
        return
    text = content[0].replace(".. image:: docs/", ".. image:: ")
    blocks = text.split("\n\n")
    content[0] = "\n\n".join(b for b in blocks if not b.startswith(".. image:: https://"))


def _plain(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write |x| for a length, never a substitution."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register what is above."""
    app.add_directive("command-line", CommandLine)
    app.connect("include-read", _for_the_site)
    app.connect("autodoc-process-docstring", _plain)
    return {"parallel_read_safe": True}
