"""The section of the run configuration that only a simulation reads: faults and slow devices."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from privtune_flwr.section import Section

_SLOW_STREAM = 11


class SimulationSection(Section):
    """What goes wrong in a simulated federation; real devices and their cloud ignore it."""

    reply_loss: float = Field(
        0.0, ge=0, lt=1, description="share of replies to training and evaluation that get lost"
    )
    slow_devices: float = Field(0.0, ge=0, le=1, description="share of devices that are slow")
    slow_factor: float = Field(
        1.0, ge=1, le=1000, description="times as long a slow device takes for its work"
    )

    def is_slow(self, partition: int, partitions: int, seed: int) -> bool:
        """Say whether a device is one of the slow ones; the seed draws the rounded share of them.

        Parameters
        ----------
        partition, partitions : int
            The device's number, from 0, and how many there are.
        seed : int
            The run's.
        """
        count = round(self.slow_devices * partitions) if self.slow_factor > 1 else 0
        if not count:
            return False
        drawn = np.random.default_rng([seed, _SLOW_STREAM]).permutation(partitions)[:count]
        return partition in drawn
