"""Replies as the cloud reads them: one valid release of the real app, then one fault at a time."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_kit import HIDDEN, NONE, RUN_ID, Device, wire_copy
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from privtune_flwr.errors import InvalidReplyError, Refusal
from privtune_flwr.protocol import (
    LABELS,
    METRICS,
    RELEASE_HEADER,
    SMASHED,
    DescribeRequest,
    ReleaseRequest,
    read_description,
    read_metrics,
    read_release,
)
from privtune_flwr.protocol.replies import DEVICE

pytestmark = pytest.mark.usefixtures("one_torch_thread")
NUMPY = "numpy.ndarray"


@pytest.fixture(scope="module")
def device(make_device: Callable[..., Device]) -> Device:
    return make_device(policy_releases_per_example=0)


@pytest.fixture(scope="module")
def release(device: Device) -> tuple[ReleaseRequest, RecordDict]:
    request = device.request()
    return request, device.ask(request).content


def read(device: Device, request: ReleaseRequest, content: RecordDict, **changes: Any) -> Any:
    known = {"device_id": device.home.device_id, "examples": 4, "hidden": HIDDEN, "num_labels": 2}
    return read_release(wire_copy(content), request, **known | changes)


def blob(value: np.ndarray, data: bytes | None = None) -> Array:
    """An array record that claims to be ``value`` and holds ``data``."""
    honest = Array(value)
    return Array(honest.dtype, honest.shape, NUMPY, honest.data if data is None else data)


def npy(value: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, value, allow_pickle=True)
    return out.getvalue()


def npz(value: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, value)
    return out.getvalue()


def npy_with_header(text: str) -> bytes:
    header = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def values_of(content: RecordDict) -> np.ndarray:
    return content.array_records[SMASHED]["values"].numpy().copy()


def change_value(number: float) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        values = values_of(content)
        values[3, 5] = number
        content.array_records[SMASHED]["values"] = Array(values)

    return change


def change_values(make: Callable[[np.ndarray], Array]) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content.array_records[SMASHED]["values"] = make(values_of(content))

    return change


def change_length(number: int) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        lengths = content.array_records[SMASHED]["lengths"].numpy().copy()
        lengths[0] = number
        content.array_records[SMASHED]["lengths"] = Array(lengths)

    return change


def change_header(**values: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.config_records[RELEASE_HEADER].update(values)


def change_metric(name: str, value: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.metric_records[METRICS].update({name: value})


def put_labels(values: list[int], dtype: str = "int32") -> Callable[[RecordDict], None]:
    record = ArrayRecord({"labels": Array(np.array(values, dtype=dtype))})
    return lambda content: content.update({LABELS: record})


def drop(name: str) -> Callable[[RecordDict], None]:
    return lambda content: content.__delitem__(name)


def extra_array(content: RecordDict) -> None:
    content.array_records[SMASHED]["more"] = Array(np.zeros(4, np.float32))


def drop_lengths(content: RecordDict) -> None:
    del content.array_records[SMASHED]["lengths"]


def drop_header_key(content: RecordDict) -> None:
    del content.config_records[RELEASE_HEADER]["wire"]


HUGE = npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**9, 10**9), }")
HUGE_LITERAL = npy_with_header(
    "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 384), }"
)
LONG = npy_with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**30}, 384), }}")
UNTERMINATED = npy_with_header("{'descr': '<f4', 'shape': (")
TINY = np.zeros((3, HIDDEN), np.float32)

FAULTS: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "bad shape": (change_values(lambda v: Array(v[:-1])), "smashed.values: wrong shape"),
    "transposed": (change_values(lambda v: Array(v.T)), "smashed.values: wrong shape"),
    "flat": (change_values(lambda v: Array(v.ravel())), "smashed.values: wrong shape"),
    "half precision": (
        change_values(lambda v: Array(v.astype(np.float16))),
        "smashed.values: wrong dtype, must be float32",
    ),
    "double precision": (change_values(lambda v: Array(v.astype(float))), "values: wrong dtype"),
    "NaN": (change_value(np.nan), "smashed.values: NaN or Inf"),
    "Inf": (change_value(-np.inf), "smashed.values: NaN or Inf"),
    "zero length": (change_length(0), "smashed.lengths: outside 1..128"),
    "absurd length": (change_length(65535), "smashed.lengths: outside 1..128"),
    "length that fits no row": (change_length(128), "smashed.values: wrong shape"),
    "no lengths": (drop_lengths, "smashed.lengths: missing"),
    "wrong chunk": (change_header(chunk=1), "wrong chunk"),
    "wrong epoch": (change_header(epoch=1), "wrong chunk"),
    "wrong split": (change_header(split="eval"), "wrong chunk"),
    "other run": (change_header(run_id="cd" * 16), "release.run_id: another run"),
    "other device": (change_header(device_id="device-00001"), "device_id: another device"),
    "other mechanism": (change_header(mechanism=NONE.id), "release.mechanism: another one"),
    "other wire": (change_header(wire="float16"), "release.wire: another format"),
    "other hidden size": (change_header(hidden=768), "release.hidden: must be 384"),
    "no examples": (change_header(examples=0), "release.examples: out of range"),
    "too many examples": (change_header(examples=5), "release.examples: out of range"),
    "fewer examples": (change_header(examples=3), "smashed.lengths: wrong shape"),
    "other schema": (change_header(schema=2), "release.schema: wrong version"),
    "schema as text": (change_header(schema="1"), "release.schema: wrong type"),
    "chunk as a truth value": (change_header(chunk=False), "release.chunk: wrong type"),
    "long device id": (change_header(device_id="d" * 5000), "release.device_id: too long"),
    "mark left in": (change_header(mark=b"m" * 32), "release: keys"),
    "header key missing": (drop_header_key, "release: keys"),
    "oversize": (
        change_values(lambda v: blob(v, Array(v).data + bytes(v.nbytes))),
        "smashed.values: oversize",
    ),
    "other dtype inside": (
        change_values(lambda v: blob(v, npy(v.astype(np.float16)))),
        "smashed.values: not what it claims",
    ),
    "other shape inside": (
        change_values(lambda v: blob(v, npy(v[:-1]))),
        "smashed.values: not what it claims",
    ),
    "objects": (
        change_values(lambda v: blob(v, npy(np.array([1, "a"], dtype=object)))),
        "smashed.values: cannot be read",
    ),
    "archive": (change_values(lambda v: blob(v, npz(TINY))), "smashed.values: not what it claims"),
    "truncated": (
        change_values(lambda v: blob(v, Array(v).data[:-1])),
        "smashed.values: cannot be read",
    ),
    "empty": (change_values(lambda v: blob(v, b"")), "smashed.values: cannot be read"),
    "noise": (change_values(lambda v: blob(v, bytes(100))), "smashed.values: cannot be read"),
    "a header that computes": (change_values(lambda v: blob(v, HUGE)), "cannot be read"),
    "a shape beyond memory": (change_values(lambda v: blob(v, HUGE_LITERAL)), "cannot be read"),
    "a shape beyond 64 bits": (change_values(lambda v: blob(v, LONG)), "cannot be read"),
    "an open header": (change_values(lambda v: blob(v, UNTERMINATED)), "cannot be read"),
    "other serialisation": (
        change_values(lambda v: Array("float32", v.shape, "pickle", Array(v).data)),
        "smashed.values: cannot be read",
    ),
    "extra record": (
        lambda content: content.update({"extra": ConfigRecord({"a": 1})}),
        "records: must be labels, metrics, release, smashed",
    ),
    "extra array": (extra_array, "smashed: arrays are not those of the schema"),
    "no labels": (drop(LABELS), "records: must be"),
    "labels of another kind": (
        lambda content: content.update({LABELS: ConfigRecord({"labels": [0, 1, 0, 1]})}),
        "records: of the wrong kind",
    ),
    "label too large": (put_labels([0, 1, 2, 0]), "labels: outside 0..1"),
    "label below zero": (put_labels([0, 1, -1, 0]), "labels: outside 0..1"),
    "too few labels": (put_labels([0, 1, 1]), "labels.labels: wrong shape"),
    "long labels": (put_labels([0, 1, 1, 0], "int64"), "labels.labels: wrong dtype"),
    "no metrics": (drop(METRICS), "records: must be"),
    "metric not finite": (change_metric("tokens", float("inf")), "metrics.tokens: not finite"),
    "metric NaN": (change_metric("seconds_bottom", float("nan")), "seconds_bottom: not finite"),
    "metric unknown": (change_metric("accuracy", 1.0), "metrics: a name is not in the schema"),
    "metric a list": (change_metric("tokens", [1, 2]), "metrics.tokens: not a number"),
}


def test_a_valid_release_is_read(device: Device, release: Any) -> None:
    request, content = release
    chunk = read(device, request, content)
    held = device.holdings.chunk("train", 0, 4)
    assert chunk.labels_B is not None
    assert chunk.labels_B.tolist() == held.labels
    assert chunk.rows_ND.shape == (int(chunk.lengths_B.sum()), HIDDEN)
    assert chunk.metrics["tokens"] == len(chunk.rows_ND)
    assert chunk.metrics["new_releases"] == 4
    assert chunk.metrics["eta_max"] == 50.0
    # E||z|| = d / eta for d_chi noise
    assert chunk.metrics["noise_norm_sum"] / len(chunk.rows_ND) == pytest.approx(384 / 50, rel=0.1)


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_makes_a_reply_invalid_and_names_the_rule(
    name: str, device: Device, release: Any
) -> None:
    request, content = release
    faulty = wire_copy(content)
    change, rule = FAULTS[name]
    change(faulty)
    with pytest.raises(InvalidReplyError) as caught:
        read(device, request, faulty)
    assert rule in str(caught.value)


def test_fewer_examples_than_described_are_invalid(device: Device, release: Any) -> None:
    request, content = release
    with pytest.raises(InvalidReplyError, match="not the number that the device described"):
        read(device, request, content, examples=3)


def test_rows_that_overflow_where_they_are_kept_are_invalid(device: Device) -> None:
    request = device.request(wire="int8")
    content = device.ask(request).content
    assert np.isfinite(read(device, request, content).rows_ND).all()
    for size in (1e4, 3e38):  # beyond half precision; beyond single precision once multiplied
        faulty = wire_copy(content)
        scale = faulty.array_records[SMASHED]["scale"].numpy()
        faulty.array_records[SMASHED]["scale"] = Array(np.full_like(scale, size))
        with pytest.raises(InvalidReplyError, match="NaN, Inf or above"):
            read(device, request, faulty)


def test_labels_that_were_not_asked_for_are_invalid(device: Device, release: Any) -> None:
    content = release[1]
    with pytest.raises(InvalidReplyError, match="records: must be metrics, release, smashed"):
        read(device, device.request(labels=False), content)


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("inside_npy", [True, False])
def test_pickled_code_is_never_run(
    inside_npy: bool, device: Device, release: Any, tmp_path: Path
) -> None:
    request, content = release
    trap = _Trap(tmp_path / "sprung")
    data = npy(np.array([trap], dtype=object)) if inside_npy else pickle.dumps(trap)
    faulty = wire_copy(content)
    change_values(lambda v: blob(v, data))(faulty)
    with pytest.raises(InvalidReplyError, match=r"smashed.values: cannot be read"):
        read(device, request, faulty)
    assert not trap.path.exists()
    # the payload is a working one
    pickle.loads(pickle.dumps(trap))
    assert trap.path.exists()


# --------------------------------------------------------------------------- descriptions, requests


@pytest.fixture(scope="module")
def description(device: Device) -> RecordDict:
    terms = {k: getattr(device.request(), k) for k in ("run_id", "bottom_id", "mechanism")}
    asked = f"{device.bottom_id},{'0' * 64}"
    return device.ask(DescribeRequest(**terms, labels=True, epochs=1, bundles=asked)).content


def test_a_valid_description_is_read(device: Device, description: RecordDict) -> None:
    record = read_description(wire_copy(description), RUN_ID)
    assert (record["train_examples"], record["eval_examples"]) == (320, 40)
    assert record["label_names"] == "negative\npositive"
    assert record["held"] == device.bottom_id
    assert record["device_id"] == device.home.device_id
    assert '"share-labels":true' in record["policy"]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"run_id": "cd" * 16}, "device.run_id: another run"),
        ({"schema": 2}, "device.schema: wrong version"),
        ({"train_examples": -1}, "device.train_examples: out of range"),
        ({"eval_examples": 10**10}, "device.eval_examples: out of range"),
        ({"train_examples": 3.0}, "device.train_examples: wrong type"),
        ({"label_names": "one"}, "device.label_names: needs at least two"),
        ({"label_names": "a\n" * 3000}, "device.label_names: too long"),
        ({"more": 1}, "device: keys"),
    ],
)
def test_a_wrong_description_names_the_rule(
    changes: dict[str, Any], rule: str, description: RecordDict
) -> None:
    faulty = wire_copy(description)
    faulty.config_records[DEVICE].update(changes)
    with pytest.raises(InvalidReplyError, match=rule):
        read_description(faulty, RUN_ID)


def test_a_description_with_another_record_is_invalid(description: RecordDict) -> None:
    faulty = wire_copy(description)
    faulty["extra"] = MetricRecord({"a": 1})
    with pytest.raises(InvalidReplyError, match="records: must be device"):
        read_description(faulty, RUN_ID)


def test_metrics_must_be_there() -> None:
    with pytest.raises(InvalidReplyError, match="metrics: missing"):
        read_metrics(RecordDict(), ("examples",))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schema": 2}, "request.schema = 2: allowed: 1"),
        ({"chunk": "0"}, "request.chunk: must be of type int"),
        ({"labels": 1}, "request.labels: must be of type bool"),
        ({"surprise": 1}, "request.surprise: unknown"),
    ],
)
def test_a_device_refuses_a_malformed_request(
    changes: dict[str, Any], named: str, device: Device
) -> None:
    content = device.request().to_content()
    assert ReleaseRequest.from_content(content) == device.request()
    content.config_records["request"].update(changes)
    with pytest.raises(Refusal, match=named):
        ReleaseRequest.from_content(content)
    with pytest.raises(Refusal, match=r"request.run_id: missing"):
        ReleaseRequest.from_content(RecordDict())
