"""Federated averaging of a learned mechanism's updates, with or without Flower."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.learned_update import check_change, privatise
from privtune_flwr.privacy.learning import Learner, State

Part = tuple[Sequence[NDArray[np.int32]], Sequence[int]]


class WeightedMean:
    """Running mean of updates, so that they need not be held all at once.

    The result depends on the order of :meth:`add` by rounding alone; callers add in order of
    device, so that a run can be repeated to the bit.
    """

    def __init__(self) -> None:
        self._sum: dict[str, NDArray[np.float64]] = {}
        self.examples = 0
        self.updates = 0

    def add(self, change: State, examples: int) -> None:
        """Take one device's update in, weighted by its examples."""
        for name, value in change.items():
            weighted = value.astype(np.float64) * examples
            self._sum[name] = self._sum[name] + weighted if name in self._sum else weighted
        self.examples += examples
        self.updates += 1

    def mean(self) -> State:
        """Give the mean as float32.

        Raises
        ------
        ValueError
            If nothing was added.
        """
        if not self.examples:
            raise ValueError("there is no update to average")
        return {k: (v / self.examples).astype(np.float32) for k, v in self._sum.items()}


def federate_in_process(
    learner: Learner,
    parts: Sequence[Part],
    *,
    rounds: int,
    seeds: Sequence[int],
    clip: float = 0.0,
    noise: float = 0.0,
) -> State:
    """Run a learning phase in one process: for studies, which need no Flower.

    Parameters
    ----------
    learner : Learner
        Serves the cloud and all devices.
    parts : sequence of (sequences, labels)
        What each device holds.
    rounds : int
        Of federated averaging.
    seeds : sequence of int
        One a device: of its updates and its noise.
    clip, noise : float
        As in ``privacy.learning``: largest L2 norm (0 = any), and noise in units of it.

    Returns
    -------
    State
        After the last round; ``learner.finish`` freezes it.
    """
    state = learner.start()
    for number in range(1, rounds + 1):
        mean = WeightedMean()
        for (sequences, labels), seed in zip(parts, seeds, strict=True):
            rng = np.random.default_rng([seed, number])
            update = learner.update(
                state,
                sequences,
                labels,
                round_number=number,
                seed=int(rng.integers(2**31)),
            )
            change = check_change(update.change, state)
            mean.add(privatise(change, clip=clip, noise=noise, rng=rng), update.examples)
        state = learner.apply(state, mean.mean())
    return state
