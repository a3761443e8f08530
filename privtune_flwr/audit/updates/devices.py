"""What simulated devices held: the text that attacks on a run are judged by."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from privtune_flwr.config import RunConfig
from privtune_flwr.device import Holdings, open_holdings, open_home, simulated_root
from privtune_flwr.privacy.keyed import keyed_generator


@dataclass(frozen=True)
class Device:
    """A simulated device's text, and the seed of its batches."""

    name: str
    holdings: Holdings
    seed: int


def held_by(config: RunConfig, names: Sequence[str], devices: int) -> list[Device]:
    """Give the text of a simulation's first devices that hold any."""
    run_id = uuid.uuid4().hex
    found: list[Device] = []
    try:
        for name in names:
            if len(found) == devices:
                break
            node: dict[str, Any] = {
                "partition-id": int(name.removeprefix("device-")),
                "num-partitions": len(names),
            }
            home = open_home(node, run_id=run_id, simulated=True, seed=config.run.seed)
            holdings = open_holdings(config, node, home)
            seed = int.from_bytes(keyed_generator(home.derive("order"), "audit").bytes(7), "big")
            if holdings.train.texts:
                found.append(Device(name, holdings, seed))
    finally:
        shutil.rmtree(simulated_root(run_id), ignore_errors=True)
    return found
