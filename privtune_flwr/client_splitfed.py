"""What a device answers to SplitFed: one message a step; a thin handler.

Representations leave here without noise, again in every epoch, with their labels, and gradients
that the cloud chose come in: the device's policy must allow all of it (labels, the mechanism
``none``, as many releases as epochs, ``fit-shares`` with gradients, ``fit-rounds``). The ledger has
one row for each start of a round, and one for each evaluation.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from privtune_flwr.client_fit import _holdings, _home, _ids
from privtune_flwr.device import Chunk, DeviceHome
from privtune_flwr.errors import GuardError, Refusal
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.splitfed_device import (
    BottomTwin,
    Journal,
    Position,
    begin_round,
    held_twin,
    round_batches,
    train_message,
)
from privtune_flwr.privacy.base import Strength
from privtune_flwr.privacy.fit_ledger import FitTerms
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.learned_update import digest_of
from privtune_flwr.privacy.update_mod import received_state
from privtune_flwr.protocol.fit import ANSWER
from privtune_flwr.protocol.replies import LABELS, MAX_LABELS, METRICS, SMASHED
from privtune_flwr.protocol.splitfed import (
    SPLITFED_HEADER,
    SplitFedRequest,
    check_rows,
    check_state,
    read_gradients,
    rows_reply,
    state_reply,
)
from privtune_flwr.protocol.updates import state_record
from privtune_flwr.usage import compute_seconds, peak_memory_bytes

_Ids = list[NDArray[np.int32]]


def register(app: ClientApp) -> None:
    """Add the handler to the client app."""
    app.train("splitfed")(splitfed)


def check_terms(settings: FitSettings, home: DeviceHome) -> None:
    """Hold a run against the policy: what leaves in it is more than a baseline's update.

    Raises
    ------
    Refusal
        Naming the bound.
    """
    passes = settings.rounds * settings.federated.local_epochs
    home.policy.check_mechanism("none", Strength())
    home.policy.check_releases(passes)
    home.policy.check_labels(True)
    home.policy.check_fit("gradients", settings.rounds + evaluations(settings), None)


def evaluations(settings: FitSettings) -> int:
    """Count the rounds after which devices evaluate: their evaluation rows leave then."""
    every = settings.train.evaluate_every
    due = {n for n in range(1, settings.rounds + 1) if every and n % every == 0}
    return len(due | {settings.rounds})


def splitfed(message: Message, context: Context) -> Message:
    """Take the last batch's step, and send the next batch's rows or the trained bottom model."""
    request = SplitFedRequest.from_content(message.content)
    home = _home(context, request.run_id)
    settings = request.fit_settings
    home.policy.check_bottom(request.model_id)
    check_terms(settings, home)
    holdings = _holdings(context, home)
    split = holdings.split(request.split)
    if not split.texts or request.label_names != holdings.label_names:
        raise Refusal(
            f"request.labels: this device has {len(split.texts)} examples of "
            f"{len(holdings.label_names)} classes, which are not the request's"
        )
    twin = _twin(request, home)
    ids = _ids(home, request.model_id, split.texts, settings.model.max_length)
    start = compute_seconds()
    work = _evaluate if request.split == "eval" else _train
    content = work(message.content, request, home, twin, split, ids)
    content.metric_records[METRICS]["seconds_fit"] = compute_seconds() - start
    return Message(content, reply_to=message)


def _train(
    asked: RecordDict,
    request: SplitFedRequest,
    home: DeviceHome,
    twin: BottomTwin,
    split: Chunk,
    ids: _Ids,
) -> RecordDict:
    settings = request.fit_settings
    run = _run_name(request)
    batches = batches_of(request, home, [len(i) for i in ids])
    if request.step > len(batches) + 1:
        raise Refusal(
            f"request.step = {request.step}: this device has {len(batches)} batches a round"
        )
    journal = Journal(home.root, run)
    new = 0
    if request.step == 1:
        new = _begin(asked, request, home, twin, journal, split)
    else:
        last = [ids[i] for i in batches[request.step - 2]]
        shape = (sum(len(i) for i in last), twin.bottom.hidden_size)
        gradient_ND = read_gradients(asked, shape, request.wire)
        position = Position(
            run, request.round, request.step, _hash(request, digest_of({"g": gradient_ND}))
        )
        train_message(
            twin,
            journal,
            position,
            [[ids[i] for i in batch] for batch in batches],
            gradient_ND,
            steps=request.steps,
            rounds=settings.rounds,
        )
    metrics = _metrics(home, new)
    if request.step == len(batches) + 1:
        return state_reply(
            request,
            twin.state(),
            device_id=home.device_id,
            examples=len(split.texts),
            metrics=metrics,
        )
    batch = batches[request.step - 1]
    return rows_reply(
        request,
        twin.rows([ids[i] for i in batch]),
        np.array([len(ids[i]) for i in batch], dtype=np.uint16),
        np.array([split.labels[i] for i in batch], dtype=np.int32),
        device_id=home.device_id,
        metrics=metrics,
    )


def _begin(
    asked: RecordDict,
    request: SplitFedRequest,
    home: DeviceHome,
    twin: BottomTwin,
    journal: Journal,
    split: Chunk,
) -> int:
    """Start a round, entered in the ledger before anything of it leaves."""
    state = received_state(asked, home)
    position = Position(_run_name(request), request.round, 1, _hash(request, digest_of(state)))
    position, again = begin_round(twin, journal, position, state)
    # a second start may lead the same batches down another path, so it counts again
    new = _reserve(request, home, split, f"{position.identity}/{position.starts}")
    if not again:
        journal.write(position, state, journal.moments_before(request.round))
    return new


def _evaluate(
    asked: RecordDict,
    request: SplitFedRequest,
    home: DeviceHome,
    twin: BottomTwin,
    split: Chunk,
    ids: _Ids,
) -> RecordDict:
    state = received_state(asked, home)
    twin.load(state)
    start = (request.step - 1) * request.batch
    part = ids[start : start + request.batch]
    if not part:
        raise Refusal(f"request.step = {request.step}: eval has no such chunk")
    # all chunks of one evaluation are one answer
    new = _reserve(request, home, split, f"eval/{request.round}/{digest_of(state).hex()}")
    return rows_reply(
        request,
        twin.rows(part),
        np.array([len(i) for i in part], dtype=np.uint16),
        None,
        device_id=home.device_id,
        metrics=_metrics(home, new),
    )


def batches_of(request: SplitFedRequest, home: DeviceHome, lengths: list[int]) -> list[list[int]]:
    """Draw this round's batches: the device's own order, the same in every message of the round."""
    rng = keyed_generator(home.derive("order"), "splitfed", _run_name(request), request.round)
    seed = int.from_bytes(rng.bytes(8), "little") >> 1
    passes = request.fit_settings.federated.local_epochs
    return round_batches(lengths, request.batch, passes, seed)


def check_reply(message: Message, content: RecordDict, home: DeviceHome) -> None:
    """Let an answer out only if it is what was asked for, and the owner allows it.

    Raises
    ------
    GuardError, InvalidReplyError, Refusal
        Naming the rule that is broken.
    """
    request = SplitFedRequest.from_content(message.content)
    check_terms(request.fit_settings, home)
    twin = _twin(request, home)
    if ANSWER in content:
        if request.split != "train" or request.step == 1:
            raise GuardError(f"{ANSWER}: was not asked for")
        schema = {n: ("float32", tuple(p.shape)) for n, p in twin.trainable().items()}
        arrays: dict[str, NDArray[Any]] = check_state(content, request, schema)
        content[ANSWER] = state_record(arrays)
    else:
        hidden = twin.bottom.hidden_size
        arrays = check_rows(content, request, hidden=hidden, num_labels=MAX_LABELS)
        if LABELS in arrays:
            content[LABELS] = ArrayRecord({LABELS: Array(arrays.pop(LABELS))})
        # serialised anew: a blob may hold more than the values that were checked
        content[SMASHED] = ArrayRecord({name: Array(value) for name, value in arrays.items()})
    if content.config_records[SPLITFED_HEADER]["device_id"] != home.device_id:
        raise GuardError(f"{SPLITFED_HEADER}.device_id: not this device's")


def _reserve(request: SplitFedRequest, home: DeviceHome, split: Chunk, identity: str) -> int:
    digest = hmac.new(home.derive("ledger"), b"splitfed", hashlib.sha256)
    digest.update(f"{_run_name(request)}/{identity}".encode())
    for text, label in zip(split.texts, split.labels, strict=True):
        digest.update(home.example_key(text) + int(label).to_bytes(8, "big"))
    terms = FitTerms(
        run=f"{request.run_id}/{request.fit_settings.id}",
        shares="gradients",
        round=request.round,
        epsilon=None,
        delta=0.0,
        examples=len(split.texts),
    )
    return home.fit_ledger.reserve(digest.digest(), terms, home.policy)


def _metrics(home: DeviceHome, new: int) -> dict[str, float]:
    return {
        "new_fits": new,
        "spent_fits": home.fit_ledger.spent().fits,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _hash(request: SplitFedRequest, arrays: bytes) -> str:
    """Name a message by all that it says."""
    named = repr(sorted(asdict(request).items())).encode()
    return hashlib.sha256(named + arrays).hexdigest()


def _run_name(request: SplitFedRequest) -> str:
    # what draws the batches is part of it: they cannot be changed in the middle of a round
    asked = f"{request.batch}/{request.steps}/{request.wire}"
    named = f"{request.run_id}/{request.model_id}/{request.settings}/{request.labels}/{asked}"
    return hashlib.sha256(named.encode()).hexdigest()


def _twin(request: SplitFedRequest, home: DeviceHome) -> BottomTwin:
    if not home.bundles.holds(request.model_id):
        raise Refusal("request.model_id: this bottom model has not been provisioned")
    return held_twin(home.bundles.path(request.model_id), request.fit_settings)
