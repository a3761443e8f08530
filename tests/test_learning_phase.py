"""Learning before the release: what leaves a device."""

from __future__ import annotations

import math
import stat
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from device_kit import DCHI, RUN_ID, Device
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from learned_kit import (
    DRAFT,
    WIDTH,
    ToyLearner,
)
from learning_kit import FEW, LEARNS, MakeDevice, ask, flat, request, update_of
from scipy import stats

from privtune_flwr import client_app
from privtune_flwr.errors import InvalidReplyError
from privtune_flwr.privacy.learned_update import (
    norm_of,
)
from privtune_flwr.privacy.learning import State, Update
from privtune_flwr.privacy.mods import FAILED, GUARDED, REFUSED, egress_guard, privacy_mod
from privtune_flwr.protocol import (
    CLEAN,
    LEARN,
    LEARN_HEADER,
    METRICS,
    UPDATE,
    DescribeRequest,
    read_update,
)
from privtune_flwr.protocol.replies import MARK

pytestmark = pytest.mark.usefixtures("one_torch_thread", "registered")


@pytest.fixture(scope="module")
def device(make_device: MakeDevice, registered: None) -> Device:
    return make_device(run=FEW, **LEARNS)


# ------------------------------------------------------------------------------- what leaves


def test_an_update_leaves_with_nothing_but_what_the_protocol_names(
    device: Device, state: State
) -> None:
    reply = ask(device, state)
    assert set(reply.content) == {UPDATE, LEARN_HEADER, METRICS}
    header = reply.content.config_records[LEARN_HEADER]
    assert MARK not in header
    assert header["examples"] == len(device.holdings.train.texts)
    metrics = reply.content.metric_records[METRICS]
    # a metric that the protocol does not name stays on the device
    assert "secret" not in metrics
    loss = metrics["loss_sum"] / header["examples"]
    assert loss == pytest.approx(math.log(WIDTH), abs=0.2)
    sound = read_update(
        reply.content,
        request(device),
        state,
        device_id=device.home.device_id,
        examples=header["examples"],
    )
    assert norm_of(sound.change) > 0
    other = {"device_id": "other", "examples": header["examples"]}
    with pytest.raises(InvalidReplyError, match="another device"):
        read_update(reply.content, request(device), state, **other)
    with pytest.raises(InvalidReplyError, match="not the number that the device described"):
        read_update(
            reply.content, request(device), state, device_id=device.home.device_id, examples=3
        )


def test_the_update_is_clipped_and_carries_gaussian_noise_of_the_devices_own(
    device: Device, state: State
) -> None:
    raw = flat(update_of(ask(device, state)))
    clip = float(np.linalg.norm(raw)) / 4
    clipped = flat(update_of(ask(device, state, clip=clip)))
    np.testing.assert_allclose(clipped, raw / 4, rtol=1e-5)
    # below the bound it stays as it is
    np.testing.assert_array_equal(flat(update_of(ask(device, state, clip=8 * clip))), raw)

    noisy = ask(device, state, clip=clip, noise=0.7)
    noise = flat(update_of(noisy)) - clipped
    assert stats.kstest(noise / (0.7 * clip), "norm").pvalue > 1e-3
    metrics = noisy.content.metric_records[METRICS]
    # a sum over the text would be outside the guarantee
    assert "loss_sum" not in metrics
    assert "spent_update_rho" not in metrics  # unbounded: noiseless updates left before

    # a retry says nothing new; another round, setting or state draws independent noise
    again = ask(device, state, clip=clip, noise=0.7)
    np.testing.assert_array_equal(flat(update_of(again)), flat(update_of(noisy)))
    assert again.content.metric_records[METRICS]["new_updates"] == 0
    moved = {name: value + np.float32(1e-4) for name, value in state.items()}
    for sent, changes in ((state, {"round": 2}), (state, {"rounds": 3, "noise": 0.8}), (moved, {})):
        own = {"clip": clip, "noise": 0.7} | changes
        raw_there = flat(update_of(ask(device, sent, **own | {"noise": 0.0})))
        other = flat(update_of(ask(device, sent, **own))) - raw_there
        assert abs(stats.pearsonr(noise, other).statistic) < 0.15


def test_another_device_and_other_text_draw_other_noise(
    device: Device, make_device: MakeDevice, state: State
) -> None:
    other = make_device(run=FEW, **LEARNS)
    more = make_device(run=FEW | {"data.train-examples": 220}, **LEARNS)
    (more.root / "secret").unlink(missing_ok=True)
    (more.root / "secret").write_bytes(device.home.secret)
    (more.root / "secret").chmod(0o600)
    noises = []
    for one in (device, other, more):
        plain = flat(update_of(ask(one, state, clip=1e-3)))
        noises.append(flat(update_of(ask(one, state, clip=1e-3, noise=5.0))) - plain)
    assert abs(stats.pearsonr(noises[0], noises[1]).statistic) < 0.15
    assert abs(stats.pearsonr(noises[0], noises[2]).statistic) < 0.15


def test_a_retry_sends_the_same_bytes_where_training_does_not_repeat(
    make_device: MakeDevice, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_device(run=FEW, **LEARNS)
    learn = ToyLearner.update
    calls: list[int] = []

    def restless(self: ToyLearner, *arguments: Any, **options: Any) -> Update:
        calls.append(1)
        update = learn(self, *arguments, **options)
        drift = np.float32(1e-6 * len(calls))
        return replace(update, change={n: a + drift for n, a in update.change.items()})

    monkeypatch.setattr(ToyLearner, "update", restless)
    first, again = (ask(device, state, clip=1.0, noise=0.5) for _ in range(2))
    np.testing.assert_array_equal(flat(update_of(first)), flat(update_of(again)))
    other = ask(device, state, clip=1.0, noise=0.5, round=2)
    assert (flat(update_of(other)) != flat(update_of(first))).all()
    assert len(calls) == 3
    assert device.home.ledger.spent().updates == 2
    kept = device.root / "last-update.safetensors"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_the_ledger_prices_updates(make_device: MakeDevice, state: State) -> None:
    device = make_device(run=FEW, policy_learning_rounds=2)
    first = ask(device, state, clip=1.0, noise=2.0, rounds=2)
    assert first.content.metric_records[METRICS]["spent_update_rho"] == pytest.approx(0.5)
    second = ask(device, state, clip=1.0, noise=2.0, round=2, rounds=2)
    assert second.content.metric_records[METRICS]["spent_update_rho"] == pytest.approx(1.0)
    refused = ask(device, state, clip=1.0, noise=4.0, round=2, rounds=2)
    assert "policy.learning-rounds: the run needs 3, allowed: 2" in refused.error.reason
    assert ask(device, state, clip=1.0, noise=2.0, rounds=2).has_content()
    assert device.home.ledger.spent().updates == 2


# ---------------------------------------------------------------------------- the owner's word


@pytest.mark.parametrize(
    ("node_config", "changes", "named"),
    [
        ({}, {}, "policy.learning-rounds: the run needs 3, allowed: 0"),
        ({"policy_learning_rounds": 2}, {}, "policy.learning-rounds: the run needs 3, allowed: 2"),
        (LEARNS | {"policy_max_update_norm": 1.0}, {}, "policy.max-update-norm: the run needs inf"),
        (
            LEARNS | {"policy_min_learning_noise": 1.0},
            {"clip": 1.0, "noise": 0.5},
            "policy.min-learning-noise: the run has 0.5, at least: 1",
        ),
        (LEARNS | {"policy_max_bits": 20.0}, {}, "policy.max-bits: the run needs 24, allowed: 20"),
        (LEARNS | {"policy_max_eta": 20.0}, {}, "policy.max-eta: the run needs inf"),
        (LEARNS | {"policy_mechanisms": "dchi"}, {}, "policy.mechanisms: 'toy-learned'"),
        (LEARNS, {"round": 4}, "request.round = 4: allowed: 1 to 3"),
        (LEARNS, {"noise": 1.0}, "request.noise: is in units of clip"),
        (LEARNS, {"clip": math.nan}, "request.clip = nan"),
        (LEARNS, {"num_labels": 3}, "request.num_labels = 3"),
        (
            LEARNS,
            {"mechanism": DCHI.to_json()},
            "'dchi' has nothing to learn",
        ),
    ],
)
def test_a_learning_phase_that_asks_for_too_much_is_refused_by_name(
    node_config: dict[str, Any],
    changes: dict[str, Any],
    named: str,
    make_device: MakeDevice,
    state: State,
) -> None:
    device = make_device(run=FEW, **node_config)
    reply = ask(device, state, **changes)
    assert reply.has_error()
    assert (reply.error.code, named in reply.error.reason) == (REFUSED, True), reply.error.reason
    assert device.home.ledger.spent().updates == 0


def test_the_refusal_comes_with_the_description(make_device: MakeDevice) -> None:
    terms = {"run_id": RUN_ID, "mechanism": DRAFT.to_json(), "labels": True, "epochs": 1}

    def describe(device: Device, rounds: int) -> Message:
        request = DescribeRequest(
            **terms, bottom_id=device.bottom_id, bundles="", learning_rounds=rounds
        )
        return device.ask(request)

    strict = make_device(run=FEW)
    assert "policy.learning-rounds" in describe(strict, 5).error.reason
    assert describe(strict, 0).has_content()
    assert describe(make_device(run=FEW, **LEARNS), 5).has_content()


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({}, "number of arrays"),
        ({"a": np.zeros(3)}, "wrong dtype"),
        ({"a b": np.zeros(3, np.float32)}, "a name is not allowed"),
        ({"a": np.full(3, np.nan, np.float32)}, "NaN or Inf"),
        ({"a": np.zeros((0, 3), np.float32)}, "a shape is not allowed"),
        ({"a": np.zeros(3000, np.float32)}, "12000 bytes, allowed: 8000"),
    ],
)
def test_a_malformed_state_is_refused(
    arrays: dict[str, np.ndarray], named: str, make_device: MakeDevice
) -> None:
    device = make_device(run=FEW, **LEARNS, policy_max_bundle_bytes=8000)
    content = request(device).to_content()
    content["payload"] = ArrayRecord({name: Array(value) for name, value in arrays.items()})
    reply = device.send(content, LEARN)
    assert reply.error.code == REFUSED
    assert "request.state" in reply.error.reason
    assert named in reply.error.reason


# ---------------------------------------------------------------------- misbehaving handlers


def handler_that(change: Callable[[RecordDict], None]) -> Callable[[Message, Context], Message]:
    def handler(message: Message, context: Context) -> Message:
        reply = client_app.learn(message, context)
        change(reply.content)
        return reply

    return handler


def without_the_mod(content: RecordDict) -> None:
    content[UPDATE] = content.array_records.pop(CLEAN)
    del content.array_records["device-only"]
    content.config_records[LEARN_HEADER][MARK] = b"m" * 32


def reshaped(content: RecordDict) -> None:
    content[CLEAN] = ArrayRecord(
        {n: Array(a.numpy()[..., :2]) for n, a in content.array_records[CLEAN].items()}
    )


def not_finite(content: RecordDict) -> None:
    spoilt = {n: a.numpy() * np.float32(np.inf) for n, a in content.array_records[CLEAN].items()}
    content[CLEAN] = ArrayRecord({n: Array(a) for n, a in spoilt.items()})


def doubled(content: RecordDict) -> None:
    record = content.array_records[UPDATE]
    record["bias"] = Array(record["bias"].numpy() * np.float32(2))


def with_text(content: RecordDict) -> None:
    content.config_records[LEARN_HEADER]["text"] = "a sentence"


def with_a_metric(content: RecordDict) -> None:
    content.metric_records[METRICS]["word"] = 1.0


@pytest.mark.parametrize(
    ("handler", "code"),
    [
        (handler_that(without_the_mod), FAILED),
        (handler_that(reshaped), FAILED),
        (handler_that(not_finite), FAILED),
        (handler_that(with_text), GUARDED),
        (handler_that(with_a_metric), GUARDED),
        (handler_that(lambda c: c.update({"more": c.array_records[CLEAN]})), GUARDED),
    ],
)
def test_a_misbehaving_handler_lets_no_update_out(
    handler: Any, code: int, device: Device, state: State
) -> None:
    app = ClientApp(mods=[egress_guard, privacy_mod])
    app.train("learn")(handler)
    reply = ask(device, state, app)
    assert reply.has_error()
    assert (reply.has_content(), reply.error.code) == (False, code)


def test_only_what_the_mod_marked_leaves(device: Device, state: State) -> None:
    unmarked = ClientApp(mods=[egress_guard])
    unmarked.train("learn")(handler_that(without_the_mod))
    assert "mark" in ask(device, state, unmarked).error.reason

    def tamper(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        doubled(reply.content)
        return reply

    tampered = ClientApp(mods=[egress_guard, tamper, privacy_mod])
    tampered.train("learn")(client_app.learn)
    reply = ask(device, state, tampered)
    assert (reply.error.code, "not clipped and noised" in reply.error.reason) == (GUARDED, True)
