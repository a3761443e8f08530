"""Which of Flower's strategies averages a baseline's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx, Strategy

from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol.requests import PAYLOAD, REQUEST
from strategies.dp_fedavg import (
    DeviceLevelPrivacy,
    create_dp_fedavg,
    example_statement,
    kept_account,
    restore_account,
)

# of Flower's server optimisers
_MOMENTS = ("m_t", "v_t")


def create_aggregator(settings: FitSettings, devices: int) -> Strategy:
    """Build the Flower strategy that ``train.strategy`` names.

    Who takes part is drawn before Flower sees the grid, so it always takes all that it sees.

    Parameters
    ----------
    settings : FitSettings
        The run's.
    devices : int
        Devices a round, which the clipping wrapper's noise is divided by.
    """
    federated, strategy = settings.federated, settings.train.strategy
    common: dict[str, Any] = {
        "fraction_train": 1.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
        "weighted_by_key": "weight",
        "arrayrecord_key": PAYLOAD,
        "configrecord_key": REQUEST,
    }
    if strategy == "fedprox":
        return FedProx(**common, proximal_mu=federated.proximal_mu)
    if strategy == "fedadam":
        return FedAdam(
            **common,
            eta=federated.server_learning_rate,
            beta_1=federated.server_beta1,
            beta_2=federated.server_beta2,
            tau=federated.server_tau,
        )
    if strategy == "dp-fedavg":
        return create_dp_fedavg(FedAvg(**common), settings, devices)
    return FedAvg(**common)


class FleetGrid:
    """What a Flower strategy may see of the grid: this round's devices, and nothing else."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        """Give the nodes that are drawn this round."""
        return self._nodes


def guarantee_of(aggregator: Strategy, settings: FitSettings) -> dict[str, Any]:
    """State what protects an example or a device, and against whom."""
    if isinstance(aggregator, DeviceLevelPrivacy):
        return aggregator.guarantee(settings)
    if settings.epsilon is None:
        return {
            "epsilon": None,
            "adversary": "none",
            "statement": "No formal guarantee: what devices send may tell what their text is.",
        }
    return {
        "epsilon": settings.epsilon,
        "delta": settings.federated.delta,
        "adversary": "everybody but the device itself",
        "statement": example_statement(settings),
    }


def kept_of(aggregator: Strategy) -> State:
    """Give what a resumed run needs of an aggregator: moments, and the account of DP-FedAvg."""
    moments: State = {}
    for name in _MOMENTS:
        for key, value in (getattr(aggregator, name, None) or {}).items():
            moments[f"{name}/{key}"] = np.asarray(value, dtype=np.float32)
    return moments | kept_account(aggregator)


def restore_kept(aggregator: Strategy, kept: State) -> None:
    """Take up what :func:`kept_of` gave."""
    for name in _MOMENTS:
        own = f"{name}/"
        found = {k.removeprefix(own): v for k, v in kept.items() if k.startswith(own)}
        if found:
            setattr(aggregator, name, found)
    restore_account(aggregator, kept)
