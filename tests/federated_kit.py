"""A federated baseline without a network: a tiny model, devices with files of their own."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_kit import RUN_ID, Device
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from learned_kit import Wire, run_folder
from scipy import stats
from tiny_models import WORDS, save_tiny

from privtune_flwr import client_app
from privtune_flwr.bundle import BundleCache
from privtune_flwr.config import RunConfig, flatten, load_run_config
from privtune_flwr.federated.cloud import FederatedCloud, prepare_federated
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.whole import WholeModel, held_whole
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol.fit import ANSWER, FIT, FitRequest
from privtune_flwr.protocol.requests import PAYLOAD, REQUEST
from privtune_flwr.protocol.updates import state_record
from strategies import create_federated
from strategies.federated import FederatedTuning

LABELS = ("high", "low")
ALLOWED = {"policy-fit-rounds": 1000, "policy-min-metric-examples": 1}
BASE: dict[str, Any] = {
    "model.max-length": 16,
    "model.tuning": "lora",
    "model.lora-rank": 2,
    "data.train-examples": 8,
    "data.eval-examples": 2,
    "data.test-source": "none",
    "data.labels": ",".join(LABELS),
    "train.strategy": "fedavg",
    "train.epochs": 2,
    "train.batch-size": 4,
    "train.learning-rate": 1e-2,
    "train.head-learning-rate": 1e-2,
    "train.schedule": "constant",
    "train.warmup": 0.0,
    "train.device": "cpu",
}


class FederatedWire(Wire):
    """The grid that a federated strategy starts on."""

    def get_node_ids(self) -> list[int]:
        return list(self.devices)


@dataclass
class Place:
    """A folder with a tiny model, devices and runs."""

    root: Path
    patch: pytest.MonkeyPatch
    family: str = "bert"
    bundles: BundleCache = field(init=False)
    model: Path = field(init=False)

    def __post_init__(self) -> None:
        self.bundles = BundleCache(self.root / "bundles")
        self.model = save_tiny(self.family, self.root / "model")
        self.patch.setattr("privtune_flwr.federated.cloud.cloud_cache", lambda: self.bundles)
        # who sends a message: Flower sets it where a server app runs
        for name in ("_task_id", "_run_id", "_node_id"):
            self.patch.setattr(TaskIdentity, name, 1)
        # devices share a disk here: one loaded model serves all of them
        self.patch.setattr(
            "privtune_flwr.federated.methods.held_whole",
            lambda folder, settings, labels: held_whole(folder.resolve(), settings, labels),
        )
        # waiting for nodes and for replies is all that would take time
        self.patch.setattr("time.sleep", lambda seconds: None)

    def config(self, **changes: Any) -> RunConfig:
        dotted = {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}
        base = BASE | {"model.name": str(self.model)}
        return load_run_config(flatten(RunConfig()) | base | dotted)

    def device(self, number: int, examples: int, **policy: Any) -> Device:
        """Make a device with a file of ``examples`` sentences of its own, a fifth to evaluate."""
        path = self.root / f"text-{number}.csv"
        rng = np.random.default_rng([7, number])
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for i in range(examples):
                half = WORDS[: len(WORDS) // 2] if i % 2 else WORDS[len(WORDS) // 2 :]
                words = rng.choice(half, size=int(rng.integers(3, 9)))
                rows.writerow([" ".join(words), LABELS[i % 2]])
        dashed = {f"policy-{key.replace('_', '-')}": value for key, value in policy.items()}
        node = {"data": str(path), "labels": ",".join(LABELS)} | ALLOWED | dashed
        home = self.root / f"home-{number}"
        if not home.exists():
            # the same identity and secret in every run of the tests: draws are keyed by them
            home.mkdir(mode=0o700)
            for name, value in (
                ("device-id", f"device-{number:05d}".encode()),
                ("secret", hashlib.sha256(str(number).encode()).digest()),
            ):
                (home / name).write_bytes(value)
                (home / name).chmod(0o600)
        return Device(home, self.bundles.root, "", node, flatten(self.config()))

    def cloud(self, **changes: Any) -> FederatedCloud:
        return prepare_federated(self.config(**changes))

    def strategy(self, name: str, **changes: Any) -> FederatedTuning:
        return create_federated(self.cloud(**changes), run_folder(self.root / name))

    def run(self, name: str, wire: Wire, **changes: Any) -> FederatedTuning:
        strategy = self.strategy(name, **changes)
        strategy.start(wire)  # type: ignore[arg-type]
        return strategy


def fit_content(
    cloud: FederatedCloud, state: State, *, flower: Mapping[str, Any] | None = None, **changes: Any
) -> Any:
    """A request as a Flower strategy completes ours: round 1 unless ``flower`` says otherwise."""
    request = FitRequest(
        **{
            "run_id": RUN_ID,
            "model_id": cloud.model_id,
            "settings": cloud.settings.to_json(),
            "public_id": "",
            "labels": "\n".join(LABELS),
        }
        | changes
    )
    content = request.to_content()
    record = request.to_record()
    for key, value in ({"server-round": 1} | dict(flower or {})).items():
        record[key] = value
    content[REQUEST] = record
    content[PAYLOAD] = state_record(state)
    return content


def ask_fit(
    device: Device,
    cloud: FederatedCloud,
    state: State,
    *,
    app: ClientApp = client_app.app,
    **changes: Any,
) -> Message:
    return device.send(fit_content(cloud, state, **changes), FIT, app)


def answer_of(reply: Message) -> State:
    assert reply.has_content(), reply.error
    return {n: a.numpy() for n, a in reply.content.array_records[ANSWER].items()}


def model_of(cloud: FederatedCloud, settings: FitSettings | None = None) -> WholeModel:
    """The cloud's model, loaded anew: nothing trained is left in it."""
    held_whole.cache_clear()
    return held_whole(cloud.model_bundle[1], settings or cloud.settings, LABELS)


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def flat(state: State) -> np.ndarray:
    return np.concatenate([state[n].ravel() for n in sorted(state)]).astype(np.float64)


def weighted_mean(states: Sequence[State], weights: Sequence[float]) -> State:
    """By hand, in float64."""
    total = sum(weights)
    return {
        n: sum(w / total * s[n].astype(np.float64) for s, w in zip(states, weights, strict=True))
        for n in states[0]
    }


def noise_holds(update: State, scale: float) -> bool:
    """Hold a sample to a centred Gaussian of this standard deviation."""
    values = flat(update)
    spread = values.std() / scale
    return bool(
        abs(spread - 1) < 5 / np.sqrt(2 * values.size)
        and stats.kstest(values / scale, "norm").pvalue > 1e-4
    )
