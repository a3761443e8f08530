"""DP-FedAvg: devices clip their updates, the cloud adds noise to the mean, Flower accounts for it.

McMahan et al., arXiv 1710.06963, with a fixed clip. The wrapper and the accountant are Flower's
own; here they learn how many devices a round has, and to survive a resume.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import (
    Grid,
    NeighboringRelation,
    PrivacyAccountant,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAvg,
    Strategy,
)

from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.privacy.learning import State

_ACCOUNT = "account"
# The accountant wants a stable population, of which a sample would cost less. No such saving is
# claimed (the cloud draws the devices and knows them), so the number enters no epsilon, and it may
# not change when devices come or go between a run and its resumption.
_POPULATION = 10**9


class DeviceLevelPrivacy(DifferentialPrivacyClientSideFixedClipping):
    """Flower's clipping wrapper, for rounds whose number of devices may change.

    Flower divides the noise by a number of devices that is set once and, with an accountant,
    raises where a round is sent to another number of them: it would end the run once a device has
    left for good. Here each round sets it to the devices that are asked. The noise of their *sum*
    is ``update-noise * update-clip`` whatever their number, so the cost of a round is the same.
    Where one of them does not answer, Flower releases nothing for that round: noise that is
    divided by exactly the devices that answered, or no result.
    """

    accountant: PrivacyAccountant

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every device of the grid, and divide by their number."""
        self.num_sampled_clients = len(list(grid.get_node_ids()))
        return super().configure_train(server_round, arrays, config, grid)

    def guarantee(self, settings: FitSettings) -> dict[str, Any]:
        """State what the rounds so far promise a device, against whom, and what they do not."""
        spent = self.accountant.get_privacy_spent()
        statement = (
            f"({spent.epsilon:.4g}, {spent.delta:g})-differentially private for each device, with "
            f"all its text, after {spent.num_releases} averaged rounds (Rényi accountant, "
            "no amplification by sampling; adding or removing a device means that its clipped "
            "update counts or is zero, the number of devices being public). Central: it holds "
            "against everybody who sees the released models and nothing else. It does not hold "
            "against the cloud, which receives each device's clipped update without that noise "
            "and adds it itself, with numpy's generator, which is not cryptographic. Not "
            "covered: numbers of examples, seconds and memory, and what devices tell of their "
            "evaluation examples."
        )
        found: dict[str, Any] = {
            "epsilon": spent.epsilon,
            "delta": spent.delta,
            "unit": "device",
            "adversary": "everybody who sees only the released models; not the cloud",
            "statement": statement,
        }
        if settings.epsilon is not None:
            found["example_epsilon"] = settings.epsilon
            found["statement"] += f" Against the cloud too: {example_statement(settings)}"
        return found


def create_dp_fedavg(strategy: FedAvg, settings: FitSettings, devices: int) -> Strategy:
    """Put Flower's fixed-clipping wrapper with its Rényi accountant round ``strategy``.

    Parameters
    ----------
    strategy : FedAvg
        Takes every device it sees, all with weight 1.
    settings : FitSettings
        ``federated.update-clip``, ``update-noise`` and ``delta``.
    devices : int
        Devices of the first round.

    Raises
    ------
    ImportError
        If dp-accounting is missing; the server app looks for it before it asks a device.
    """
    from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

    federated = settings.federated
    accountant = RdpAccountant(
        PrivacyConfig(
            target_delta=federated.delta,
            population_size=_POPULATION,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
        )
    )
    return DeviceLevelPrivacy(
        strategy,
        noise_multiplier=federated.update_noise,
        clipping_norm=federated.update_clip,
        num_sampled_clients=max(1, devices),
        accountant=accountant,
    )


def kept_account(aggregator: Strategy) -> State:
    """Give the accountant's state as an array for the checkpoint; nothing where there is none."""
    if not isinstance(aggregator, DeviceLevelPrivacy):
        return {}
    text = json.dumps(aggregator.accountant.state_dict())
    return {_ACCOUNT: cast(Any, np.frombuffer(text.encode(), dtype=np.uint8))}


def restore_account(aggregator: Strategy, kept: State) -> None:
    """Take up what :func:`kept_account` gave."""
    if isinstance(aggregator, DeviceLevelPrivacy) and _ACCOUNT in kept:
        aggregator.accountant.load_state_dict(json.loads(kept[_ACCOUNT].tobytes()))


def example_statement(settings: FitSettings) -> str:
    """Say what DP-SGD on the device promises an example."""
    federated = settings.federated
    return (
        f"({federated.epsilon:g}, {federated.delta:g})-differentially private for each training "
        "example of a device over the whole run (DP-SGD on the device, noise keyed by the "
        "device's secret; add or remove one example). Not covered: the number of examples, "
        "seconds and memory, and what devices tell of their evaluation examples."
    )
