"""The lines to compare with: all text in one place, and each device alone."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from device_kit import RUN_ID, Device
from federated_kit import LABELS, FederatedWire, Place, assert_same, flat
from flwr.app import Message
from tiny_models import WORDS, one_thread

from privtune_flwr.config import ConfigError, flatten, load_run_config
from privtune_flwr.device import Holdings, open_holdings, open_home
from privtune_flwr.errors import RunError
from privtune_flwr.federated.local import train_locally
from privtune_flwr.federated.methods import Work, create_method
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.protocol.fit import FIT, JOIN, JUDGE
from privtune_flwr.protocol.requests import PAYLOAD
from privtune_flwr.results.federated import build_federated_results
from strategies.bounds import CentralTuning, LocalTuning, spread_evenly

CENTRAL, LOCAL = {"train__strategy": "central"}, {"train__strategy": "local"}
# so that neither schedule nor moments nor decay may be forgotten between two passes
TRAIN = {"train__epochs": 3, "train__schedule": "linear", "train__warmup": 0.1}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A simulation: devices hold parts of one file, and their homes are the simulation's."""
    path = tmp_path / "source.csv"
    rng = np.random.default_rng(3)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for i in range(120):
            half = WORDS[: len(WORDS) // 2] if i % 2 else WORDS[len(WORDS) // 2 :]
            rows.writerow([" ".join(rng.choice(half, size=int(rng.integers(3, 9)))), LABELS[i % 2]])
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("privtune_flwr.privacy.mods.in_simulation", lambda: True)
        patch.setattr("strategies.bounds.in_simulation", lambda: True)
        patch.setattr("privtune_flwr.device.home.cache_root", lambda: tmp_path / "cache")
        yield Place(tmp_path, patch)


def shared(place: Place, examples: int) -> dict[str, Any]:
    return {
        "data__source": f"file:{place.root / 'source.csv'}",
        "data__train_examples": examples,
        "data__eval_examples": examples // 4,
        "data__test_examples": 20,
        "data__test_source": "held-out",
    }


class Seen(FederatedWire):
    """Remembers who was asked what, and what came back."""

    def __init__(self, devices: dict[int, Device]) -> None:
        super().__init__(devices)
        self.asked: list[tuple[int, Message]] = []
        self.before = lambda node, message: self.asked.append((node, message))

    @property
    def actions(self) -> list[str]:
        return [message.metadata.message_type for _, message in self.asked]


def fleet(place: Place, count: int, **changes: Any) -> Seen:
    shown = flatten(place.config(**changes))
    return Seen(
        {
            node: Device(
                place.root / f"unused-{node}",
                place.bundles.root,
                "",
                {"partition-id": node - 1, "num-partitions": count},
                shown,
            )
            for node in range(1, count + 1)
        }
    )


# -------------------------------------------------------------------------------------- central


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_all_text_of_one_device_is_that_device_alone(place: Place, optimizer: str) -> None:
    """Pass by pass in the cloud, or all passes at once on the device: the same bits."""
    settings = shared(place, 12) | TRAIN | {"train__optimizer": optimizer}
    wire = fleet(place, 1, **settings)
    central = cast("CentralTuning", place.run("central", wire, **settings | CENTRAL))
    assert [r["steps"] for r in central.progress.rounds] == [3, 3, 3]

    local = place.strategy("local", **settings | LOCAL)
    method = create_method(local.cloud.settings, local.cloud.model_bundle[1], LABELS)
    sequences, labels = central._train
    assert len(sequences) == 12
    work = Work(sequences, labels, 1, 1, 0.0, central.config.run.seed, {})
    start = method.model.state()
    outcome = method.fit(start, work)
    assert_same(dict(outcome.arrays), central.state)
    assert outcome.metrics["steps"] == 9
    assert np.abs(flat(central.state) - flat(start)).max() > 1e-3


def test_central_asks_devices_for_their_counts_alone(place: Place) -> None:
    settings = shared(place, 40)
    wire = fleet(place, 3, **settings, data__partitioner="size")
    strategy = place.run(
        "central",
        wire,
        **settings | CENTRAL | {"data__partitioner": "size", "train__test_every": 1},
    )
    assert wire.actions == [JOIN] * 3
    # what the devices would have trained on, word for word
    texts, labels = [], []
    for node, device in wire.devices.items():
        assert device.node_config["partition-id"] == node - 1
        held = held_by(device)
        texts += held.train.texts
        labels += held.train.labels
    central = cast("CentralTuning", strategy)
    assert len(texts) == 40
    tokenizer = strategy.model.parts.tokenizer
    own = sorted((tuple(tokenizer(t)["input_ids"]), c) for t, c in zip(texts, labels, strict=True))
    cloud = sorted((tuple(i.tolist()), c) for i, c in zip(*central._train, strict=True))
    assert own == cloud

    results = build_federated_results(strategy)
    assert (results["rounds"], results["steps"]) == (2, 20)
    assert results["examples"] == {"train_received": 40, "train_described": 40}
    assert results["privacy"]["cloud_sees"] == "all text"
    assert results["privacy"]["epsilon"] is None
    assert results["traffic"]["training"]["messages"] == 3
    assert results["traffic"]["training"]["bytes_up"] < 10_000
    assert results["devices"]["used"] == 3
    assert results["final"]["eval_examples"] == 10
    assert [("test_accuracy" in r) for r in results["per_round"]] == [True, True]
    assert results["per_round"][1]["loss"] < results["per_round"][0]["loss"]


def held_by(device: Device) -> Holdings:
    home = open_home(device.node_config, run_id=RUN_ID, simulated=True, seed=0)
    return open_holdings(load_run_config(device.run_config), device.node_config, home)


def test_a_central_run_killed_after_a_pass_ends_like_an_unbroken_one(place: Place) -> None:
    settings = shared(place, 12) | TRAIN | {"train__optimizer": "adamw"}
    wire = fleet(place, 2, **settings)
    whole = place.run("whole", wire, **settings | CENTRAL)

    passes: list[int] = []

    def stop(*args: Any, **options: Any) -> Any:
        passes.append(options["first_epoch"])
        if passes[-1] == 1:
            raise KeyboardInterrupt
        return train_locally(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strategies.bounds.train_locally", stop)
        with pytest.raises(KeyboardInterrupt):
            place.run("broken", wire, **settings | CENTRAL)
    assert passes == [0, 1]
    resumed = place.run("broken", wire, **settings | CENTRAL)
    assert [r["round"] for r in resumed.progress.rounds] == [1, 2, 3]
    assert_same(resumed.state, whole.state)
    assert_same(resumed.kept(), whole.kept())
    assert any(name.endswith("/exp_avg_sq") for name in whole.kept())


def test_central_is_refused_where_text_is_the_devices_own(place: Place) -> None:
    settings = shared(place, 12)
    wire = fleet(place, 2, **settings)
    # one partition more than the source was cut into
    wire.devices[2].node_config["num-partitions"] = 3
    with pytest.raises(RunError, match="described other counts"):
        place.run("odd", wire, **settings | CENTRAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strategies.bounds.in_simulation", lambda: False)
        with pytest.raises(RunError, match="works in a simulation alone"):
            place.run("real", fleet(place, 2, **settings), **settings | CENTRAL)
        # a real device's own refusal is not what the operator should read first
        wire = fleet(place, 1, **settings)
        wire.devices[1].node_config["policy-fit-rounds"] = 0
        with pytest.raises(RunError, match="works in a simulation alone"):
            place.run("shy", wire, **settings | CENTRAL)
    for bound in (CENTRAL, LOCAL):
        with pytest.raises(ConfigError, match="does not protect examples"):
            place.config(**bound, federated__example_privacy="dp-sgd")


# ---------------------------------------------------------------------------------------- local


def test_each_device_alone(place: Place) -> None:
    settings = shared(place, 30) | TRAIN
    wire = fleet(place, 6, **settings)
    answers: dict[int, Message] = {}

    def note(node: int, reply: Message) -> Message:
        if reply.has_content() and "answer" in reply.content.array_records:
            answers[node] = reply
        return reply

    wire.after = note
    strategy = cast("LocalTuning", place.run("local", wire, **settings | LOCAL))
    assert strategy.rounds == 1
    fits = [(n, m) for n, m in wire.asked if m.metadata.message_type == FIT]
    assert sorted(n for n, _ in fits) == [1, 2, 3, 4, 5, 6]
    assert list(strategy.models) == [f"device-{i:05d}" for i in (0, 2, 3, 5)]

    # all passes at once, from the same start, each on its own
    asked = FitSettings.from_json(str(fits[0][1].content.config_records["request"]["settings"]))
    assert (asked.federated.local_epochs, asked.rounds) == (3, 1)
    record = strategy.progress.rounds[0]
    assert record["seen"] == 3 * 30
    assert record["steps"] == sum(3 * -(-n // 4) for n in strategy.fleet.train.values())
    own = {
        n: {k: v.numpy() for k, v in a.content.array_records["answer"].items()}
        for n, a in answers.items()
    }
    for device, state in strategy.models.items():
        assert_same(state, own[strategy.fleet.nodes[device]])
    states = [flat(s) for s in strategy.models.values()]
    assert all(np.abs(states[0] - other).max() > 1e-3 for other in states[1:])

    # the record is about the models that were tested, each alone
    found = []
    for state in strategy.models.values():
        strategy.model.load(state)
        judged = strategy.cloud.test(strategy.model)
        assert judged is not None
        found.append(judged[0])
    assert record["test_accuracy"] == pytest.approx(np.mean(found))
    assert (record["test_accuracy_min"], record["test_accuracy_max"]) == (min(found), max(found))
    assert record["test_accuracy_std"] == pytest.approx(np.std(found))
    assert record["devices_tested"] == 4

    # and every device judged its own model
    judged_nodes = {n: m for n, m in wire.asked if m.metadata.message_type == JUDGE}
    named = {strategy._name(n): m for n, m in judged_nodes.items()}
    assert set(named) == {d for d in strategy.models if strategy.fleet.evaluation[d]}
    assert len(named) >= 3
    for device, message in named.items():
        sent = {k: v.numpy() for k, v in message.content.array_records[PAYLOAD].items()}
        assert_same(sent, strategy.models[device])
    assert record["eval_examples"] == sum(strategy.fleet.evaluation[d] for d in named)

    results = build_federated_results(strategy)
    assert results["final"]["devices_tested"] == 4
    assert results["final"]["test_accuracy"] == record["test_accuracy"]
    assert results["privacy"]["cloud_sees"].startswith("nothing")
    # weights travelled to be measured, not to train
    assert results["traffic"]["training"]["messages"] == 6
    assert results["traffic"]["training"]["bytes_up"] < 10_000
    assert results["traffic"]["bytes_up"] > 6 * 4 * len(states[0])

    # a finished run has nothing left to ask
    again = fleet(place, 6, **settings)
    place.run("local", again, **settings | LOCAL)
    assert set(again.actions) == {JOIN}


def test_few_are_tested_and_they_are_spread() -> None:
    names = [f"d{i}" for i in range(10)]
    assert spread_evenly(names, 4) == ["d0", "d3", "d6", "d9"]
    assert spread_evenly(names[:3], 4) == names[:3]
    assert spread_evenly(names[:4], 4) == names[:4]
    assert len(set(spread_evenly(names[:5], 4))) == 4
