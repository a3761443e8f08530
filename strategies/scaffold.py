"""SCAFFOLD's cloud: a mean of weights, and of what devices' gradients are like.

Karimireddy et al., arXiv 1910.06378.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from privtune_flwr.federated.scaffold import CONTROL, join_parts, split_parts
from privtune_flwr.privacy.learned_update import norm_of
from privtune_flwr.privacy.learning import State
from strategies.federated import FederatedTuning


class ScaffoldTuning(FederatedTuning):
    """Rounds in which the cloud keeps a control variate ``c`` beside the weights ``x``.

    ``x += lr * mean(y_i - x)`` and ``c += s * mean(change of c_i)``. Both means are weighted by the
    devices' examples, as FedAvg's is here, and ``s`` is the participants' share of all examples
    (with equal devices the paper's ``|S| / N``): while every change arrives, ``c`` is the weighted
    mean of all ``c_i``. A device whose answer is lost twice has changed its ``c_i`` all the same;
    ``c`` then is off by that change, as in the paper's protocol, which has no acknowledgement.
    """

    def begin(self) -> None:
        """Start from a control variate of zeros."""
        self.control: State = {n: np.zeros_like(v) for n, v in self.state.items()}
        self._share = 0.0

    def what_is_sent(self) -> State:
        """Give weights and the server's control variate."""
        return join_parts(self.state, self.control)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average as FedAvg does, and note which share of all examples took part."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        totals = dict(metrics or {})
        self._share = float(str(totals.get("examples", 0))) / max(1, sum(self.fleet.train.values()))
        return arrays, metrics

    def take(self, arrays: State) -> dict[str, Any]:
        """Step towards the mean of the weights, and move the control variate."""
        mean, change = split_parts(arrays)
        rate = self.cloud.settings.federated.scaffold_learning_rate
        record = super().take({n: v + rate * (mean[n] - v) for n, v in self.state.items()})
        self.control = {n: c + self._share * change[n] for n, c in self.control.items()}
        return {**record, "control_norm": norm_of(self.control)}

    def kept(self) -> State:
        """Keep the control variate for a resumed run."""
        return super().kept() | {f"{CONTROL}{n}": v for n, v in self.control.items()}

    def restore(self, kept: State) -> None:
        """Take it up again."""
        super().restore(kept)
        self.control = {
            n.removeprefix(CONTROL): v for n, v in kept.items() if n.startswith(CONTROL)
        }
