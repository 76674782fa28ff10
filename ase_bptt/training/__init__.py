"""Fine-tuning: from pairs of structures to a tuned potential.

`trainer` tells a run from its first look at the pairs to its best state. Under it, `choices` is what it takes and
refuses, `epoch` the order of its pairs and a row of its metrics, `pairloss` the loss of one batch, `updates` the steps
of the optimizer, and `resuming` what it leaves behind; above it, `finetune` puts the measurements around it,
and `folds` makes one outcome of those of a cross-validation. The processes that share all this are `ranks`.
"""

from __future__ import annotations

from .trainer import Trainer

__all__ = ["Trainer"]
