"""Fine-tuning: from pairs of structures to a tuned potential.

`trainer` runs the epochs, `pairloss` is the loss of one batch, and `finetune` puts the measurements around it.
"""

from __future__ import annotations

from .trainer import Trainer

__all__ = ["Trainer"]
