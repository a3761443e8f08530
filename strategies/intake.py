"""Asking devices for chunks, and keeping what comes back if it is sound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message

from privtune_flwr.cloud import CloudSide
from privtune_flwr.errors import InvalidReplyError
from privtune_flwr.protocol import ReceivedChunk, ReleaseRequest, read_release, to_message
from privtune_flwr.training.plan import Ask
from privtune_flwr.training.store import SmashedStore
from strategies.exchange import Traffic, failure
from strategies.fleet import Fleet

# metrics of which the largest counts; the others are summed over devices
_LARGEST = ("spent", "eta_max", "epsilon", "delta", "bits_max", "peak")


def terms_of(cloud: CloudSide, run_id: str) -> dict[str, Any]:
    """Say what a run asks of a device's privacy: the same in every message."""
    per_epoch = cloud.config.privacy.release_policy == "per-epoch"
    return {
        "run_id": run_id,
        "bottom_id": cloud.bottom_id,
        "mechanism": cloud.spec.to_json(),
        "labels": cloud.config.privacy.labels == "shared",
        "epochs": cloud.config.train.epochs if per_epoch else 1,
    }


class Intake:
    """The cloud's counter for releases: one chunk a device at a time.

    Parameters
    ----------
    cloud : CloudSide
        Mechanism, bottom model and configuration.
    store : SmashedStore
        Receives valid chunks.
    fleet : Fleet
        Devices that are asked; a device whose reply is bad is dropped from it.
    run_id : str
    num_labels : int
        Classes; a label outside them is a bad reply.
    traffic : Traffic
        The run's count. What a chunk added to it is kept with the chunk.
    """

    def __init__(
        self,
        cloud: CloudSide,
        store: SmashedStore,
        fleet: Fleet,
        run_id: str,
        num_labels: int,
        traffic: Traffic,
    ) -> None:
        self._cloud = cloud
        self._store = store
        self._fleet = fleet
        self._run_id = run_id
        self._num_labels = num_labels
        self._traffic = traffic
        self._counted = traffic.copy()
        self._asked: dict[int, Ask] = {}
        self._found: list[Ask] = []
        #: device to what its ledger says it has spent, as of its last reply
        self.spent: dict[str, dict[str, float]] = {}

    def requests(self, asks: Iterable[Ask]) -> list[Message]:
        """Build messages for chunks that are not in the store yet, of devices still in the run."""
        messages: list[Message] = []
        self._asked, self._found = {}, []
        for ask in asks:
            if ask.key in self._store:
                # a plan names a chunk once: an earlier start kept it, and died before a checkpoint
                self._found.append(ask)
                continue
            node = self._fleet.nodes.get(ask.device)
            if node is None:
                continue
            self._asked[node] = ask
            request = self._request(ask)
            messages.append(to_message(request.to_content(), node, request.action))
        return messages

    def keep(self, replies: Mapping[int, Message | None]) -> dict[str, float]:
        """Keep valid replies in the order in which they were asked for; quarantine the others.

        Parameters
        ----------
        replies : Mapping
            Node id to its reply; None or missing where none came.

        Returns
        -------
        dict
            Counts, chunks included that an earlier start of the run kept and did not live to
            count, and the devices' metrics summed (or their largest, for peaks and totals).
        """
        totals: dict[str, float] = {"devices": 0, "examples_new": 0, "noise_norm_sum": 0.0}
        for ask in self._found:
            entry = self._store[ask.key]
            self._traffic.add(ask.device, entry.traffic)
            self._counted.add(ask.device, entry.traffic)
            self._count(totals, ask, entry.metrics)
        for node, ask in self._asked.items():
            reply = replies.get(node)
            if why := failure(reply):
                self._fleet.drop(ask.device, why)
                continue
            assert reply is not None
            try:
                chunk = self._read(reply, ask)
            except InvalidReplyError as error:
                self._fleet.drop(ask.device, str(error))
                continue
            labels = None if chunk.labels_B is None else chunk.labels_B.tolist()
            grown = self._traffic.since(self._counted, ask.device)
            self._store.append(
                ask.key,
                chunk.rows_ND,
                chunk.lengths_B.tolist(),
                labels,
                metrics=chunk.metrics,
                traffic=grown,
            )
            self._counted.add(ask.device, grown)
            self._count(totals, ask, chunk.metrics)
        self._asked, self._found = {}, []
        return totals

    def checkpointed(self) -> None:
        """Note that a checkpoint now holds all that was counted so far."""
        self._counted = self._traffic.copy()

    def _count(self, totals: dict[str, float], ask: Ask, metrics: Mapping[str, float]) -> None:
        totals["devices"] += 1
        totals["examples_new"] += ask.examples
        add_metrics(totals, metrics)
        spent = {
            name.removeprefix("spent_"): value
            for name, value in metrics.items()
            if name.startswith("spent_")
        }
        # a chunk of a store from before this was kept has none
        if spent:
            self.spent[ask.device] = spent

    def _read(self, reply: Message, ask: Ask) -> ReceivedChunk:
        if ask.key in self._store:
            raise InvalidReplyError("replay: this chunk is already in the store")
        return read_release(
            reply.content,
            self._request(ask),
            device_id=ask.device,
            examples=ask.examples,
            hidden=self._cloud.width,
            num_labels=self._num_labels,
        )

    def _request(self, ask: Ask) -> ReleaseRequest:
        config = self._cloud.config
        return ReleaseRequest(
            **terms_of(self._cloud, self._run_id),
            split=ask.split,
            chunk=ask.chunk,
            chunk_size=config.privacy.chunk_size,
            epoch=ask.epoch,
            wire=config.privacy.wire,
            max_length=config.model.max_length,
        )


def add_metrics(totals: dict[str, float], metrics: Mapping[str, float]) -> None:
    """Add one device's metrics to the round's: peaks and totals by their largest."""
    for key, value in metrics.items():
        before = totals.get(key, 0.0)
        totals[key] = max(before, value) if key.startswith(_LARGEST) else before + value
