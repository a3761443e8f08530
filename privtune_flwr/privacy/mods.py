"""The two client-side mods: privacy, and the egress guard round it.

``ClientApp(mods=[egress_guard, privacy_mod])``: Flower calls the guard first and gets its answer
last, so nothing reaches the network that the guard has not seen. Both fail closed: whatever goes
wrong inside becomes an error reply that carries a rule's name and no content.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from privtune_flwr.codec import get_codec
from privtune_flwr.config import ConfigError, load_run_config
from privtune_flwr.device import DeviceHome, held_bottom, open_home
from privtune_flwr.errors import GuardError, InvalidReplyError, PrivTuneError, Refusal
from privtune_flwr.privacy.base import Mechanism
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.policy import PolicyError
from privtune_flwr.privacy.registry import create_mechanism
from privtune_flwr.privacy.update_mod import check_marked_update, privatise_reply
from privtune_flwr.protocol import (
    CLEAN,
    DESCRIBE,
    DEVICE_ONLY,
    EVALUATE,
    LABELS,
    LEARN,
    METRICS,
    PROVISION,
    RELEASE,
    RELEASE_HEADER,
    SMASHED,
    DescribeRequest,
    LearnRequest,
    ReleaseRequest,
    check_release,
    read_description,
    read_metrics,
)
from privtune_flwr.protocol.fit import FIT, JOIN, JUDGE, FitRequest, JoinRequest
from privtune_flwr.protocol.replies import EVALUATE_METRICS, MARK, MAX_LABELS
from privtune_flwr.protocol.splitfed import SPLITFED, SplitFedRequest
from privtune_flwr.usage import compute_seconds, peak_memory_bytes

logger = logging.getLogger("privtune.device")

# Flower's own codes end far below
REFUSED = 101
GUARDED = 102
FAILED = 103


def in_simulation() -> bool:
    """Whether Flower's simulation runs this process: only there is a Ray worker around us."""
    ray = sys.modules.get("ray")
    return bool(ray is not None and ray.is_initialized())


def device_home(context: Context, run_id: str) -> DeviceHome:
    """Open the home of the device that this process answers for."""
    config = load_run_config(context.run_config)
    return open_home(
        context.node_config, run_id=run_id, simulated=in_simulation(), seed=config.run.seed
    )


def artefact_path(home: DeviceHome, bundle_id: str) -> Path | None:
    """Folder of a mechanism's public artefact, None where it has none.

    Raises
    ------
    Refusal
        If the device does not hold it (yet).
    """
    if not bundle_id:
        return None
    if not home.bundles.holds(bundle_id):
        raise Refusal("request.mechanism: its artefact has not been provisioned")
    return home.bundles.path(bundle_id)


def mark_of(
    home: DeviceHome, request: ReleaseRequest, arrays: dict[str, npt.NDArray[Any]]
) -> bytes:
    """Keyed hash over what the mechanism made: these bytes, for this request, and no others.

    A handler cannot forge it by accident, and the guard takes it off before the reply leaves.
    """
    digest = hmac.new(home.derive("mark"), request.release_key.encode(), hashlib.sha256)
    digest.update(f"{request.split}/{request.chunk}/{request.wire}".encode())
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{value.dtype}:{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.digest()


# --------------------------------------------------------------------------------------- privacy


@dataclass(frozen=True)
class _Clean:
    """What the handler leaves for the mod: ragged, still private."""

    hidden_ND: npt.NDArray[np.float32]
    lengths_B: npt.NDArray[np.uint16]
    token_ids_N: npt.NDArray[np.int32]
    examples: list[bytes]


def privacy_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Perturb what a release handler computed and privatise what a learn handler did.

    A baseline's update is clipped by Flower's mod where its strategy asks for it. Every other
    action passes.

    The mechanism and its parameters come with the request and are held against the device's
    policy and ledger here, before anything is perturbed.
    """
    action = message.metadata.message_type
    if action == FIT:
        from privtune_flwr.client_fit import clip_as_asked

        return clip_as_asked(message, context, call_next)
    reply = call_next(message, context)
    if action == LEARN and not reply.has_error():
        home = device_home(context, LearnRequest.from_content(message.content).run_id)
        privatise_reply(message.content, reply.content, home)
    if action == RELEASE and not reply.has_error():
        _perturb_release(message, context, reply)
    return reply


def _perturb_release(message: Message, context: Context, reply: Message) -> None:
    request = ReleaseRequest.from_content(message.content)
    home = device_home(context, request.run_id)
    clean = _take_clean(reply.content)
    mechanism = create_mechanism(request.spec, artefact_path(home, request.spec.artefact))
    if mechanism.reads == "tokens":
        mechanism.attach(held_bottom(home, request.bottom_id)[0])
    strength = mechanism.strength
    home.policy.check_mechanism(mechanism.name, strength)
    new = home.ledger.reserve(
        clean.examples,
        clean.lengths_B.tolist(),
        release=request.release_key,
        mechanism=mechanism,
        policy=home.policy,
    )
    start = compute_seconds()
    rows_ND = perturb(clean.hidden_ND, clean.lengths_B, clean.token_ids_N, mechanism, home, request)
    seconds = compute_seconds() - start
    norms_N = _noise_norms(rows_ND, clean.hidden_ND)
    start = compute_seconds()
    arrays = get_codec(request.wire).encode(rows_ND, clean.lengths_B)
    arrays["lengths"] = clean.lengths_B
    reply.content[SMASHED] = ArrayRecord({k: Array(v) for k, v in arrays.items()})
    reply.content.config_records[RELEASE_HEADER]["hidden"] = rows_ND.shape[1]
    reply.content.config_records[RELEASE_HEADER][MARK] = mark_of(home, request, arrays)
    spent = home.ledger.spent()
    metrics = {
        "seconds_mechanism": seconds,
        "seconds_codec": compute_seconds() - start,
        "noise_norm_sum": float(norms_N.sum(dtype=np.float64)),
        "tokens": int(clean.lengths_B.sum(dtype=np.int64)),
        "new_releases": new,
        "spent_releases": spent.releases,
        "spent_max_per_example": spent.max_releases_per_example,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    # a number that is not there says: nothing bounds it
    optional = {
        "eta_max": strength.eta,
        "epsilon_max": strength.epsilon,
        "bits_max": strength.bits,
        "spent_eta_sum_max": spent.eta_sum_max,
        "spent_eta_total_max": spent.largest.eta,
        "spent_epsilon_total_max": spent.largest.epsilon,
        "spent_delta_total_max": spent.largest.delta,
        "spent_bits_total_max": spent.largest.bits,
    }
    metrics |= {name: value for name, value in optional.items() if value is not None}
    reply.content.metric_records[METRICS].update(metrics)


def _take_clean(content: RecordDict) -> _Clean:
    """Take the private records out of the reply before anything else is done with it."""
    clean = content.array_records.pop(CLEAN)
    private = content.array_records.pop(DEVICE_ONLY)
    keys = private["examples"].numpy()
    return _Clean(
        hidden_ND=clean["hidden"].numpy(),
        lengths_B=clean["lengths"].numpy(),
        token_ids_N=private["token-ids"].numpy(),
        examples=[row.tobytes() for row in keys],
    )


def _noise_norms(
    rows_ND: npt.NDArray[np.float32], hidden_ND: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Distance of each released row from the clean one; zero where they cannot be compared."""
    if rows_ND.shape != hidden_ND.shape:
        return np.zeros(len(rows_ND), dtype=np.float32)
    return np.asarray(np.linalg.norm(rows_ND - hidden_ND, axis=1))


def perturb(
    hidden_ND: npt.NDArray[np.float32],
    lengths_B: npt.NDArray[np.uint16],
    token_ids_N: npt.NDArray[np.int32],
    mechanism: Mechanism,
    home: DeviceHome,
    request: ReleaseRequest,
) -> npt.NDArray[np.float32]:
    """Perturb a chunk sentence by sentence, each with its own keyed generator.

    The key holds the secret, the release (model, mechanism, epoch) and the sentence's tokens: the
    same sentence gets the same noise wherever it stands, and *another* mechanism or strength gets
    independent noise (the same vector at two strengths would cancel).
    """
    key = home.derive("noise")
    perturbed: list[npt.NDArray[np.float32]] = []
    start = 0
    for length in lengths_B.tolist():
        ids_T = token_ids_N[start : start + length]
        rng = keyed_generator(key, request.release_key, ids_T.astype("<i4").tobytes())
        perturbed.append(mechanism.perturb(hidden_ND[start : start + length], ids_T, rng))
        start += length
    return np.concatenate(perturbed)


# ----------------------------------------------------------------------------------------- guard


def egress_guard(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let out only what the protocol names, marked by the mechanism; else an error alone."""
    try:
        reply = call_next(message, context)
        if reply.has_error():
            # built by code inside this guard, so its text is not trusted either
            raise GuardError("the app answered with an error of its own")
        return _checked(message, context, reply)
    except Refusal as refusal:
        return _error(message, REFUSED, f"refused: {refusal}")
    except PolicyError as error:
        logger.error("the policy cannot be used: %s", error)
        return _error(message, REFUSED, "refused: this device's policy cannot be used")
    except ConfigError as error:
        return _error(message, REFUSED, f"refused: {error}")
    except (GuardError, InvalidReplyError) as error:
        return _error(message, GUARDED, f"egress guard: {error}")
    except Exception as error:
        # The message of an unforeseen exception may quote text: only its type and place go on.
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        detail = f": {error}" if isinstance(error, PrivTuneError) else ""
        logger.error("%s at %s%s", type(error).__name__, place, detail)
        return _error(message, FAILED, f"device failed: {type(error).__name__} at {place}")


def _error(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code=code, reason=reason[:2000]), reply_to=message)


def _checked(message: Message, context: Context, reply: Message) -> Message:
    action = message.metadata.message_type
    content = reply.content
    if action == LEARN:
        home = device_home(context, LearnRequest.from_content(message.content).run_id)
        check_marked_update(message.content, content, home)
    elif action == RELEASE:
        _check_marked_release(message, context, content)
    elif action in (DESCRIBE, JOIN):
        _check_description(message, context, content)
    elif action == FIT:
        from privtune_flwr.client_fit import check_answer

        home = device_home(context, FitRequest.from_content(message.content).run_id)
        check_answer(message, content, home)
    elif action == SPLITFED:
        from privtune_flwr.client_splitfed import check_reply

        home = device_home(context, SplitFedRequest.from_content(message.content).run_id)
        check_reply(message, content, home)
    elif action == PROVISION:
        if set(content) != {METRICS}:
            raise GuardError("records: provision answers with metrics only")
        read_metrics(content, ("held",))
    elif action in (EVALUATE, JUDGE):
        if set(content) != {METRICS}:
            raise GuardError("records: evaluation answers with metrics only")
        read_metrics(content, EVALUATE_METRICS)
    else:
        raise GuardError("the protocol has no such action")
    # a message built anew carries the checked records and nothing else
    return Message(content, reply_to=message)


def _check_description(message: Message, context: Context, content: RecordDict) -> None:
    """Free text leaves in the class names only: every other string must be what it stands for."""
    kind = JoinRequest if message.metadata.message_type == JOIN else DescribeRequest
    request = kind.from_content(message.content)
    home = device_home(context, request.run_id)
    record = read_description(content, request.run_id)
    if record["device_id"] != home.device_id or record["policy"] != home.policy.public_json():
        raise GuardError("device: not this device's id and policy")
    if not set(str(record["held"]).split(",")) <= {"", *request.bundles.split(",")}:
        raise GuardError("device.held: names a bundle that was not asked about")


def _check_marked_release(message: Message, context: Context, content: RecordDict) -> None:
    request = ReleaseRequest.from_content(message.content)
    home = device_home(context, request.run_id)
    header = content.config_records.get(RELEASE_HEADER, ConfigRecord())
    hidden = header.get("hidden", 0)
    if not isinstance(hidden, int) or isinstance(hidden, bool) or hidden < 1:
        raise GuardError(f"{RELEASE_HEADER}.hidden: missing")
    arrays = check_release(content, request, hidden=hidden, num_labels=MAX_LABELS, marked=True)
    if content.config_records[RELEASE_HEADER]["device_id"] != home.device_id:
        raise GuardError(f"{RELEASE_HEADER}.device_id: not this device's")
    labels_B = arrays.pop(LABELS, None)
    if labels_B is not None:
        home.policy.check_labels(True)
        content[LABELS] = ArrayRecord({LABELS: Array(labels_B)})
    mark = content.config_records[RELEASE_HEADER].pop(MARK)
    assert isinstance(mark, bytes)
    if not hmac.compare_digest(mark, mark_of(home, request, arrays)):
        raise GuardError("mark: these bytes did not come out of the mechanism")
    # serialised anew: a blob may hold more than the values that were checked
    content[SMASHED] = ArrayRecord({name: Array(value) for name, value in arrays.items()})
