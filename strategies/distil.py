"""Federated distillation in the cloud: pool the devices' opinions, and distil a model of its own.

See :mod:`privtune_flwr.federated.distil` for the protocol and its sources.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from privtune_flwr.federated.distil import (
    LOGITS,
    NO_TEACHER,
    TEACHER,
    distil,
    read_public,
    vote_of,
)
from privtune_flwr.privacy.learned_update import norm_of
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol.fit import FitRequest, ReceivedFit
from strategies.federated import FederatedTuning

VOTE = "vote"


class DistilTuning(FederatedTuning):
    """Rounds in which devices and cloud exchange logits on public sentences.

    The ensemble is the mean of the devices' logits, weighted by their examples (FedMD, FedDF);
    Flower's ``FedAvg`` takes it. A mean of probabilities would bound each vote by itself, but a
    device that has seen one class answers nearly 1 for it everywhere, and what it knows of a
    sentence is in small differences of logits that softening rounds away. What a mean of
    logits is weak against, an over-confident or lying device, is met by a bound on each vote.

    ``state`` is the cloud's own model: pretrained before the first round, then distilled from each
    round's ensemble, with a schedule of its own a round since the last teacher is the best. It is
    what is tested, judged by devices (its traffic counts as evaluation) and exported.
    """

    def begin(self) -> None:
        """Read the public sentences; there is no teacher yet."""
        bundle = self.cloud.public_bundle
        folder = bundle[1] if bundle else None
        self._public = read_public(folder, self.cloud.settings, self.model.bottom)
        self._teacher_NC: NDArray[np.float32] | None = None

    def what_is_sent(self) -> State:
        """Give the ensemble's logits of the round before, or say that there are none."""
        if self._teacher_NC is None:
            # a message must carry an array
            return {NO_TEACHER: np.zeros(1, dtype=np.float32)}
        return {TEACHER: self._teacher_NC}

    def read(self, reply: Message, request: FitRequest, device: str) -> ReceivedFit:
        """Validate one answer and make it a bounded vote."""
        received = super().read(reply, request, device)
        return replace(received, arrays={VOTE: vote_of(received.arrays[LOGITS])})

    def take(self, arrays: State) -> dict[str, Any]:
        """Make the mean vote the next teacher, and distil the cloud's model from it."""
        self._teacher_NC = np.asarray(arrays[VOTE], dtype=np.float32)
        steps, loss = distil(
            self.model, self._public, self._teacher_NC, seed=self._seed(self.progress.round + 1)
        )
        before, self.state = self.state, self.model.state()
        change = {name: self.state[name] - before[name] for name in before}
        spread = self._teacher_NC.max(axis=1) - self._teacher_NC.min(axis=1)
        return {
            "update_norm": norm_of(change),
            "distil_steps": steps,
            "distil_loss": loss,
            "teacher_spread": float(spread.mean()),
        }

    def kept(self) -> State:
        """Give the teacher: with it, a resumed round's request is the same to the last bit."""
        teacher = {} if self._teacher_NC is None else {TEACHER: self._teacher_NC}
        return super().kept() | teacher

    def restore(self, kept: State) -> None:
        """Take the teacher up again."""
        super().restore(kept)
        self._teacher_NC = kept.get(TEACHER)

    def _seed(self, number: int) -> int:
        """Key the order of batches by run and round."""
        return int(np.random.default_rng([self.config.run.seed, 4, number]).integers(2**62))
