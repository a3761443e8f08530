"""States and updates of a learning phase on the wire, and the checks on both sides.

An update has exactly the arrays of the state that was sent: the same names, shapes and float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol.replies import (
    MARK,
    METRICS,
    check_answer,
    check_sender,
    read_arrays,
    read_metrics,
    require,
)
from privtune_flwr.protocol.requests import PAYLOAD, SCHEMA_VERSION, LearnRequest

UPDATE = "update"
LEARN_HEADER = "learning"
HEADER_TYPES: dict[str, type] = {
    "schema": int,
    "run_id": str,
    "device_id": str,
    "round": int,
    "examples": int,
    "mechanism": str,
}
# what a learner may say of the device's text; left out where noise is to protect that text
LEARNER_METRICS = ("loss_sum", "correct", "adversary_loss_sum")
LEARN_METRICS = (
    *LEARNER_METRICS,
    "seconds_learn",
    "new_updates",
    "spent_updates",
    "spent_update_rho",
    "peak_memory_bytes",
)
MAX_ARRAYS = 10_000
_NAME = re.compile(r"^[A-Za-z0-9_./-]{1,200}$")
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class ReceivedUpdate:
    """A device's update that passed every check.

    Attributes
    ----------
    change : State
        The arrays of the state, as the device clipped and noised them.
    examples : int
        Its weight.
    metrics : dict
        Sums and seconds, all finite.
    """

    change: State
    examples: int
    metrics: dict[str, float]


def state_record(state: Mapping[str, Any]) -> ArrayRecord:
    """Put named float32 arrays into a record, in order of name."""
    return ArrayRecord(
        {name: Array(np.ascontiguousarray(state[name], dtype=np.float32)) for name in sorted(state)}
    )


def learn_content(request: LearnRequest, state: State) -> RecordDict:
    """Build a request's content with its state."""
    content = request.to_content()
    content[PAYLOAD] = state_record(state)
    return content


def read_state(content: RecordDict, max_bytes: int) -> State:
    """Read the state that the cloud sent; on the device, which knows no shapes beforehand.

    Raises
    ------
    InvalidReplyError
        If there is none, it is larger than ``max_bytes``, an array is not float32, or a number is
        not finite.
    """
    record = content.array_records.get(PAYLOAD)
    require(record is not None and 0 < len(record) <= MAX_ARRAYS, "state: number of arrays")
    assert record is not None
    schema: dict[str, tuple[str, tuple[int, ...]]] = {}
    total = 0
    for name in sorted(record):
        shape = tuple(record[name].shape)
        require(_NAME.fullmatch(name) is not None, "state: a name is not allowed")
        require(
            len(shape) <= _MAX_DIMENSIONS and all(0 < n <= 2**31 for n in shape),
            "state: a shape is not allowed",
        )
        total += 4 * math.prod(shape)
        schema[name] = ("float32", shape)
    require(total <= max_bytes, f"state: {total} bytes, allowed: {max_bytes}")
    return _finite(read_arrays(record, schema, "state"), "state")


def check_update(
    content: RecordDict, request: LearnRequest, state: State, *, marked: bool
) -> State:
    """Check an update against what was asked.

    Parameters
    ----------
    content : RecordDict
        The reply's content.
    request : LearnRequest
        What was asked.
    state : State
        What was sent with it.
    marked : bool
        On the device the header still bears the mod's mark; on the wire it must not.

    Raises
    ------
    InvalidReplyError
        Naming the rule that is broken.
    """
    expected = {UPDATE, LEARN_HEADER, METRICS}
    require(set(content) == expected, f"records: must be {', '.join(sorted(expected))}")
    require(
        set(content.array_records) == {UPDATE} and set(content.config_records) == {LEARN_HEADER},
        "records: of the wrong kind",
    )
    metrics = read_metrics(content, LEARN_METRICS)
    if request.noise > 0:
        require(
            not set(metrics) & set(LEARNER_METRICS),
            "metrics: a sum over the text has no noise, where noise was asked for",
        )
    header = dict(content.config_records[LEARN_HEADER])
    if marked:
        require(isinstance(header.pop(MARK, None), bytes), f"{LEARN_HEADER}.mark: missing")
    check_answer(header, HEADER_TYPES, LEARN_HEADER, run_id=request.run_id, number=request.round)
    require(header["mechanism"] == request.spec.id, f"{LEARN_HEADER}.mechanism: another one")
    schema = {name: ("float32", value.shape) for name, value in state.items()}
    return _finite(read_arrays(content.array_records[UPDATE], schema, UPDATE), UPDATE)


def read_update(
    content: RecordDict, request: LearnRequest, state: State, *, device_id: str, examples: int
) -> ReceivedUpdate:
    """Validate an update in the cloud.

    Parameters
    ----------
    content, request, state
        As in :func:`check_update`.
    device_id : str
        Who was asked.
    examples : int
        Training examples that the device described.

    Raises
    ------
    InvalidReplyError
        The reason for the quarantine.
    """
    change = check_update(content, request, state, marked=False)
    header = content.config_records[LEARN_HEADER]
    check_sender(header, LEARN_HEADER, device_id=device_id, examples=examples)
    return ReceivedUpdate(change, examples, read_metrics(content, LEARN_METRICS))


def update_header(request: LearnRequest, device_id: str, examples: int) -> ConfigRecord:
    """Build an update's header."""
    return ConfigRecord(
        {
            "schema": SCHEMA_VERSION,
            "run_id": request.run_id,
            "device_id": device_id,
            "round": request.round,
            "examples": examples,
            "mechanism": request.spec.id,
        }
    )


def _finite(arrays: Mapping[str, Any], name: str) -> State:
    for key, value in arrays.items():
        require(bool(np.isfinite(value).all()), f"{name}.{key}: NaN or Inf")
    return dict(arrays)
