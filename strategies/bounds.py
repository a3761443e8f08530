"""Lines to hold the others against: all text in one place, and each device on its own."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray

from privtune_flwr.bundle import Manifest
from privtune_flwr.data import tokenise
from privtune_flwr.device.holdings import shared_part
from privtune_flwr.errors import RunError
from privtune_flwr.federated.cloud import FederatedCloud
from privtune_flwr.federated.local import evaluate_locally, make_optimizer, train_locally
from privtune_flwr.privacy.learned_update import norm_of
from privtune_flwr.privacy.learning import State
from privtune_flwr.privacy.mods import in_simulation
from privtune_flwr.protocol import to_message
from privtune_flwr.protocol.fit import ANSWER
from privtune_flwr.results.run_folder import RunFolder
from strategies.exchange import EVALUATION
from strategies.federated import FederatedTuning

logger = logging.getLogger("privtune.cloud")

#: Devices whose models :class:`LocalTuning` tests at most: each test costs as much as the one of
#: a federated run, and the cloud holds each of these models.
MAX_TESTED = 4

_MOMENTS = "optimizer/"
_SIMULATED = re.compile(r"^device-(\d{5,})$")


class CentralTuning(FederatedTuning):
    """All text of all simulated devices in the cloud, one pass a round: the upper line.

    Devices are asked to join, for their counts and classes, and for nothing else: the cloud reads
    their parts from the source that a simulation shares. What devices hold for evaluation is judged
    in the cloud likewise. The optimiser goes on from pass to pass, over a resume too.

    Raises
    ------
    RunError
        Outside of a simulation: real devices' text is theirs.
    """

    @property
    def rounds(self) -> int:
        """One for each pass."""
        return self.config.train.epochs

    @property
    def bundles(self) -> list[tuple[Manifest, Path]]:
        """None: devices compute nothing."""
        return []

    def guarantee(self) -> dict[str, Any]:
        """Nothing is left to protect."""
        return {
            "epsilon": None,
            "adversary": "none",
            "statement": "No guarantee: the cloud holds all text. A line to compare with.",
        }

    def summary(self) -> None:
        """Log what is about to happen."""
        logger.info(
            "the text of %d simulated devices in one place: %d training examples, %d passes",
            len(self.fleet.nodes),
            len(self._train[0]),
            self.rounds,
        )

    def _gather(self, grid: Grid) -> None:
        why: RunError | None = None
        try:
            super()._gather(grid)
        except RunError as error:
            why = error
        # asked after the devices: a simulation is one only when its workers are up
        if not in_simulation():
            raise RunError(
                "train.strategy = 'central': works in a simulation alone; real devices' text is "
                "theirs, and no run can ask for it"
            )
        if why is not None:
            raise why

    def begin(self) -> None:
        """Read the devices' parts, and set up an optimiser for the whole run."""
        self.seed = self.config.run.seed
        self._train, self._held_out = self.read_parts()
        self._optimizer = make_optimizer(self.model)

    def read_parts(
        self,
    ) -> tuple[
        tuple[list[NDArray[np.int32]], list[int]],
        tuple[list[NDArray[np.int32]], list[int]],
    ]:
        """Read the text of all devices that joined, as they read it themselves.

        Returns
        -------
        train, evaluation : (token ids, classes)

        Raises
        ------
        RunError
            If a device described another number of examples than its part of the source has.
        """
        fleet = self.fleet
        partitions = len({*fleet.nodes, *fleet.refused, *fleet.quarantined})
        texts: dict[str, tuple[list[str], list[int]]] = {"train": ([], []), "eval": ([], [])}
        for device in sorted(fleet.nodes):
            numbered = _SIMULATED.match(device)
            if numbered is None or int(numbered[1]) >= partitions:
                raise RunError(f"train.strategy = 'central': {device} has no part of the source")
            part = shared_part(self.config.data, self.config.run.seed, int(numbered[1]), partitions)
            described = fleet.train[device], fleet.evaluation[device]
            if (len(part.train), len(part.evaluation)) != described:
                raise RunError(
                    f"train.strategy = 'central': {device} described other counts than those of "
                    f"part {int(numbered[1])} of {partitions} of data.source"
                )
            for split, rows in (("train", part.train), ("eval", part.evaluation)):
                texts[split][0].extend(str(text) for text in rows["text"])
                texts[split][1].extend(int(label) for label in rows["label"])
        length, tokenizer = self.config.model.max_length, self.model.parts.tokenizer
        train, held = texts["train"], texts["eval"]
        return (
            (tokenise(tokenizer, train[0], length), train[1]),
            (tokenise(tokenizer, held[0], length), held[1]),
        )

    def _run_round(self, number: int, grid: Grid) -> dict[str, Any]:
        """Make one pass in the cloud; no message is sent."""
        begun = time.perf_counter()
        before = self.state
        result = train_locally(
            self.model,
            *self._train,
            epochs=1,
            seed=self.seed,
            progress=((number - 1) / self.rounds, number / self.rounds),
            optimizer=self._optimizer,
            first_epoch=number - 1,
        )
        self.state = self.model.state()
        record: dict[str, Any] = {
            "round": number,
            "kind": "pass",
            "devices": len(self.fleet.nodes),
            "examples": len(self._train[0]),
            "examples_received": len(self._train[0]),
            "steps": result.steps,
            "seen": result.seen,
            "correct": result.correct,
            "loss_sum": result.loss_sum,
            "loss": result.loss_sum / result.seen,
            "update_norm": norm_of({n: self.state[n] - before[n] for n in before}),
            "seconds_wire": 0.0,
            "seconds_top": time.perf_counter() - begun,
        }
        return self._completed(record, number, begun, grid)

    def _evaluate(self, number: int, grid: Grid) -> dict[str, Any]:
        examples = len(self._held_out[1])
        if not examples:
            return {}
        correct, loss = evaluate_locally(self.model, *self._held_out)
        return {
            "eval_examples": examples,
            "eval_accuracy": correct / examples,
            "eval_loss": loss / examples,
        }

    def kept(self) -> State:
        """Keep the optimiser's moments."""
        moments: dict[int, dict[str, torch.Tensor]] = self._optimizer.state_dict()["state"]
        return {
            f"{_MOMENTS}{index}/{name}": value.cpu().numpy().astype(np.float32)
            for index, values in moments.items()
            for name, value in values.items()
            if value is not None
        }

    def restore(self, kept: State) -> None:
        """Take them up again."""
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in kept.items():
            index, _, name = key.removeprefix(_MOMENTS).partition("/")
            moments.setdefault(int(index), {})[name] = torch.from_numpy(value)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


class LocalTuning(FederatedTuning):
    """Each device trains on its own text alone, for all epochs at once: the lower line.

    One message a device, and nothing is averaged. Weights travel only so that their models can be
    tested on the public test set: at most :data:`MAX_TESTED` of them, spread evenly over the
    devices' names (under a size skew the first ones would be the smallest). This traffic counts as
    evaluation. The model that is exported is the first tested device's.
    """

    def __init__(self, cloud: FederatedCloud, folder: RunFolder) -> None:
        super().__init__(cloud, folder)
        settings = cloud.settings
        epochs = {"local_epochs": settings.train.epochs}
        federated = settings.federated.model_copy(update=epochs)
        cloud.settings = settings.model_copy(update={"federated": federated})
        self.models: dict[str, State] = {}

    def guarantee(self) -> dict[str, Any]:
        """Nothing has to leave; here the models do, to be measured."""
        return {
            "epsilon": None,
            "adversary": "none",
            "statement": "A device that trains alone shows nothing. No formal guarantee for this "
            "run, in which the devices' models were sent to be tested.",
        }

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate the answers and keep those that are tested; nothing is averaged."""
        answers, totals = self.validated(replies)
        by_name = {self._name(answer.metadata.src_node_id): answer for answer in answers}
        self.models = {}
        for device in spread_evenly(sorted(by_name), MAX_TESTED):
            record = by_name[device].content.array_records[ANSWER]
            self.models[device] = {name: record[name].numpy() for name in sorted(record)}
        if not self.models:
            return None, MetricRecord({**totals})
        first = by_name[next(iter(self.models))].content.array_records[ANSWER]
        return first, MetricRecord({**totals})

    def test_record(self) -> dict[str, Any]:
        """Judge the tested devices' models on the public test set, each alone."""
        found: list[tuple[float, float]] = []
        for state in self.models.values():
            self.model.load(state)
            judged = self.cloud.test(self.model)
            if judged is not None:
                found.append(judged)
        self.model.load(self.state)
        if not found:
            return {}
        accuracies = [accuracy for accuracy, _ in found]
        return {
            "test_accuracy": float(np.mean(accuracies)),
            "test_accuracy_min": min(accuracies),
            "test_accuracy_max": max(accuracies),
            "test_accuracy_std": float(np.std(accuracies)),
            "test_loss": float(np.mean([loss for _, loss in found])),
            "devices_tested": len(found),
        }

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each tested device its own model back, to judge on its evaluation examples."""
        request = self.judge_request()
        return [
            to_message(request.to_content_with(state), self.fleet.nodes[device], request.action)
            for device, state in self.models.items()
            if device in self.fleet.nodes and self.fleet.evaluation[device]
        ]

    def _run_round(self, number: int, grid: Grid) -> dict[str, Any]:
        with self._exchange.purpose(EVALUATION):
            return super()._run_round(number, grid)


def spread_evenly(names: list[str], count: int) -> list[str]:
    """Choose ``count`` of the names at most, evenly spaced, the first and last among them."""
    if len(names) <= count:
        return names
    return [names[i] for i in np.linspace(0, len(names) - 1, count).round().astype(int).tolist()]
