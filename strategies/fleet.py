"""The devices of a run: found, described, provisioned."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from privtune_flwr.bundle import Manifest, count_parts, read_parts
from privtune_flwr.config import RunSection
from privtune_flwr.errors import InvalidReplyError, RunError
from privtune_flwr.privacy.mods import in_simulation
from privtune_flwr.protocol import (
    DescribeRequest,
    ProvisionRequest,
    read_description,
    to_message,
)
from privtune_flwr.protocol.fit import JoinRequest
from privtune_flwr.protocol.requests import INQUIRY
from strategies.exchange import PROVISIONING, Exchange, failure

logger = logging.getLogger("privtune.cloud")

PART_BYTES = 64 * 2**20


@dataclass
class Fleet:
    """Usable devices, and those that are not with the reason.

    Attributes
    ----------
    nodes : dict
        Device id to Flower's node id in this run.
    train, evaluation : dict
        Device id to its number of examples.
    label_names : tuple of str
        Class names, the same on every device.
    refused, quarantined : dict
        Device (or node) to reason.
    """

    nodes: dict[str, int] = field(default_factory=dict)
    train: dict[str, int] = field(default_factory=dict)
    evaluation: dict[str, int] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)

    def drop(self, device: str, reason: str) -> None:
        """Take a device out of the run; what it sent before stays.

        A refusal is the device's own decision, everything else a fault; they are listed apart.
        """
        refused = reason.startswith("refused")
        (self.refused if refused else self.quarantined)[device] = reason
        self.nodes.pop(device, None)
        logger.warning("%s %s: %s", device, "refuses" if refused else "is quarantined", reason)

    def why_none(self) -> str:
        """Say why no device is usable."""
        reasons = sorted({*self.refused.values(), *self.quarantined.values()})
        return "; ".join(reasons[:5]) or "none of them holds a training example"

    def draw(self, fraction: float, seed: int, number: int) -> list[str]:
        """Draw devices that have training examples: a function of seed and round."""
        able = sorted(d for d in self.nodes if self.train[d])
        size = max(1, round(fraction * len(able)))
        if size >= len(able):
            return able
        rng = np.random.default_rng([seed, 3, number])
        return sorted(rng.choice(able, size=size, replace=False).tolist())


def wait_for_nodes(grid: Grid, run: RunSection) -> list[int]:
    """Wait until enough nodes are there and no more arrive.

    Raises
    ------
    RunError
        If fewer than ``run.min-devices`` came in ``run.wait`` seconds.
    """
    deadline = time.monotonic() + run.wait
    seen: list[int] = []
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= run.min_devices and nodes == seen:
            return nodes
        if time.monotonic() > deadline:
            raise RunError(
                f"{len(nodes)} devices after {run.wait:.0f} s, "
                f"run.min-devices = {run.min_devices}; are the SuperNodes connected?"
            )
        seen = nodes
        time.sleep(1.0)


def describe(
    nodes: list[int], request: DescribeRequest | JoinRequest, exchange: Exchange
) -> tuple[Fleet, dict[str, set[str]]]:
    """Ask every node what it holds and whether it accepts the run's terms.

    Returns
    -------
    fleet : Fleet
    held : dict
        Device id to the bundles it holds of those in the request.
    """
    fleet = Fleet()
    held: dict[str, set[str]] = {}
    replies = exchange.ask(to_message(request.to_content(), node, request.action) for node in nodes)
    # sorted by device, so that a conflict is settled the same way on every start
    described: list[tuple[str, int, dict[str, object]]] = []
    for node, reply in replies.items():
        if why := failure(reply):
            fleet.drop(f"node-{node}", why)
            continue
        assert reply is not None
        try:
            record = read_description(reply.content, request.run_id)
        except InvalidReplyError as error:
            fleet.quarantined[f"node-{node}"] = str(error)
            continue
        described.append((str(record["device_id"]), node, record))
    for device, node, record in sorted(described, key=lambda d: d[:2]):
        names = tuple(str(record["label_names"]).split("\n"))
        fleet.label_names = fleet.label_names or names
        if device in fleet.nodes:
            fleet.quarantined[f"node-{node}"] = f"a second device calls itself {device}"
        elif names != fleet.label_names:
            fleet.quarantined[device] = (
                f"{len(names)} label names that differ from the other devices'; set data.labels"
            )
        else:
            exchange.identify(node, device)
            fleet.nodes[device] = node
            fleet.train[device] = int(str(record["train_examples"]))
            fleet.evaluation[device] = int(str(record["eval_examples"]))
            held[device] = set(str(record["held"]).split(",")) - {""}
    return fleet, held


def provision(
    fleet: Fleet,
    held: Mapping[str, set[str]],
    bundle: tuple[Manifest, Path],
    run_id: str,
    exchange: Exchange,
) -> None:
    """Bring a bundle to every device that lacks it.

    Where devices share a disk (a simulation) one device is sent it first, then the others are
    asked: they hold it by now, and the bundle has crossed once. Real devices get each part at
    once: every further message is a new process on each of them.

    Parameters
    ----------
    fleet : Fleet
        Devices that do not take it in are dropped.
    held : Mapping
        As :func:`describe` gives it; empty where devices have not been asked.
    bundle : tuple
        Manifest and folder of its files.
    run_id : str
    exchange : Exchange
    """
    manifest, folder = bundle
    lacking = [d for d in fleet.nodes if manifest.id not in held.get(d, ())]
    if not lacking:
        return
    size = manifest.total_bytes / 2**20
    logger.info("provisioning %.0f MB to %d devices", size, len(lacking))
    parts = count_parts(manifest, PART_BYTES)
    sender = _Sender(fleet, exchange, run_id, manifest.to_json(), parts)
    with exchange.purpose(PROVISIONING):
        shared = in_simulation()
        waves = (lacking[:1], lacking[1:]) if shared else (lacking,)
        for wave in filter(None, waves):
            group = sender.send(wave, INQUIRY, b"") if shared or not held else wave
            for number, data in enumerate(read_parts(folder, manifest, PART_BYTES)):
                if not group:
                    break
                group = sender.send(group, number, data)
            for device in group:
                fleet.drop(device, "the provisioned bundle is still incomplete")


@dataclass(frozen=True)
class _Sender:
    fleet: Fleet
    exchange: Exchange
    run_id: str
    manifest: str
    parts: int

    def send(self, devices: list[str], part: int, data: bytes) -> list[str]:
        """Send one part to devices; return those that still lack the bundle."""
        request = ProvisionRequest(
            run_id=self.run_id, manifest=self.manifest, part=part, parts=self.parts
        )
        content = request.to_content_with(data)
        replies = self.exchange.ask(
            to_message(content, self.fleet.nodes[d], request.action) for d in devices
        )
        return _still_lacking(self.fleet, devices, replies)


def _still_lacking(
    fleet: Fleet, devices: list[str], replies: Mapping[int, Message | None]
) -> list[str]:
    lacking: list[str] = []
    for device in devices:
        reply = replies.get(fleet.nodes[device])
        if why := failure(reply):
            fleet.drop(device, why)
            continue
        assert reply is not None
        if not reply.content.metric_records["metrics"]["held"]:
            lacking.append(device)
    return lacking
