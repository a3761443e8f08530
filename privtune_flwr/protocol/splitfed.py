"""Messages of SplitFed: one a device and step; build and validate.

A round's first message brings the averaged bottom model, the following ones the gradients for the
rows that left before, the last one asks for the trained bottom model. Shape legend: B sentences of
a batch, N tokens of all of them, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from privtune_flwr.codec import Lengths, Rows, get_codec
from privtune_flwr.errors import InvalidReplyError, Refusal
from privtune_flwr.federated.methods import Schema
from privtune_flwr.federated.splitfed import DeviceBatch
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol.fit import ANSWER, ReceivedFit, _FitTerms
from privtune_flwr.protocol.replies import (
    LABELS,
    METRICS,
    SMASHED,
    check_header,
    read_arrays,
    read_metrics,
    require,
)
from privtune_flwr.protocol.requests import PAYLOAD, SCHEMA_VERSION
from privtune_flwr.protocol.updates import state_record

SPLITFED = "train.splitfed"
GRADIENTS = "gradients"
SPLITFED_HEADER = "splitfed"
HEADER_TYPES: dict[str, type] = {
    "schema": int,
    "run_id": str,
    "device_id": str,
    "settings": str,
    "split": str,
    "round": int,
    "step": int,
    "examples": int,
}
SPLITFED_METRICS = ("seconds_fit", "new_fits", "spent_fits", "peak_memory_bytes")
_MAX_COUNT = 10**6
# largest magnitude that gradients are scaled to for half precision: room below for small ones
_HALF_PEAK = 2.0**14


@dataclass(frozen=True, kw_only=True)
class SplitFedRequest(_FitTerms):
    """Ask for one batch's rows, or for the bottom model at the end of a round.

    ``split`` is ``train`` (``step`` counts messages of the round from 1) or ``eval`` (``step``
    counts chunks of ``batch`` evaluation examples from 1; the state comes with each). ``steps`` is
    the number of batches of the device that has most of them: it sets the schedule.
    """

    action: ClassVar[str] = SPLITFED
    labels: str
    wire: str
    split: str
    round: int
    step: int
    steps: int
    batch: int

    @classmethod
    def from_content(cls, content: RecordDict) -> Self:
        """Read a request on the device; a :class:`Refusal` names a wrong field."""
        request = super().from_content(content)
        for name in ("round", "step", "steps", "batch"):
            if not 1 <= getattr(request, name) <= _MAX_COUNT:
                raise Refusal(f"request.{name}: allowed: 1 to {_MAX_COUNT}")
        if request.split not in ("train", "eval"):
            raise Refusal(f"request.split = {request.split!r}: allowed: train, eval")
        settings = request.fit_settings
        if settings.train.strategy != "splitfed":
            raise Refusal("request.settings: train.strategy must be splitfed")
        if request.round > settings.rounds:
            raise Refusal(f"request.round = {request.round}: allowed: 1 to {settings.rounds}")
        try:
            get_codec(request.wire)
        except Exception:
            raise Refusal("request.wire: no such format") from None
        return request

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(self.labels.split("\n"))

    def to_content_with(
        self, state: State | None = None, gradient_ND: Rows | None = None
    ) -> RecordDict:
        """Build the content with the averaged state, or with gradients for the last rows."""
        content = self.to_content()
        if state is not None:
            content[PAYLOAD] = state_record(state)
        if gradient_ND is not None:
            content[GRADIENTS] = gradient_record(gradient_ND, self.wire)
        return content


def gradient_record(gradient_ND: Rows, wire: str) -> ArrayRecord:
    """Put gradients on the wire: as they are, or in half precision times one scale.

    Gradients of single tokens are far below what half precision can hold; a power of two moves
    them there without rounding of its own.
    """
    if wire.startswith("float32"):
        return ArrayRecord({"values": Array(np.ascontiguousarray(gradient_ND, np.float32))})
    peak = float(np.abs(gradient_ND).max(initial=0.0))
    scale = np.float32(2.0 ** np.floor(np.log2(_HALF_PEAK / peak)) if peak > 0 else 1.0)
    return ArrayRecord(
        {
            "values": Array((gradient_ND * scale).astype(np.float16)),
            "scale": Array(np.array([scale], dtype=np.float32)),
        }
    )


def read_gradients(content: RecordDict, shape: tuple[int, int], wire: str) -> Rows:
    """Read the gradients for rows of this shape; on the device, which trusts none of it.

    Raises
    ------
    Refusal
        If they are missing, of another shape or dtype, or not finite.
    """
    try:
        record = content.array_records.get(GRADIENTS)
        require(record is not None, f"{GRADIENTS}: missing")
        assert record is not None
        half = not wire.startswith("float32")
        schema: Schema = {"values": ("float16" if half else "float32", shape)}
        if half:
            schema["scale"] = ("float32", (1,))
        arrays = read_arrays(record, schema, GRADIENTS)
        values_ND: Rows = arrays["values"].astype(np.float32)
        if half:
            scale = float(arrays["scale"][0])
            require(np.isfinite(scale) and scale > 0, f"{GRADIENTS}.scale: must be above 0")
            with np.errstate(over="ignore"):
                values_ND = values_ND / np.float32(scale)
        require(bool(np.isfinite(values_ND).all()), f"{GRADIENTS}.values: NaN or Inf")
    except InvalidReplyError as error:
        raise Refusal(f"request.{error}") from None
    return values_ND


# --------------------------------------------------------------------------------------- replies


def reply_header(request: SplitFedRequest, device_id: str, examples: int) -> ConfigRecord:
    """Build a reply's header: ``examples`` sentences in it, or behind the bottom model."""
    return ConfigRecord(
        {
            "schema": SCHEMA_VERSION,
            "run_id": request.run_id,
            "device_id": device_id,
            "settings": request.fit_settings.id,
            "split": request.split,
            "round": request.round,
            "step": request.step,
            "examples": examples,
        }
    )


def rows_reply(
    request: SplitFedRequest,
    rows_ND: Rows,
    lengths_B: Lengths,
    labels_B: NDArray[np.int32] | None,
    *,
    device_id: str,
    metrics: Mapping[str, float],
) -> RecordDict:
    """Build the answer that carries a batch's rows, with labels where they train."""
    arrays = {**get_codec(request.wire).encode(rows_ND, lengths_B), "lengths": lengths_B}
    content = RecordDict(
        {
            SMASHED: ArrayRecord({name: Array(value) for name, value in arrays.items()}),
            SPLITFED_HEADER: reply_header(request, device_id, len(lengths_B)),
            METRICS: MetricRecord({**metrics}),
        }
    )
    if labels_B is not None:
        content[LABELS] = ArrayRecord({LABELS: Array(labels_B)})
    return content


def state_reply(
    request: SplitFedRequest,
    state: State,
    *,
    device_id: str,
    examples: int,
    metrics: Mapping[str, float],
) -> RecordDict:
    """Build the answer that ends a round: the trained bottom model, ``examples`` behind it."""
    return RecordDict(
        {
            ANSWER: state_record(state),
            SPLITFED_HEADER: reply_header(request, device_id, examples),
            METRICS: MetricRecord({**metrics}),
        }
    )


def _check_frame(content: RecordDict, request: SplitFedRequest, arrays: set[str]) -> int:
    """Check records, metrics and header; give the number of examples."""
    expected = arrays | {SPLITFED_HEADER, METRICS}
    require(set(content) == expected, f"records: must be {', '.join(sorted(expected))}")
    require(
        set(content.array_records) == arrays and set(content.config_records) == {SPLITFED_HEADER},
        "records: of the wrong kind",
    )
    read_metrics(content, SPLITFED_METRICS)
    header = dict(content.config_records[SPLITFED_HEADER])
    check_header(header, HEADER_TYPES, SPLITFED_HEADER)
    wanted = dict(reply_header(request, "", 0))
    for key in ("run_id", "settings", "split", "round", "step"):
        require(header[key] == wanted[key], f"{SPLITFED_HEADER}.{key}: not what was asked for")
    examples = int(str(header["examples"]))
    require(0 < examples <= 10**9, f"{SPLITFED_HEADER}.examples: out of range")
    return examples


def check_rows(
    content: RecordDict, request: SplitFedRequest, *, hidden: int, num_labels: int
) -> dict[str, NDArray[Any]]:
    """Check a batch's rows, on either side of the network.

    Returns
    -------
    dict of arrays
        The codec's, ``lengths``, and ``labels`` where they train.

    Raises
    ------
    InvalidReplyError
        Naming the rule that is broken.
    """
    trains = request.split == "train"
    examples = _check_frame(content, request, {SMASHED, LABELS} if trains else {SMASHED})
    require(examples <= request.batch, f"{SPLITFED_HEADER}.examples: more than asked for")
    smashed = content.array_records[SMASHED]
    require("lengths" in smashed, f"{SMASHED}.lengths: missing")
    schema: Schema = {"lengths": ("uint16", (examples,))}
    lengths_B = read_arrays(ArrayRecord({"lengths": smashed["lengths"]}), schema, SMASHED)[
        "lengths"
    ]
    longest = request.fit_settings.model.max_length
    require(
        bool(lengths_B.min() > 0) and int(lengths_B.max()) <= longest,
        f"{SMASHED}.lengths: outside 1..{longest}",
    )
    arrays = read_arrays(
        smashed, get_codec(request.wire).schema(lengths_B, hidden) | schema, SMASHED
    )
    for key, value in arrays.items():
        if np.issubdtype(value.dtype, np.floating):
            require(bool(np.isfinite(value).all()), f"{SMASHED}.{key}: NaN or Inf")
    if trains:
        labels = read_arrays(
            content.array_records[LABELS], {LABELS: ("int32", (examples,))}, LABELS
        )
        inside = (labels[LABELS] >= 0) & (labels[LABELS] < num_labels)
        require(bool(inside.all()), f"{LABELS}: outside 0..{num_labels - 1}")
        arrays |= labels
    return arrays


def check_state(content: RecordDict, request: SplitFedRequest, schema: Schema) -> State:
    """Check a trained bottom model, on either side of the network.

    Raises
    ------
    InvalidReplyError
        Naming the rule that is broken.
    """
    _check_frame(content, request, {ANSWER})
    arrays = read_arrays(content.array_records[ANSWER], schema, ANSWER)
    for name, value in arrays.items():
        require(bool(np.isfinite(value).all()), f"{ANSWER}.{name}: NaN or Inf")
    return arrays


def _check_sender(content: RecordDict, device_id: str, examples: int | None) -> None:
    header = content.config_records[SPLITFED_HEADER]
    require(header["device_id"] == device_id, f"{SPLITFED_HEADER}.device_id: another device")
    require(
        examples is None or header["examples"] == examples,
        f"{SPLITFED_HEADER}.examples: not the number that the device described",
    )


def read_rows(
    content: RecordDict,
    request: SplitFedRequest,
    *,
    device_id: str,
    examples: int | None,
    hidden: int,
    num_labels: int,
) -> tuple[DeviceBatch, dict[str, float]]:
    """Validate and decode a batch in the cloud; labels are -1 where none came.

    Which of a device's batches is the smaller one is its own draw: ``examples`` is None there.

    Raises
    ------
    InvalidReplyError
        The reason for the quarantine.
    """
    arrays = check_rows(content, request, hidden=hidden, num_labels=num_labels)
    _check_sender(content, device_id, examples)
    lengths_B = arrays.pop("lengths")
    labels_B = arrays.pop(LABELS, np.full(len(lengths_B), -1, dtype=np.int32))
    rows_ND = get_codec(request.wire).decode(arrays, lengths_B)
    limit = np.finfo(np.float16).max
    require(bool((np.abs(rows_ND) <= limit).all()), f"{SMASHED}: NaN, Inf or above {limit:.4g}")
    return DeviceBatch(rows_ND, lengths_B, labels_B), read_metrics(content, SPLITFED_METRICS)


def read_bottom(
    content: RecordDict, request: SplitFedRequest, schema: Schema, *, device_id: str, examples: int
) -> ReceivedFit:
    """Validate a trained bottom model in the cloud; its weight in the mean is ``examples``.

    Raises
    ------
    InvalidReplyError
        The reason for the quarantine.
    """
    arrays = check_state(content, request, schema)
    _check_sender(content, device_id, examples)
    metrics = read_metrics(content, SPLITFED_METRICS)
    return ReceivedFit(arrays, examples, metrics | {"weight": float(examples)})
