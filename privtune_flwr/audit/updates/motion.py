"""From a device's change back to what its optimiser was given.

Weight decay moves every weight, also where no gradient came: the cloud knows optimiser, rates and
schedule, repeats that movement exactly and takes it off. What is left of plain SGD is the sum of
the steps' gradients times their rates (for one step: the gradient itself, up to a factor); Adam's
movement is not proportional to gradients, but where there was no gradient there is none.

Legend: M rows, D columns of a matrix.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privtune_flwr.audit.updates.base import Update
from privtune_flwr.config import TrainConfig
from privtune_flwr.federated.local import local_steps
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.whole import WholeModel
from privtune_flwr.privacy.learning import State
from privtune_flwr.training.trainer import span_factors


class Motion:
    """One update, with decay and clipping taken off.

    Parameters
    ----------
    model : WholeModel
        With the run's settings; its parameters are left as they are.
    update : Update
    table : str
        Name of the token table, which tells whether the answer was clipped; may not be sent.
    """

    def __init__(self, model: WholeModel, update: Update, table: str) -> None:
        self.model = model
        self.update = update
        self.table = table
        self._decayed: State = {}

    def decayed(self, name: str) -> NDArray[np.float32]:
        """Give an array as it would be had no gradient come, by the device's own arithmetic."""
        if name not in self._decayed:
            self._decayed[name] = _decay(self.model, self.update, name)
        return self._decayed[name]

    @cached_property
    def scale(self) -> float:
        """By what the answer was multiplied when it was clipped; 1 if not, or if none can tell.

        Most rows of the token table occur in no text: they only decayed, and the whole answer was
        scaled alike, so the median over rows tells the factor.
        """
        update, table = self.update, self.table
        if table not in update.sent:
            return 1.0
        decayed = self.decayed(table)
        if (decayed == update.received[table]).all(axis=1).mean() > 0.5:
            return 1.0
        decay = decayed.astype(np.float64) - update.sent[table]
        below = np.square(decay).sum(axis=1)
        rows = below > 0
        if not rows.any():
            return 1.0
        return float(np.median((update.change(table) * decay).sum(axis=1)[rows] / below[rows]))

    def movement(self, name: str) -> NDArray[np.float64]:
        """Give what gradients did to an array: its change without weight decay."""
        decay = self.decayed(name).astype(np.float64) - self.update.sent[name]
        found: NDArray[np.float64] = self.update.change(name) - self.scale * decay
        return found

    def rounding(self, name: str) -> NDArray[np.float64]:
        """Give the standard deviation of float32's rounding in each entry of a change."""
        spacing = np.spacing(np.abs(self.update.received[name]))
        found: NDArray[np.float64] = spacing.astype(np.float64) / np.sqrt(12.0)
        return found


def rate_factors(settings: FitSettings, update: Update) -> list[float]:
    """Give the schedule's factor of each step of the round, as devices compute it."""
    total = local_steps(update.examples, settings.train.batch_size, settings.federated.local_epochs)
    span = (update.round - 1) / update.rounds, update.round / update.rounds
    return span_factors(total, span, settings.train)


def _decay(model: WholeModel, update: Update, name: str) -> NDArray[np.float32]:
    """Let the device's optimiser step on one array without any gradient."""
    trained = model.trainable()[name]
    group = next(g for g in model.groups() if any(p is trained for p in g["params"]))
    copy = nn.Parameter(torch.from_numpy(update.sent[name].copy()))
    copy.grad = torch.zeros_like(copy)
    optimizer = optimizer_of([{**group, "params": [copy]}], model.settings.train)
    for factor in rate_factors(model.settings, update):
        optimizer.param_groups[0]["lr"] = float(group["lr"]) * factor
        optimizer.step()
    return copy.detach().numpy()


def optimizer_of(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimiser that ``train.optimizer`` names, as devices do, for other parameters."""
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=0.0)
