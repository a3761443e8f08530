"""Split tuning: devices release once, the cloud trains one shared top model.

Flower's base class has five methods and a loop that waits for every message. The five methods are
kept, so that wrappers compose; the loop is replaced, because a round must overlap with the next
one's messages, survive a kill, and outlive a device that misbehaves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from privtune_flwr.cloud import TEST_DEVICE, CloudSide
from privtune_flwr.config import RunConfig
from privtune_flwr.errors import RunError
from privtune_flwr.learned import adopt_learned
from privtune_flwr.models import CutModel
from privtune_flwr.protocol import (
    DescribeRequest,
    EvaluateRequest,
    to_message,
)
from privtune_flwr.results.run_folder import RunFolder
from privtune_flwr.training import checkpoint
from privtune_flwr.training.plan import Ask, Plan, make_plan
from privtune_flwr.training.store import Example, SmashedStore
from privtune_flwr.training.trainer import TopModelTrainer, accuracy_and_loss
from strategies.evaluation import sum_evaluations
from strategies.exchange import EVALUATION, Exchange, Traffic, open_exchange
from strategies.fleet import Fleet, describe, provision, wait_for_nodes
from strategies.intake import Intake, terms_of
from strategies.learning import learn_first, learning_terms

logger = logging.getLogger("privtune.cloud")

DEVICE_SECONDS = ("seconds_bottom", "seconds_mechanism", "seconds_codec")


class SplitTuning(Strategy):
    """Release once, train in the cloud for any number of epochs.

    Parameters
    ----------
    cloud : CloudSide
        Bottom model, mechanism and decoder, prepared.
    folder : RunFolder
        Where the run lives.
    """

    def __init__(self, cloud: CloudSide, folder: RunFolder) -> None:
        self.cloud = cloud
        self.config: RunConfig = cloud.config
        self.folder = folder
        self.fleet = Fleet()
        self.progress = checkpoint.Progress()
        # set in start(), once the mechanism is learned and the devices have said their classes
        self.store: SmashedStore
        self.model: CutModel
        self.trainer: TopModelTrainer
        self.plan: Plan
        self._exchange: Exchange
        self._intake: Intake
        self.test_examples: list[Example] = []
        self._nodes = 0

    # ------------------------------------------------------------------ Flower's five methods

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for this round's chunks of the devices that are still usable.

        Chunks that are already in the store (a resumed run) are not asked for again.
        """
        return self._intake.requests(self.plan.rounds[server_round - 1].asks)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate replies and keep what they carry; quarantine the senders of bad ones."""
        received = {reply.metadata.src_node_id: reply for reply in replies}
        return None, MetricRecord({**self._intake.keep(received)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each device the top model's logits for the evaluation examples it released."""
        messages: list[Message] = []
        by_device: dict[str, list[Example]] = {}
        for ask in self._present(ask for wave in self.plan.evaluation for ask in wave):
            by_device.setdefault(ask.device, []).extend(self.store.examples(ask.key))
        for device, node in self.fleet.nodes.items():
            examples = by_device.get(device, [])
            if not examples or len(examples) != self.fleet.evaluation[device]:
                continue
            logits_BC = self.trainer.logits(self.store.training_rows(), examples)
            request = EvaluateRequest(
                run_id=self.folder.run_id, split="eval", examples=len(examples)
            )
            messages.append(to_message(request.to_content_with(logits_BC), node, request.action))
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Add up what devices say of the evaluation examples they hold."""
        return sum_evaluations(replies, self._exchange, self.fleet)

    def summary(self) -> None:
        """Log what is about to happen."""
        privacy, plan = self.config.privacy, self.plan
        releases = sum(r.releases for r in plan.rounds)
        logger.info(
            "%d devices, %d training examples, %d release rounds and %d training rounds",
            len(self.fleet.nodes),
            sum(self.fleet.train.values()),
            releases,
            len(plan.rounds) - releases,
        )
        logger.info(
            "model %s cut at %d, mechanism %s, release %s, wire %s, decoder %s",
            self.config.model.name,
            self.config.model.cut,
            self.cloud.mechanism.name,
            privacy.release_policy,
            privacy.wire,
            "on" if self.cloud.uses_decoder else "off",
        )

    # ------------------------------------------------------------------------------- the loop

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

        The number of rounds, the timeout and the rest come from the run configuration; Flower's
        arguments are accepted so that wrappers can pass them on.

        Raises
        ------
        RunError
            If no device is usable.
        """
        started = time.monotonic()
        self._exchange = open_exchange(grid, self.config, timeout)
        adopt_learned(self.cloud, self.folder.path)
        self._gather(grid)
        # a checkpoint, where there is one, holds these already and replaces them
        self.progress.rounds, self.progress.seconds = learn_first(
            self.cloud, self.folder, self.fleet, self._exchange
        )
        self._check_usable()
        self.store = self.cloud.open_store(self.folder.store)
        self._restore()
        self.summary()
        self._intake = Intake(
            self.cloud,
            self.store,
            self.fleet,
            self.folder.run_id,
            len(self.model.spec.labels),
            self._exchange.traffic,
        )
        self._intake.spent = self.progress.spent
        self.test_examples = self._test_examples()
        before = self.progress.seconds
        if self.progress.round < 0:
            self._release_evaluation_examples()
            self._finish_round(0, before + time.monotonic() - started)
        result = Result()
        done = self.progress.round
        if done < len(self.plan.rounds):
            self._post(done + 1, grid)
        for number in range(done + 1, len(self.plan.rounds) + 1):
            record = self._run_round(number, grid)
            result.train_metrics_clientapp[number] = MetricRecord(
                {k: v for k, v in record.items() if isinstance(v, int | float)}
            )
            self._finish_round(number, before + time.monotonic() - started)
        return result

    def _gather(self, grid: Grid) -> None:
        nodes = wait_for_nodes(grid, self.config.run)
        self._nodes = len(nodes)
        request = DescribeRequest(
            **terms_of(self.cloud, self.folder.run_id),
            bundles=",".join(manifest.id for manifest, _ in self.cloud.bundles),
            **learning_terms(self.cloud),
        )
        self.fleet, held = describe(nodes, request, self._exchange)
        for bundle in self.cloud.bundles:
            provision(self.fleet, held, bundle, self.folder.run_id, self._exchange)
        self._check_usable()

    def _check_usable(self) -> None:
        if not any(self.fleet.train.get(d) for d in self.fleet.nodes):
            raise RunError(f"no usable device: {self.fleet.why_none()}")

    def _restore(self) -> None:
        """Build top model and plan; take up a checkpoint where there is one.

        The plan belongs to the devices of the run's first start, so their counts are kept: a
        device that is absent now is skipped, its examples already released stay.
        """
        counts = self.folder.read_json("devices.json")
        if counts is None:
            counts = {
                "train": {d: self.fleet.train[d] for d in self.fleet.nodes},
                "evaluation": {d: self.fleet.evaluation[d] for d in self.fleet.nodes},
                "labels": list(self.fleet.label_names),
                "nodes": self._nodes,
            }
            self.folder.write_json("devices.json", counts)
        self.plan = make_plan(counts["train"], counts["evaluation"], self.config)
        self.model, self.trainer = self.cloud.build_top(
            counts["labels"], fresh=not self.folder.checkpoint.exists()
        )
        if self.cloud.adaptation:
            self.folder.write_json("adaptation.json", self.cloud.adaptation)
        restored = checkpoint.load(self.folder.checkpoint, self.trainer)
        if restored is not None:
            self.progress = restored
            logger.info("resuming after round %d of %d", restored.round, len(self.plan.rounds))
        # traffic of this start goes on top of what the checkpoint counted
        for device, account in self._exchange.traffic.totals.items():
            Traffic(self.progress.traffic).add(device, account)
        self._exchange.traffic.totals = self.progress.traffic
        for device in counts["train"]:
            changed = self.fleet.train.get(device) != counts["train"][device]
            if device in self.fleet.nodes and changed:
                self.fleet.drop(device, "its number of examples changed since the run began")
            elif device not in self.fleet.nodes and device not in self.fleet.quarantined:
                self.fleet.quarantined[device] = "absent when the run was resumed"
        for device, reason in self.progress.quarantined.items():
            if device in self.fleet.nodes:
                self.fleet.drop(device, reason)
        self.progress.quarantined |= self.fleet.quarantined
        self.progress.refused |= self.fleet.refused

    def _test_examples(self) -> list[Example]:
        self.cloud.add_test_set(self.store, self.model.spec.labels)
        keys = [c.key for c in self.store if c.device == TEST_DEVICE]
        return [example for key in sorted(keys) for example in self.store.examples(key)]

    def _release_evaluation_examples(self) -> None:
        with self._exchange.purpose(EVALUATION):
            for wave in self.plan.evaluation:
                self._exchange.post(self._intake.requests(wave))
                self._intake.keep(self._exchange.collect())

    # ---------------------------------------------------------------------------- one round

    def _post(self, number: int, grid: Grid) -> None:
        """Send round ``number``'s messages, unless it has none."""
        if number <= len(self.plan.rounds) and self.plan.rounds[number - 1].releases:
            self._exchange.post(self.configure_train(number, ArrayRecord(), ConfigRecord(), grid))

    def _run_round(self, number: int, grid: Grid) -> dict[str, Any]:
        record: dict[str, Any] = {"round": number, "kind": "train"}
        begun = time.perf_counter()
        waited, decoded = self._exchange.seconds_waited, self.cloud.seconds["decode"]
        if self.plan.rounds[number - 1].releases:
            replies = self._exchange.collect()
            _, metrics = self.aggregate_train(number, [r for r in replies.values() if r])
            record |= {"kind": "release", **dict(metrics or {})}
        if not self.fleet.nodes and not any(True for _ in self._present(self._all_asks())):
            raise RunError(f"no usable device is left: {self.fleet.why_none()}")
        # the next round's messages travel, and devices compute, while the cloud trains on this one
        evaluates = self._due(number, self.config.train.evaluate_every)
        if not evaluates:
            self._post(number + 1, grid)
        start = time.perf_counter()
        record |= self._train(number)
        record["seconds_top"] = time.perf_counter() - start
        # wall time of the round without tests, evaluation and checkpoint
        record["seconds_round"] = time.perf_counter() - begun
        if self._due(number, self.config.train.test_every) and self.test_examples:
            logits_BC = self.trainer.logits(self.store.training_rows(), self.test_examples)
            accuracy, loss = accuracy_and_loss(logits_BC, [e.label for e in self.test_examples])
            record |= {"test_accuracy": accuracy, "test_loss": loss}
        if evaluates:
            record |= self._evaluate(number, grid)
            self._post(number + 1, grid)
        record["seconds_wire"] = self._exchange.seconds_waited - waited
        record["seconds_decode"] = self.cloud.seconds["decode"] - decoded
        record |= self._exchange.traffic.training()
        self.progress.rounds.append(record)
        return record

    def _due(self, number: int, every: int) -> bool:
        return number == len(self.plan.rounds) or bool(every and number % every == 0)

    def _train(self, number: int) -> dict[str, Any]:
        asks = list(self._present(self.plan.train_asks(number)))
        examples = [example for ask in asks for example in self.store.examples(ask.key)]
        if not examples:
            return {"examples": 0}
        steps = self.trainer.train_pass(
            self.store.training_rows(),
            examples,
            round_number=number,
            total_steps=self.trainer.steps + self._steps_to_come(number),
        )
        self.progress.steps += [[s.number, s.loss, s.learning_rate] for s in steps]
        return {
            "examples": len(examples),
            "steps": len(steps),
            "loss": sum(s.loss for s in steps) / len(steps),
            "learning_rate": steps[-1].learning_rate,
        }

    def _steps_to_come(self, number: int) -> int:
        """Count steps from round ``number`` to the end, of devices that are still in the run."""
        size = self.config.train.batch_size
        total = 0
        for later in range(number, len(self.plan.rounds) + 1):
            asks = self.plan.train_asks(later)
            expected = [a for a in asks if a.key in self.store or a.device in self.fleet.nodes]
            total += -(-sum(a.examples for a in expected) // size)
        return total

    def _evaluate(self, number: int, grid: Grid) -> dict[str, Any]:
        messages = self.configure_evaluate(number, ArrayRecord(), ConfigRecord(), grid)
        with self._exchange.purpose(EVALUATION):
            replies = self._exchange.ask(messages)
        return dict(self.aggregate_evaluate(number, [r for r in replies.values() if r]) or {})

    def _finish_round(self, number: int, seconds: float) -> None:
        self.progress.round = number
        self.progress.seconds = seconds
        self.progress.quarantined |= self.fleet.quarantined
        self.progress.refused |= self.fleet.refused
        if self._saves_after(number):
            checkpoint.save(self.folder.checkpoint, self.trainer, self.progress)
            self._intake.checkpointed()
            self.folder.write_jsonl("rounds.jsonl", self.progress.rounds)
            self.folder.write_jsonl("steps.jsonl", self.progress.steps)
        if number:
            self._report(self.progress.rounds[-1])

    def _saves_after(self, number: int) -> bool:
        return True

    def _report(self, record: Mapping[str, Any]) -> None:
        numbers = " ".join(
            f"{key.replace('_', ' ')} {record[key]:.4f}"
            for key in ("loss", "test_accuracy", "eval_accuracy")
            if key in record
        )
        logger.info(
            "round %d/%d %s: %d examples, %s, %.1f s waiting, %.1f s training",
            record["round"],
            len(self.plan.rounds),
            record["kind"],
            record.get("examples", 0),
            numbers,
            record["seconds_wire"],
            record["seconds_top"],
        )

    # ------------------------------------------------------------------------ asking, keeping

    def _all_asks(self) -> Iterable[Ask]:
        return (ask for r in self.plan.rounds for ask in r.asks)

    def _present(self, asks: Iterable[Ask]) -> Iterable[Ask]:
        return (ask for ask in asks if ask.key in self.store)
