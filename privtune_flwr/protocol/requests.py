"""What the cloud asks of a device: one frozen dataclass an action."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import recorddict_to_proto

from privtune_flwr.errors import Refusal
from privtune_flwr.privacy.base import MechanismSpec

SCHEMA_VERSION = 1
DESCRIBE = "query.describe"
PROVISION = "query.provision"
LEARN = "train.learn"
RELEASE = "train.release"
EVALUATE = "evaluate.default"
REQUEST = "request"
PAYLOAD = "payload"
# a part number that brings nothing and only asks whether the bundle is held
INQUIRY = -1


@dataclass(frozen=True, kw_only=True)
class _Request:
    """Scalars that travel in one ConfigRecord; every request carries the run and the schema."""

    action: ClassVar[str]
    run_id: str
    schema: int = SCHEMA_VERSION

    def to_content(self) -> RecordDict:
        """Build the message's content."""
        record = ConfigRecord({f.name: getattr(self, f.name) for f in fields(self)})
        return RecordDict({REQUEST: record})

    @classmethod
    def from_content(cls, content: RecordDict) -> Self:
        """Read a request on the device.

        Raises
        ------
        Refusal
            Naming the field, if one is missing, unknown or of the wrong type, or if the schema's
            version is another.
        """
        record: dict[str, Any] = dict(content.config_records.get(REQUEST, ConfigRecord()))
        known = {f.name: f for f in fields(cls)}
        for name in record:
            if name not in known:
                raise Refusal(f"request.{name}: unknown; allowed: {', '.join(known)}")
        for name, field in known.items():
            if name not in record:
                raise Refusal(f"request.{name}: missing")
            if type(record[name]).__name__ != field.type:
                raise Refusal(f"request.{name}: must be of type {field.type}")
        if record["schema"] != SCHEMA_VERSION:
            raise Refusal(f"request.schema = {record['schema']}: allowed: {SCHEMA_VERSION}")
        return cls(**record)


@dataclass(frozen=True, kw_only=True)
class _Terms(_Request):
    """What a run asks of a device's privacy; checked against the policy in every message."""

    bottom_id: str
    mechanism: str
    labels: bool
    epochs: int

    @property
    def spec(self) -> MechanismSpec:
        """The mechanism's specification, parsed."""
        return MechanismSpec.from_json(self.mechanism)


@dataclass(frozen=True, kw_only=True)
class DescribeRequest(_Terms):
    """Ask for counts, and announce the terms so that a refusal comes before any work.

    ``bundles`` are the ids, joined by commas, of which the device says whether it holds them;
    ``epochs`` the distinct releases of each example that the run will ask for; ``learning_rounds``
    the updates before them, 0 where nothing is (still) to be learned, with ``clip`` and ``noise``
    as in :class:`LearnRequest`.
    """

    action: ClassVar[str] = DESCRIBE
    bundles: str
    learning_rounds: int = 0
    clip: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ProvisionRequest(_Request):
    """One part of a bundle; its bytes are in the payload record."""

    action: ClassVar[str] = PROVISION
    manifest: str
    part: int
    parts: int

    def to_content_with(self, data: bytes) -> RecordDict:
        """Build the content with this part's bytes."""
        content = self.to_content()
        content[PAYLOAD] = ArrayRecord({"data": Array(np.frombuffer(data, dtype=np.uint8))})
        return content


@dataclass(frozen=True, kw_only=True)
class LearnRequest(_Terms):
    """Ask for one update of a mechanism that is still to be learned; the state is the payload.

    ``mechanism`` is the draft. An update has an L2 norm of at most ``clip`` (0 = any), and the
    device adds Gaussian noise of standard deviation ``noise * clip`` to each of its numbers.
    """

    action: ClassVar[str] = LEARN
    round: int
    rounds: int
    clip: float
    noise: float
    max_length: int
    num_labels: int

    def check(self) -> None:
        """Refuse numbers that make no sense.

        Raises
        ------
        Refusal
            Naming the field.
        """
        if not 1 <= self.round <= self.rounds:
            raise Refusal(f"request.round = {self.round}: allowed: 1 to {self.rounds}")
        for name, value in (("clip", self.clip), ("noise", self.noise)):
            if not 0 <= value < math.inf:
                raise Refusal(f"request.{name} = {value}: must be at least 0 and finite")
        if self.noise > 0 and self.clip == 0:
            raise Refusal("request.noise: is in units of clip, which must then be above 0")
        if not 4 <= self.max_length <= 2**16 - 1:
            raise Refusal(f"request.max_length = {self.max_length}: allowed: 4 to {2**16 - 1}")

    @property
    def learn_key(self) -> str:
        """What a learning phase is about: model, draft, cut-off. Keys noise and ledger."""
        return f"{self.bottom_id}/{self.spec.id}/{self.max_length}"


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest(_Terms):
    """Ask for one chunk of one split, perturbed.

    ``epoch`` distinguishes deliberate fresh releases (``release-policy = per-epoch``); with the
    policy ``once`` it is always 0, so that every retry draws the same noise.
    """

    action: ClassVar[str] = RELEASE
    split: str
    chunk: int
    chunk_size: int
    epoch: int
    wire: str
    max_length: int

    @property
    def release_key(self) -> str:
        """What makes a release distinct: model, mechanism, cut-off, epoch. Keys noise and ledger.

        The cut-off is part of it: another one gives another sentence and so independent noise,
        which must count as a release of its own. The wire format is not: it rounds what the
        mechanism has already made.
        """
        return f"{self.bottom_id}/{self.spec.id}/{self.max_length}/{self.epoch}"


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(_Request):
    """Ask for metrics of the top model's logits, one row for each evaluation example."""

    action: ClassVar[str] = EVALUATE
    split: str
    examples: int

    def to_content_with(self, logits_BC: npt.NDArray[np.float32]) -> RecordDict:
        """Build the content with the logits."""
        content = self.to_content()
        content[PAYLOAD] = ArrayRecord({"logits": Array(logits_BC)})
        return content


def to_message(content: RecordDict, node_id: int, action: str) -> Message:
    """Wrap content as a Flower message to one node."""
    return Message(content, dst_node_id=node_id, message_type=action)


def wire_bytes(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serialises it."""
    return int(recorddict_to_proto(content).ByteSize())
