"""The field's words, and no others, wherever a user or a reader meets them; docs/glossary.rst defines them."""

from __future__ import annotations

import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.rst", ROOT / "CHANGELOG.rst", *sorted((ROOT / "docs").rglob("*.rst"))]
CODE = [path for folder in ("ase_bptt", "tutorials", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
WORDS = {
    r"slopes?": "negative gradient",
    r"(held|what constraints hold) (atoms|layers)|(atoms|layers) held": "fixed atoms",
    r"run again when asked|run again on the way back": "recomputed",
    r"makes? room for the next|on (its|their) way": "in-flight batching, being relaxed",
    r"ways? to the gradient|way ?back|pull_?back": "adjoint, backward sweep, vjp",
    r"krylov": "conjugate gradients",
    r"rigid(?! (motion|translation|drift))": "zero modes",
    r"steady|restrain\w*": "resolve_step_size, clamp_parameters",
    r"numbers of (a|the) stepper|stepper's own numbers": "hyperparameters",
    r"sameness|pair ?lists?": "structure matching, edges",
    r"Pull\(|Teacher\(|portraits?|holes?|(?<!as )wells|health": "weight anchor, distillation, snapshot, instability",
    r"(?<!model )(?<!model_)cards?(?![\w.])": "drift report, model card",
    r"meeting|what is said is said": "distributed, only rank 0 prints",
    r"diagnosis|outcomes?|planning": "suitability, results, memory",
    r"in the mean": "on average",
    r'(?<!")hollow|hardly heard': "basin, vanishing gradient",
    r"begun|told|go(es)? on|anew": "started, reported, continues, rebuilt",
    # Of sentences that had to be read twice.
    r"on (one|two|both) sides?": "a group is never divided",
    r"kept: the weights|best by the mean log": "the best epoch",
    r"the one near the reference": "the minimum near the reference",
    r"not so [A-Z]\w*_": "which structures, and why",
    r"falls? into the": "reaches the same local minimum",
    r"relax(es|ed)? (it )?on(?! (Atoms|the|a|one|two))": "relax further",
}
"""What is not said, as a regular expression of whole words in any case, with what is said instead."""
NAMES = re.compile(
    r"_?(wayback|pull_back|krylov|steady|restrain\w*|sameness|pairlists?|portraits?|holes?|meeting|outcome|planning"
    r"|health|Pull|Teacher)"
)
"""Names that the code does not use."""
PROSE = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", None)}


@cache
def tokens(path: Path) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline))


@cache
def texts(path: Path) -> list[tuple[int, str]]:
    """Paragraphs of a page; of code its strings and comments: each in one line, with the number of its first."""
    if path.suffix == ".rst":
        page = path.read_text(encoding="utf-8")
        found = re.finditer(r"(?:.+\n)+", page)
        return [(page.count("\n", 0, part.start()) + 1, " ".join(part[0].split())) for part in found]
    return [(token.start[0], " ".join(token.string.split())) for token in tokens(path) if token.type in PROSE]


@pytest.mark.parametrize("words", WORDS)
def test_a_word_is_not_used(words):
    pattern = re.compile(rf"(?<![\w`])(?:{words})(?!\w)", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text[max(0, match.start() - 40) : match.end() + 40]}"
        for path in (*PAGES, *CODE)
        for line, text in texts(path)
        for match in pattern.finditer(text)
    ]
    assert not found, f"say {WORDS[words]}:\n" + "\n".join(found)


def test_names_in_the_code():
    found = [
        f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}"
        for path in CODE
        for token in tokens(path)
        if token.type == tokenize.NAME and NAMES.fullmatch(token.string)
    ]
    assert not found, "\n".join(found)
