"""Tables, pictures and a page of an evaluation or a fine-tuning run."""

from .page import write_page
from .plots import plot_before_after, plot_learning_curve
from .tables import comparison_text, evaluation_table, group_table, table, write_csv
from .words import change

__all__ = [
    "change",
    "comparison_text",
    "evaluation_table",
    "group_table",
    "plot_before_after",
    "plot_learning_curve",
    "table",
    "write_csv",
    "write_page",
]
