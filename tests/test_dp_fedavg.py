"""DP-FedAvg: the devices' clip, the cloud's noise, Flower's account of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from device_kit import Device
from federated_kit import (
    FederatedWire,
    Place,
    answer_of,
    ask_fit,
    model_of,
    noise_holds,
)
from flwr.app import Error, Message

from privtune_flwr import server_app
from privtune_flwr.config import ConfigError
from privtune_flwr.privacy.learned_update import norm_of
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol import METRICS
from strategies.dp_fedavg import DeviceLevelPrivacy
from strategies.federated import FederatedTuning

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CENTRAL = {"train__strategy": "dp-fedavg", "federated__update_clip": 0.05}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path_factory.mktemp("dp-fedavg"), patch)


@pytest.fixture(scope="module")
def devices(place: Place) -> dict[int, Device]:
    place.cloud()
    return {n: place.device(n, examples) for n, examples in ((1, 10), (2, 10), (3, 20))}


def test_the_guard_lets_no_update_beyond_the_clip_out(
    place: Place, devices: dict[int, Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = place.cloud(**CENTRAL)
    state = model_of(cloud).state()
    free = answer_of(ask_fit(devices[1], cloud, state))
    assert norm_of({n: free[n] - state[n] for n in state}) > 0.05
    flower = {"server-round": 1, "clipping_norm": 0.05}
    reply = ask_fit(devices[1], cloud, state, flower=flower)
    clipped = {n: v - state[n] for n, v in answer_of(reply).items()}
    assert norm_of(clipped) == pytest.approx(0.05, rel=1e-3)
    metrics = reply.content.metric_records[METRICS]
    assert metrics["weight"] == 1.0
    assert "loss_sum" not in metrics
    # a mod that does not clip is found out
    monkeypatch.setattr(
        "privtune_flwr.client_fit.fixedclipping_mod",
        lambda message, context, call_next: call_next(message, context),
    )
    broken = ask_fit(devices[1], cloud, state, flower=flower)
    assert broken.has_error()


def account_of(run: FederatedTuning) -> float:
    assert isinstance(run._aggregator, DeviceLevelPrivacy)
    return float(run._aggregator.accountant.get_privacy_spent().epsilon)


def run_central(
    place: Place, devices: dict[int, Device], name: str, wire: Any = None, **changes: Any
) -> FederatedTuning:
    return place.run(name, wire or FederatedWire(devices), **CENTRAL, **changes)


def test_the_mean_has_noise_of_clip_times_multiplier_over_the_devices(
    place: Place, devices: dict[int, Device]
) -> None:
    wire = FederatedWire(devices)
    sent: list[State] = []

    def keep(node: int, reply: Message) -> Message:
        if reply.has_content() and "answer" in reply.content:
            sent.append(answer_of(reply))
        return reply

    wire.after = keep
    run = run_central(place, devices, "noise", wire, train__epochs=1, federated__update_noise=4.0)
    assert len(sent) == 3
    mean = {n: sum(s[n].astype(np.float64) for s in sent) / 3 for n in sent[0]}
    noise = {n: run.state[n] - mean[n] for n in mean}
    assert noise_holds(noise, 4.0 * 0.05 / 3)
    assert not noise_holds(noise, 4.0 * 0.05)


def test_epsilon_grows_with_rounds_and_survives_a_resume(
    place: Place, devices: dict[int, Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: dict[str, Any] = {"train__epochs": 4}
    whole = run_central(place, devices, "whole", **epochs)
    told = whole.guarantee()
    assert told["epsilon"] == account_of(whole) > 0
    assert "not hold against the cloud" in told["statement"].replace("\n", " ")
    assert "4 averaged rounds" in told["statement"]
    finish = FederatedTuning._finish_round

    def die(self: FederatedTuning, number: int, record: Any, seconds: float) -> None:
        finish(self, number, record, seconds)
        if number == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FederatedTuning, "_finish_round", die)
        with pytest.raises(KeyboardInterrupt):
            run_central(place, devices, "cut", **epochs)
    # a device more or less than before changes nothing about what was spent
    fewer = {n: devices[n] for n in (1, 2)}
    resumed = run_central(place, fewer, "cut", **epochs)
    assert len(resumed.progress.rounds) == 4
    assert account_of(resumed) == pytest.approx(account_of(whole))
    short = run_central(place, devices, "short", train__epochs=2)
    assert account_of(short) < account_of(whole)


def test_a_round_with_a_silent_device_is_without_result_and_the_run_goes_on(
    place: Place, devices: dict[int, Device]
) -> None:
    wire = FederatedWire(devices)
    asked: list[int] = []

    def fail(node: int, reply: Message) -> Message:
        if reply.has_content() and "answer" in reply.content:
            asked.append(node)
            if node == 2 and asked.count(2) <= 2:  # the message and its retry
                return Message(Error(code=0, reason="gone"), reply_to=reply)
        return reply

    wire.after = fail
    run = run_central(place, devices, "silent", wire, train__epochs=3)
    first, second, third = run.progress.rounds
    assert first["devices"] == 2
    assert "update_norm" not in first
    assert second["update_norm"] > 0
    assert third["update_norm"] > 0
    # nothing was released in the first round
    assert "2 averaged rounds" in run.guarantee()["statement"]


def test_a_device_that_leaves_for_good_does_not_end_the_run(
    place: Place, devices: dict[int, Device]
) -> None:
    wire = FederatedWire(devices)
    forged: list[int] = []

    def forge(node: int, reply: Message) -> Message:
        if reply.has_content() and "answer" in reply.content and node == 3:
            forged.append(node)
            del reply.content["answer"]
        return reply

    wire.after = forge
    run = run_central(place, devices, "leaves", wire, train__epochs=2)
    assert run.progress.quarantined
    assert [r["devices"] for r in run.progress.rounds] == [2, 2]
    assert ["update_norm" in r for r in run.progress.rounds] == [False, True]
    assert run._aggregator.num_sampled_clients == 2  # type: ignore[attr-defined]


def test_without_dp_accounting_the_run_names_the_extra(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = place.config(**CENTRAL)
    server_app._check_extras(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'privtune-flwr\[dp\]'"):
        server_app._check_extras(config)
