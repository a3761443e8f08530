"""A small mechanism that is learned, and a cloud that asks devices without a network."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
from device_kit import RUN_ID, Device
from filelock import FileLock
from flwr.app import Message, Metadata
from flwr.serverapp import Grid
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from privtune_flwr.bundle import BundleCache, Manifest
from privtune_flwr.cloud import CloudSide
from privtune_flwr.config import RunConfig
from privtune_flwr.models import CutModel
from privtune_flwr.privacy.base import (
    Guarantee,
    Mechanism,
    MechanismError,
    MechanismSpec,
    ParamReader,
    Strength,
)
from privtune_flwr.privacy.learning import State, Update
from privtune_flwr.privacy.privtune.bank import Bottom
from privtune_flwr.results.run_folder import RunFolder
from strategies.exchange import Exchange, Traffic
from strategies.fleet import Fleet

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge

WIDTH = 3
DRAFT = MechanismSpec("toy-learned", {"done": 0})


class ToyLearner:
    """Multinomial regression on mean rows; its weights become the mechanism's projection."""

    start_seconds = 1.5

    def __init__(self, bottom: Bottom, num_labels: int) -> None:
        self._bottom = bottom
        self._labels = num_labels

    def start(self) -> State:
        shape = (self._bottom.hidden_size, WIDTH)
        drawn = np.random.default_rng(0).normal(0, 0.01, shape)
        return {"projection": drawn.astype(np.float32), "bias": np.zeros(WIDTH, np.float32)}

    def update(
        self,
        state: State,
        sequences: Sequence[NDArray[np.int32]],
        labels: Sequence[int],
        *,
        round_number: int,
        seed: int,
    ) -> Update:
        assert max(labels) < self._labels <= WIDTH
        mean_BD = np.stack([h.mean(axis=0) for h in self._bottom.encode(sequences)])
        score_BR = mean_BD @ state["projection"] + state["bias"]
        chance_BR = np.exp(score_BR - score_BR.max(axis=1, keepdims=True))
        chance_BR /= chance_BR.sum(axis=1, keepdims=True)
        wanted_BR = np.eye(WIDTH, dtype=np.float32)[list(labels)]
        error_BR = (wanted_BR - chance_BR) / len(labels)
        # the seed takes part, so that a test sees whether a retry has the same one
        step = np.random.default_rng(seed).uniform(0.04, 0.06)
        change = {
            "projection": (step * mean_BD.T @ error_BR).astype(np.float32),
            "bias": (step * error_BR.sum(axis=0)).astype(np.float32),
        }
        loss = -np.log(chance_BR[np.arange(len(labels)), list(labels)]).sum()
        return Update(change, len(sequences), {"loss_sum": float(loss), "secret": 1.0})

    def apply(self, state: State, mean_change: State) -> State:
        return {name: value + mean_change[name] for name, value in state.items()}

    def finish(self, state: State, folder: Path) -> MechanismSpec:
        save_file(state, folder / "learned.safetensors")
        return MechanismSpec("toy-learned", {"done": 1}, Manifest.of(folder).id)


class ToyLearned(Mechanism):
    """Rows times a learned projection, rounded to whole numbers; 8 bits each."""

    name: ClassVar[str] = "toy-learned"
    learned: ClassVar[bool] = True
    additive: ClassVar[bool] = False

    def __init__(self, spec: MechanismSpec, state: State | None) -> None:
        super().__init__(spec)
        self._state = state

    def width(self, hidden_size: int) -> int:
        return WIDTH

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        return DRAFT

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        ParamReader(spec, ("done",)).integer("done", 0, 1)
        return cls(spec, load_file(artefact / "learned.safetensors") if artefact else None)

    @classmethod
    def learner(
        cls, spec: MechanismSpec, artefact: Path | None, bottom: Bottom, num_labels: int
    ) -> ToyLearner:
        return ToyLearner(bottom, num_labels)

    @classmethod
    def declared(cls, spec: MechanismSpec) -> Strength:
        return Strength(bits=8.0 * WIDTH)

    @property
    def strength(self) -> Strength:
        return self.declared(self.spec)

    @property
    def eta_max(self) -> None:
        return None

    def guarantee(self) -> Guarantee:
        return Guarantee("none", "any", None, "At most 24 bits a token.")

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        if self._state is None:
            raise MechanismError("toy-learned: is a draft")
        rows = np.rint(10 * (hidden_TD @ self._state["projection"] + self._state["bias"]))
        return cast("NDArray[np.float64]", np.clip(rows, -127, 127))


class Wire:
    """Stands for Flower's grid: a message is answered by the device with that node number."""

    def __init__(self, devices: dict[int, Device]) -> None:
        self.devices = devices
        self.rounds: list[int] = []
        self.before: Any = lambda node, message: None
        self.after: Any = lambda node, reply: reply
        self._ids = itertools.count()
        self._replies: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        given = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.before(node, message)
            number = str(next(self._ids))
            given.append(number)
            answer = self.devices[node].send(message.content, message.metadata.message_type)
            answer = self.after(node, answer)
            metadata = Metadata(1, number, node, 0, number, "", 0.0, 1e12, "train.learn")
            self._replies[number] = (
                Message(error=answer.error, metadata=metadata)
                if answer.has_error()
                else Message(content=answer.content, metadata=metadata)
            )
        return given

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in list(ids) if i in self._replies]


def make_cloud(config: RunConfig, model: CutModel, cache: Path, bottom_id: str) -> CloudSide:
    """A cloud with the draft; public knowledge is not needed."""
    manifest = Manifest.of(cache / bottom_id)
    public: Any = None
    mechanism = ToyLearned.load(DRAFT, None)
    return CloudSide(
        config, model.bottom, [(manifest, cache / bottom_id)], DRAFT, mechanism, public
    )


def fleet_of(wire: Wire) -> tuple[Fleet, Exchange]:
    """Devices as described, and the exchange that reaches them."""
    fleet = Fleet(label_names=("neg", "pos"))
    exchange = Exchange(cast("Grid", wire), timeout=5.0, traffic=Traffic({}))
    for node, device in wire.devices.items():
        name = device.home.device_id
        fleet.nodes[name] = node
        fleet.train[name] = len(device.holdings.train.texts)
        exchange.identify(node, name)
    return fleet, exchange


def run_folder(path: Path) -> RunFolder:
    """A run's folder without a run."""
    path.mkdir(parents=True, exist_ok=True)
    return RunFolder(path, RUN_ID, FileLock(path / ".lock"))


def provision(device: Device, cloud: CloudSide) -> None:
    """Bring the learned artefact to a device."""
    manifest, folder = cloud.bundles[1]
    assert BundleCache(device.bundles).add_folder(folder) == manifest
