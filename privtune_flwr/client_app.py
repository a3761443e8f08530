"""What a device answers: one thin handler an action.

Handlers leave clean representations and a ``device-only`` record in their reply; the mods take
both out again (see :mod:`privtune_flwr.privacy.mods`). Nothing is kept in memory between two
messages but caches keyed by content.
"""

from __future__ import annotations

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from privtune_flwr.bundle import BundleError, Manifest
from privtune_flwr.client_describe import description
from privtune_flwr.client_fit import register as register_fit
from privtune_flwr.client_slow import slow_mod
from privtune_flwr.client_splitfed import register as register_splitfed
from privtune_flwr.config import load_run_config
from privtune_flwr.data import tokenise
from privtune_flwr.device import DeviceHome, Holdings, held_bottom, open_holdings
from privtune_flwr.errors import GuardError, Refusal
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.mods import artefact_path, device_home, egress_guard, privacy_mod
from privtune_flwr.privacy.registry import create_mechanism, mechanism_class
from privtune_flwr.privacy.update_mod import data_record, raw_record, received_state
from privtune_flwr.protocol import (
    CLEAN,
    DEVICE_ONLY,
    LABELS,
    LEARN_HEADER,
    METRICS,
    RELEASE_HEADER,
    SCHEMA_VERSION,
    DescribeRequest,
    EvaluateRequest,
    LearnRequest,
    ProvisionRequest,
    ReleaseRequest,
)
from privtune_flwr.protocol.requests import INQUIRY, PAYLOAD
from privtune_flwr.protocol.updates import LEARNER_METRICS, update_header
from privtune_flwr.usage import compute_seconds

MAX_LOGIT = 20.0

app = ClientApp(mods=[egress_guard, slow_mod, privacy_mod])
register_fit(app)
register_splitfed(app)


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Say what this device holds, or refuse the run's terms before any work is done."""
    request = DescribeRequest.from_content(message.content)
    home = device_home(context, request.run_id)
    _check_terms(request, home)
    home.policy.check_releases(request.epochs)
    if request.learning_rounds:
        home.policy.check_learning(request.learning_rounds, request.clip, request.noise)
    return description(message, request, home, _holdings(context, home))


@app.query("provision")
def provision(message: Message, context: Context) -> Message:
    """Keep one part of a bundle; verified by hash once the last one is there."""
    request = ProvisionRequest.from_content(message.content)
    home = device_home(context, request.run_id)
    try:
        manifest = Manifest.from_json(request.manifest)
        if manifest.total_bytes > home.policy.max_bundle_bytes:
            raise Refusal(
                f"policy.max-bundle-bytes: the run sends {manifest.total_bytes}, "
                f"allowed: {home.policy.max_bundle_bytes}"
            )
        data = message.content.array_records[PAYLOAD]["data"].numpy().tobytes()
        if request.part == INQUIRY:
            held = home.bundles.holds(manifest.id)
        else:
            held = home.bundles.receive(manifest, request.part, request.parts, data)
    except BundleError as error:
        # built from the cloud's own bytes only
        raise Refusal(str(error)) from None
    metrics = MetricRecord({"held": int(held)})
    return Message(RecordDict({METRICS: metrics}), reply_to=message)


@app.train("learn")
def learn(message: Message, context: Context) -> Message:
    """Learn from all training text; the privacy mod clips and noises what came of it."""
    request = LearnRequest.from_content(message.content)
    home = device_home(context, request.run_id)
    _check_terms(request, home)
    request.check()
    home.policy.check_learning(request.rounds, request.clip, request.noise)
    state = received_state(message.content, home)
    kind = mechanism_class(request.spec.name)
    if not kind.learned:
        raise Refusal(f"request.mechanism: {kind.name!r} has nothing to learn")
    holdings = _holdings(context, home)
    texts, labels = holdings.train.texts, holdings.train.labels
    if not texts or request.num_labels != len(holdings.label_names):
        raise Refusal(
            f"request.num_labels = {request.num_labels}: this device has {len(texts)} training "
            f"examples of {len(holdings.label_names)} classes"
        )
    bottom, tokenizer = held_bottom(home, request.bottom_id)
    artefact = artefact_path(home, request.spec.artefact)
    learner = kind.learner(request.spec, artefact, bottom, request.num_labels)
    # the device's own choice of order and drop-out, the same in a retry
    rng = keyed_generator(home.derive("order"), "learning", request.learn_key, request.round)
    start = compute_seconds()
    update = learner.update(
        state,
        tokenise(tokenizer, texts, request.max_length),
        labels,
        round_number=request.round,
        seed=int.from_bytes(rng.bytes(32), "little"),  # noise may hang on it: not to be guessed
    )
    if update.examples != len(texts):
        raise GuardError("update: must be weighted by the number of training examples")
    metrics = {k: round(float(v), 2) for k, v in update.metrics.items() if k in LEARNER_METRICS}
    content = RecordDict(
        {
            CLEAN: raw_record(update.change),
            DEVICE_ONLY: ArrayRecord(data_record(home, texts, labels)),
            LEARN_HEADER: update_header(request, home.device_id, len(texts)),
            METRICS: MetricRecord({**metrics, "seconds_learn": compute_seconds() - start}),
        }
    )
    return Message(content, reply_to=message)


@app.train("release")
def release(message: Message, context: Context) -> Message:
    """Compute one chunk's representations; the privacy mod turns them into smashed data."""
    request = ReleaseRequest.from_content(message.content)
    home = device_home(context, request.run_id)
    _check_terms(request, home)
    if request.split not in ("train", "eval"):
        raise Refusal(f"request.split = {request.split!r}: allowed: train, eval")
    chunk = _holdings(context, home).chunk(request.split, request.chunk, request.chunk_size)
    bottom, tokenizer = held_bottom(home, request.bottom_id)
    start = compute_seconds()
    ids = tokenise(tokenizer, chunk.texts, request.max_length)
    hidden = bottom.encode(ids)
    seconds = compute_seconds() - start
    keys = np.stack([np.frombuffer(home.example_key(t), dtype=np.uint8) for t in chunk.texts])
    content = RecordDict(
        {
            CLEAN: ArrayRecord(
                {
                    "hidden": Array(np.concatenate(hidden)),
                    "lengths": Array(np.array([len(i) for i in ids], dtype=np.uint16)),
                }
            ),
            DEVICE_ONLY: ArrayRecord(
                {"token-ids": Array(np.concatenate(ids)), "examples": Array(keys)}
            ),
            RELEASE_HEADER: ConfigRecord(
                {
                    "schema": SCHEMA_VERSION,
                    "run_id": request.run_id,
                    "device_id": home.device_id,
                    "split": request.split,
                    "chunk": request.chunk,
                    "epoch": request.epoch,
                    "examples": len(chunk.texts),
                    "hidden": bottom.hidden_size,  # the mod puts the released width here
                    "mechanism": request.spec.id,
                    "wire": request.wire,
                }
            ),
            METRICS: MetricRecord({"seconds_bottom": seconds}),
        }
    )
    if request.labels and request.split == "train":
        content[LABELS] = ArrayRecord({"labels": Array(np.array(chunk.labels, dtype=np.int32))})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Hold the top model's logits against the labels that never left; answer with sums only."""
    request = EvaluateRequest.from_content(message.content)
    home = device_home(context, request.run_id)
    labels = _holdings(context, home).evaluation.labels
    logits_BC = message.content.array_records[PAYLOAD]["logits"].numpy()
    if request.split != "eval" or len(logits_BC) != len(labels) or logits_BC.ndim != 2:
        raise Refusal(f"request.examples: this device has {len(labels)} evaluation examples")
    if len(labels) < home.policy.min_metric_examples:
        raise Refusal(
            f"policy.min-metric-examples: {len(labels)} examples, "
            f"a metric must cover {home.policy.min_metric_examples}"
        )
    # Outputs chosen with a wide range would spell every label out in one sum (weights 2^i): a
    # narrow range and a rounded answer leave it the few bits that a metric is.
    logits = torch.from_numpy(logits_BC.astype(np.float32)).clamp(-MAX_LOGIT, MAX_LOGIT)
    target = torch.tensor(labels)
    metrics = MetricRecord(
        {
            "examples": len(labels),
            "correct": int((logits.argmax(1) == target).sum()),
            "loss_sum": round(
                float(torch.nn.functional.cross_entropy(logits, target, reduction="sum")), 2
            ),
        }
    )
    return Message(RecordDict({METRICS: metrics}), reply_to=message)


def _check_terms(
    request: DescribeRequest | LearnRequest | ReleaseRequest, home: DeviceHome
) -> None:
    """Hold the run's terms against the policy. The privacy mod checks the strength once more."""
    home.policy.check_bottom(request.bottom_id)
    home.policy.check_labels(request.labels)
    spec = request.spec
    if spec.artefact and not home.bundles.holds(spec.artefact):
        # how strong an artefact makes it is known once it is here; until then the bound counts
        home.policy.check_mechanism(spec.name, mechanism_class(spec.name).declared(spec))
    else:
        mechanism = create_mechanism(spec, artefact_path(home, spec.artefact))
        home.policy.check_mechanism(mechanism.name, mechanism.strength)


def _holdings(context: Context, home: DeviceHome) -> Holdings:
    return open_holdings(load_run_config(context.run_config), context.node_config, home)
