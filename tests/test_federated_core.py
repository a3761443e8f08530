"""Federated baselines: averaging, the proximal term, server optimisers, resume, faults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_kit import Device, message_to
from federated_kit import (
    LABELS,
    FederatedWire,
    Place,
    answer_of,
    assert_same,
    flat,
    model_of,
    weighted_mean,
)
from flwr.app import Array, Error, Message, RecordDict
from tiny_models import load_uncut, pad_ids, save_tiny, sentences

from privtune_flwr.config import RunConfig, flatten, load_run_config
from privtune_flwr.errors import RunError
from privtune_flwr.federated.local import train_locally
from privtune_flwr.federated.methods import Work
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.weights import WeightsMethod
from privtune_flwr.federated.whole import WholeModel, load_whole
from privtune_flwr.models import cut_model
from privtune_flwr.protocol import METRICS
from privtune_flwr.protocol.fit import ANSWER, FIT
from privtune_flwr.protocol.requests import REQUEST
from privtune_flwr.training import trainer

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


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """What devices worked on, in order."""
    seen: list[Work] = []
    fit = WeightsMethod.fit

    def spy(self: WeightsMethod, state: Any, work: Work) -> Any:
        seen.append(work)
        return fit(self, state, work)

    monkeypatch.setattr(WeightsMethod, "fit", spy)
    return seen


def recording(wire: FederatedWire) -> list[dict[str, Any]]:
    """Collect the answers that pass the wire, with their weight."""
    answers: list[dict[str, Any]] = []

    def keep(node: int, reply: Message) -> Message:
        if reply.has_content() and ANSWER in reply.content:
            weight = reply.content.metric_records[METRICS]["weight"]
            answers.append({"node": node, "state": answer_of(reply), "weight": weight})
        return reply

    wire.after = keep
    return answers


# ------------------------------------------------------------------------------------ averaging


def test_fedavg_is_the_mean_weighted_by_examples(place: Place, devices: dict[int, Device]) -> None:
    wire = FederatedWire(devices)
    answers = recording(wire)
    strategy = place.run("mean", wire, train__epochs=1)
    assert sorted(a["weight"] for a in answers) == [8.0, 12.0, 20.0]
    wanted = weighted_mean([a["state"] for a in answers], [a["weight"] for a in answers])
    plain = weighted_mean([a["state"] for a in answers], [1, 1, 1])
    np.testing.assert_allclose(flat(strategy.state), flat(wanted), atol=1e-7)
    assert np.abs(flat(plain) - flat(wanted)).max() > 1e-4
    # what is tested and exported is what was averaged
    assert_same(strategy.model.state(), strategy.state)
    (record,) = strategy.progress.rounds
    assert (record["devices"], record["examples"], record["seen"]) == (3, 40, 40)
    assert record["eval_examples"] == 2 + 3 + 5


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_one_device_and_one_round_are_central_training(
    place: Place, devices: dict[int, Device], works: list[Work], tuning: str
) -> None:
    changes = {"model__tuning": tuning, "train__schedule": "linear", "train__warmup": 0.1}
    strategy = place.run(
        f"one-{tuning}", FederatedWire({1: devices[1]}), **changes, train__epochs=1
    )
    (work,) = works
    central = model_of(strategy.cloud)
    result = train_locally(central, work.sequences, work.labels, epochs=1, seed=work.seed)
    assert result.steps == 2
    assert_same(strategy.state, central.state())
    fresh = model_of(strategy.cloud).state()
    assert np.abs(flat(strategy.state) - flat(fresh)).max() > 1e-3


def test_rounds_go_through_the_schedule_of_the_run(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def factor(step: int, total: int, config: Any) -> float:
        asked.append((step, total))
        return 1.0

    monkeypatch.setattr(trainer, "schedule_factor", factor)
    model = model_of(place.cloud())
    ids, labels = sentences([4, 5, 6, 7, 8]), [0, 1, 0, 1, 0]
    for first in (0, 1, 2):
        train_locally(model, ids, labels, epochs=1, seed=1, progress=(first / 3, (first + 1) / 3))
    assert asked == [(step, 6) for step in range(6)]


# ------------------------------------------------------------------------------- proximal term


def _sgd(place: Place, **changes: Any) -> FitSettings:
    settings = {
        "train__optimizer": "sgd",
        "train__clip_norm": 1e9,
        "train__weight_decay": 0.0,
        "train__batch_size": 8,
    }
    return FitSettings.of(place.config(**settings | changes))


def test_the_proximal_term_pulls_back_by_mu_times_the_distance(place: Place) -> None:
    cloud, settings = place.cloud(), _sgd(place)
    ids, labels = sentences([5, 6, 7, 8]), [0, 1, 1, 0]

    def after(epochs: int, mu: float) -> np.ndarray:
        model = model_of(cloud, settings)
        train_locally(model, ids, labels, epochs=epochs, seed=3, proximal_mu=mu)
        return flat(model.state())

    start = flat(model_of(cloud, settings).state())
    one, mu, rate = after(1, 0.0), 50.0, settings.train.learning_rate
    # at w_0 the term has no gradient; after one step it is mu (w_1 - w_0), half a squared norm's
    np.testing.assert_array_equal(after(1, mu), one)
    pulled = after(2, mu) - after(2, 0.0)
    np.testing.assert_allclose(pulled, -rate * mu * (one - start), atol=1e-6)
    assert np.abs(pulled).max() > 1e-3


def test_fedprox_sends_mu_and_without_it_is_fedavg(
    place: Place, devices: dict[int, Device], works: list[Work]
) -> None:
    place.run(
        "prox", FederatedWire(devices), train__strategy="fedprox", federated__proximal_mu=0.25
    )
    assert {w.proximal_mu for w in works} == {0.25}
    folder = place.cloud().model_bundle[1]
    found = []
    for name, mu in (("fedavg", 0.0), ("fedprox", 0.0), ("fedprox", 25.0)):
        settings = _sgd(place, train__strategy=name, train__batch_size=2)
        method = WeightsMethod(settings, folder, LABELS)
        work = Work(sentences([5, 6, 7, 8]), [0, 1, 1, 0], 1, 1, mu, 9, {})
        found.append(method.fit(model_of(place.cloud(), settings).state(), work).arrays)
    assert_same(found[0], found[1])
    assert np.abs(flat(found[2]) - flat(found[0])).max() > 1e-4


# ------------------------------------------------------------------------------ FedAdam, resume

ADAM = {
    "train__strategy": "fedadam",
    "train__epochs": 3,
    "federated__server_learning_rate": 0.02,
    "federated__server_beta1": 0.8,
    "federated__server_beta2": 0.95,
    "federated__server_tau": 1e-2,
}


def test_fedadam_takes_the_step_of_its_formula(place: Place, devices: dict[int, Device]) -> None:
    wire = FederatedWire(devices)
    answers = recording(wire)
    strategy = place.run("adam", wire, **ADAM)
    x = flat(model_of(strategy.cloud).state())
    m, v = np.zeros_like(x), np.zeros_like(x)
    for number in (1, 2, 3):
        asked, answers = answers[:3], answers[3:]
        mean = flat(weighted_mean([a["state"] for a in asked], [a["weight"] for a in asked]))
        delta = mean - x
        m = 0.8 * m + 0.2 * delta
        v = 0.95 * v + 0.05 * delta**2
        # arXiv 2003.00295, algorithm 2, with Flower's correction of eta for moments that start at 0
        eta = 0.02 * np.sqrt(1 - 0.95 ** (number + 1)) / (1 - 0.8 ** (number + 1))
        x = x + eta * m / (np.sqrt(v) + 1e-2)
    np.testing.assert_allclose(flat(strategy.state), x, atol=1e-6)
    assert not answers


@pytest.mark.parametrize("changes", [ADAM, {"train__epochs": 3}], ids=["fedadam", "fedavg"])
def test_a_run_killed_after_a_round_ends_like_an_unbroken_one(
    place: Place, devices: dict[int, Device], changes: dict[str, Any]
) -> None:
    name = changes.get("train__strategy", "fedavg")
    whole = place.run(f"whole-{name}", FederatedWire(devices), **changes)
    before = {n: d.home.fit_ledger.spent().fits for n, d in devices.items()}
    wire = FederatedWire(devices)

    def kill(node: int, message: Message) -> None:
        asked = message.content.config_records[REQUEST]
        if (asked.get("server-round"), node) == (2, 2):
            raise KeyboardInterrupt

    wire.before = kill
    with pytest.raises(KeyboardInterrupt):
        place.run(f"broken-{name}", wire, **changes)
    again = place.strategy(f"broken-{name}", **changes)
    wire = FederatedWire(devices)
    rounds: list[Any] = []
    wire.before = lambda node, message: rounds.append(
        message.content.config_records[REQUEST].get("server-round")
    )
    again.start(wire)  # type: ignore[arg-type]
    assert {r for r in rounds if r} == {2, 3}
    assert [r["round"] for r in again.progress.rounds] == [1, 2, 3]
    assert_same(again.state, whole.state)
    assert_same(again.kept(), whole.kept())
    assert all(v.dtype == np.float32 for v in again.state.values())
    # the same answers once more are retries
    assert {n: d.home.fit_ledger.spent().fits for n, d in devices.items()} == before


def test_a_finished_run_resumes_to_itself(place: Place, devices: dict[int, Device]) -> None:
    whole = place.run("finished", FederatedWire(devices), train__epochs=1)
    again = place.run("finished", FederatedWire(devices), train__epochs=1)
    assert_same(again.state, whole.state)
    assert len(again.progress.rounds) == 1


# ----------------------------------------------------------------------------- faults in a round


def test_a_bad_answer_is_quarantined_and_a_failure_passed_over(
    place: Place, devices: dict[int, Device]
) -> None:
    strict = place.device(5, 10, fit_rounds=1)
    wire = FederatedWire({**devices, 5: strict})
    answers = recording(wire)
    keep, failed = wire.after, iter([True])

    def spoil(node: int, reply: Message) -> Message:
        if reply.has_error() or ANSWER not in reply.content:
            return keep(node, reply)
        if node == 1 and next(failed, False):
            return Message(Error(code=103, reason="device failed"), reply_to=_asked())
        if node == 2:
            record = reply.content.array_records[ANSWER]
            name = next(iter(record))
            record[name] = Array(np.full(record[name].shape, np.nan, np.float32))
            return reply
        return keep(node, reply)

    wire.after = spoil
    strategy = place.strategy("faults", train__epochs=2)
    # the strict device's owner allows one answer, the run needs two: it refuses at once
    strategy.start(wire)  # type: ignore[arg-type]
    names = {n: d.home.device_id for n, d in wire.devices.items()}
    assert [r["devices"] for r in strategy.progress.rounds] == [1, 2]
    assert "NaN or Inf" in strategy.progress.quarantined[names[2]]
    (why,) = strategy.progress.refused.values()
    assert "policy.fit-rounds: the run needs 2, allowed: 1" in why
    assert strategy.progress.quarantined.keys() == {names[2]}
    assert {a["node"] for a in answers} == {1, 3}
    json.dumps(strategy.progress.rounds)


@pytest.mark.parametrize(
    ("weight", "words"), [(1e12, "metrics.weight"), (-5.0, "metrics.weight"), (None, "metrics")]
)
def test_a_device_does_not_choose_its_weight(
    place: Place, devices: dict[int, Device], weight: float | None, words: str
) -> None:
    wire = FederatedWire(devices)

    def claim(node: int, reply: Message) -> Message:
        if node == 3 and reply.has_content() and ANSWER in reply.content:
            metrics = reply.content.metric_records[METRICS]
            metrics.pop("weight")
            if weight is not None:
                metrics["weight"] = weight
        return reply

    wire.after = claim
    strategy = place.run(f"weight-{weight}", wire, train__epochs=1)
    (why,) = strategy.progress.quarantined.values()
    assert words in why
    assert np.isfinite(flat(strategy.state)).all()


def test_without_a_usable_device_the_run_says_why(place: Place) -> None:
    refusing = place.device(6, 10, fit_rounds=0)
    with pytest.raises(RunError, match=r"no usable device: .*policy\.fit-rounds"):
        place.run("nobody", FederatedWire({1: refusing}))


def _asked() -> Message:
    return message_to(RecordDict(), FIT)


# ------------------------------------------------------------------------------ the whole model


FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_model_is_the_uncut_one(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / family, content="classifier")
    ids = sentences([9, 4, 12, 7])
    for tuning in ("full", "lora"):
        config = load_run_config(
            flatten(RunConfig()) | {"model.tuning": tuning, "train.strategy": "fedavg"}
        )
        settings = FitSettings.of(config)
        parts = cut_model(folder, cut=0, num_labels=3, head="native", seed=0)
        padding = parts.bottom.base.config.pad_token_id or 0
        model = WholeModel(parts, settings)
        uncut = load_uncut(folder, padding).eval()
        with torch.no_grad():
            ids_BT, mask_BT = pad_ids(ids, padding)
            wanted = uncut(input_ids=ids_BT, attention_mask=mask_BT).logits.numpy()
        np.testing.assert_allclose(model.logits(ids), wanted, atol=1e-5)

        state = model.state()
        train_locally(model, ids, [0, 1, 2, 0], epochs=1, seed=0)
        moved = model.state()
        still = [n for n in state if np.array_equal(state[n], moved[n])]
        # the untrained LoRA's A factors have no gradient while B is 0; all else must move
        assert all("lora_A" in n for n in still), still
        trained = model.logits(ids)
        model.load(state)
        np.testing.assert_allclose(model.logits(ids), wanted, atol=1e-5)
        model.load(moved)
        np.testing.assert_array_equal(model.logits(ids), trained)
        assert_same(model.state(), moved)
        if tuning == "full":
            # every weight that the model reads is trained
            sizes = sum(p.numel() for p in model.parameters())
            assert sum(v.size for v in state.values()) == sizes


def test_two_machines_start_alike(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path / "bert")
    config = load_run_config(
        flatten(RunConfig()) | {"model.tuning": "lora", "train.strategy": "fedavg"}
    )
    settings = FitSettings.of(config)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(load_whole(folder, settings, LABELS).state())
    assert_same(*states)
