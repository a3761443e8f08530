"""The mods' part for learned updates: privatise and mark one, and let out only a marked one."""

from __future__ import annotations

import hashlib
import hmac
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors import safe_open
from safetensors.numpy import save

from privtune_flwr.device import DeviceHome
from privtune_flwr.errors import GuardError, InvalidReplyError, Refusal
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.learned_update import (
    check_change,
    digest_of,
    privatise,
    update_identity,
)
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol import (
    CLEAN,
    DEVICE_ONLY,
    LEARN_HEADER,
    METRICS,
    UPDATE,
    LearnRequest,
    check_update,
    read_state,
)
from privtune_flwr.protocol.replies import MARK
from privtune_flwr.protocol.updates import LEARNER_METRICS, state_record
from privtune_flwr.usage import peak_memory_bytes

_LAST_UPDATE = "last-update.safetensors"


def received_state(content: RecordDict, home: DeviceHome) -> State:
    """Read the state of a learn request.

    Raises
    ------
    Refusal
        If it is malformed, or larger than ``max-bundle-bytes``.
    """
    try:
        return read_state(content, home.policy.max_bundle_bytes)
    except InvalidReplyError as error:
        # built from the cloud's own names and sizes only
        raise Refusal(f"request.{error}") from None


def privatise_reply(asked: RecordDict, reply: RecordDict, home: DeviceHome) -> None:
    """Turn the raw change in a handler's reply into an update that may leave.

    Parameters
    ----------
    asked : RecordDict
        The request's content.
    reply : RecordDict
        The reply's; changed in place.
    home : DeviceHome
        Policy, ledger and secret of the device.

    Raises
    ------
    Refusal
        If policy or ledger forbid it. Nothing is entered then.
    """
    raw = reply.array_records.pop(CLEAN)
    private = reply.array_records.pop(DEVICE_ONLY)
    request = LearnRequest.from_content(asked)
    request.check()
    state = received_state(asked, home)
    change = check_change({name: raw[name].numpy() for name in raw}, state)
    identity = update_identity(
        request.learn_key,
        request.round,
        request.clip,
        request.noise,
        digest_of(state),
        private["data"].numpy().tobytes(),
    )
    header = reply.config_records[LEARN_HEADER]
    examples = int(str(header["examples"]))
    new = home.ledger.reserve_update(
        identity,
        mechanism=request.spec.name,
        spec=request.spec.id,
        round_number=request.round,
        clip=request.clip,
        noise=request.noise,
        examples=examples,
        policy=home.policy,
    )
    update = _kept(home, identity, state)
    if update is None:
        rng = keyed_generator(home.derive("noise"), "learning", identity)
        update = privatise(change, clip=request.clip, noise=request.noise, rng=rng)
        _keep(home, identity, update)
    reply[UPDATE] = state_record(update)
    header[MARK] = _mark_of(home, request, state, update)
    metrics = reply.metric_records[METRICS]
    if request.noise > 0 or examples < home.policy.min_metric_examples:
        for name in LEARNER_METRICS:
            metrics.pop(name, None)
    spent = home.ledger.spent()
    metrics.update(
        {
            "new_updates": new,
            "spent_updates": spent.updates,
            "peak_memory_bytes": peak_memory_bytes(),
        }
    )
    if spent.update_rho is not None:
        metrics["spent_update_rho"] = spent.update_rho


def check_marked_update(asked: RecordDict, reply: RecordDict, home: DeviceHome) -> None:
    """Let an update out only as the mod made it.

    Raises
    ------
    GuardError, InvalidReplyError
        Naming the rule that is broken.
    """
    request = LearnRequest.from_content(asked)
    state = received_state(asked, home)
    update = check_update(reply, request, state, marked=True)
    header: ConfigRecord = reply.config_records[LEARN_HEADER]
    if header["device_id"] != home.device_id:
        raise GuardError(f"{LEARN_HEADER}.device_id: not this device's")
    mark = header.pop(MARK)
    assert isinstance(mark, bytes)
    if not hmac.compare_digest(mark, _mark_of(home, request, state, update)):
        raise GuardError("mark: these bytes were not clipped and noised as asked")
    # serialised anew: a blob may hold more than the values that were checked
    reply[UPDATE] = state_record(update)


def data_record(home: DeviceHome, texts: list[str], labels: list[int]) -> dict[str, Any]:
    """Name what an update is learned from by a keyed hash, for the mod alone."""
    digest = hmac.new(home.derive("ledger"), b"learning", hashlib.sha256)
    for text, label in zip(texts, labels, strict=True):
        digest.update(home.example_key(text) + int(label).to_bytes(8, "big"))
    return {"data": Array(np.frombuffer(digest.digest(), dtype=np.uint8))}


def raw_record(change: State) -> ArrayRecord:
    """Put a learner's change where only the mod may find it."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in change.items()})


def _kept(home: DeviceHome, identity: bytes, state: State) -> State | None:
    """Give the last update again, if this is a retry of it.

    Training need not repeat to the last bit, and two answers under one noise must not differ.
    """
    path = home.root / _LAST_UPDATE
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        if file.metadata().get("identity") != identity.hex():
            return None
        return check_change({name: file.get_tensor(name) for name in state}, state)


def _keep(home: DeviceHome, identity: bytes, update: State) -> None:
    """Keep the last update on the device's disk, for its owner's eyes; whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=home.root, prefix=".update-")
    with os.fdopen(handle, "wb") as file:
        file.write(save(update, metadata={"identity": identity.hex()}))
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(home.root / _LAST_UPDATE)


def _mark_of(home: DeviceHome, request: LearnRequest, state: State, update: State) -> bytes:
    """Keyed hash over what the mod made: these numbers, for this request and state."""
    asked = f"learning/{request.learn_key}/{request.round}/{request.clip!r}/{request.noise!r}"
    digest = hmac.new(home.derive("mark"), asked.encode(), hashlib.sha256)
    digest.update(digest_of(state) + digest_of(update))
    return digest.digest()
