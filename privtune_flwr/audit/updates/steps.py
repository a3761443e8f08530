"""What a cloud reads from SplitFed: rows of a bottom model that it averages and sends itself.

Rounds are made again by the code that devices and cloud run, with the attacked devices alone in the
union batch. The attacker compares all rows of a round with a bank of the state that the round began
with, which it knows exactly; what devices move within the round it leaves aside. It could follow
that too, step by step, from the gradients that it sent and the sentences that it has read, so what
is measured is a lower bound.

Legend: V vocabulary, N tokens of a batch, T tokens of a sentence, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.attacks.retrieval import NearestEntries
from privtune_flwr.audit.updates.base import CloudKnowledge, Reading
from privtune_flwr.audit.updates.devices import Device
from privtune_flwr.audit.updates.judge import judge
from privtune_flwr.config import RunConfig
from privtune_flwr.data import load_public_text, tokenise
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.splitfed import (
    DeviceBatch,
    SplitFedModel,
    UnionTrainer,
    device_batch_size,
    load_moments,
    save_moments,
)
from privtune_flwr.federated.splitfed_device import (
    BottomTwin,
    batch_count,
    round_batches,
    schedule_step,
)
from privtune_flwr.models import CutModel, cut_model, resolve_model
from privtune_flwr.privacy.learning import State
from privtune_flwr.privacy.privtune.bank import build_bank
from privtune_flwr.training.averaging import WeightedMean
from privtune_flwr.training.trainer import schedule_factor

NAME = "retrieval"
Ids = NDArray[np.int32]


def splitfed_rounds(
    config: RunConfig, devices: Sequence[Device], fleet: int
) -> dict[str, list[dict[str, Any]]]:
    """Make a run's first rounds again with some of its devices, and read their rows.

    Parameters
    ----------
    config : RunConfig
        The run's.
    devices : sequence of Device
        Those that are attacked.
    fleet : int
        How many devices the run had: their number sets the size of a device's batch.

    Returns
    -------
    dict
        ``first`` and, where there are several rounds, ``later`` (the second, from the averaged
        state): for each device the figures of
        :func:`~privtune_flwr.audit.updates.judge.judge`, by attack.
    """
    rehearsal = Rehearsal(config, devices, fleet)
    kinds = ["first", *(["later"] if rehearsal.rounds > 1 else [])]
    found: dict[str, list[dict[str, Any]]] = {}
    for number, kind in enumerate(kinds, start=1):
        index = rehearsal.bank()
        seen = rehearsal.round(number)
        found[kind] = [{NAME: judged(index, s, rehearsal.knowledge)} for s in seen.values()]
    return found


@dataclass
class Seen:
    """What one device sent in a round, sentence by sentence, beside what it was."""

    rows: list[NDArray[np.float32]] = field(default_factory=list)
    ids: list[Ids] = field(default_factory=list)


class Rehearsal:
    """SplitFed in one process, round by round, with the run's settings and its devices' text."""

    def __init__(self, config: RunConfig, devices: Sequence[Device], fleet: int) -> None:
        self._settings = FitSettings.of(config)
        labels = devices[0].holdings.label_names
        self._model = SplitFedModel(_cut(config, labels), self._settings)
        self._twin = BottomTwin(_cut(config, labels).bottom, self._settings)
        tokenizer = self._model.parts.tokenizer
        texts = load_public_text(config.data.public_corpora)
        public = tokenise(tokenizer, texts, config.model.max_length)
        self.knowledge = CloudKnowledge(self._model, public)
        self._ids = {
            d.name: tokenise(tokenizer, d.holdings.train.texts, config.model.max_length)
            for d in devices
        }
        self._devices = devices
        self._batch = device_batch_size(config.train, fleet)
        passes = config.federated.local_epochs
        self._steps = max(batch_count(len(i), self._batch, passes) for i in self._ids.values())
        self.rounds = self._settings.rounds
        self._trainer = UnionTrainer(self._model, config.train, self._steps * self.rounds)
        self._moments: dict[str, State] = {d.name: {} for d in devices}

    def bank(self) -> NearestEntries:
        """Index the mean representation of each token under the state that the cloud sends now."""
        self._twin.load(self._model.bottom_state())
        bottom, public = self._twin.bottom, self.knowledge.public
        counts_V = np.bincount(np.concatenate(public), minlength=bottom.vocab_size)
        return NearestEntries(build_bank(bottom, self.knowledge.tokenizer, public, counts_V))

    def round(self, number: int) -> dict[str, Seen]:
        """Train a round, from 1; give what each device sent in it."""
        start = self._model.bottom_state()
        states = {d.name: start for d in self._devices}
        seen = {d.name: Seen() for d in self._devices}
        batches = {d.name: self._batches(d, number) for d in self._devices}
        labels = {d.name: d.holdings.train.labels for d in self._devices}
        for step in range(1, self._steps + 1):
            sent: dict[str, DeviceBatch] = {}
            for name, drawn in batches.items():
                if step > len(drawn):
                    continue
                chosen = drawn[step - 1]
                self._twin.load(states[name])
                ids = [self._ids[name][i] for i in chosen]
                lengths_B = np.array([len(i) for i in ids], dtype=np.uint16)
                rows_ND = self._twin.rows(ids)
                labels_B = np.array([labels[name][i] for i in chosen], dtype=np.int32)
                sent[name] = DeviceBatch(rows_ND, lengths_B, labels_B)
                seen[name].rows += np.split(rows_ND, np.cumsum(lengths_B, dtype=np.int64)[:-1])
                seen[name].ids += ids
            at = schedule_step(number, step, self._steps)
            done = self._trainer.step(list(sent.values()), at)
            for name, gradient_ND in zip(sent, done.gradients, strict=True):
                ids = [self._ids[name][i] for i in batches[name][step - 1]]
                states[name] = self._step(name, states[name], ids, gradient_ND, at)
        mean = WeightedMean()
        for name, state in states.items():
            mean.add(state, len(self._ids[name]))
        self._model.load_bottom(mean.mean())
        return seen

    def _step(
        self, name: str, state: State, ids: Sequence[Ids], gradient_ND: NDArray[Any], at: int
    ) -> State:
        self._twin.load(state)
        optimizer = self._twin.optimizer()
        load_moments(optimizer, self._twin.trainable(), self._moments[name])
        total = self._steps * self.rounds
        factor = schedule_factor(at, total, self._settings.train)
        self._twin.step(ids, gradient_ND, optimizer, factor)
        self._moments[name] = save_moments(optimizer, self._twin.trainable())
        return self._twin.state()

    def _batches(self, device: Device, number: int) -> list[list[int]]:
        lengths = [len(i) for i in self._ids[device.name]]
        passes = self._settings.federated.local_epochs
        return round_batches(lengths, self._batch, passes, device.seed + number)


def _cut(config: RunConfig, labels: Sequence[str]) -> CutModel:
    model = config.model
    return cut_model(
        resolve_model(model.name),
        cut=model.cut,
        num_labels=len(labels),
        head=model.head,
        seed=config.run.seed,
        labels=labels,
    )


def judged(index: NearestEntries, seen: Seen, knowledge: CloudKnowledge) -> dict[str, Any]:
    """Guess each row's token by a bank, and judge the device's text as read."""
    guessed_N = index.top(np.concatenate(seen.rows))[:, 0]
    tokens, counts = np.unique(guessed_N, return_counts=True)
    tokens = tokens[np.argsort(-counts, kind="stable")]
    lengths = [len(rows) for rows in seen.rows]
    reading = Reading(
        tokens[knowledge.is_text[tokens]],
        np.split(guessed_N, np.cumsum(lengths)[:-1]),
        "nearest entry of a bank of the bottom model that the round began with",
    )
    return {**judge(reading, seen.ids, knowledge), "said": reading.said}
