"""SplitFed: both parts of a cut model train; one Flower message a device and step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from privtune_flwr.codec import Rows
from privtune_flwr.errors import InvalidReplyError, RunError
from privtune_flwr.federated.methods import Schema
from privtune_flwr.federated.splitfed import (
    DeviceBatch,
    SplitFedModel,
    UnionTrainer,
    device_batch_size,
    load_moments,
    save_moments,
)
from privtune_flwr.federated.splitfed_device import batch_count, schedule_step
from privtune_flwr.privacy.learned_update import norm_of
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol import EvaluateRequest, to_message
from privtune_flwr.protocol.fit import ReceivedFit
from privtune_flwr.protocol.splitfed import SplitFedRequest, read_bottom, read_rows
from privtune_flwr.training.trainer import schedule_factor
from strategies.exchange import EVALUATION, failure
from strategies.federated import FederatedTuning

logger = logging.getLogger("privtune.cloud")

_PLAN = "plan"
_TOP = "top."


class SplitFedTuning(FederatedTuning):
    """Train the top model in the cloud and the bottom model on the devices, step by step.

    In a step every device of the round sends the representations of one batch of its own, of
    ``train.batch-size`` divided by the number of devices; the cloud trains the top model on all of
    them together, and each device gets the gradient of its rows back and trains its bottom model.
    A device that has no batch left is not asked until the next round. At the end of a round
    (``federated.local-epochs`` passes) the bottom models are averaged, weighted by examples.

    SplitFed: Thapa et al., arXiv 2004.12088 (its first variant, with one top model for all, which
    here sees one union batch a step); with ``model.tuning = lora`` adapters in both halves, as in
    SplitLoRA, arXiv 2407.00952. The devices' optimisers go on over rounds; only weights are
    averaged. A run that was killed goes on at the round it was in.
    """

    def begin(self) -> None:
        """Fix batches and schedule, which depend on the devices' counts."""
        assert isinstance(self.model, SplitFedModel)
        self._model: SplitFedModel = self.model
        self._schema: Schema = {
            name: ("float32", value.shape) for name, value in self._model.bottom_state().items()
        }
        batch = device_batch_size(self.config.train, len(self._drawn(1)))
        passes = self.config.federated.local_epochs
        able = [self.fleet.train[d] for d in self.fleet.nodes if self.fleet.train[d]]
        self._set_plan(batch, max(batch_count(n, batch, passes) for n in able))

    def _set_plan(self, batch: int, steps: int) -> None:
        self._batch, self._steps = batch, steps
        self._trainer = UnionTrainer(self._model, self.config.train, steps * self.rounds)

    def kept(self) -> State:
        """Keep batches, schedule and the top model's moments for a resumed run."""
        return {_PLAN: np.array([self._batch, self._steps], dtype=np.float32)} | save_moments(
            self._trainer.optimizer, self._top()
        )

    def restore(self, kept: State) -> None:
        """Take up what :meth:`kept` gave."""
        batch, steps = kept.pop(_PLAN).tolist()
        self._set_plan(int(batch), int(steps))
        load_moments(self._trainer.optimizer, self._top(), kept)

    def _top(self) -> dict[str, Any]:
        return {n: p for n, p in self._model.trainable().items() if n.startswith(_TOP)}

    def guarantee(self) -> dict[str, Any]:
        """Say that there is none."""
        return {
            "epsilon": None,
            "adversary": "none",
            "statement": "No protection: clean representations leave in every epoch, with their "
            "labels, and the text can be read back from them.",
        }

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
        """Run the federation to its end; the bottom's adapters are merged then, for the export.

        Raises
        ------
        RunError
            If no device is usable.
        """
        result = super().start(grid, timeout=timeout)
        self._model.merge()
        return result

    # ---------------------------------------------------------------------------- one round

    def _run_round(self, number: int, grid: Grid) -> dict[str, Any]:
        begun = time.perf_counter()
        drawn = self._drawn(number)
        if not drawn:
            raise RunError(f"no usable device is left: {self.fleet.why_none()}")
        waited = self._exchange.seconds_waited
        totals: dict[str, float] = {"seconds_fit": 0.0, "peak_memory_bytes": 0.0}
        losses, sums, ended, seconds = self._take_steps(number, drawn, totals)
        record: dict[str, Any] = {"round": number, "kind": "splitfed", **totals, **sums}
        record["seconds_wire"] = self._exchange.seconds_waited - waited
        start = time.perf_counter()
        record |= {"devices": len(ended), "examples": 0, "steps": len(losses), "losses": losses}
        if ended:
            record["examples"] = sum(received.examples for _, received in ended)
            messages = [self._for_flower(reply, received) for reply, received in ended]
            arrays, _ = self._aggregator.aggregate_train(number, messages)
            assert arrays is not None
            record |= self.take({name: arrays[name].numpy() for name in sorted(arrays)})
        else:
            logger.warning("round %d: no bottom model came back; the last one stays", number)
            self.state = self._model.state()
        record["seconds_top"] = seconds + time.perf_counter() - start
        if sums["seen"]:
            record["loss"] = sums["loss_sum"] / sums["seen"]
        last = schedule_step(number, self._steps, self._steps)
        factor = schedule_factor(last, self._trainer.total_steps, self.config.train)
        record["learning_rate"] = self.config.train.learning_rate * factor
        return self._completed(record, number, begun, grid)

    def take(self, arrays: State) -> dict[str, Any]:
        """Make the averaged bottom model the cloud's own; the top model is its own already."""
        before = self._model.bottom_state()
        self._model.load_bottom(arrays)
        self.state = self._model.state()
        return {"update_norm": norm_of({n: arrays[n] - before[n] for n in before})}

    def _take_steps(
        self, number: int, drawn: Sequence[str], totals: dict[str, float]
    ) -> tuple[list[float], dict[str, float], list[tuple[Message, ReceivedFit]], float]:
        """Take a round's steps.

        Returns
        -------
        losses : list of float
            Mean loss of each step's union batch.
        sums : dict
            ``loss_sum``, ``correct`` and ``seen`` over them.
        ended : list of (Message, ReceivedFit)
            Devices that ended the round, in order of name, with their bottom models.
        seconds : float
            Of the cloud's computation.
        """
        losses: list[float] = []
        sums: dict[str, float] = {"loss_sum": 0.0, "correct": 0, "seen": 0}
        ended: dict[str, tuple[Message, ReceivedFit]] = {}
        gradients: dict[str, Rows] = {}
        state = self._model.bottom_state()
        going, seconds = list(drawn), 0.0
        passes = self.config.federated.local_epochs
        for step in range(1, self._steps + 2):
            request = self._request(number, step)
            first = step == 1
            messages = [
                to_message(
                    request.to_content_with(state if first else None, gradients.get(device)),
                    self.fleet.nodes[device],
                    request.action,
                )
                for device in going
            ]
            replies = self._exchange.ask(messages)
            batches: dict[str, DeviceBatch] = {}
            for device in list(going):
                count = batch_count(self.fleet.train[device], self._batch, passes)
                node = self.fleet.nodes[device]
                found = self._received(replies.get(node), request, device, step > count, totals)
                if isinstance(found, DeviceBatch):
                    batches[device] = found
                    continue
                going.remove(device)
                if found is not None:
                    ended[device] = found
            if not batches:
                break
            start = time.perf_counter()
            at = schedule_step(number, step, self._steps)
            done = self._trainer.step(list(batches.values()), at)
            seconds += time.perf_counter() - start
            gradients = dict(zip(batches, done.gradients, strict=True))
            losses.append(done.loss_sum / done.seen)
            for key in sums:
                sums[key] += getattr(done, key)
        return losses, sums, [ended[device] for device in sorted(ended)], seconds

    def _request(self, number: int, step: int, split: str = "train") -> SplitFedRequest:
        return SplitFedRequest(
            run_id=self.folder.run_id,
            model_id=self.cloud.model_id,
            settings=self.cloud.settings.to_json(),
            labels="\n".join(self.fleet.label_names),
            wire=self.config.privacy.wire,
            split=split,
            round=number,
            step=step,
            steps=self._steps,
            batch=self._batch if split == "train" else self.config.privacy.chunk_size,
        )

    def _received(
        self,
        reply: Message | None,
        request: SplitFedRequest,
        device: str,
        ends: bool,
        totals: dict[str, float],
        examples: int | None = None,
    ) -> DeviceBatch | tuple[Message, ReceivedFit] | None:
        """Validate one answer; None if the device is out of this round, or of the run."""
        if why := failure(reply):
            if why.startswith("refused"):
                self.fleet.drop(device, why)
            else:
                logger.warning("%s is left out of round %d: %s", device, request.round, why)
            return None
        assert reply is not None
        try:
            if ends:
                count = self.fleet.train[device]
                received = read_bottom(
                    reply.content, request, self._schema, device_id=device, examples=count
                )
                _add(totals, received.metrics)
                return reply, received
            batch, metrics = read_rows(
                reply.content,
                request,
                device_id=device,
                examples=examples,
                hidden=self._model.parts.spec.hidden_size,
                num_labels=self._model.parts.spec.num_labels,
            )
        except InvalidReplyError as error:
            self.fleet.drop(device, str(error))
            return None
        _add(totals, metrics)
        return batch

    # --------------------------------------------------------------------------- evaluation

    def _evaluate(self, number: int, grid: Grid) -> dict[str, Any]:
        """Have devices send their evaluation rows, without labels, and judge what comes of them."""
        with self._exchange.purpose(EVALUATION):
            logits = self._evaluation_logits(number)
            messages = []
            for device, logits_BC in sorted(logits.items()):
                ask = EvaluateRequest(
                    run_id=self.folder.run_id, split="eval", examples=len(logits_BC)
                )
                node = self.fleet.nodes[device]
                messages.append(to_message(ask.to_content_with(logits_BC), node, ask.action))
            replies = self._exchange.ask(messages)
        return dict(self.aggregate_evaluate(number, [r for r in replies.values() if r]) or {})

    def _evaluation_logits(self, number: int) -> dict[str, Rows]:
        """Give each device's logits, as far as all of its evaluation rows came."""
        size = self.config.privacy.chunk_size
        counts = {d: self.fleet.evaluation[d] for d in sorted(self.fleet.nodes)}
        logits: dict[str, list[Rows]] = {device: [] for device, count in counts.items() if count}
        totals: dict[str, float] = {}
        state = self._model.bottom_state()
        for chunk in range(max((-(-counts[d] // size) for d in logits), default=0)):
            asked = [d for d in logits if chunk * size < counts[d]]
            request = self._request(number, chunk + 1, "eval")
            content = request.to_content_with(state)
            replies = self._exchange.ask(
                to_message(content, self.fleet.nodes[d], request.action) for d in asked
            )
            for device in asked:
                due = min(size, counts[device] - chunk * size)
                reply = replies.get(self.fleet.nodes[device])
                found = self._received(reply, request, device, False, totals, due)
                if isinstance(found, DeviceBatch):
                    logits[device].append(self._trainer.logits(found))
                else:
                    del logits[device]
        return {device: np.concatenate(parts) for device, parts in logits.items()}


def _add(totals: dict[str, float], metrics: dict[str, float]) -> None:
    """Add what a device spent; of its memory, the peak."""
    totals["seconds_fit"] = totals.get("seconds_fit", 0.0) + metrics.get("seconds_fit", 0.0)
    for key in ("peak_memory_bytes", "spent_fits"):
        totals[key] = max(totals.get(key, 0.0), metrics.get(key, 0.0))
