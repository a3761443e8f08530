"""What a device says of itself before any work: counts, classes, what it holds, its bounds."""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, RecordDict

from privtune_flwr.device import DeviceHome, Holdings
from privtune_flwr.protocol import SCHEMA_VERSION, DescribeRequest
from privtune_flwr.protocol.fit import JoinRequest
from privtune_flwr.protocol.replies import DEVICE


def description(
    message: Message, request: DescribeRequest | JoinRequest, home: DeviceHome, holdings: Holdings
) -> Message:
    """Build the reply to a request whose terms the device accepts."""
    record = ConfigRecord(
        {
            "schema": SCHEMA_VERSION,
            "run_id": request.run_id,
            "device_id": home.device_id,
            "train_examples": len(holdings.train.texts),
            "eval_examples": len(holdings.evaluation.texts),
            "label_names": "\n".join(holdings.label_names),
            "held": ",".join(b for b in request.bundles.split(",") if b and home.bundles.holds(b)),
            "policy": home.policy.public_json(),
        }
    )
    return Message(RecordDict({DEVICE: record}), reply_to=message)
