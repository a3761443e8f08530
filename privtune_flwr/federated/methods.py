"""What a device does in one round of a federated baseline; one class a method, chosen by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.whole import WholeModel, held_whole
from privtune_flwr.privacy.learning import State

#: Array name to dtype and shape.
Schema = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Work:
    """What a device works on in one round.

    Attributes
    ----------
    sequences, labels
        Its training examples: token ids and classes.
    round, rounds : int
        From 1, and how many there are.
    proximal_mu : float
        As FedProx's strategy sent it; 0 without.
    seed : int
        Keyed by the device's secret: order of batches, dropout of DP-SGD.
    memory : dict
        What this device kept of its last round in this run; empty in the first.
    public : Path or None
        Folder of the public artefact that came with the model, for methods that have one.
    noise_key : bytes
        32 bytes derived from the device's secret for this one answer: what DP-SGD draws from.
    """

    sequences: Sequence[NDArray[np.int32]]
    labels: Sequence[int]
    round: int
    rounds: int
    proximal_mu: float
    seed: int
    memory: State
    public: Path | None = None
    noise_key: bytes = b""


@dataclass(frozen=True)
class Outcome:
    """What a device's round came to.

    Attributes
    ----------
    arrays : dict
        What leaves, as :meth:`FitMethod.reply_schema` promises.
    metrics : dict
        Of :data:`privtune_flwr.protocol.fit.FIT_METRICS`.
    memory : dict
        What the device keeps on its disk for the next round; empty = nothing.
    """

    arrays: dict[str, NDArray[np.float32]]
    metrics: Mapping[str, float] = field(default_factory=dict)
    memory: State = field(default_factory=dict)


class FitMethod(ABC):
    """The device's part of a federated baseline.

    Parameters
    ----------
    settings : FitSettings
        The run's.
    folder : Path
        The provisioned whole model.
    labels : tuple of str
        Names of the classes.
    """

    #: Whether a round leaves something on the device that the next one needs.
    remembers: ClassVar[bool] = False

    def __init__(self, settings: FitSettings, folder: Path, labels: tuple[str, ...]) -> None:
        self.settings = settings
        self.folder = folder
        self.labels = labels

    @property
    def model(self) -> WholeModel:
        """The model, cached in this process; load a state before using it."""
        return held_whole(self.folder, self.settings, self.labels)

    @abstractmethod
    def fit(self, state: State, work: Work) -> Outcome:
        """Work on the device's text, starting from what the cloud sent."""

    @abstractmethod
    def reply_schema(self, state: State, public: Path | None = None) -> Schema:
        """Say exactly which arrays answer ``state``; the guard and the cloud hold a reply to it."""

    @staticmethod
    def same_arrays(state: State) -> Schema:
        """Give the schema of a reply that has the state's own arrays."""
        return {name: ("float32", value.shape) for name, value in state.items()}


_PACKAGE = "privtune_flwr.federated"
# modules by strategy, loaded when they are asked for: each imports what it alone needs
_METHODS = {
    "scaffold": ("scaffold", "ScaffoldMethod"),
    "bbt": ("blackbox", "BlackBoxMethod"),
    "distil": ("distil", "DistilMethod"),
}


def create_method(settings: FitSettings, folder: Path, labels: Sequence[str]) -> FitMethod:
    """Build the method of ``train.strategy``; averaging weights where none is named."""
    module, name = _METHODS.get(settings.train.strategy, ("weights", "WeightsMethod"))
    kind: type[FitMethod] = getattr(import_module(f"{_PACKAGE}.{module}"), name)
    return kind(settings, folder, tuple(labels))
