"""Directives of these pages that read the package itself, so that nothing on them can be stale."""

from __future__ import annotations

import argparse
import ast
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

import ase_bptt
from ase_bptt.cli import build_parser
from ase_bptt.potentials import families, family

COLUMNS = 80
"""Width of the help texts."""


class CommandLine(Directive):
    """A section with the help text of each command, from the parser itself."""

    def run(self) -> list[nodes.Node]:
        """The main help, then a section for each command, in the parser's order."""
        parser = build_parser()
        found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        commands = {name: command for action in found for name, command in action.choices.items()}
        return [_help(parser), *(_section(name, command) for name, command in commands.items())]


def _section(name: str, parser: argparse.ArgumentParser) -> nodes.section:
    title = f"ase-bptt {name}"
    section = nodes.section(ids=[f"ase-bptt-{name}"], names=[title])
    section += [nodes.title(text=title), _help(parser)]
    return section


def _help(parser: argparse.ArgumentParser) -> nodes.literal_block:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(COLUMNS)
    try:
        text = parser.format_help()
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return nodes.literal_block(text, text, language="text")


class Said(Directive):
    """A sentence that the package says, with … for what varies, and below it why and what to do.

    A sentence that is not in the source fails the build.
    """

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        """One entry of a definition list."""
        sentence = " ".join(self.arguments[0].split())
        parts = [re.escape(part.strip()) for part in sentence.split("…") if part.strip(" .:")]
        if not any(re.search(".*".join(parts), text) for text in _texts()):
            raise self.error(f"The package does not say {sentence!r}.")
        entry = nodes.definition_list_item()
        meaning = nodes.definition()
        self.state.nested_parse(self.content, self.content_offset, meaning)
        # A flag keeps its two dashes.
        said = nodes.strong(text=sentence, support_smartquotes=False)
        entry += [nodes.term("", "", said), meaning]
        return [nodes.definition_list("", entry)]


class Registered(Directive):
    """The classes that have a name: of a dict such as ase_bptt.steppers.STEPPERS, or ``families``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """An autoclass for each."""
        (what,) = self.arguments
        if what == "families":
            classes = [f"{family(name).__module__}.{family(name).__qualname__}" for name in families()]
        else:
            module, _, registry = what.rpartition(".")
            classes = [f"{module}.{cls.__name__}" for cls in getattr(import_module(module), registry).values()]
        lines = [line for name in classes for line in (f".. autoclass:: {name}", "")]
        found = nodes.container()
        self.state.nested_parse(StringList(lines, source=what), self.content_offset, found)
        return found.children


@cache
def _texts() -> tuple[str, ...]:
    """Every string in the source, with … for what is filled in."""
    files = sorted(Path(ase_bptt.__file__).parent.rglob("*.py"))
    return tuple(text for file in files for text in _strings(ast.parse(file.read_text(encoding="utf-8"))))


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("command-line", CommandLine)
    app.add_directive("said", Said)
    app.add_directive("registered", Registered)
    return {"parallel_read_safe": True}
