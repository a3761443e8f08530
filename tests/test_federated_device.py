"""What a device lets out in a federated baseline: guard, policy, ledger, hostile requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_kit import RUN_ID, Device
from federated_kit import (
    LABELS,
    Place,
    answer_of,
    ask_fit,
    assert_same,
    fit_content,
    model_of,
)
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from tiny_models import sentences

from privtune_flwr import client_fit
from privtune_flwr.errors import Refusal
from privtune_flwr.federated.local import evaluate_locally
from privtune_flwr.privacy.fit_ledger import FitLedger, FitTerms
from privtune_flwr.privacy.learned_update import norm_of
from privtune_flwr.privacy.ledger import Ledger
from privtune_flwr.privacy.mods import GUARDED, REFUSED, egress_guard, privacy_mod
from privtune_flwr.privacy.policy import load_policy
from privtune_flwr.protocol import METRICS
from privtune_flwr.protocol.fit import ANSWER, FIT, FIT_HEADER, JUDGE, JoinRequest, JudgeRequest
from privtune_flwr.protocol.requests import REQUEST

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path_factory.mktemp("federated"), patch)


@pytest.fixture(scope="module")
def devices(place: Place) -> dict[int, Device]:
    """Three devices of 8, 12 and 20 training examples, provisioned."""
    place.cloud()
    return {n: place.device(n, examples) for n, examples in ((1, 10), (2, 15), (3, 25))}


# ---------------------------------------------------------------------------------- the guard


def _spoiled(spoil: Callable[[RecordDict], None], mods: Any = None) -> ClientApp:
    app = ClientApp(mods=mods or [egress_guard, privacy_mod])

    @app.train("fit")
    def fit(message: Message, context: Context) -> Message:
        reply = client_fit.fit(message, context)
        spoil(reply.content)
        return reply

    return app


def _arrays(change: Callable[[dict[str, Any]], None]) -> Callable[[RecordDict], None]:
    def spoil(content: RecordDict) -> None:
        arrays = {n: a.numpy().copy() for n, a in content.array_records[ANSWER].items()}
        change(arrays)
        content[ANSWER] = ArrayRecord({n: Array(v) for n, v in arrays.items()})

    return spoil


def _first(function: Callable[[Any], Any]) -> Callable[[RecordDict], None]:
    def change(arrays: dict[str, Any]) -> None:
        name = sorted(arrays)[0]
        arrays[name] = function(arrays[name])

    return _arrays(change)


def _header(**values: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.config_records[FIT_HEADER].update(values)


LEAK = "the-text-of-the-device"
SPOILS: dict[str, Callable[[RecordDict], None]] = {
    "another-name": _arrays(lambda a: a.update({"other": a.pop(sorted(a)[0])})),
    "one-more": _arrays(lambda a: a.update(more=np.zeros(3, np.float32))),
    "one-less": _arrays(lambda a: a.pop(sorted(a)[0])),
    "shape": _first(lambda v: v[..., None]),
    "dtype": _first(lambda v: v.astype(np.float64)),
    "nan": _first(lambda v: v * np.float32(np.nan)),
    "inf": _first(lambda v: v + np.float32(np.inf)),
    "record": lambda content: content.update(extra=ArrayRecord()),
    "metric": lambda content: content.metric_records[METRICS].update({LEAK: 1.0}),
    "metric-nan": lambda content: content.metric_records[METRICS].update({"steps": np.nan}),
    "device-id": _header(device_id=LEAK),
    "header-key": _header(note=LEAK),
    "round": _header(round=2),
    "settings": _header(settings=LEAK),
    "run": _header(run_id=LEAK),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_only_what_was_promised_leaves(
    place: Place, devices: dict[int, Device], spoil: Callable[[RecordDict], None]
) -> None:
    cloud = place.cloud()
    state = model_of(cloud).state()
    reply = ask_fit(devices[1], cloud, state, app=_spoiled(spoil))
    assert reply.has_error()
    assert reply.error.code == GUARDED
    assert not reply.has_content()
    assert LEAK not in reply.error.reason
    assert ask_fit(devices[1], cloud, state).has_content()


def test_what_must_be_clipped_leaves_clipped(place: Place, devices: dict[int, Device]) -> None:
    cloud = place.cloud()
    state = model_of(cloud).state()
    free = answer_of(ask_fit(devices[1], cloud, state))
    norm = norm_of({n: free[n] - state[n] for n in state})
    bound = norm / 3
    reply = ask_fit(devices[1], cloud, state, flower={"clipping_norm": bound})
    clipped = answer_of(reply)
    assert norm_of({n: clipped[n] - state[n] for n in state}) == pytest.approx(bound, rel=1e-3)
    # sums over the text have no noise: they stay where noise is to come
    assert not {"loss_sum", "correct", "seen"} & set(reply.content.metric_records[METRICS])
    assert reply.content.metric_records[METRICS]["weight"] == 1.0
    # without the mod that clips, the guard lets nothing out
    bare = _spoiled(lambda content: None, mods=[egress_guard])
    unclipped = ask_fit(devices[1], cloud, state, app=bare, flower={"clipping_norm": bound})
    assert unclipped.error.code == GUARDED
    assert "clipped" in unclipped.error.reason


def test_a_sum_over_the_text_does_not_leave_with_a_clipped_answer(
    place: Place, devices: dict[int, Device]
) -> None:
    cloud = place.cloud()
    told = _spoiled(lambda c: c.metric_records[METRICS].update({"loss_sum": 1.0}))
    state = model_of(cloud).state()
    reply = ask_fit(devices[1], cloud, state, app=told, flower={"clipping_norm": 1.0})
    assert reply.error.code == GUARDED


# ---------------------------------------------------------------------------- policy and ledger


def test_a_real_device_refuses_until_its_owner_allows_it(place: Place) -> None:
    cloud = place.cloud()
    state = model_of(cloud).state()
    assert load_policy({}, simulated=False).fit_rounds == 0
    assert load_policy({}, simulated=True).fit_rounds > 10**6
    for number, policy, words in (
        (7, {"fit_rounds": 0}, "policy.fit-rounds: the run needs 1, allowed: 0"),
        (8, {"fit_shares": "weights,logits"}, "policy.fit-shares: 'adapters' is not allowed"),
        (9, {"max_fit_epsilon": 3.0}, "policy.max-fit-epsilon: the run needs inf, allowed: 3"),
    ):
        device = place.device(number, 10, **policy)
        reply = ask_fit(device, cloud, state)
        assert reply.error.code == REFUSED
        assert words in reply.error.reason
        assert device.home.fit_ledger.spent().fits == 0
        # nor is the text a question to be asked of any model
        judge = JudgeRequest(
            run_id=RUN_ID,
            model_id=cloud.model_id,
            settings=cloud.settings.to_json(),
            labels="\n".join(LABELS),
        )
        judged = device.send(judge.to_content_with(state), JUDGE)
        assert words.split(":")[0] in judged.error.reason


def test_the_ledger_counts_a_retry_once(place: Place) -> None:
    cloud = place.cloud()
    device = place.device(10, 10, fit_rounds=2)
    state = model_of(cloud).state()
    one, two = (ask_fit(device, cloud, state) for _ in range(2))
    assert_same(answer_of(one), answer_of(two))
    spent = [r.content.metric_records[METRICS]["spent_fits"] for r in (one, two)]
    new = [r.content.metric_records[METRICS]["new_fits"] for r in (one, two)]
    assert (spent, new) == ([1, 1], [1, 0])
    other = ask_fit(device, cloud, answer_of(one), flower={"server-round": 2})
    assert other.content.metric_records[METRICS]["spent_fits"] == 2
    third = ask_fit(device, cloud, answer_of(other), flower={"server-round": 2})
    assert "policy.fit-rounds: the run needs 3, allowed: 2" in third.error.reason
    # what was answered may be asked for again
    assert ask_fit(device, cloud, state).has_content()


def test_a_run_with_an_epsilon_gives_one_answer_a_round(tmp_path: Path) -> None:
    policy = load_policy({"policy-fit-rounds": 100, "policy-max-fit-epsilon": 4.0}, simulated=False)
    ledger = FitLedger(Ledger(tmp_path / "ledger.sqlite").path)

    def reserve(name: bytes, number: int, run: str = "run", epsilon: float | None = 2.0) -> int:
        return ledger.reserve(name, FitTerms(run, "weights", number, epsilon, 1e-5, 9), policy)

    assert [reserve(b"a", 1), reserve(b"a", 1), reserve(b"b", 2)] == [1, 0, 1]
    with pytest.raises(Refusal, match=r"request\.round = 1: another answer"):
        reserve(b"c", 1)
    assert reserve(b"d", 1, run="other") == 1
    with pytest.raises(Refusal, match=r"max-fit-epsilon: the run needs 5"):
        reserve(b"e", 3, epsilon=5.0)
    spent = ledger.spent()
    # rounds of one run share its epsilon, runs add up
    assert (spent.fits, spent.epsilon, spent.delta) == (3, 4.0, 2e-5)


# ------------------------------------------------------------------------------ hostile requests


def _settings(place: Place, **changes: Any) -> str:
    return json.dumps(json.loads(place.cloud().settings.to_json()) | changes)


HOSTILE: dict[str, tuple[Callable[[Place], dict[str, Any]], str]] = {
    "broken": (lambda p: {"settings": "{"}, "request.settings: not a JSON object"),
    "oversized": (lambda p: {"settings": " " * 20_000}, "request.settings: longer than"),
    "unknown": (lambda p: {"settings": _settings(p, other=1)}, "request.settings: other"),
    "nan-rate": (
        lambda p: {
            "settings": p.cloud()
            .settings.to_json()
            .replace('"proximal-mu":0.01', '"proximal-mu":NaN')
        },
        "request.settings: ",
    ),
    "epochs": (
        lambda p: {"settings": p.cloud().settings.to_json().replace('"epochs":2', '"epochs":2e9')},
        "request.settings: train.epochs",
    ),
    "claimed": (
        lambda p: {
            "settings": p.cloud()
            .settings.to_json()
            .replace('"strategy":"fedavg"', '"strategy":"bbt"')
            .replace('"example-privacy":"none"', '"example-privacy":"dp-sgd"')
        },
        "federated.example-privacy",
    ),
    "round-0": (lambda p: {"flower": {"server-round": 0}}, "request.round = 0"),
    "round-3": (lambda p: {"flower": {"server-round": 3}}, "request.round = 3: the run has 2"),
    "round-text": (lambda p: {"flower": {"server-round": "1"}}, "request.round: must be of type"),
    "mu-nan": (lambda p: {"flower": {"proximal-mu": float("nan")}}, "request.proximal_mu"),
    "mu-negative": (lambda p: {"flower": {"proximal-mu": -1.0}}, "request.proximal_mu"),
    "clip-inf": (lambda p: {"flower": {"clipping_norm": float("inf")}}, "request.clip"),
    "unknown-field": (lambda p: {"flower": {"lr": 1.0}}, "request.lr: unknown"),
    "labels": (lambda p: {"labels": "high"}, "request.labels"),
    "model": (lambda p: {"model_id": "ab" * 32}, "request.model_id"),
    "public": (lambda p: {"public_id": "ab" * 32}, "request.public_id"),
}


@pytest.mark.parametrize(("changes", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_request_is_refused_by_name(
    place: Place,
    devices: dict[int, Device],
    changes: Callable[[Place], dict[str, Any]],
    words: str,
) -> None:
    cloud = place.cloud()
    reply = ask_fit(devices[1], cloud, model_of(cloud).state(), **changes(place))
    assert reply.error.code == REFUSED, reply.error.reason
    assert words in reply.error.reason


@pytest.mark.parametrize("action", [FIT, JUDGE])
def test_a_state_that_is_not_this_models_is_refused(
    place: Place, devices: dict[int, Device], action: str
) -> None:
    cloud = place.cloud()
    state = model_of(cloud).state()
    name = sorted(state)[0]
    for wrong in (
        {**state, "more": state[name]},
        {n: v for n, v in state.items() if n != name},
        state | {name: state[name][..., None]},
        state | {name: np.full_like(state[name], np.nan)},
    ):
        content = fit_content(cloud, wrong)
        if action == JUDGE:
            content[REQUEST] = JudgeRequest(
                run_id=RUN_ID,
                model_id=cloud.model_id,
                settings=cloud.settings.to_json(),
                labels="\n".join(LABELS),
            ).to_content()[REQUEST]
        reply = devices[1].send(content, action)
        assert reply.error.code == REFUSED, reply.error.reason
        assert "request.state" in reply.error.reason
    # the model is as it was
    assert ask_fit(devices[1], cloud, state).has_content()


def test_outputs_of_a_chosen_model_cannot_spell_the_labels(place: Place) -> None:
    model = model_of(place.cloud())
    state = model.state()
    (bias,) = [n for n in state if n.endswith("classifier.modules_to_save.default.bias")] or [
        n for n in state if "classifier" in n and n.endswith("bias")
    ]
    model.load(state | {bias: np.array([1e6, -1e6], np.float32)})
    correct, loss = evaluate_locally(model, sentences([5, 6, 7]), [1, 1, 0])
    assert (correct, loss) == (1, pytest.approx(80.0, rel=1e-3))


def test_join_says_counts_and_what_is_held(place: Place, devices: dict[int, Device]) -> None:
    cloud = place.cloud()
    request = JoinRequest(
        run_id=RUN_ID,
        model_id=cloud.model_id,
        settings=cloud.settings.to_json(),
        bundles=f"{cloud.model_id},{'cd' * 32}",
    )
    record = devices[2].send(request.to_content(), request.action).content.config_records["device"]
    assert (record["train_examples"], record["eval_examples"]) == (12, 3)
    assert record["held"] == cloud.model_id
    assert record["label_names"] == "\n".join(LABELS)
