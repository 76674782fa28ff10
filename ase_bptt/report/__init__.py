"""Tables, pictures and a page of an evaluation or a fine-tuning run."""

from .plots import plot_before_after, plot_learning_curve
from .tables import change, table

__all__ = ["change", "plot_before_after", "plot_learning_curve", "table"]
