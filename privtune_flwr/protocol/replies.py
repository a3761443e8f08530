"""What a device answers, and the checks it must pass on both sides of the network.

The egress guard calls :func:`check_release` before a reply leaves, the cloud calls it again before
it touches a value. Shape legend: B sentences, N tokens of all of them, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from privtune_flwr.codec import get_codec
from privtune_flwr.errors import InvalidReplyError
from privtune_flwr.protocol.requests import SCHEMA_VERSION, ReleaseRequest

SMASHED = "smashed"
LABELS = "labels"
RELEASE_HEADER = "release"
METRICS = "metrics"
DEVICE = "device"
# between handler and privacy mod only; the guard refuses both
CLEAN = "clean"
DEVICE_ONLY = "device-only"

MARK = "mark"
HEADER_TYPES: dict[str, type] = {
    "schema": int,
    "run_id": str,
    "device_id": str,
    "split": str,
    "chunk": int,
    "epoch": int,
    "examples": int,
    "hidden": int,
    "mechanism": str,
    "wire": str,
}
DESCRIPTION_TYPES: dict[str, type] = {
    "schema": int,
    "run_id": str,
    "device_id": str,
    "train_examples": int,
    "eval_examples": int,
    "label_names": str,
    "held": str,
    "policy": str,
}
RELEASE_METRICS = (
    "seconds_bottom",
    "seconds_mechanism",
    "seconds_codec",
    "noise_norm_sum",
    "tokens",
    "eta_max",
    "new_releases",
    "spent_releases",
    "spent_max_per_example",
    "spent_eta_sum_max",
    "spent_eta_total_max",
    "spent_epsilon_total_max",
    "spent_delta_total_max",
    "spent_bits_total_max",
    "epsilon_max",
    "bits_max",
    "peak_memory_bytes",
)
EVALUATE_METRICS = ("examples", "correct", "loss_sum")
MAX_LABELS = 10_000
# npy header on top of the values
_ARRAY_OVERHEAD = 1024


@dataclass(frozen=True)
class ReceivedChunk:
    """A reply that passed every check, decoded.

    Attributes
    ----------
    rows_ND : float32 array (N, D)
    lengths_B : uint16 array (B,)
    labels_B : int32 array (B,) or None
    metrics : dict
        Counters and seconds, all finite.
    """

    rows_ND: npt.NDArray[np.float32]
    lengths_B: npt.NDArray[np.uint16]
    labels_B: npt.NDArray[np.int32] | None
    metrics: dict[str, float]


def require(condition: bool, reason: str) -> None:
    """Raise :class:`InvalidReplyError` with ``reason`` unless the condition holds."""
    if not condition:
        raise InvalidReplyError(reason)


def check_header(record: dict[str, Any], types: dict[str, type], name: str) -> None:
    """Check that a header has exactly the schema's keys, types and version."""
    require(set(record) == set(types), f"{name}: keys are not those of the schema")
    for key, kind in types.items():
        require(type(record[key]) is kind, f"{name}.{key}: wrong type")
        if kind is str:
            require(len(record[key]) <= 4096, f"{name}.{key}: too long")
    require(record["schema"] == SCHEMA_VERSION, f"{name}.schema: wrong version")


def check_answer(
    header: dict[str, Any], types: dict[str, type], name: str, *, run_id: str, number: int
) -> None:
    """Check that a header is of the schema, of this run and this round, and counts examples."""
    check_header(header, types, name)
    require(header["run_id"] == run_id, f"{name}.run_id: another run")
    require(header["round"] == number, f"{name}.round: another one")
    require(0 < int(header["examples"]) <= 10**9, f"{name}.examples: out of range")


def check_sender(record: ConfigRecord, name: str, *, device_id: str, examples: int) -> None:
    """Check that a header is of the device that was asked, for what it described."""
    require(record["device_id"] == device_id, f"{name}.device_id: another device")
    require(
        record["examples"] == examples,
        f"{name}.examples: not the number that the device described",
    )


def read_metrics(content: RecordDict, allowed: Collection[str]) -> dict[str, float]:
    """Read the metrics record: known names and finite numbers only.

    Raises
    ------
    InvalidReplyError
        Otherwise, or if the record is missing.
    """
    record = content.metric_records.get(METRICS)
    require(record is not None, "metrics: missing")
    assert record is not None
    require(set(record) <= set(allowed), "metrics: a name is not in the schema")
    values: dict[str, float] = {}
    for key, value in record.items():
        require(isinstance(value, int | float), f"metrics.{key}: not a number")
        assert isinstance(value, int | float)
        require(math.isfinite(value), f"metrics.{key}: not finite")
        values[key] = float(value)
    return values


def read_evaluation(content: RecordDict, examples: int) -> dict[str, float]:
    """Read the sums of one device's evaluation over its ``examples`` examples.

    Raises
    ------
    InvalidReplyError
        If a sum is missing or cannot be true.
    """
    require(set(content) == {METRICS}, f"records: must be {METRICS}")
    values = read_metrics(content, EVALUATE_METRICS)
    require(set(values) == set(EVALUATE_METRICS), "metrics: a sum is missing")
    require(values["examples"] == examples, f"metrics.examples: must be {examples}")
    require(0 <= values["correct"] <= examples, "metrics.correct: out of range")
    require(values["loss_sum"] >= 0, "metrics.loss_sum: negative")
    return values


def read_arrays(
    record: ArrayRecord, schema: Mapping[str, tuple[str, tuple[int, ...]]], name: str
) -> dict[str, npt.NDArray[Any]]:
    """Deserialise a record's arrays after checking what they claim, and again what they are.

    Raises
    ------
    InvalidReplyError
        On a missing or additional array, another dtype or shape, or more bytes than that takes.
    """
    require(set(record) == set(schema), f"{name}: arrays are not those of the schema")
    arrays: dict[str, npt.NDArray[Any]] = {}
    for key, (dtype, shape) in schema.items():
        array = record[key]
        require(array.dtype == dtype, f"{name}.{key}: wrong dtype, must be {dtype}")
        require(tuple(array.shape) == shape, f"{name}.{key}: wrong shape")
        # checked before a byte is parsed: an oversized blob is never expanded
        limit = math.prod(shape) * np.dtype(dtype).itemsize + _ARRAY_OVERHEAD
        require(len(array.data) <= limit, f"{name}.{key}: oversize")
        try:
            value = array.numpy()
        except Exception:  # a hostile header makes the parser fail in ways that are not documented
            raise InvalidReplyError(f"{name}.{key}: cannot be read") from None
        require(
            isinstance(value, np.ndarray) and str(value.dtype) == dtype and value.shape == shape,
            f"{name}.{key}: not what it claims",
        )
        arrays[key] = value
    return arrays


def check_release(
    content: RecordDict, request: ReleaseRequest, *, hidden: int, num_labels: int, marked: bool
) -> dict[str, npt.NDArray[Any]]:
    """Check a release against what was asked.

    Parameters
    ----------
    content : RecordDict
        The reply's content.
    request : ReleaseRequest
        What was asked.
    hidden : int
        Hidden size at the cut.
    num_labels : int
        Classes; labels must lie below.
    marked : bool
        On the device the header still bears the mechanism's mark; on the wire it must not.

    Returns
    -------
    dict of arrays
        The codec's arrays, ``lengths`` and, where asked for, ``labels``.

    Raises
    ------
    InvalidReplyError
        Naming the rule that is broken.
    """
    expected = {SMASHED, RELEASE_HEADER, METRICS}
    wants_labels = request.labels and request.split == "train"
    if wants_labels:
        expected.add(LABELS)
    require(set(content) == expected, f"records: must be {', '.join(sorted(expected))}")
    require(
        set(content.array_records) == expected & {SMASHED, LABELS}
        and set(content.config_records) == {RELEASE_HEADER},
        "records: of the wrong kind",
    )
    read_metrics(content, RELEASE_METRICS)
    header = dict(content.config_records[RELEASE_HEADER])
    if marked:
        require(isinstance(header.pop(MARK, None), bytes), f"{RELEASE_HEADER}.mark: missing")
    check_header(header, HEADER_TYPES, RELEASE_HEADER)
    require(header["run_id"] == request.run_id, f"{RELEASE_HEADER}.run_id: another run")
    asked = {"split": request.split, "chunk": request.chunk, "epoch": request.epoch}
    require(all(header[k] == v for k, v in asked.items()), "wrong chunk: not what was asked for")
    require(header["mechanism"] == request.spec.id, f"{RELEASE_HEADER}.mechanism: another one")
    require(header["wire"] == request.wire, f"{RELEASE_HEADER}.wire: another format")
    require(header["hidden"] == hidden, f"{RELEASE_HEADER}.hidden: must be {hidden}")
    examples = header["examples"]
    assert isinstance(examples, int)
    require(0 < examples <= request.chunk_size, f"{RELEASE_HEADER}.examples: out of range")
    return _read_payload(content, request, examples, hidden, num_labels if wants_labels else 0)


def _read_payload(
    content: RecordDict, request: ReleaseRequest, examples: int, hidden: int, num_labels: int
) -> dict[str, npt.NDArray[Any]]:
    smashed = content.array_records[SMASHED]
    require("lengths" in smashed, f"{SMASHED}.lengths: missing")
    lengths_schema = {"lengths": ("uint16", (examples,))}
    lengths_B = read_arrays(ArrayRecord({"lengths": smashed["lengths"]}), lengths_schema, SMASHED)[
        "lengths"
    ]
    require(
        bool(lengths_B.min() > 0) and int(lengths_B.max()) <= request.max_length,
        f"{SMASHED}.lengths: outside 1..{request.max_length}",
    )
    schema = get_codec(request.wire).schema(lengths_B, hidden) | lengths_schema
    arrays = read_arrays(smashed, schema, SMASHED)
    for key, value in arrays.items():
        if np.issubdtype(value.dtype, np.floating):
            require(bool(np.isfinite(value).all()), f"{SMASHED}.{key}: NaN or Inf")
    if num_labels:
        labels = read_arrays(
            content.array_records[LABELS], {"labels": ("int32", (examples,))}, LABELS
        )
        inside = (labels["labels"] >= 0) & (labels["labels"] < num_labels)
        require(bool(inside.all()), f"{LABELS}: outside 0..{num_labels - 1}")
        arrays |= labels
    return arrays


def read_release(
    content: RecordDict,
    request: ReleaseRequest,
    *,
    device_id: str,
    examples: int,
    hidden: int,
    num_labels: int,
) -> ReceivedChunk:
    """Validate and decode a release in the cloud.

    Parameters
    ----------
    content, request
        The reply's content and what was asked.
    device_id : str
        Who was asked.
    examples : int
        Examples that the device's own description promises for this chunk.
    hidden, num_labels : int
        As in :func:`check_release`.

    Raises
    ------
    InvalidReplyError
        The reason for the quarantine.
    """
    arrays = check_release(content, request, hidden=hidden, num_labels=num_labels, marked=False)
    header = content.config_records[RELEASE_HEADER]
    check_sender(header, RELEASE_HEADER, device_id=device_id, examples=examples)
    lengths_B = arrays.pop("lengths")
    labels_B = arrays.pop("labels", None)
    rows_ND = get_codec(request.wire).decode(arrays, lengths_B)
    # beyond half precision a row is absurd on any wire, and would make training overflow
    limit = np.finfo(np.float16).max
    require(bool((np.abs(rows_ND) <= limit).all()), f"{SMASHED}: NaN, Inf or above {limit:.4g}")
    return ReceivedChunk(rows_ND, lengths_B, labels_B, read_metrics(content, RELEASE_METRICS))


def read_description(content: RecordDict, run_id: str) -> dict[str, Any]:
    """Validate the reply to a describe request.

    Raises
    ------
    InvalidReplyError
        Naming what is wrong.
    """
    require(set(content) == {DEVICE}, f"records: must be {DEVICE}")
    require(set(content.config_records) == {DEVICE}, "records: of the wrong kind")
    record = dict(content.config_records[DEVICE])
    check_header(record, DESCRIPTION_TYPES, DEVICE)
    require(record["run_id"] == run_id, f"{DEVICE}.run_id: another run")
    for key in ("train_examples", "eval_examples"):
        value = record[key]
        assert isinstance(value, int)
        require(0 <= value <= 10**9, f"{DEVICE}.{key}: out of range")
    names = str(record["label_names"]).split("\n")
    require(2 <= len(names) <= MAX_LABELS, f"{DEVICE}.label_names: needs at least two classes")
    return record
