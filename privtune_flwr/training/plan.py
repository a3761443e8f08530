"""The plan of rounds: who releases which chunk when, and when the cloud only trains.

It is a function of the devices' counts, the configuration and the seed, made before the first
round. That is what makes a killed run end like an unbroken one: no round depends on which reply
came first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from privtune_flwr.config import RunConfig
from privtune_flwr.errors import RunError


@dataclass(frozen=True)
class Ask:
    """One chunk of one device."""

    device: str
    split: str
    chunk: int
    examples: int
    epoch: int = 0

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Its key in the smashed store."""
        return (self.device, self.split, self.epoch, self.chunk)


@dataclass(frozen=True)
class Round:
    """One round: chunks to ask for (their examples are trained on once), or one pass over all.

    ``number`` counts from 1; round 0 asks for the evaluation examples and trains on nothing.
    """

    number: int
    asks: tuple[Ask, ...]

    @property
    def releases(self) -> bool:
        """Whether devices release in this round."""
        return bool(self.asks)


@dataclass(frozen=True)
class Plan:
    """All rounds of a run."""

    evaluation: tuple[tuple[Ask, ...], ...]
    rounds: tuple[Round, ...]

    def train_asks(self, number: int) -> list[Ask]:
        """Chunks that round ``number`` trains on, in plan order."""
        current = self.rounds[number - 1]
        if current.releases:
            return list(current.asks)
        return [ask for earlier in self.rounds[: number - 1] for ask in earlier.asks]


def split_chunks(device: str, split: str, examples: int, size: int, epoch: int = 0) -> list[Ask]:
    """Cut a device's split into chunks of ``size``; the last one may be smaller."""
    starts = range(0, examples, size)
    return [
        Ask(device, split, n, min(size, examples - start), epoch) for n, start in enumerate(starts)
    ]


def make_plan(train: Mapping[str, int], evaluation: Mapping[str, int], config: RunConfig) -> Plan:
    """Plan a run.

    Parameters
    ----------
    train, evaluation : Mapping
        Examples of each device, by device id.
    config : RunConfig
        ``train.fraction`` of the devices that still have chunks are drawn a round, one chunk each,
        for ``train.rounds`` rounds at most. With the release policy ``once`` the first pass over
        the examples happens while they arrive and ``train.epochs`` - 1 rounds pass over all; with
        ``per-epoch`` every pass asks for every chunk anew.

    Raises
    ------
    RunError
        If no device has a training example.
    """
    if not any(train.values()):
        raise RunError("no usable device holds a training example")
    size = config.privacy.chunk_size
    per_epoch = config.privacy.release_policy == "per-epoch"
    rounds: list[Round] = []
    for epoch in range(config.train.epochs if per_epoch else 1):
        for asks in _release_rounds(train, config, epoch):
            rounds.append(Round(len(rounds) + 1, tuple(asks)))
    if not per_epoch:
        for _ in range(config.train.epochs - 1):
            rounds.append(Round(len(rounds) + 1, ()))
    queues = [split_chunks(d, "eval", n, size) for d, n in sorted(evaluation.items())]
    waves = max((len(queue) for queue in queues), default=0)
    by_wave = [tuple(q[i] for q in queues if i < len(q)) for i in range(waves)]
    return Plan(tuple(by_wave), tuple(rounds))


def _release_rounds(train: Mapping[str, int], config: RunConfig, epoch: int) -> list[list[Ask]]:
    rng = np.random.default_rng([config.run.seed, 1, epoch])
    queues = {
        d: split_chunks(d, "train", n, config.privacy.chunk_size, epoch)
        for d, n in sorted(train.items())
        if n
    }
    # with a fraction below one, as many devices a round as that share of all of them
    draw = max(1, round(config.train.fraction * len(queues)))
    rounds: list[list[Ask]] = []
    while queues and (config.train.rounds == 0 or len(rounds) < config.train.rounds):
        waiting = sorted(queues)
        if config.train.strategy == "stepwise":
            drawn = [waiting[int(rng.integers(len(waiting)))]]
        elif config.train.strategy == "sequential":
            # all of a device's chunks before the next device's
            drawn = waiting[:1]
        elif draw < len(waiting):
            drawn = sorted(rng.choice(waiting, size=draw, replace=False).tolist())
        else:
            drawn = waiting
        rounds.append([queues[device].pop(0) for device in drawn])
        queues = {d: q for d, q in queues.items() if q}
    return rounds
