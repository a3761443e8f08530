"""Sequential split learning: one device's examples after the other's, in every epoch."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from privtune_flwr.training.plan import Ask
from strategies.split import SplitTuning


class SequentialSplit(SplitTuning):
    """Train on the first device's examples, then on the second's, and so on; batches never mix.

    The plan asks one device a round, all of its chunks before the next device's, in order of
    device id (``train.strategy = sequential``); ``train.fraction`` draws nobody. The first epoch
    is trained while rows arrive, the later ones on the store, device after device in the same
    order. With one device this is split tuning.

    The classical setting (Gupta & Raskar, arXiv 1810.06060) trains the device's part as well and
    hands it on from device to device, with one exchange of activations and gradients a batch. Here
    the bottom model is frozen, so nothing is handed on and every example is released once; what
    remains is the order, and with it forgetting. ``privacy.release-policy = per-epoch`` sends
    every example in every epoch and so measures the classical traffic up; gradients that would
    go down in the classical setting are as many bytes again, and are not sent.
    """

    def _train(self, number: int) -> dict[str, Any]:
        """Pass over the round's examples device by device."""
        losses: list[float] = []
        trained, rate = 0, 0.0
        total = self.trainer.steps + self._steps_to_come(number)
        for asks in by_device(self._present(self.plan.train_asks(number))):
            examples = [example for ask in asks for example in self.store.examples(ask.key)]
            steps = self.trainer.train_pass(
                self.store.training_rows(), examples, round_number=number, total_steps=total
            )
            self.progress.steps += [[s.number, s.loss, s.learning_rate] for s in steps]
            losses += [s.loss for s in steps]
            trained, rate = trained + len(examples), steps[-1].learning_rate
        if not losses:
            return {"examples": 0}
        return {
            "examples": trained,
            "steps": len(losses),
            "loss": sum(losses) / len(losses),
            "learning_rate": rate,
        }

    def _steps_to_come(self, number: int) -> int:
        """Count steps to the end; a device's last batch is not filled up from the next one."""
        size = self.config.train.batch_size
        total = 0
        for later in range(number, len(self.plan.rounds) + 1):
            expected = (
                ask
                for ask in self.plan.train_asks(later)
                if ask.key in self.store or ask.device in self.fleet.nodes
            )
            total += sum(-(-sum(a.examples for a in asks) // size) for asks in by_device(expected))
        return total

    def _saves_after(self, number: int) -> bool:
        """Save at the end of an epoch: rows that have arrived are in the store anyway."""
        if number in (0, len(self.plan.rounds)):
            return True
        current, later = self.plan.rounds[number - 1].asks, self.plan.rounds[number].asks
        return not (current and later and current[0].epoch == later[0].epoch)


def by_device(asks: Iterable[Ask]) -> list[list[Ask]]:
    """Group a round's chunks by device, devices in the order in which they come first."""
    order: dict[str, int] = {}
    listed = sorted(asks, key=lambda ask: order.setdefault(ask.device, len(order)))
    return [list(group) for _, group in groupby(listed, key=lambda ask: ask.device)]
