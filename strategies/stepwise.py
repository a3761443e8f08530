"""One Flower message for every training step: split learning without a store.

The comparison that shows what releasing once saves. With ``release-policy = per-epoch`` every
example is sent anew in every epoch; a chunk is a batch, and one device at a time supplies it.
"""

from __future__ import annotations

from strategies.split import SplitTuning


class StepwiseSplit(SplitTuning):
    """Train on one device's chunk a round.

    The plan draws one device a round (``train.strategy = stepwise``); everything else is
    inherited. Only the end of an epoch is checkpointed: a state of many megabytes after each step
    would be what is measured.
    """

    def _saves_after(self, number: int) -> bool:
        if number in (0, len(self.plan.rounds)):
            return True
        current, later = self.plan.rounds[number - 1], self.plan.rounds[number]
        return [a.epoch for a in current.asks[:1]] != [a.epoch for a in later.asks[:1]]
