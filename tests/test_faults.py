"""Lost replies and slow devices of a simulation; sending again what found no answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
from device_kit import message_to
from federated_kit import FederatedWire, Place, ask_fit, flat, model_of
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from learned_kit import run_folder
from scipy import stats

from privtune_flwr import client_app
from privtune_flwr.cloud import prepare_cloud
from privtune_flwr.config import ConfigError, RunConfig
from privtune_flwr.errors import RunError
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.protocol import METRICS, to_message
from privtune_flwr.protocol.requests import REQUEST
from privtune_flwr.scenario import load_scenario
from privtune_flwr.simulation_config import SimulationSection
from strategies.exchange import EVALUATION, PROVISIONING, Exchange, Traffic, failure
from strategies.faults import ReplyLoss
from strategies.split import SplitTuning

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path_factory.mktemp("faults"), patch)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.faults.in_simulation", lambda: True)
    monkeypatch.setattr("privtune_flwr.client_slow.in_simulation", lambda: True)


def asked(number: int, run_id: str = "ab") -> Message:
    record = ConfigRecord({"run_id": run_id, "settings": run_id, "round": number})
    return message_to(RecordDict({REQUEST: record}), "train.fit")


def drawn(loss: ReplyLoss, run_id: str = "ab", count: int = 500) -> list[bool]:
    return [
        loss.loses(device, asked(number, run_id))
        for number in range(count)
        for device in ("device-a", "device-b")
    ]


# ------------------------------------------------------------------------------ which are lost


def test_the_same_seed_loses_the_same_replies(simulated: None) -> None:
    first = drawn(ReplyLoss(0.3, 5))
    # another run has another id, and perhaps other settings
    assert drawn(ReplyLoss(0.3, 5), run_id="cd") == first
    assert drawn(ReplyLoss(0.3, 6)) != first
    assert stats.binomtest(sum(first), len(first), 0.3).pvalue > 1e-3
    # a device's luck is its own, and each attempt has new luck
    assert first[::2] != first[1::2]
    loss = ReplyLoss(0.3, 5)
    attempts = [[loss.loses("device-a", asked(n)) for _ in range(2)] for n in range(500)]
    assert [a for a, _ in attempts] == first[::2]
    both = sum(a and b for a, b in attempts)
    assert stats.binomtest(both, 500, 0.09).pvalue > 1e-3


def test_a_real_network_loses_nothing_of_its_own_accord(place: Place) -> None:
    assert not any(drawn(ReplyLoss(0.9, 5)))
    assert ReplyLoss.of(place.config()) is None
    with pytest.raises(ConfigError, match=r"simulation\.reply-loss = 1\.0"):
        place.config(simulation__reply_loss=1.0)


# ---------------------------------------------------------------------------------- the exchange


class Failing:
    """A grid on which the first answers to each node are Flower's own errors, or none."""

    def __init__(self, failures: int, error: Error | None = None) -> None:
        self.failures = failures
        self.error = error
        self.pushed: list[int] = []
        self._ids = itertools.count()
        self._waiting: dict[str, Message] = {}

    def push_messages(self, messages: list[Message]) -> list[str]:
        given = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.pushed.append(node)
            given.append(str(next(self._ids)))
            reply = message_to(RecordDict({METRICS: MetricRecord({"x": 1})}), "train.fit")
            if self.error is not None:
                reply = Message(self.error, reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = node
            reply.metadata.__dict__["_reply_to_message_id"] = given[-1]
            if self.pushed.count(node) > self.failures:
                self._waiting[given[-1]] = reply
        return given

    def pull_messages(self, ids: Any) -> list[Message]:
        return [self._waiting.pop(i) for i in list(ids) if i in self._waiting]


@pytest.mark.parametrize(
    ("retries", "failures", "messages", "answered"),
    [(0, 0, 1, True), (0, 1, 1, False), (1, 1, 2, True), (1, 2, 2, False), (3, 3, 4, True)],
)
def test_what_found_no_answer_is_sent_again(
    place: Place, retries: int, failures: int, messages: int, answered: bool
) -> None:
    grid = Failing(failures)
    exchange = Exchange(cast("Grid", grid), timeout=0.02, traffic=Traffic({}), retries=retries)
    exchange.identify(7, "device-a")
    content = RecordDict({REQUEST: ConfigRecord({"round": 1})})
    (reply,) = exchange.ask([to_message(content, 7, "train.fit")]).values()
    assert (reply is not None) == answered
    account = exchange.traffic.totals["device-a"]
    # each sending counts, an answer counts once
    one = account["down"] // messages
    assert (account["messages"], account["down"]) == (messages, messages * one)
    assert (account["up"] > 0) == answered
    assert grid.pushed == [7] * messages


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("simulation", [True, False])
def test_a_dead_process_ends_a_simulation_and_nothing_else_does(
    place: Place, monkeypatch: pytest.MonkeyPatch, code: int, simulation: bool
) -> None:
    monkeypatch.setattr("strategies.exchange.in_simulation", lambda: simulation)
    grid = Failing(0, error=Error(code=code, reason="ActorDiedError:<'gone'>\nmore"))
    exchange = Exchange(cast("Grid", grid), timeout=0.02, traffic=Traffic({}), retries=1)
    message = to_message(RecordDict({REQUEST: ConfigRecord({"round": 1})}), 7, "train.fit")
    if simulation and code == 0:
        with pytest.raises(RunError, match=r"died.*1 devices.*resumed.*ActorDiedError:<'gone'>$"):
            exchange.ask([message])
        assert grid.pushed == [7]  # asking a dead process again helps nobody
    else:
        (reply,) = exchange.ask([message]).values()
        assert (failure(reply) or "").startswith("ActorDiedError")
        assert grid.pushed == [7, 7]


def test_lost_replies_count_as_sent_and_not_received(place: Place, simulated: None) -> None:
    loss = ReplyLoss(0.999999, 0)
    exchange = Exchange(
        cast("Grid", Failing(0)), timeout=0.02, traffic=Traffic({}), retries=2, loss=loss
    )
    message = to_message(RecordDict({REQUEST: ConfigRecord({"round": 1})}), 7, "train.fit")
    # a node that has not said who it is, and the model's way to it, are spared
    assert list(exchange.ask([message]).values()) != [None]
    exchange.identify(7, "device-a")
    with exchange.purpose(PROVISIONING):
        assert list(exchange.ask([message]).values()) != [None]
    received = dict(exchange.traffic.totals["device-a"])
    assert list(exchange.ask([message]).values()) == [None]
    account = exchange.traffic.totals["device-a"]
    assert account["messages"] - received["messages"] == account["lost"] == 3
    assert account["up"] == received["up"]
    with exchange.purpose(EVALUATION):
        exchange.ask([message])
    assert exchange.traffic.totals["device-a"]["evaluate_lost"] == 3
    assert exchange.traffic.training()["messages"] == 1 + 3


# ------------------------------------------------------------------------------------ the runs


def test_rounds_go_on_with_the_devices_that_answered(place: Place, simulated: None) -> None:
    place.cloud()
    devices = {n: place.device(n, 10) for n in (1, 2, 3)}
    changes = {"train__epochs": 3, "train__retries": 0, "simulation__reply_loss": 0.4}
    runs = []
    for name in ("one", "two"):
        strategy = place.run(name, FederatedWire(devices), **changes, run__seed=1)
        assert not strategy.progress.quarantined
        accounts = strategy.progress.traffic.values()
        lost = sum(a.get("lost", 0) - a.get("evaluate_lost", 0) for a in accounts)
        taking_part = [r["devices"] for r in strategy.progress.rounds]
        assert lost == 3 * 3 - sum(taking_part) > 0
        assert min(taking_part) >= 1
        runs.append((taking_part, flat(strategy.state)))
    # the same replies, so the same model
    assert runs[0][0] == runs[1][0]
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_a_round_that_lost_every_reply_leaves_the_model_as_it_was(
    place: Place, simulated: None
) -> None:
    place.cloud()
    changes = {"train__epochs": 1, "train__retries": 1, "simulation__reply_loss": 0.9999999}
    strategy = place.run("none", FederatedWire({1: place.device(1, 10)}), **changes)
    (record,) = strategy.progress.rounds
    assert (record["devices"], record["examples"]) == (0, 0)
    np.testing.assert_array_equal(flat(strategy.state), flat(model_of(strategy.cloud).state()))


def test_how_often_to_ask_is_no_business_of_a_device(place: Place) -> None:
    one, other = (FitSettings.of(place.config(train__retries=n)) for n in (1, 3))
    assert one.id == other.id


@pytest.mark.parametrize(("retries", "complete"), [(1, False), (3, True)])
def test_split_tuning_gets_every_chunk_with_retries(
    place: Place,
    simulated: None,
    monkeypatch: pytest.MonkeyPatch,
    retries: int,
    complete: bool,
) -> None:
    monkeypatch.setattr("privtune_flwr.cloud.cloud_cache", lambda: place.bundles)
    cloud = prepare_cloud(
        place.config(
            train__strategy="split",
            train__retries=retries,
            train__epochs=1,
            model__cut=1,
            model__tuning="full",
            privacy__mechanism="none",
            privacy__chunk_size=2,
            simulation__reply_loss=0.3,
            run__seed=1,
        )
    )
    devices = {n: place.device(20 + n, 10, mechanisms="none") for n in (1, 2, 3)}
    for device in devices.values():
        device.bottom_id = cloud.bottom_id
    strategy = SplitTuning(cloud, run_folder(place.root / f"split-{retries}"))
    strategy.start(cast("Grid", FederatedWire(devices)))
    received = sum(len(c.lengths) for c in strategy.store if c.split == "train")
    assert (received == 3 * 8) == complete
    assert bool(strategy.progress.quarantined) != complete
    accounts = strategy.progress.traffic.values()
    assert sum(a.get("lost", 0) for a in accounts) > 0


# -------------------------------------------------------------------------------- slow devices


def test_the_seed_draws_the_share_of_slow_devices() -> None:
    section = SimulationSection(slow_devices=0.3, slow_factor=4.0)
    slow = [{p for p in range(10) if section.is_slow(p, 10, seed)} for seed in range(4)]
    assert {len(s) for s in slow} == {3}
    assert len({frozenset(s) for s in slow}) > 1
    assert not SimulationSection(slow_devices=1.0).is_slow(0, 10, 0)
    assert load_scenario("slow").run_config().simulation == section
    assert load_scenario("dropout").run_config().train.retries > RunConfig().train.retries


def test_a_slow_device_sleeps_and_says_so(
    place: Place, simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    times = itertools.count(10.0, 2.0)
    monkeypatch.setattr("privtune_flwr.client_slow.time.sleep", slept.append)
    monkeypatch.setattr("privtune_flwr.client_slow.time.perf_counter", lambda: next(times))
    from privtune_flwr.client_slow import slow_mod

    app = ClientApp(mods=[slow_mod])

    @app.train("fit")
    def fit(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"seconds_fit": 1.5, "steps": 3})
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    def told(share: float) -> MetricRecord:
        run = {"simulation.slow-devices": share, "simulation.slow-factor": 4.0}
        node = {"partition-id": 0, "num-partitions": 10}
        context = Context(1, 1, node, RecordDict(), {**load_flat(), **run})
        return app(message_to(RecordDict(), "train.fit"), context).content.metric_records[METRICS]

    assert dict(told(1.0)) == {"seconds_fit": 6.0, "steps": 3}
    assert slept == [6.0]
    assert dict(told(0.0)) == {"seconds_fit": 1.5, "steps": 3}
    # a real device is as fast as it is, whatever the cloud asks for
    monkeypatch.setattr("privtune_flwr.client_slow.in_simulation", lambda: False)
    assert dict(told(1.0)) == {"seconds_fit": 1.5, "steps": 3}
    assert slept == [6.0]


def test_a_slow_devices_answer_still_passes_the_guard(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privtune_flwr.client_slow.in_simulation", lambda: True)
    device = place.device(30, 10)
    cloud = place.cloud()
    state = model_of(cloud).state()
    fast = ask_fit(device, cloud, state, app=client_app.app)
    device.run_config |= {"simulation.slow-devices": 1.0, "simulation.slow-factor": 100.0}
    slow = ask_fit(device, cloud, state, app=client_app.app)
    seconds = [r.content.metric_records[METRICS]["seconds_fit"] for r in (fast, slow)]
    assert seconds[1] > 3 * seconds[0]


def load_flat() -> dict[str, Any]:
    from privtune_flwr.config import RunConfig, flatten

    return flatten(RunConfig())
