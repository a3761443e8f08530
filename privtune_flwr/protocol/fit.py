"""Messages of the federated baselines: join, fit, evaluate; build and validate.

Flower's own strategies put their numbers into the request's record under names of their own
(``server-round``, ``proximal-mu``, ``clipping_norm``); :class:`FitRequest` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from privtune_flwr.errors import Refusal
from privtune_flwr.federated.methods import Schema
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol.replies import (
    METRICS,
    check_answer,
    check_sender,
    read_arrays,
    read_metrics,
    require,
)
from privtune_flwr.protocol.requests import PAYLOAD, REQUEST, SCHEMA_VERSION, _Request
from privtune_flwr.protocol.updates import state_record

JOIN = "query.join"
FIT = "train.fit"
JUDGE = "evaluate.judge"
FIT_HEADER = "fit"
ANSWER = "answer"
#: How Flower's strategies and our requests call the same thing.
FLOWER_NAMES = {
    "server-round": "round",
    "proximal-mu": "proximal_mu",
    "clipping_norm": "clip",
}
HEADER_TYPES: dict[str, type] = {
    "schema": int,
    "run_id": str,
    "device_id": str,
    "round": int,
    "examples": int,
    "settings": str,
}
# what a round may say of the device's text; left out where noise is to protect that text
TEXT_METRICS = ("loss_sum", "correct", "seen")
FIT_METRICS = (
    *TEXT_METRICS,
    "weight",
    "steps",
    "seconds_fit",
    "epsilon",
    "delta",
    "new_fits",
    "spent_fits",
    "peak_memory_bytes",
)
_MAX_LABEL_CHARACTERS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class _FitTerms(_Request):
    """What every message of a baseline says: which model, which settings."""

    model_id: str
    settings: str

    @property
    def fit_settings(self) -> FitSettings:
        """The settings, parsed and bounded; a :class:`Refusal` names a wrong one."""
        return FitSettings.from_json(self.settings)


@dataclass(frozen=True, kw_only=True)
class JoinRequest(_FitTerms):
    """Ask for counts, and announce the terms so that a refusal comes before any work."""

    action: ClassVar[str] = JOIN
    bundles: str


@dataclass(frozen=True, kw_only=True)
class FitRequest(_FitTerms):
    """Ask for one round's work; the state is the payload.

    ``public_id`` is the bundle with what else a method needs, or empty. ``clip`` bounds the L2
    norm of the change; 0 = none.
    """

    action: ClassVar[str] = FIT
    public_id: str
    labels: str
    round: int = 0
    proximal_mu: float = 0.0
    clip: float = 0.0

    @classmethod
    def from_content(cls, content: RecordDict) -> Self:
        """Read a request on the device; Flower's names count as ours.

        Raises
        ------
        Refusal
            Naming the field.
        """
        record = dict(content.config_records.get(REQUEST, ConfigRecord()))
        named: dict[str, Any] = {}
        for name, value in record.items():
            named[FLOWER_NAMES.get(name, name)] = value
        for field in fields(cls):
            if field.name in FLOWER_NAMES.values():
                named.setdefault(field.name, field.default)
        request = super().from_content(RecordDict({REQUEST: ConfigRecord(named)}))
        if not 1 <= request.round <= 10**6:
            raise Refusal(f"request.round = {request.round}: allowed: 1 to {10**6}")
        for name in ("proximal_mu", "clip"):
            if not 0 <= getattr(request, name) < math.inf:
                raise Refusal(f"request.{name}: must be at least 0 and finite")
        if len(request.labels) > _MAX_LABEL_CHARACTERS:
            raise Refusal("request.labels: too long")
        return request

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(self.labels.split("\n"))

    def to_record(self) -> ConfigRecord:
        """Build the record that Flower's strategies add their numbers to."""
        ours = set(FLOWER_NAMES.values())
        return ConfigRecord(
            {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ours}
        )


@dataclass(frozen=True, kw_only=True)
class JudgeRequest(_FitTerms):
    """Ask for sums over the evaluation examples, of the model whose state is the payload."""

    action: ClassVar[str] = JUDGE
    labels: str

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(self.labels.split("\n"))

    def to_content_with(self, state: State) -> RecordDict:
        """Build the content with the state."""
        content = self.to_content()
        content[PAYLOAD] = state_record(state)
        return content


@dataclass(frozen=True)
class ReceivedFit:
    """A device's answer that passed every check.

    Attributes
    ----------
    arrays : dict
        As the method's schema promises.
    examples : int
        Training examples behind it.
    metrics : dict
        Sums and seconds, all finite.
    """

    arrays: State
    examples: int
    metrics: dict[str, float]


def fit_reply(
    arrays: Mapping[str, Any],
    metrics: Mapping[str, float],
    *,
    run_id: str,
    device_id: str,
    round_number: int,
    examples: int,
    settings_id: str,
) -> RecordDict:
    """Build a device's answer."""
    from flwr.app import MetricRecord

    header = ConfigRecord(
        {
            "schema": SCHEMA_VERSION,
            "run_id": run_id,
            "device_id": device_id,
            "round": round_number,
            "examples": examples,
            "settings": settings_id,
        }
    )
    record = ArrayRecord(
        {n: Array(np.ascontiguousarray(arrays[n], dtype=np.float32)) for n in sorted(arrays)}
    )
    return RecordDict({ANSWER: record, FIT_HEADER: header, METRICS: MetricRecord({**metrics})})


def check_fit(content: RecordDict, request: FitRequest, schema: Schema) -> State:
    """Check an answer against what was asked, on either side of the network.

    Raises
    ------
    InvalidReplyError
        Naming the rule that is broken.
    """
    expected = {ANSWER, FIT_HEADER, METRICS}
    require(set(content) == expected, f"records: must be {', '.join(sorted(expected))}")
    require(
        set(content.array_records) == {ANSWER} and set(content.config_records) == {FIT_HEADER},
        "records: of the wrong kind",
    )
    metrics = read_metrics(content, FIT_METRICS)
    settings = request.fit_settings
    if settings.epsilon is not None or request.clip > 0:
        require(
            not set(metrics) & set(TEXT_METRICS),
            "metrics: a sum over the text has no noise, where noise was asked for",
        )
    header = dict(content.config_records[FIT_HEADER])
    check_answer(header, HEADER_TYPES, FIT_HEADER, run_id=request.run_id, number=request.round)
    require(header["settings"] == settings.id, f"{FIT_HEADER}.settings: others")
    arrays = read_arrays(content.array_records[ANSWER], schema, ANSWER)
    for name, value in arrays.items():
        require(bool(np.isfinite(value).all()), f"{ANSWER}.{name}: NaN or Inf")
    return arrays


def read_fit(
    content: RecordDict, request: FitRequest, schema: Schema, *, device_id: str, examples: int
) -> ReceivedFit:
    """Validate an answer in the cloud.

    Parameters
    ----------
    content, request, schema
        As in :func:`check_fit`.
    device_id : str
        Who was asked.
    examples : int
        Training examples that the device described.

    Raises
    ------
    InvalidReplyError
        The reason for the quarantine.
    """
    arrays = check_fit(content, request, schema)
    header = content.config_records[FIT_HEADER]
    check_sender(header, FIT_HEADER, device_id=device_id, examples=examples)
    metrics = read_metrics(content, FIT_METRICS)
    # a device must not choose how much it counts
    weight = 1.0 if request.clip > 0 else float(examples)
    require(metrics.get("weight") == weight, "metrics.weight: not what the answer counts for")
    return ReceivedFit(arrays, examples, metrics)
