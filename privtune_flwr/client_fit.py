"""What a device answers to a federated baseline: join, fit, judge; thin handlers.

Weights, losses or logits leave here, not representations: the device's policy says whether they
may (``fit-rounds``, 0 on a real device until its owner allows it). The egress guard holds each
answer to the schema that the method promises.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from privtune_flwr.client_describe import description
from privtune_flwr.config import load_run_config
from privtune_flwr.data import tokenise
from privtune_flwr.device import DeviceHome, Holdings, open_holdings
from privtune_flwr.errors import GuardError, Refusal
from privtune_flwr.federated.dp_sgd import require_opacus
from privtune_flwr.federated.local import evaluate_locally
from privtune_flwr.federated.methods import FitMethod, Work, create_method
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.models import load_tokenizer
from privtune_flwr.privacy.fit_ledger import FitTerms
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.learned_update import digest_of, norm_of
from privtune_flwr.privacy.learning import State
from privtune_flwr.privacy.update_mod import received_state
from privtune_flwr.protocol import METRICS
from privtune_flwr.protocol.fit import (
    ANSWER,
    FIT_HEADER,
    TEXT_METRICS,
    FitRequest,
    JoinRequest,
    JudgeRequest,
    check_fit,
    fit_reply,
)
from privtune_flwr.protocol.updates import state_record
from privtune_flwr.usage import compute_seconds, peak_memory_bytes

_KEPT = "fit-kept.safetensors"
# of public numbers alone; delta would be rounded to zero
_EXACT = ("epsilon", "delta")
# Flower's clipping computes in float32
_CLIP_SLACK = 1e-3


def register(app: ClientApp) -> None:
    """Add the handlers to the client app."""
    app.query("join")(join)
    app.train("fit")(fit)
    app.evaluate("judge")(judge)


def join(message: Message, context: Context) -> Message:
    """Say what this device holds, or refuse the run's terms before any work is done."""
    request = JoinRequest.from_content(message.content)
    home = _home(context, request.run_id)
    settings = request.fit_settings
    home.policy.check_bottom(request.model_id)
    if settings.shares == "gradients":
        from privtune_flwr.client_splitfed import check_terms

        check_terms(settings, home)
    else:
        home.policy.check_fit(settings.shares, settings.rounds, _promised(settings, home))
    if settings.epsilon is not None:
        require_opacus()
    return description(message, request, home, _holdings(context, home))


def fit(message: Message, context: Context) -> Message:
    """Do one round's work on the training text, and enter it in the ledger before it leaves."""
    request = FitRequest.from_content(message.content)
    home = _home(context, request.run_id)
    settings = request.fit_settings
    if request.round > settings.rounds:
        raise Refusal(f"request.round = {request.round}: the run has {settings.rounds}")
    home.policy.check_bottom(request.model_id)
    state = received_state(message.content, home)
    holdings = _holdings(context, home)
    texts, labels = holdings.train.texts, holdings.train.labels
    if not texts or request.label_names != holdings.label_names:
        raise Refusal(
            f"request.labels: this device has {len(texts)} training examples of "
            f"{len(holdings.label_names)} classes, which are not the request's"
        )
    covered = min(len(texts), settings.federated.bbt_examples)
    if settings.shares == "losses" and covered < home.policy.min_metric_examples:
        raise Refusal(
            f"policy.min-metric-examples: a loss would cover {covered} examples, "
            f"it must cover {home.policy.min_metric_examples}"
        )
    method = _method(request, home)
    identity = _identity(request, state, home, texts, labels)
    terms = FitTerms(
        run=f"{request.run_id}/{settings.id}",
        shares=settings.shares,
        round=request.round,
        epsilon=_promised(settings, home),
        delta=settings.federated.delta if settings.epsilon is not None else 0.0,
        examples=len(texts),
    )
    new = home.fit_ledger.reserve(identity, terms, home.policy)
    sequences = _ids(home, request.model_id, texts, settings.model.max_length)
    method.model.train()  # loaded before the clock starts, as split tuning's bottom model is
    start = compute_seconds()
    arrays, metrics = _answer(request, state, home, method, sequences, labels, identity)
    spent = home.fit_ledger.spent()
    reply = fit_reply(
        arrays,
        {
            **metrics,
            "weight": 1.0 if request.clip > 0 else float(len(texts)),
            "seconds_fit": compute_seconds() - start,
            "new_fits": new,
            "spent_fits": spent.fits,
            "peak_memory_bytes": peak_memory_bytes(),
        },
        run_id=request.run_id,
        device_id=home.device_id,
        round_number=request.round,
        examples=len(texts),
        settings_id=settings.id,
    )
    return Message(reply, reply_to=message)


def judge(message: Message, context: Context) -> Message:
    """Hold the model that came against the evaluation examples; answer with sums only."""
    request = JudgeRequest.from_content(message.content)
    home = _home(context, request.run_id)
    home.policy.check_bottom(request.model_id)
    settings = request.fit_settings
    # what a model of the cloud's choice makes of this text is for runs that may train on it
    home.policy.check_fit(settings.shares, 1, settings.epsilon)
    evaluation = _holdings(context, home).evaluation
    if len(evaluation.labels) < home.policy.min_metric_examples:
        raise Refusal(
            f"policy.min-metric-examples: {len(evaluation.labels)} examples, "
            f"a metric must cover {home.policy.min_metric_examples}"
        )
    if request.label_names != _holdings(context, home).label_names:
        raise Refusal("request.labels: not this device's classes")
    method = _method(request, home)
    state = received_state(message.content, home)
    try:
        method.model.load(state)
    except ValueError as error:
        raise Refusal(f"request.{error}") from None
    ids = _ids(home, request.model_id, evaluation.texts, settings.model.max_length)
    correct, loss = evaluate_locally(method.model, ids, evaluation.labels)
    metrics = {"examples": len(ids), "correct": correct, "loss_sum": round(loss, 2)}
    return Message(RecordDict({METRICS: MetricRecord({**metrics})}), reply_to=message)


def clip_as_asked(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let Flower's own mod clip the update where the strategy asks for it."""
    if FitRequest.from_content(message.content).clip > 0:
        return fixedclipping_mod(message, context, call_next)
    return call_next(message, context)


def check_answer(message: Message, content: RecordDict, home: DeviceHome) -> None:
    """Let an answer out only as its method promises it, and clipped where that was asked.

    Raises
    ------
    GuardError, InvalidReplyError
        Naming the rule that is broken.
    """
    request = FitRequest.from_content(message.content)
    state = received_state(message.content, home)
    schema = _method(request, home).reply_schema(state, _public(request, home))
    arrays = check_fit(content, request, schema)
    if content.config_records[FIT_HEADER]["device_id"] != home.device_id:
        raise GuardError(f"{FIT_HEADER}.device_id: not this device's")
    if request.clip > 0:
        norm = norm_of({name: arrays[name] - state[name] for name in arrays})
        if not norm <= request.clip * (1 + _CLIP_SLACK):
            raise GuardError("answer: is not clipped as asked")
    # serialised anew: a blob may hold more than the values that were checked
    content[ANSWER] = state_record(arrays)


def _answer(
    request: FitRequest,
    state: State,
    home: DeviceHome,
    method: FitMethod,
    sequences: list[NDArray[np.int32]],
    labels: list[int],
    identity: bytes,
) -> tuple[State, dict[str, float]]:
    """Work, or give the last answer again if this is a retry of it.

    A method that remembers must not take its step twice, and noise must not be drawn twice on the
    same gradients.
    """
    settings = request.fit_settings
    keeps = method.remembers or settings.epsilon is not None
    kept = _read_kept(home) if keeps else _Kept()
    if kept.identity == identity:
        return kept.answer, {}
    rng = keyed_generator(home.derive("order"), "fit", identity)
    work = Work(
        sequences=sequences,
        labels=labels,
        round=request.round,
        rounds=settings.rounds,
        proximal_mu=request.proximal_mu,
        seed=int.from_bytes(rng.bytes(8), "little") >> 1,
        memory=kept.memory if kept.run == _run_name(request) and request.round > 1 else {},
        public=_public(request, home),
        noise_key=hmac.digest(home.derive("fit-noise"), identity, "sha256"),
    )
    try:
        outcome = method.fit(state, work)
    except ValueError as error:
        # the model's own words about the names and shapes of the cloud's arrays
        if str(error).startswith("state:"):
            raise Refusal(f"request.{error}") from None
        raise
    if keeps:
        _write_kept(home, _Kept(identity, _run_name(request), outcome.arrays, outcome.memory))
    metrics = {
        name: float(value) if name in _EXACT else round(float(value), 4)
        for name, value in outcome.metrics.items()
    }
    noised = settings.epsilon is not None or request.clip > 0
    if noised or len(labels) < home.policy.min_metric_examples:
        metrics = {n: v for n, v in metrics.items() if n not in TEXT_METRICS}
    return outcome.arrays, metrics


def _promised(settings: FitSettings, home: DeviceHome) -> float | None:
    """Give what a run promises an example; nothing where its delta is too large to mean much."""
    meant = settings.federated.delta <= home.policy.max_delta
    return settings.epsilon if meant else None


@dataclass(frozen=True)
class _Kept:
    """What a device keeps of its last round: in one file, so that a crash leaves no half of it."""

    identity: bytes = b""
    run: bytes = b""
    answer: State = field(default_factory=dict)
    memory: State = field(default_factory=dict)


def _read_kept(home: DeviceHome) -> _Kept:
    path = home.root / _KEPT
    if not path.exists():
        return _Kept()
    arrays = load_file(path)
    parts: dict[str, State] = {"answer": {}, "memory": {}, "name": {}}
    for name, value in arrays.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    names = parts["name"]
    return _Kept(
        names["identity"].tobytes(), names["run"].tobytes(), parts["answer"], parts["memory"]
    )


def _write_kept(home: DeviceHome, kept: _Kept) -> None:
    """Write whole or not at all, for the owner's eyes."""
    arrays: dict[str, NDArray[Any]] = {
        "name/identity": np.frombuffer(kept.identity, dtype=np.uint8),
        "name/run": np.frombuffer(kept.run, dtype=np.uint8),
        **{f"answer/{name}": value for name, value in kept.answer.items()},
        **{f"memory/{name}": value for name, value in kept.memory.items()},
    }
    handle, temporary = tempfile.mkstemp(dir=home.root, prefix=".fit-")
    os.close(handle)
    save_file({name: np.ascontiguousarray(v) for name, v in arrays.items()}, temporary)
    Path(temporary).replace(home.root / _KEPT)


def _run_name(request: FitRequest) -> bytes:
    named = f"{request.run_id}/{request.model_id}/{request.fit_settings.id}"
    return hashlib.sha256(named.encode()).digest()


def _identity(
    request: FitRequest, state: State, home: DeviceHome, texts: list[str], labels: list[int]
) -> bytes:
    """Name an answer by all that determines it, keyed so that the file tells nothing."""
    digest = hmac.new(home.derive("ledger"), b"fit", hashlib.sha256)
    head = f"{request.run_id}/{request.model_id}/{request.fit_settings.id}/{request.round}"
    digest.update(f"{head}/{request.proximal_mu!r}/{request.clip!r}".encode())
    digest.update(digest_of(state))
    for text, label in zip(texts, labels, strict=True):
        digest.update(home.example_key(text) + int(label).to_bytes(8, "big"))
    return digest.digest()


def _method(request: FitRequest | JudgeRequest, home: DeviceHome) -> FitMethod:
    if not home.bundles.holds(request.model_id):
        raise Refusal("request.model_id: this model has not been provisioned")
    folder = home.bundles.path(request.model_id)
    return create_method(request.fit_settings, folder, request.label_names)


def _public(request: FitRequest, home: DeviceHome) -> Path | None:
    if not request.public_id:
        return None
    if not home.bundles.holds(request.public_id):
        raise Refusal("request.public_id: has not been provisioned")
    return home.bundles.path(request.public_id)


def _ids(
    home: DeviceHome, model_id: str, texts: list[str], max_length: int
) -> list[NDArray[np.int32]]:
    return tokenise(load_tokenizer(home.bundles.path(model_id)), texts, max_length)


def _home(context: Context, run_id: str) -> DeviceHome:
    from privtune_flwr.privacy.mods import device_home

    return device_home(context, run_id)


def _holdings(context: Context, home: DeviceHome) -> Holdings:
    return open_holdings(load_run_config(context.run_config), context.node_config, home)
