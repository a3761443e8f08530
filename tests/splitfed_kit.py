"""SplitFed without a network: a tiny model, and one device asked by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from device_kit import RUN_ID, Device, wire_copy
from federated_kit import LABELS, FederatedWire, Place
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from privtune_flwr import client_app
from privtune_flwr.federated.splitfed import DeviceBatch
from privtune_flwr.federated.splitfed_cloud import SplitFedCloud
from privtune_flwr.federated.splitfed_device import held_twin
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol.fit import ANSWER
from privtune_flwr.protocol.splitfed import SPLITFED, SplitFedRequest, read_rows
from strategies.splitfed import SplitFedTuning

HIDDEN = 32
SPLITFED_RUN: dict[str, Any] = {
    "train__strategy": "splitfed",
    "privacy__mechanism": "none",
    "privacy__wire": "float32",
    "model__cut": 2,
}
ALLOWED = {"mechanisms": "none", "releases_per_example": 0}


def open_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Make a folder with a tiny model; to be yielded from by a fixture."""
    made = Place(tmp_path, monkeypatch)
    monkeypatch.setattr("privtune_flwr.federated.splitfed_cloud.cloud_cache", lambda: made.bundles)
    held_twin.cache_clear()
    yield made
    held_twin.cache_clear()


def strategy_of(place: Place, name: str, **changes: Any) -> SplitFedTuning:
    return cast("SplitFedTuning", place.strategy(name, **SPLITFED_RUN | changes))


def start(strategy: SplitFedTuning, devices: dict[int, Device]) -> SplitFedTuning:
    strategy.start(cast("Grid", FederatedWire(devices)))
    return strategy


class Asker:
    """One device asked by hand, as the strategy would."""

    def __init__(self, place: Place, device: Device, **changes: Any) -> None:
        self.device = device
        self.cloud = cast("SplitFedCloud", place.cloud(**SPLITFED_RUN | changes))
        self.model = self.cloud.build(LABELS)
        self.state = self.model.bottom_state()

    def request(self, step: int, **changes: Any) -> SplitFedRequest:
        values: dict[str, Any] = {
            "run_id": RUN_ID,
            "model_id": self.cloud.model_id,
            "settings": self.cloud.settings.to_json(),
            "labels": "\n".join(LABELS),
            "wire": "float32",
            "split": "train",
            "round": 1,
            "step": step,
            "steps": 3,
            "batch": 4,
        }
        return SplitFedRequest(**values | changes)

    def ask(
        self,
        step: int,
        gradient_ND: Any = None,
        *,
        state: State | None = None,
        app: ClientApp = client_app.app,
        **changes: Any,
    ) -> Message:
        request = self.request(step, **changes)
        brought = self.state if state is None and gradient_ND is None else state
        return self.device.send(request.to_content_with(brought, gradient_ND), SPLITFED, app)

    def batch(self, reply: Message, step: int, **changes: Any) -> DeviceBatch:
        assert reply.has_content(), reply.error
        return read_rows(
            reply.content,
            self.request(step, **changes),
            device_id=self.device.home.device_id,
            examples=None,
            hidden=HIDDEN,
            num_labels=len(LABELS),
        )[0]


def bottom_of(reply: Message) -> State:
    assert reply.has_content(), reply.error
    return {n: a.numpy() for n, a in reply.content.array_records[ANSWER].items()}


def gradients_for(batch: DeviceBatch, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1e-2, batch.rows_ND.shape).astype(np.float32)


def asker_content(reply: Message) -> RecordDict:
    return wire_copy(reply.content)
