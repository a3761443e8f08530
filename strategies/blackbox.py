"""Federated black-box prompt tuning: the cloud searches, devices say how good a prompt is."""

from __future__ import annotations

from typing import Any

from flwr.app import Message

from privtune_flwr.federated.blackbox import CANDIDATES, LOSSES, POINT, width
from privtune_flwr.federated.search import Search
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol.fit import FitRequest, ReceivedFit
from privtune_flwr.protocol.replies import require
from strategies.federated import FederatedTuning

#: No loss of a candidate that a device accepts is larger.
MAX_LOSS = 1e4


class BlackBoxTuning(FederatedTuning):
    """Generations of CMA-ES over a soft prompt's few numbers.

    A round is a generation: ``federated.population`` candidates go to every device, a loss for each
    comes back, and Flower's ``FedAvg`` averages them weighted by the devices' examples. What is
    tested and saved is the mean of the search's distribution.
    """

    def begin(self) -> None:
        """Start the search at the mean embedding."""
        settings = self.cloud.settings
        self.search = Search(
            width(settings, len(self.fleet.label_names)),
            population=settings.federated.population,
            sigma=settings.federated.sigma,
            seed=settings.seed,
        )

    def what_is_sent(self) -> State:
        """Give this generation's candidates; again, where nobody answered."""
        return {CANDIDATES: self.search.candidates()}

    def read(self, reply: Message, request: FitRequest, device: str) -> ReceivedFit:
        """Validate one answer: it must hold losses that can be."""
        received = super().read(reply, request, device)
        losses = received.arrays[LOSSES]
        require(
            bool(((losses >= 0) & (losses <= MAX_LOSS)).all()),
            f"{LOSSES}: no mean cross-entropy is that, allowed: 0 to {MAX_LOSS:g}",
        )
        return received

    def take(self, arrays: State) -> dict[str, Any]:
        """Tell the search, and move the model to its favourite."""
        losses = arrays[LOSSES]
        before = self.state[POINT]
        self.search.tell(losses)
        self.state = {POINT: self.search.mean()}
        self.model.load(self.state)
        return {
            "loss": float(losses.mean()),
            "best_loss": float(losses.min()),
            "update_norm": float(((self.state[POINT] - before) ** 2).sum() ** 0.5),
        }

    def kept(self) -> State:
        """Keep what the search was told."""
        return super().kept() | self.search.kept()

    def restore(self, kept: State) -> None:
        """Repeat the search up to where it stood."""
        super().restore(kept)
        self.search.restore(kept)
