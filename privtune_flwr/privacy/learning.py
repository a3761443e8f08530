"""What a mechanism with learned parts does before anything is released.

Rounds of ordinary federated averaging: the cloud sends the state, devices answer with updates, the
cloud averages. Only then the state is frozen, becomes the mechanism's public artefact, and examples
are released once. What the updates themselves tell is bounded by clipping and the devices' own
noise, or not at all; the ledger says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.base import MechanismSpec

#: Named float32 arrays; the same names and shapes in every round.
State = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Update:
    """A device's answer in one learning round.

    Attributes
    ----------
    change : State
        What is averaged, before clipping and noise.
    examples : int
        Its weight.
    metrics : dict
        Sums that may leave, for example ``loss_sum``; no token, text or label.
    """

    change: State
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Learner(Protocol):
    """Learns one mechanism's state; built alike in the cloud and on devices.

    Attributes
    ----------
    start_seconds : float
        What the cloud took to learn the state that :meth:`start` last gave, in this run or in an
        earlier one that kept it; 0 where nothing is learned for it.
    """

    start_seconds: float

    def start(self) -> State:
        """Give the state before the first round; in the cloud."""

    def update(
        self,
        state: State,
        sequences: Sequence[NDArray[np.int32]],
        labels: Sequence[int],
        *,
        round_number: int,
        seed: int,
    ) -> Update:
        """Learn from a device's own text; on the device. Deterministic given its arguments."""

    def apply(self, state: State, mean_change: State) -> State:
        """Take the weighted mean of the devices' changes in; in the cloud."""

    def finish(self, state: State, folder: Path) -> MechanismSpec:
        """Freeze: write the artefact and give the specification that devices release with."""
