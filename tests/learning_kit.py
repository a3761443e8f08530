"""Asking real devices for updates of the toy mechanism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from device_kit import RUN_ID, Device
from flwr.app import Message
from flwr.clientapp import ClientApp
from learned_kit import (
    DRAFT,
)

from privtune_flwr import client_app
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol import (
    LEARN,
    UPDATE,
    LearnRequest,
    learn_content,
)

LEARNS = {"policy_learning_rounds": 1000, "policy_releases_per_example": 0}
# a device's part of the run's text: few sentences, as every update reads all of them
FEW = {"data.train-examples": 200, "data.eval-examples": 10}


MakeDevice = Callable[..., Device]


def request(device: Device, **changes: Any) -> LearnRequest:
    values: dict[str, Any] = {
        "run_id": RUN_ID,
        "bottom_id": device.bottom_id,
        "mechanism": DRAFT.to_json(),
        "labels": True,
        "epochs": 1,
        "round": 1,
        "rounds": 3,
        "clip": 0.0,
        "noise": 0.0,
        "max_length": 128,
        "num_labels": 2,
    }
    return LearnRequest(**values | changes)


def ask(device: Device, state: State, app: ClientApp = client_app.app, **changes: Any) -> Message:
    return device.send(learn_content(request(device, **changes), state), LEARN, app)


def update_of(reply: Message) -> State:
    assert reply.has_content(), reply.error
    return {n: a.numpy() for n, a in reply.content.array_records[UPDATE].items()}


def flat(state: State) -> np.ndarray:
    return np.concatenate([state[name].ravel() for name in sorted(state)]).astype(np.float64)
