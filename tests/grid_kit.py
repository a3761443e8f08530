"""A whole federation in one process: a grid of real devices, and the cloud's side of split runs."""

from __future__ import annotations

from typing import Any

from device_kit import NONE, Device
from learned_kit import Wire

from privtune_flwr.bundle import Manifest
from privtune_flwr.cloud import CloudSide
from privtune_flwr.config import RunConfig, flatten, load_run_config
from privtune_flwr.models import CutModel
from privtune_flwr.privacy.registry import create_mechanism

# devices of a test that lets clean representations out, with labels, as often as asked
OPEN = {"policy_mechanisms": "none", "policy_releases_per_example": 0, "policy_fit_rounds": 1000}


def named(device: Device, number: int) -> Device:
    """Give a device a name and a secret that are the same in every run of the tests."""
    for name, value in (
        ("device-id", f"device-{number}".encode()),
        ("secret", bytes([number] * 32)),
    ):
        path = device.root / name
        path.write_bytes(value)
        path.chmod(0o600)
    return device


class DeviceGrid(Wire):
    """Devices by node number, all of them connected; counts messages by action and node."""

    def __init__(self, devices: dict[int, Device]) -> None:
        super().__init__(devices)
        self.log: list[tuple[int, str]] = []
        self.before = lambda node, message: self.log.append((node, message.metadata.message_type))

    def get_node_ids(self) -> list[int]:
        return list(self.devices)


def run_config(**values: Any) -> RunConfig:
    """A configuration from keys with two underscores for the dot."""
    flat = {key.replace("__", ".").replace("_", "-"): value for key, value in values.items()}
    return load_run_config(flatten(RunConfig()) | {"privacy.mechanism": "none"} | flat)


def split_cloud(config: RunConfig, model: CutModel, device: Device) -> CloudSide:
    """The cloud of a split run without perturbation; public text is not needed."""
    folder = device.bundles / device.bottom_id
    public: Any = None
    mechanism = create_mechanism(NONE, None)
    return CloudSide(config, model.bottom, [(Manifest.of(folder), folder)], NONE, mechanism, public)
