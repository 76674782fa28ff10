"""Tables, pictures and a page of an evaluation or a fine-tuning run."""

from .curve import learning_curve
from .figures import save
from .page import write_page
from .pictures import write_pictures
from .plots import atom_displacements, before_after, by_group
from .tables import comparison_text, evaluation_table, group_table, table, write_csv
from .words import change

__all__ = [
    "atom_displacements",
    "before_after",
    "by_group",
    "change",
    "comparison_text",
    "evaluation_table",
    "group_table",
    "learning_curve",
    "save",
    "table",
    "write_csv",
    "write_page",
    "write_pictures",
]
