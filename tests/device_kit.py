"""A real device without a network: its home, and messages as Flower would hand them over."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from privtune_flwr import client_app
from privtune_flwr.config import RunConfig, flatten, load_run_config
from privtune_flwr.data import tokenise
from privtune_flwr.device import DeviceHome, Holdings, open_holdings, open_home
from privtune_flwr.models import BottomModel, load_tokenizer
from privtune_flwr.privacy.base import MechanismSpec
from privtune_flwr.protocol import SMASHED, ReleaseRequest

RUN_ID = "ab" * 16
HIDDEN = 384
DCHI = MechanismSpec("dchi", {"eta": 50.0, "dimension": HIDDEN, "unit": 1.0})
NONE = MechanismSpec("none")


def message_to(content: RecordDict, action: str) -> Message:
    """A message as a node receives it: with an id, so that it can be replied to."""
    metadata = Metadata(
        run_id=1,
        message_id="asked",
        src_node_id=0,
        dst_node_id=1,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=1e12,
        message_type=action,
    )
    return Message(content=content, metadata=metadata)


def wire_copy(content: RecordDict) -> RecordDict:
    """What arrives at the other end."""
    return recorddict_from_proto(recorddict_to_proto(content))


def wire_bytes_of(reply: Message) -> bytes:
    """All bytes of a reply, and its error's text."""
    if reply.has_error():
        return repr((reply.error.code, reply.error.reason)).encode()
    return recorddict_to_proto(reply.content).SerializeToString(deterministic=True)


def released_rows(reply: Message) -> np.ndarray:
    """The rows of a release."""
    assert reply.has_content(), reply.error
    return reply.content.array_records[SMASHED]["values"].numpy()


def array_bytes(content: RecordDict, record: str) -> bytes:
    part = RecordDict({record: content[record]})
    return recorddict_to_proto(part).SerializeToString(deterministic=True)


@dataclass
class Device:
    """One device; ``bundles`` holds the bottom model ``bottom_id``."""

    root: Path
    bundles: Path
    bottom_id: str
    node_config: dict[str, Any] = field(default_factory=dict)
    run_config: dict[str, Any] = field(default_factory=dict)
    state: RecordDict = field(default_factory=RecordDict)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if not (self.root / "bundles").exists():
            (self.root / "bundles").symlink_to(self.bundles)
        base = {"device-home": str(self.root), "partition-id": 0, "num-partitions": 10}
        self.node_config = base | {"policy-share-labels": True} | self.node_config
        self.run_config = flatten(RunConfig()) | self.run_config

    @property
    def home(self) -> DeviceHome:
        return open_home(self.node_config, run_id=RUN_ID, simulated=False, seed=0)

    @property
    def holdings(self) -> Holdings:
        return open_holdings(load_run_config(self.run_config), self.node_config, self.home)

    def request(self, **changes: Any) -> ReleaseRequest:
        spec = changes.pop("spec", DCHI)
        values: dict[str, Any] = {
            "run_id": RUN_ID,
            "bottom_id": self.bottom_id,
            "mechanism": spec.to_json(),
            "labels": True,
            "epochs": 1,
            "split": "train",
            "chunk": 0,
            "chunk_size": 4,
            "epoch": 0,
            "wire": "float32",
            "max_length": 128,
        }
        return ReleaseRequest(**values | changes)

    def ask(self, request: Any, app: ClientApp = client_app.app) -> Message:
        return self.send(request.to_content(), request.action, app)

    def send(self, content: RecordDict, action: str, app: ClientApp = client_app.app) -> Message:
        context = Context(
            run_id=1,
            node_id=1,
            node_config=self.node_config,
            state=self.state,
            run_config=self.run_config,
        )
        return app(message_to(wire_copy(content), action), context)


def clean_rows(device: Device) -> np.ndarray:
    """Rows of a device's first chunk of four sentences, as no mechanism changed them."""
    folder = device.bundles / device.bottom_id
    ids = tokenise(load_tokenizer(folder), device.holdings.chunk("train", 0, 4).texts, 128)
    return np.concatenate(BottomModel.load(folder).encode(ids))
