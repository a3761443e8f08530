"""Federated baselines: Flower's own strategies inside the harness that split tuning runs in.

The loop, the fleet, validation, traffic, tests and checkpoints are the harness's; who is averaged
how is a Flower strategy's (``FedAvg``, ``FedProx``, ``FedAdam``, the fixed-clipping wrapper).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from privtune_flwr.bundle import Manifest
from privtune_flwr.errors import InvalidReplyError, RunError
from privtune_flwr.federated.cloud import FederatedCloud
from privtune_flwr.federated.methods import FitMethod, create_method
from privtune_flwr.federated.progress import FitProgress, load_progress, save_progress
from privtune_flwr.federated.whole import WholeModel
from privtune_flwr.privacy.learned_update import norm_of
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol import METRICS, to_message
from privtune_flwr.protocol.fit import (
    ANSWER,
    FitRequest,
    JoinRequest,
    JudgeRequest,
    ReceivedFit,
    read_fit,
)
from privtune_flwr.protocol.updates import state_record
from privtune_flwr.results.run_folder import RunFolder
from strategies.aggregators import (
    FleetGrid,
    create_aggregator,
    guarantee_of,
    kept_of,
    restore_kept,
)
from strategies.evaluation import sum_evaluations
from strategies.exchange import EVALUATION, Exchange, failure, open_exchange
from strategies.fleet import Fleet, describe, provision, wait_for_nodes
from strategies.intake import add_metrics

logger = logging.getLogger("privtune.cloud")


class FederatedTuning(Strategy):
    """Rounds of federated training of a model that every device holds whole.

    Parameters
    ----------
    cloud : FederatedCloud
        The model, its settings and its test.
    folder : RunFolder
        Where the run lives.
    """

    def __init__(self, cloud: FederatedCloud, folder: RunFolder) -> None:
        self.cloud = cloud
        self.config = cloud.config
        self.folder = folder
        self.fleet = Fleet()
        self.progress = FitProgress()
        # set in start(), once the devices have said their classes
        self.model: WholeModel
        self.state: State = {}
        self._method: FitMethod
        self._aggregator: Strategy
        self._exchange: Exchange
        self._asked: dict[int, FitRequest] = {}
        self._sent: State = {}

    # ------------------------------------------------------------------ Flower's five methods

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Have Flower's strategy address this round's devices; under our action's name."""
        messages = self._aggregator.configure_train(server_round, arrays, config, grid)
        return self._tagged(messages)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate the answers, quarantine the senders of bad ones, average the others."""
        kept, totals = self.validated(replies)
        if not kept:
            return None, MetricRecord({**totals})
        arrays, _ = self._aggregator.aggregate_train(server_round, list(kept))
        return arrays, MetricRecord({**totals})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model to the devices that hold evaluation examples."""
        request = self.judge_request()
        content = request.to_content_with(self.state)
        return [
            to_message(content, node, request.action)
            for device, node in sorted(self.fleet.nodes.items())
            if self.fleet.evaluation[device]
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Add up what devices say of the evaluation examples they hold."""
        return sum_evaluations(replies, self._exchange, self.fleet)

    def summary(self) -> None:
        """Log what is about to happen."""
        settings = self.cloud.settings
        logger.info(
            "%d devices, %d training examples, %s, %d rounds; devices send %s",
            len(self.fleet.nodes),
            sum(self.fleet.train.values()),
            settings.train.strategy,
            settings.rounds,
            settings.shares,
        )

    # ------------------------------------------------------------------------- for subclasses

    @property
    def rounds(self) -> int:
        """Rounds of the run."""
        return self.cloud.settings.rounds

    @property
    def bundles(self) -> list[tuple[Manifest, Path]]:
        """What devices must hold before the first round."""
        return self.cloud.bundles

    def begin(self) -> None:
        """Set up what the method needs beside model and aggregator."""

    def request(self) -> FitRequest:
        """Build this run's request; the round and the strategy's numbers come on top."""
        return FitRequest(
            run_id=self.folder.run_id,
            model_id=self.cloud.model_id,
            settings=self.cloud.settings.to_json(),
            public_id=self.cloud.public_id,
            labels="\n".join(self.fleet.label_names),
        )

    def judge_request(self) -> JudgeRequest:
        """Build the request to judge a model on a device's evaluation examples."""
        return JudgeRequest(
            run_id=self.folder.run_id,
            model_id=self.cloud.model_id,
            settings=self.cloud.settings.to_json(),
            labels="\n".join(self.fleet.label_names),
        )

    def guarantee(self) -> dict[str, Any]:
        """State what protects an example or a device, and against whom; for the results."""
        return guarantee_of(self._aggregator, self.cloud.settings)

    def what_is_sent(self) -> State:
        """Give the arrays that devices receive in the coming round."""
        return self.state

    def take(self, arrays: State) -> dict[str, Any]:
        """Make what the round came to the cloud's own; returns what the record should say."""
        change = {name: arrays[name] - self.state[name] for name in self.state}
        self.state = arrays
        self.model.load(arrays)
        return {"update_norm": norm_of(change)}

    def test_record(self) -> dict[str, Any]:
        """Judge the current model on the public test set."""
        found = self.cloud.test(self.model)
        return {} if found is None else {"test_accuracy": found[0], "test_loss": found[1]}

    def validated(self, replies: Iterable[Message]) -> tuple[list[Message], dict[str, float]]:
        """Hold answers to the schema; give the good ones, for Flower, and their metrics' sums.

        A fault now need not be one in the next round: a device that does not answer is left out of
        this round; one that refuses, or whose answer cannot be used, leaves the run.
        """
        answers = {reply.metadata.src_node_id: reply for reply in replies}
        kept: list[Message] = []
        totals = {"devices": 0.0, "examples": 0.0}
        for node, request in sorted(self._asked.items(), key=lambda a: self._name(a[0])):
            device = self._name(node)
            reply = answers.get(node)
            if why := failure(reply):
                if why.startswith("refused"):
                    self.fleet.drop(device, why)
                else:
                    logger.warning("%s is left out of round %d: %s", device, request.round, why)
                continue
            assert reply is not None
            try:
                received = self.read(reply, request, device)
            except InvalidReplyError as error:
                self.fleet.drop(device, str(error))
                continue
            kept.append(self._for_flower(reply, received))
            totals["devices"] += 1
            totals["examples"] += received.examples
            add_metrics(totals, received.metrics)
        self._asked = {}
        return kept, totals

    def read(self, reply: Message, request: FitRequest, device: str) -> ReceivedFit:
        """Validate one answer."""
        public = self.cloud.public_bundle[1] if self.cloud.public_bundle else None
        return read_fit(
            reply.content,
            request,
            self._method.reply_schema(self._sent, public),
            device_id=device,
            examples=self.fleet.train[device],
        )

    @staticmethod
    def _for_flower(reply: Message, received: ReceivedFit) -> Message:
        """Give a message with one record of arrays and one of metrics, as aggregation wants it."""
        reply.content = RecordDict(
            {
                ANSWER: state_record(received.arrays),
                METRICS: MetricRecord({"weight": float(received.metrics.get("weight", 1.0))}),
            }
        )
        return reply

    def _tagged(self, messages: Iterable[Message]) -> list[Message]:
        tagged: list[Message] = []
        for message in messages:
            node, request = message.metadata.dst_node_id, FitRequest.from_content(message.content)
            self._asked[node] = request
            tagged.append(to_message(message.content, node, request.action))
        return tagged

    def _name(self, node: int) -> str:
        return self._exchange.names.get(node, f"node-{node}")

    # ----------------------------------------------------------------------------- the loop

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 0,
        timeout: float = 0.0,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the federation to its end, or from its checkpoint to its end.

        Flower's arguments are accepted so that wrappers can pass them on; rounds, timeout and the
        rest come from the run configuration.

        Raises
        ------
        RunError
            If no device is usable.
        """
        started = time.monotonic()
        self._exchange = open_exchange(grid, self.config, timeout)
        self._gather(grid)
        self.model = self.cloud.build(self.fleet.label_names)
        self.state = self.model.state()
        self._method = create_method(
            self.cloud.settings, self.cloud.model_bundle[1], self.fleet.label_names
        )
        drawn = self._drawn(1)
        self._aggregator = create_aggregator(self.cloud.settings, len(drawn))
        self.begin()
        self._restore()
        self.summary()
        before = self.progress.seconds
        result = Result()
        for number in range(self.progress.round + 1, self.rounds + 1):
            record = self._run_round(number, grid)
            result.train_metrics_clientapp[number] = MetricRecord(
                {k: v for k, v in record.items() if isinstance(v, int | float)}
            )
            self._finish_round(number, record, before + time.monotonic() - started)
        return result

    def _gather(self, grid: Grid) -> None:
        nodes = wait_for_nodes(grid, self.config.run)
        request = JoinRequest(
            run_id=self.folder.run_id,
            model_id=self.cloud.model_id,
            settings=self.cloud.settings.to_json(),
            bundles=",".join(manifest.id for manifest, _ in self.bundles),
        )
        self.fleet, held = describe(nodes, request, self._exchange)
        for bundle in self.bundles:
            provision(self.fleet, held, bundle, self.folder.run_id, self._exchange)
        if not any(self.fleet.train.get(d) for d in self.fleet.nodes):
            raise RunError(f"no usable device: {self.fleet.why_none()}")

    def _restore(self) -> None:
        restored = load_progress(self.folder.checkpoint)
        if restored is None:
            return
        self.progress, self.state, kept = restored
        self.model.load(self.state)
        self.restore(kept)
        logger.info("resuming after round %d of %d", self.progress.round, self.rounds)
        self._exchange.traffic.include(self.progress.traffic)
        for device, reason in self.progress.quarantined.items():
            if device in self.fleet.nodes:
                self.fleet.drop(device, reason)

    def kept(self) -> State:
        """Give what a resumed run needs beside the state: an aggregator's moments."""
        return kept_of(self._aggregator)

    def restore(self, kept: State) -> None:
        """Take up what :meth:`kept` gave."""
        restore_kept(self._aggregator, kept)

    def _drawn(self, number: int) -> list[str]:
        return self.fleet.draw(self.config.train.fraction, self.config.run.seed, number)

    def _run_round(self, number: int, grid: Grid) -> dict[str, Any]:
        begun = time.perf_counter()
        drawn = self._drawn(number)
        if not drawn:
            raise RunError(f"no usable device is left: {self.fleet.why_none()}")
        record: dict[str, Any] = {"round": number, "kind": "fit"}
        self._sent = self.what_is_sent()
        seen = cast("Grid", FleetGrid([self.fleet.nodes[d] for d in drawn]))
        messages = self.configure_train(
            number, state_record(self._sent), self.request().to_record(), seen
        )
        waited = self._exchange.seconds_waited
        replies = self._exchange.ask(messages)
        record["seconds_wire"] = self._exchange.seconds_waited - waited
        start = time.perf_counter()
        arrays, metrics = self.aggregate_train(number, [r for r in replies.values() if r])
        record |= dict(metrics or {})
        if arrays is None:
            logger.warning("round %d is without result: nothing could be averaged", number)
        else:
            # a server optimiser computes in float64; devices and checkpoint hold float32
            record |= self.take(
                {n: arrays[n].numpy().astype(np.float32, copy=False) for n in sorted(arrays)}
            )
        record["seconds_top"] = time.perf_counter() - start
        if record.get("seen"):
            record["loss"] = record["loss_sum"] / record["seen"]
        return self._completed(record, number, begun, seen)

    def _completed(
        self, record: dict[str, Any], number: int, begun: float, grid: Grid
    ) -> dict[str, Any]:
        """Add what a round cost, and the tests that are due after it."""
        record["seconds_round"] = time.perf_counter() - begun
        record |= self._exchange.traffic.training()
        if self._due(number, self.config.train.test_every):
            record |= self.test_record()
        if self._due(number, self.config.train.evaluate_every):
            record |= self._evaluate(number, grid)
        return record

    def _due(self, number: int, every: int) -> bool:
        return number == self.rounds or bool(every and number % every == 0)

    def _evaluate(self, number: int, grid: Grid) -> dict[str, Any]:
        messages = self.configure_evaluate(number, ArrayRecord(), ConfigRecord(), grid)
        with self._exchange.purpose(EVALUATION):
            replies = self._exchange.ask(messages)
        return dict(self.aggregate_evaluate(number, [r for r in replies.values() if r]) or {})

    def _finish_round(self, number: int, record: dict[str, Any], seconds: float) -> None:
        self.progress.round = number
        self.progress.rounds.append(record)
        self.progress.seconds = seconds
        self.progress.quarantined |= self.fleet.quarantined
        self.progress.refused |= self.fleet.refused
        self.progress.traffic = self._exchange.traffic.totals
        save_progress(self.folder.checkpoint, self.progress, self.state, self.kept())
        self.folder.write_jsonl("rounds.jsonl", self.progress.rounds)
        self._report(record)

    def _report(self, record: Mapping[str, Any]) -> None:
        numbers = " ".join(
            f"{key.replace('_', ' ')} {record[key]:.4f}"
            for key in ("loss", "test_accuracy", "eval_accuracy")
            if key in record
        )
        counts = f"{record['devices']:.0f} devices, {record['examples']:.0f} examples"
        told, waited = numbers or "nothing told", record["seconds_wire"]
        logger.info(
            "round %d/%d: %s, %s, %.1f s waiting",
            record["round"],
            self.rounds,
            counts,
            told,
            waited,
        )
